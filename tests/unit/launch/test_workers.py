"""The parts of a worker group: copies of a job's folder, messages, degrees for fewer ranks, begun jobs."""

from __future__ import annotations

import dataclasses
import errno
import io
import logging
import sys
import tempfile
import threading
import time

import numpy as np
import pytest

from heterostep.engine.decoding import deliver
from heterostep.engine.engine import Engine, EngineConfig
from heterostep.engine.request import GenerateRequest, JobConfig
from heterostep.errors import Cancelled, ConfigError, Interrupted, JobDiffers, JobInUse, RequestError
from heterostep.launch.workers import rank
from heterostep.launch.workers.messages import Copier, Identity, read_copies, write_copies
from heterostep.launch.workers.process import Outbox, WorkerLoop, _read_stderr
from heterostep.launch.workers.rank import RoomWait, resume_job
from heterostep.launch.workers.render import Rendering
from heterostep.launch.workers.rendezvous import refit
from heterostep.parallel.config import ParallelConfig


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_copies_come_in_the_order_in_which_they_may_be_torn(tmp_path):
    for name in ("checkpoint-000005.json", "checkpoint-000005-ab.safetensors", "progress.jsonl", ".lock", "mine.txt"):
        (tmp_path / name).write_text(name)
    files = read_copies(tmp_path)
    assert list(files) == ["progress.jsonl", "checkpoint-000005-ab.safetensors", "checkpoint-000005.json"]
    assert list(read_copies(tmp_path, known=files)) == ["progress.jsonl"]


def test_written_copies_keep_the_last_two_checkpoints_or_the_result(tmp_path):
    kept = []
    for step in ("05", "10", "15"):
        files = {f"checkpoint-0000{step}-ab.safetensors": b"t", f"checkpoint-0000{step}.json": b"m"}
        kept = write_copies(tmp_path, files | {"progress.jsonl": step.encode()}, kept)
    assert [name for name in names(tmp_path) if name.endswith(".json")] == [
        "checkpoint-000010.json", "checkpoint-000015.json",
    ]  # fmt: skip
    assert (tmp_path / "progress.jsonl").read_bytes() == b"15"
    assert write_copies(tmp_path, {"progress.jsonl": b"16"}, kept) == kept and len(names(tmp_path)) == 5
    write_copies(tmp_path, {"result-cd.safetensors": b"t", "result.json": b"m"}, kept)
    assert names(tmp_path) == ["progress.jsonl", "result-cd.safetensors", "result.json"]


@pytest.mark.parametrize("name", ["../result.json", "/etc/passwd", "checkpoint-1.json/..", "other.json", ".lock"])
def test_only_files_of_a_job_are_written(tmp_path, name):
    with pytest.raises(ValueError, match="not a file of a job"):
        write_copies(tmp_path / "job", {name: b""}, ())
    assert names(tmp_path / "job") == []


def test_a_folder_for_copies_never_outlives_its_order(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ValueError, match="not a file of a job"):
        Copier({"mine.txt": b""}, print)
    assert names(tmp_path) == []

    def gone(progress):
        raise OSError("the driver is gone")

    copier = Copier({"progress.jsonl": b""}, gone)
    assert copier.folder.parent == tmp_path and names(copier.folder) == ["progress.jsonl"]
    with pytest.raises(OSError, match="the driver is gone"):
        copier.close()
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [OSError("the disk is full"), ValueError("stderr is closed")])
def test_lines_of_a_worker_are_read_also_where_they_cannot_be_shown(error):
    shown = []

    def show(line):
        shown.append(line)
        if len(shown) < 3:
            raise error

    _read_stderr(io.BytesIO(b"one\n\ntwo\nthree\n"), show)
    assert shown == ["one", "two", "three"]


def test_what_a_worker_says_is_heard_once_and_at_once():
    outbox = Outbox()
    outbox.put(0)
    outbox.put(1)
    assert outbox.take(20.0) == [0, 1]
    assert outbox.take(0.0) == []
    threading.Timer(0.1, outbox.put, [2]).start()
    begin = time.monotonic()
    assert outbox.take(20.0) == [2]
    assert time.monotonic() - begin < 10


def test_a_worker_that_cannot_work_does_not_live_on(monkeypatch, capsys):
    def end(status):
        raise SystemExit(status)

    monkeypatch.setattr("os._exit", end)
    monkeypatch.setitem(sys.modules, "heterostep.launch.workers.rank", None)  # as where PyTorch is broken
    loop = WorkerLoop(Identity(pid=1))
    with pytest.raises(SystemExit):
        loop.run()
    assert "heterostep.launch.workers.rank" in capsys.readouterr().err
    assert loop.outbox.take(0.0) == [Identity(pid=1)]


