"""The driver of a worker group, with workers that only pretend: refusals, standbys, late processes."""

from __future__ import annotations

import contextlib
import dataclasses
import time

import pytest

from heterostep.engine.config import EngineConfig
from heterostep.engine.request import GenerateRequest
from heterostep.errors import Cancelled, ConfigError, Interrupted, RankFailure, RankLost, RequestError
from heterostep.launch.workers import watch
from heterostep.launch.workers.group import Grown, WorkerGroup
from heterostep.launch.workers.messages import PEER, GroupConfig, Identity, Order, Outcome, Report, StopRequest, Work
from heterostep.launch.workers.watch import Worker

WORK = Work(request=GenerateRequest(prompt="x"))
WAITS = "waits for the others"


class Pretender(Worker):
    """Answers orders at once, as `answers` say: by order, what each rank answers, "done" if nothing is said."""

    def __init__(self, seat, answers):
        super().__init__(seat)
        self.answers, self.pid = answers, 100 + (seat or 0)
        self.messages, self.orders, self.death, self.killed = [Identity(pid=self.pid)], [], None, False

    def post(self, message):
        if isinstance(message, StopRequest):
            ended = "cancelled" if message.verb == "cancel" else "stopped"
            self.messages.append(Report(message.order, Outcome(ended=ended, message="saved", saved=3)))
        if not isinstance(message, Order):
            return
        self.orders.append(message.what)
        answer = self.answers.get(message.what, {}).get(self.seat, Outcome())
        if answer != WAITS:
            self.messages.append(Report(message.number, answer))

    def receive(self):
        messages, self.messages = self.messages, []
        if self.death is not None and not messages:
            raise RankLost("died", self.death)
        return messages or ([] if self.killed else [None])

    def kill(self, others=()):
        self.killed = True


class Pretended:
    """A machine with such workers; `late` seats start only when they are let."""

    complete = True

    def __init__(self, answers):
        self.answers, self.started, self.late = answers, [], set()

    def reserve(self, config, attend):
        attend()

    def start(self, seat):
        worker = Pretender(seat, self.answers)
        if seat in self.late:
            worker.messages.clear()
        self.started.append(worker)
        return worker

    def wait(self, workers, seconds):
        pass

    def near(self, identity):
        return True

    def rank_key(self, worker):
        return worker.seat

    def gpu(self, seat):
        return None

    def release(self):
        pass


@pytest.fixture
def answers(monkeypatch):
    monkeypatch.setattr(watch, "_GRACE_SECONDS", 0.05)
    return {}


def group_of(answers, size=4, **settings):
    machines = Pretended(answers)
    return WorkerGroup(GroupConfig(size=size, **settings), EngineConfig(model="demo"), machines), machines


def run(group):
    for _ in group.run(WORK):
        pass


PEERS = Outcome(ended="failed", cause=PEER, message="DistError: connection closed by peer")


@pytest.mark.parametrize("others", [WAITS, PEERS], ids=["wait", "fail"])
def test_what_one_rank_alone_refuses_is_said_at_once(answers, others):
    missing = Outcome(ended="refused", message="no model at 'there'")
    answers["join"] = {0: others, 1: others, 2: missing, 3: others}
    group, machines = group_of(answers)
    with pytest.raises(ConfigError, match=r"^rank 2: no model at 'there'$"):
        group.recover()
    assert len(machines.started) == 4 and not group.ready  # it is not tried again
    answers["join"] = dict.fromkeys(range(4), missing)
    group.close()
    with pytest.raises(ConfigError, match=r"^no model at 'there'$"):
        group_of(answers)[0].recover()


@pytest.mark.parametrize("others", [WAITS, PEERS], ids=["wait", "fail"])
@pytest.mark.parametrize(("rank", "says"), [(0, "^too long$"), (1, "^rank 1: too long$")])
def test_what_one_rank_alone_refuses_ends_the_request(answers, others, rank, says):
    answers["make"] = dict.fromkeys(range(4), others) | {rank: Outcome(ended="refused", message="too long")}
    group, machines = group_of(answers)
    group.recover()
    with pytest.raises(RequestError, match=says):
        run(group)
    assert not group.ready
    answers["make"] = {}
    group.recover()
    run(group)
    assert group.ready and group.size == 4 and len(machines.started) == (7 if others == WAITS else 4)


def test_what_all_ranks_refuse_leaves_them_together(answers):
    answers["make"] = dict.fromkeys(range(4), Outcome(ended="refused", message="too long"))
    group, _ = group_of(answers)
    group.recover()
    with pytest.raises(RequestError, match=r"^too long$"):
        run(group)
    assert group.ready and group.rendezvous == 1


def lose(worker, how):
    """Let a worker die or freeze."""
    if how == "died":
        worker.death = "was killed by SIGKILL"
    else:
        worker.receive, worker.heard = list, time.monotonic() - 20.0


