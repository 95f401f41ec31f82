"""How machines find each other, prove that they belong together, and talk."""

import pickle
import socket
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from heterostep.errors import ConfigError
from heterostep.launch.cli import main
from heterostep.launch.options import Ranks
from heterostep.launch.ranks import _several
from heterostep.launch.workers import network
from heterostep.launch.workers.member import MemberMachine
from heterostep.launch.workers.network import (
    Farewell,
    Hello,
    Line,
    Meeting,
    environment_at,
    interface_of,
    key_of,
    prove,
)
from heterostep.launch.workers.several import SeveralMachines
from heterostep.version import __version__
from waiting import until


@pytest.fixture
def pair():
    """Both ends of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname(), 5)
        other, _ = server.accept()
    with one, other:
        one.settimeout(5)
        other.settimeout(5)
        yield one, other


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--nnodes", 2), "--nnodes 2 needs --master HOST"),
        (("--master", "node0"), "--master needs several machines"),
        (("--min-nnodes", 1), "--min-nnodes needs several machines"),
        (("--cluster-key-file", "key"), "--cluster-key-file needs several machines"),
        (("--nnodes", 2, "--master", "a", "--min-nnodes", 3), "--min-nnodes 3 is more than --nnodes 2"),
        (("--nnodes", 2, "--master", "a", "--ray"), "--nnodes with --ray"),
        (("--nnodes", 2, "--master", "127.0.0.1"), "which other machines cannot reach"),
        (("--nnodes", 2, "--master", "no-such-host.invalid"), "no host 'no-such-host.invalid' is known here"),
        (("--nnodes", 2, "--master", "a:b"), "give HOST or HOST:PORT"),
        (("--nnodes", 2, "--master", "a:70000"), "give HOST or HOST:PORT"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--prompt", "x", *map(str, flags)]) == 2
    err = capsys.readouterr().err.splitlines()
    assert says in err[-1] and err[-1].startswith("heterostep: ")


def test_a_meeting_is_ours_where_its_address_is(monkeypatch):
    # No test may need an address of this machine's own: any of 127.0.0.0/8 stands for one, as if it were none of them.
    monkeypatch.setattr(network.ipaddress, "ip_address", lambda _: network.ipaddress.IPv4Address("10.0.0.1"))
    assert Meeting.at("127.0.0.1") == Meeting(address="127.0.0.1", port=29500, ours=True)
    assert Meeting.at("192.0.2.1:4000") == Meeting(address="192.0.2.1", port=4000, ours=False)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked")
def test_the_interface_is_that_of_the_address(monkeypatch):
    assert interface_of("127.0.0.1") == "lo" and interface_of("192.0.2.1") is None
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "the user's")
    assert environment_at("127.0.0.1") == {"GLOO_SOCKET_IFNAME": "lo"}
    assert environment_at("192.0.2.1") == {}


def test_keys(tmp_path):
    path = tmp_path / "key"
    with pytest.raises(ConfigError, match="No such file"):
        key_of(path)
    path.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        key_of(path)
    path.write_text("secret\n")
    assert key_of(path) == b"secret" != key_of(None)


@pytest.mark.parametrize("keys", [(b"a", b"a"), (b"a", b"b")])
def test_ends_prove_that_they_have_the_same_key(pair, keys):
    found = {}
    thread = threading.Thread(target=lambda: found.update(other=prove(pair[1], keys[1], b"other", b"main")))
    thread.start()
    found["main"] = prove(pair[0], keys[0], b"main", b"other")
    thread.join()
    assert found == {"main": keys[0] == keys[1], "other": keys[0] == keys[1]}


def test_an_answer_cannot_be_sent_back(pair):
    thread = threading.Thread(target=lambda: pair[1].sendall(network._exactly(pair[1], 32) + b"x" * 32))
    thread.start()
    assert not prove(pair[0], b"a", b"main", b"other")
    thread.join()


def test_messages_signs_of_life_and_the_end_of_a_line(pair, monkeypatch):
    monkeypatch.setattr(network, "_BEAT_SECONDS", 0.02)
    arrived = threading.Condition()
    one, other = Line(pair[0], arrived), Line(pair[1], arrived)
    one.send(Farewell("done"))
    until(lambda: other.waiting)
    assert other.receive() == [Farewell("done")] and not other.waiting and not other.lost
    monkeypatch.setattr(network, "SILENT_SECONDS", 1.0)
    heard = other._heard
    until(lambda: other._heard > heard)
    one.send(Farewell("failed", "why"))
    one.close(2.0)
    until(lambda: other._ended)
    assert not other.lost  # there is something to read
    assert other.receive() == [Farewell("failed", "why")] and other.lost and not other.silent


def test_what_is_no_message_ends_the_line(pair):
    line = Line(pair[0], threading.Condition())
    pair[1].sendall(b"GET / HTTP/1.1\r\n\r\n")
    until(lambda: line.lost)
    line.close()


def test_a_line_that_says_nothing_is_lost(pair, monkeypatch):
    monkeypatch.setattr(network, "SILENT_SECONDS", 0.05)
    line = Line(pair[0], threading.Condition())
    until(lambda: line.silent)
    assert line.lost
    line.close()


def test_a_long_message_may_take_its_time(pair, monkeypatch):
    monkeypatch.setattr(network, "SILENT_SECONDS", 0.4)
    line, data = Line(pair[0], threading.Condition()), pickle.dumps(b"x" * 100)
    begun = time.monotonic()
    for i in range(len(data)):
        pair[1].sendall(data[i : i + 1])
        time.sleep(0.008)
        assert not line.lost
    assert time.monotonic() - begun > 2 * network.SILENT_SECONDS
    until(lambda: line.waiting)
    assert line.receive() == [b"x" * 100]
    line.close()


@pytest.fixture
def meeting():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return Meeting(address="127.0.0.1", port=port, ours=True)


def say_nothing(*_):
    pass


@pytest.mark.parametrize(
    ("nproc", "version", "says"),
    [(2, None, "--nproc is 2 here and 1 on the main machine"), (1, "0.0", "install the same version")],
)
def test_a_machine_that_cannot_take_part_is_told_why(meeting, monkeypatch, nproc, version, says):
    if version is not None:
        monkeypatch.setattr("heterostep.launch.workers.member.__version__", version)
    with SeveralMachines(meeting, 1, 1, b"a", say_nothing, say_nothing) as machines:
        with pytest.raises(ConfigError, match=says):
            MemberMachine(meeting, nproc, b"a", say_nothing).serve()
        assert machines.complete and machines._members == []


def test_a_machine_that_comes_at_the_end_hears_of_it(meeting):
    with SeveralMachines(meeting, 1, 1, b"a", say_nothing, say_nothing) as machines:
        stream = socket.create_connection((meeting.address, meeting.port), 5)
        assert prove(stream, b"a", b"other", b"main")
    line = Line(stream, threading.Condition())
    line.send(Hello(__version__, "late", 1))
    until(lambda: line.waiting)
    assert line.receive() == [Farewell("done")] and machines._members == []
    line.close()


def test_a_port_that_is_taken_is_said(meeting):
    with socket.create_server((meeting.address, meeting.port)), pytest.raises(ConfigError, match="give another one"):
        SeveralMachines(meeting, 1, 1, b"a", say_nothing, say_nothing)


def test_no_machine_waits_for_ever(meeting, monkeypatch):
    monkeypatch.setattr("heterostep.launch.workers.member.WAIT_SECONDS", 0.1)
    with pytest.raises(Exception, match="the machine with that address must run the same command"):
        MemberMachine(meeting, 1, b"a", say_nothing).serve()


def test_people_are_told_that_there_is_no_key(meeting, monkeypatch, tmp_path):
    monkeypatch.setattr(Meeting, "at", lambda given: meeting)
    (tmp_path / "key").write_text("secret")
    for key, told in ((None, 1), (tmp_path / "key", 0)):
        said = []
        ranks = Ranks(nnodes=2, master="node0", cluster_key_file=key)
        with _several(ranks, SimpleNamespace(show=say_nothing), SimpleNamespace(say=said.append)):
            assert len([line for line in said if "--cluster-key-file" in line]) == told


def test_a_main_machine_that_closes_every_connection_is_not_called_at_once_again(meeting, monkeypatch):
    class Paused(Exception):
        pass

    def pause(seconds):
        raise Paused

    calls = []

    def answer(server):
        for _ in range(3):
            stream, _ = server.accept()
            calls.append(stream)
            stream.settimeout(5)
            prove(stream, b"a", b"main", b"other")
            stream.close()

    clock = SimpleNamespace(monotonic=time.monotonic, sleep=pause)
    monkeypatch.setattr("heterostep.launch.workers.member.time", clock)
    with socket.create_server((meeting.address, meeting.port)) as server:
        threading.Thread(target=answer, args=(server,), daemon=True).start()
        with pytest.raises(Paused):
            MemberMachine(meeting, 1, b"a", say_nothing).serve()
    assert len(calls) == 1