def test_degrees_for_another_number_of_ranks():
    wished = ParallelConfig(ring=2, ulysses=2, kernel="sdpa", cut="measured", ring_cache="gathered")
    asked = dataclasses.asdict(wished)
    assert refit(asked, 4, num_heads=4, num_branches=2) == wished
    assert refit(asked, 1, num_heads=4, num_branches=2) is None
    three = refit(asked, 3, num_heads=4, num_branches=2)
    assert (three.cfg, three.ring, three.ulysses) == (1, 3, 1)
    assert (three.kernel, three.cut, three.ring_cache) == ("sdpa", "measured", "gathered")
    guided, single = (refit({}, 2, num_heads=4, num_branches=count) for count in (2, 1))
    assert (guided.cfg, guided.ulysses) == (2, 1) and (single.cfg, single.ulysses) == (1, 2)
    assert refit({"cfg": 2}, 2, num_heads=4, num_branches=1) == single
    # A ulysses group that spans machines is taken only where it is asked for.
    assert (refit({}, 2, 4, 1, machines=(1, 1)).ring, refit({"cfg": 1}, 4, 4, 2, machines=(2, 2)).ring) == (2, 2)
    assert refit({"ulysses": 2}, 2, 4, 1, machines=(1, 1)).ulysses == 2
    # A service names some of them.
    assert (refit({"ring": 2}, 4, num_heads=4, num_branches=2).ring, refit({"ulysses": 2}, 2, 4, 2).ulysses) == (2, 2)


class Busy:
    """An engine that finds its job in use, or another's, some times."""

    def __init__(self, error, times):
        self.error, self.times, self.asked = error, times, []

    def stream(self, request, job, sink):
        self.asked.append(job.resume)
        if len(self.asked) <= self.times:
            raise self.error("no")
        yield "event"


def test_a_job_is_waited_for_or_begun_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(rank, "_PAUSE_SECONDS", 0.0)
    request, job = GenerateRequest(prompt="x"), JobConfig(folder=tmp_path)
    engine = Busy(JobInUse, 3)
    assert list(resume_job(engine, request, job, anew=False)) == ["event"] and engine.asked == ["auto"] * 4
    with pytest.raises(JobInUse):
        list(resume_job(Busy(JobInUse, 1000), request, job, anew=True))
    engine = Busy(JobDiffers, 1)
    assert list(resume_job(engine, request, job, anew=True)) == ["event"] and engine.asked == ["auto", "never"]
    with pytest.raises(JobDiffers):
        list(resume_job(Busy(JobDiffers, 1), request, job, anew=False))


def test_an_engine_that_cannot_lead_does_not(tiny_model):
    engine = Engine(EngineConfig(model=str(tiny_model)))
    engine.regroup(None)
    assert engine.reads and engine.sharding is None
    engine.pipeline.text_encoder = None
    with pytest.raises(ConfigError, match="no text encoder"):
        engine.regroup(None)


@pytest.mark.parametrize(("what", "left"), [("join", 1), ("make", 0)])
def test_a_rank_that_refuses_to_join_lets_the_others_go(monkeypatch, what, left):
    def refuse(self, *arguments):
        raise ConfigError("no model")

    leaves = []
    monkeypatch.setattr(rank.Rank, what, refuse)
    monkeypatch.setattr(rank.Rank, "_leave", lambda self: leaves.append(self))
    outcome = rank.Rank(print, lambda: None).do(what)
    assert (outcome.ended, outcome.message, len(leaves)) == ("refused", "no model", left)


FULL = OSError(errno.ENOSPC, "No space left on device")


def made(verbs, write):
    """The files of a video, each attempt at which calls `write`."""
    wait = RoomWait(lambda: verbs[-1])
    with Rendering(lambda video: {"part": write}, wait) as rendering:
        deliver([np.zeros((2, 2, 3), np.uint8)], rendering, None)
        rendering.write("report.json", lambda path: path.write_text("{}"))
        return rendering.read()


def test_a_result_waits_for_room_says_so_once_and_not_for_ever(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(rank, "_PAUSE_SECONDS", 0.0)
    tries = []

    def write(path, frames):
        path.write_bytes(b"p" * (len(tries) + 1))
        tries.append(len(list(frames)))
        if len(tries) < 4:
            raise FULL

    def full(path, frames):
        raise FULL

    assert made([None], write) == {"part": b"pppp", "report.json": b"{}"} and tries == [1] * 4
    assert caplog.text.count("is full; the result waits up to 10 minutes") == 1 and names(tmp_path) == []
    assert caplog.records[0].levelno == logging.WARNING
    monkeypatch.setattr(rank, "_ROOM_SECONDS", 0.1)
    with pytest.raises(RequestError, match=r"the video is made, but .* was full for 0 minutes; free some"):
        made([None], full)
    assert names(tmp_path) == []
    for verb, error in (("cancel", Cancelled), ("stop", Interrupted)):
        with pytest.raises(error, match="ended while the disk was full"):
            made([verb], full)


def test_files_that_are_written_at_once_lie_together(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    together = threading.Barrier(4)

    def write(path, frames):
        together.wait(30)
        path.write_bytes(bytes(len(list(frames))))

    with Rendering(lambda video: dict.fromkeys("abcd", write), pytest.fail) as rendering:
        deliver([np.zeros((2, 2, 3), np.uint8)] * 3, rendering, None)
        assert rendering.read() == dict.fromkeys("abcd", bytes(3)) and len(names(tmp_path)) == 1


def test_a_full_disk_lets_no_folder_for_results_be_made_either(monkeypatch):
    monkeypatch.setattr(rank, "_ROOM_SECONDS", 0.0)

    def full(*_, **__):
        raise FULL

    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    with pytest.raises(RequestError, match="the video is made"):
        made([None], lambda path, frames: None)