@pytest.mark.parametrize("how", ["died", "froze"])
def test_a_standby_that_was_lost_takes_no_seat(answers, how):
    group, machines = group_of(answers, 2, standby=True)
    group.recover()
    first, second, standby = machines.started
    assert standby.seat is None and group.standby_ready
    lose(standby, how)
    second.death = "died"
    with pytest.raises(RankLost, match="rank 1 of 2"):
        group.watch()
    group.recover()
    third, other = machines.started[3:]
    assert group._workers == [first, third] and group._standby is other and standby.killed
    other.read()
    third.death = "died"
    with pytest.raises(RankLost):
        group.watch()
    group.recover()
    assert group._workers == [first, other] and other.seat == 1


@pytest.mark.parametrize("how", ["died", "froze"])
def test_an_idle_standby_is_heard_and_replaced(answers, how, caplog):
    group, machines = group_of(answers, 2, standby=True)
    group.recover()
    standby = machines.started[-1]
    assert standby.messages
    run(group)
    assert not standby.messages and standby.outcome is not None
    lose(standby, how)
    group.watch()
    assert standby.killed and "the process that stands by was lost: it was" in caplog.text
    other = machines.started[-1]
    assert group.ready and group._standby is other is not standby and other.orders == ["load"]
    # One that dies before it has loaded would do so again and again.
    other.messages.clear()
    lose(other, "died")
    group.watch()
    group.watch()
    assert group.ready and not group.standby_ready and machines.started[-1] is other
    group.close()
    group._keep_standby()
    assert group._standby is None


def test_a_late_process_that_dies_is_started_again(answers):
    group, machines = group_of(answers, 2, start_seconds=0.05)
    machines.late = {1}
    group.recover()
    late = machines.started[-1]
    assert group.size == 1 and group.ready
    group.watch()
    lose(late, "died")
    with pytest.raises(RankLost, match="the process of rank 1 could not be started: it was killed"):
        group.watch()
    assert not group.ready and late.killed
    machines.late.clear()
    group.recover()
    with contextlib.suppress(RankLost):
        group.watch()
    group.recover()
    assert group.size == 2 and group.ready


KEPT = dataclasses.replace(WORK, folder="kept")


@pytest.fixture
def alone(answers):
    """A group of two that goes on with one, whose video takes until it is told to stop."""
    group, machines = group_of(answers, 2, patience=0.01)
    machines.late, machines.complete = {1}, False
    group.recover()
    assert group.ready and group.size == 1
    answers["make"] = dict.fromkeys(range(2), WAITS)
    return group, machines.started[1]


def come(worker):
    worker.messages.append(Identity(pid=worker.pid))


def test_a_rank_that_comes_back_loads_and_is_let_in_where_the_video_is_saved(alone, caplog):
    group, late = alone
    come(late)
    with pytest.raises(Grown):
        next(group.run(KEPT))
    assert late.orders == ["load"] and not group.ready and group.working
    group.recover(KEPT)
    assert group.size == 2 and late.orders == ["load", "join"] and not late.killed
    assert "going on with 2 of 2 ranks instead of 1" in caplog.text


@pytest.mark.parametrize(("verb", "error"), [("stop", Interrupted), ("cancel", Cancelled)])
def test_what_is_asked_for_while_ranks_are_let_in_holds(alone, verb, error):
    group, late = alone
    come(late)
    with pytest.raises(Grown):
        next(group.run(KEPT))
    group.request_stop(verb)
    group.recover(KEPT)
    with pytest.raises(error):
        next(group.run(KEPT))
    assert not group.working


@pytest.mark.parametrize("how", ["refused", "died", "not kept"])
def test_what_cannot_help_does_not_disturb_the_video(alone, answers, how):
    group, late = alone
    answers["load"] = {1: Outcome(ended="refused", message="no model")} if how == "refused" else {}
    come(late)
    if how == "died":
        late.messages.clear()
        late.death = "was killed by SIGKILL"
    first = group._workers[0]

    def receive(usual=first.receive):
        """Rank 0 finishes when the late one has been dealt with."""
        if how == "not kept" or late.killed:
            first.messages.append(Report(first._number, Outcome()))
        return usual()

    first.receive = receive
    for _ in group.run(WORK if how == "not kept" else KEPT):
        pass
    assert group.ready and group.size == 1 and late.orders == (["load"] if how == "refused" else [])


def test_a_group_that_is_too_small_is_given_up_at_a_stated_time(answers):
    group, machines = group_of(answers, 3, least=2, start_seconds=0.05, patience=0.01)
    machines.late, machines.complete = {1, 2}, False
    with pytest.raises(RankFailure, match="1 of at least 2 ranks are left after 0 s"):
        group.recover()
