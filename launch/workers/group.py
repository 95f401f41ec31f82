"""The driver of a worker group: it starts the ranks, lets them meet and make videos, and replaces lost ones."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Generator, Sequence
from typing import Any

from ...engine.config import EngineConfig
from ...errors import TOO_LARGE, Cancelled, ConfigError, GroupClosed, Interrupted, RankFailure, RankLost, RequestError
from .machines import Machines
from .messages import PEER, GroupConfig, Outcome, Place, Progress, Work
from .watch import LOOK_SECONDS, Watch, Worker

TRIES = 3
"""How often in a row a group may fail to become complete."""
# The first import of a large library from a slow disk leaves no time for heartbeats.
_LOADING_SECONDS = 60.0
_GROW = "pause"
_SLOW_GBITS = 0.5
_SLOW_ADVICE = "; much of the time may go into sending, and a lower --compute sends less"


class Grown(Exception):
    """The video was saved because ranks that were missing are ready; `recover` lets them in, `run` goes on with it."""


class WorkerGroup:
    """W ranks that make one video at a time.

    One thread may call `recover`, `watch` and `run`; `request_stop` and `close` may be called from any other meanwhile.

    Attributes:
        config: as given.
        rendezvous: how often the ranks have met; more than one means that some were replaced.
    """

    def __init__(self, config: GroupConfig, engine: EngineConfig, machines: Machines) -> None:
        """Prepare; `recover` starts the ranks.

        Args:
            config: of the group.
            engine: what each rank loads, without `parallel` and `shard_weights`, which are the group's.
            machines: where the ranks run.
        """
        self.config, self._engine, self._machines = config, engine, machines
        self._workers: list[Worker] = []
        self._coming: dict[int, Worker] = {}
        self._standby: Worker | None = None
        # Seats that the cluster had not given when the group resumed without them.
        self._without: set[int] = set()
        # What is asked for and not passed on yet, and what the ranks were told.
        self._stop_request: str | None = None
        self._stopping: str | None = None
        self._kept = False
        self._complete = self._closed = self._on_gpus = False
        self.working = False
        """Whether a video is being made."""
        self.rendezvous = 0

    @property
    def ready(self) -> bool:
        """Whether a video could be made now."""
        return self._complete and not self._closed and all(worker.alive for worker in self._workers)

    @property
    def size(self) -> int:
        """How many ranks it has now."""
        return len(self._workers)

    @property
    def standby_ready(self) -> bool:
        """Whether a process stands by, ready to take the place of the next rank that dies."""
        if self._standby is not None:
            with contextlib.suppress(RankLost):
                self._standby.read()
        return self._standby is not None and self._standby.outcome is not None

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks, by rank, each on its own machine."""
        return [worker.identity.pid for worker in self._workers if worker.identity is not None]

    @property
    def near(self) -> bool:
        """Whether rank 0 is on this machine, and can use this process's folders."""
        identity = self._workers[0].identity if self._workers else None
        return identity is not None and self._machines.near(identity)

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the rank that was silent longest was heard of."""
        return max((worker.silent for worker in self._workers), default=0.0)

    def recover(self, work: Work | None = None) -> None:
        """Start what is missing and let the ranks meet, if they are not together already.

        A place that the cluster has no more is done without after a while. Should it come back, it is taken up the next
        time that the group recovers, when `watch` sees it, or in the midst of a video that is kept (`Grown`).

        Args:
            work: what comes next, if that is known.

        Raises:
            ConfigError: a rank refuses the settings or the model.
            RankLost: the group cannot be completed.
            GroupClosed: by `close`.
        """
        if self._complete:
            return
        try:
            self._assemble(work)
        except BaseException:
            self.working = False
            raise
        self._complete = True
        self._keep_standby()

    def watch(self) -> None:
        """Look after the ranks while there is no work; never waits.

        Raises:
            RankLost: one of them died or is frozen; `recover` replaces it.
        """
        for rank, worker in enumerate(self._workers):
            trouble = worker.trouble(self.config.frozen_after)
            if trouble is not None:
                name = f"rank {rank} of {self.size}"
                self._lose([rank])
                raise RankLost(trouble.cause, f"{name} was lost while it was idle: it {trouble}")
        self._watch_standby()
        if self._coming and self._arrived():
            self._complete = False

    def run(self, work: Work) -> Generator[Progress, None, Outcome]:
        """Make a video; the generator's value is rank 0's outcome. Closing it early ends the work within a step.

        Raises:
            RequestError: the request cannot be served, does not fit into the memory, or ends with the same error on
                every rank; the group stays.
            Cancelled: after a stop request; `Interrupted` if the video was saved and can be resumed.
            RankLost: a rank was lost; `recover` replaces it.
            Grown: ranks can be let in.
            GroupClosed: by `close`.
        """
        assert self._complete, "recover comes before run"
        # After `Grown` the work goes on, and what was asked for meanwhile still holds.
        self._stop_request = self._stop_request if self.working else None
        self.working, self._stopping = True, None
        self._kept = work.folder is not None or work.copies is not None
        watch = self._order("make", [(work,)] * self.size)
        try:
            yield from watch.progress()
        except (GeneratorExit, KeyboardInterrupt):
            self.request_stop("stop")
            with contextlib.suppress(GroupClosed):
                watch.end()
            self._settle(watch)
            raise
        finally:
            self.working = False
        try:
            return self._judge(watch)
        except Interrupted as saved:
            if self._stopping == "cancel":
                raise Cancelled(str(saved)) from saved
            if self._stopping != _GROW:
                raise
            self.working, self._complete = True, False
            raise Grown from saved

    @property
    def _reloads(self) -> bool:
        """Whether every rank loads its model anew when they meet: a GPU is chosen then, and shards depend on all."""
        return self._on_gpus or self.config.shard_weights

    def request_stop(self, verb: str) -> None:
        """Let the running video end within one step: "cancel", or "stop" after saving it. Harmless when idle.

        Nothing is sent here: a signal handler may call it, in the midst of what this thread does.
        """
        if self.working:
            self._stop_request = verb

    def close(self) -> None:
        """End all processes and give back their places."""
        self._closed, self._complete = True, False
        everybody = [*self._workers, *self._coming.values(), *([self._standby] if self._standby else [])]
        for worker in everybody:
            worker.kill(everybody)
        self._workers, self._coming, self._standby = [], {}, None
        self._machines.release()

    # How it becomes complete.

    def _assemble(self, work: Work | None) -> None:
        for left in reversed(range(TRIES)):
            try:
                self._gather()
                self._meet(work)
                return
            except RankLost:
                if not left:
                    raise

    def _gather(self) -> None:
        """Have a process in every place that there is."""
        self._attend()
        self._machines.reserve(self.config, self._attend)
        self._arrived()  # those of places that the group has done without so far
        self._take_standby()
        taken = {worker.seat for worker in self._workers}
        for seat in range(self.config.size):
            if seat not in taken and seat not in self._coming:
                self._coming[seat] = self._machines.start(seat)
        begin = missing_since = time.monotonic()
        while self._coming.keys() - self._without:
            self._arrived()
            now = time.monotonic()
            if self._machines.complete:
                missing_since = now
            late = now - begin > self.config.start_seconds
            enough = len(self._workers) >= self.config.least
            if late and not self._workers:
                raise RankLost("timeout", f"no process was started in {self.config.start_seconds:.0f} s")
            if late and not enough:
                raise RankFailure(
                    f"given up: {len(self._workers)} of at least {self.config.least} ranks are left after "
                    f"{self.config.start_seconds:.0f} s; a job that was kept is resumed by the same command"
                )
            if late or (now - missing_since > self.config.patience and enough):
                self._without |= self._coming.keys()
            elif self._coming:
                self._pause(list(self._coming.values()))

    def _arrived(self) -> bool:
        """Take in the processes that have started; whether there were any."""
        arrived = False
        for seat, worker in list(self._coming.items()):
            try:
                worker.read()
            except RankLost as lost:
                self._coming.pop(seat).kill()
                self._complete = False  # so that `recover` starts another one
                raise RankLost(lost.cause, f"the process of rank {seat} could not be started: it {lost}") from lost
            if worker.identity is not None:
                self._without.discard(seat)
                self._workers.append(self._coming.pop(seat))
                arrived = True
        return arrived

    def _meet(self, work: Work | None) -> None:
        """Number the ranks, let them meet, and have the model loaded."""
        self._attend()
        self._workers.sort(key=self._machines.rank_key)
        self.rendezvous += 1
        identities = [worker.identity for worker in self._workers if worker.identity is not None]
        nodes = [identity.node for identity in identities]
        port = 0
        if len(nodes) > 1:
            opened = self._order("open_store", [(identities[0].address,)], self._workers[:1], _LOADING_SECONDS)
            opened.end()
            self._raise(opened)
            port = opened.outcomes[0].port
        calls = []
        for rank, worker in enumerate(self._workers):
            assert worker.seat is not None
            place = Place(
                rank=rank,
                size=len(nodes),
                machines=tuple(nodes.count(node) for node in dict.fromkeys(nodes)),
                neighbours=nodes.count(nodes[rank]),
                gpu=self._machines.gpu(worker.seat),
                rendezvous=self.rendezvous,
                address=identities[0].address,
                port=port,
            )
            calls.append((place, self.config, self._engine, work))
        joined = self._order("join", calls, frozen_after=_LOADING_SECONDS)
        joined.end()
        refusal = joined.refusal()
        if refusal is not None:  # comes first: the others fail because they waited for the rank that refused
            self._settle(joined)
            raise ConfigError(refusal)
        self._raise(joined)
        self._on_gpus = any(outcome.device.startswith("cuda") for outcome in joined.outcomes.values())
        log, link = logging.getLogger("heterostep"), joined.outcomes[0].link
        if len(nodes) < self.config.size:
            log.warning("heterostep: resuming with %d of %d ranks", len(nodes), self.config.size)
        if link is not None:
            gbits, words = 8e-9 * link[1], "heterostep: the link between machines carries %.2g Gbit/s"
            slow = gbits < _SLOW_GBITS
            log.log(logging.WARNING if slow else logging.INFO, words + (_SLOW_ADVICE if slow else ""), gbits)

    def _keep_standby(self) -> None:
        if self.config.standby and self._standby is None and not self._on_gpus and not self._closed:
            self._standby = self._machines.start(None)
            self._standby.order("load", self._engine, self.config.threads)

    def _watch_standby(self) -> None:
        """Replace a standby that died or froze after it had loaded; one that could not load would not the next time."""
        standby = self._standby
        trouble = self._standby_trouble(standby) if standby is not None else None
        if standby is None or trouble is None:
            return
        logging.getLogger("heterostep").warning("heterostep: the process that stands by was lost: it %s", trouble)
        standby.kill(self._workers)
        self._standby = None
        if standby.outcome is not None and standby.outcome.ended == "done":
            self._keep_standby()

    def _standby_trouble(self, standby: Worker) -> RankLost | None:
        return standby.trouble(_LOADING_SECONDS if standby.outcome is None else self.config.frozen_after)

    def _take_standby(self) -> None:
        """Put the standby into the first seat that is empty; it has begun to load before any new process could."""
        taken = {worker.seat for worker in self._workers} | self._coming.keys()
        empty = [seat for seat in range(self.config.size) if seat not in taken]
        if self._standby is None or not empty:
            return
        standby, self._standby = self._standby, None
        while (trouble := self._standby_trouble(standby)) is None and standby.outcome is None:
            self._pause([standby])
        outcome = standby.outcome
        if trouble is None and outcome is not None and outcome.ended == "done" and standby.identity is not None:
            standby.seat = empty[0]
            self._workers.append(standby)
        else:
            standby.kill(self._workers)

    # How work ends.

    def _judge(self, watch: Watch) -> Outcome:
        """Rank 0's outcome, or what the outcomes of all ranks mean."""
        outcomes = list(watch.outcomes.values())
        failed = [outcome for outcome in outcomes if outcome.ended == "failed"]
        causes = {outcome.cause for outcome in failed} | {cause for cause, _ in watch.lost.values()}
        if "memory" in causes and causes <= {"memory", PEER} and failed:
            # A rank said so: with the same request it would happen again. Whoever answered has left its groups and
            # freed what the request took, and keeps its model; sharded weights are loaded again when the ranks meet.
            self._lose(watch.lost)
            raise RequestError(TOO_LARGE)
        same = len(failed) == self.size and len({(outcome.cause, outcome.message) for outcome in failed}) == 1
        if same and failed[0].cause == "error":
            self._complete = False  # each of them has left its groups; they meet again
            raise RequestError(failed[0].message)
        leading = watch.outcomes.get(0, Outcome(ended="lost"))
        refusal = leading.message if leading.ended == "refused" else watch.root() and watch.refusal()
        if refusal:
            self._settle(watch)
            raise RequestError(refusal)
        self._raise(watch)
        if leading.ended == "stopped":
            raise Interrupted(leading.message, leading.saved)
        if leading.ended == "cancelled":
            raise Cancelled(leading.message)
        return leading

    def _raise(self, watch: Watch) -> None:
        """Raise RankLost if a rank is lost or failed."""
        root = watch.root()
        if root is not None:
            self._settle(watch)
            raise root

    def _settle(self, watch: Watch) -> None:
        """Part with the ranks that are lost, or whose memory an error of their own has left in any state."""
        if watch.root() is not None:
            failed = [rank for rank, end in watch.outcomes.items() if end.ended == "failed" and end.cause != PEER]
            self._lose([*watch.lost, *failed])

    def _lose(self, ranks: Sequence[int] | dict[int, Any]) -> None:
        """End ranks that are dead, frozen or stuck; the others meet again.

        With NCCL or with sharded weights one lost rank ends all: the others would wait in a collective forever, or hold
        parts of weights that no longer exist as a whole.
        """
        self._complete = False
        everybody, gone = self._workers, set(ranks)
        if gone and self._reloads:
            gone = set(range(len(everybody)))
        for rank in gone:
            everybody[rank].kill(everybody)
        self._workers = [worker for rank, worker in enumerate(everybody) if rank not in gone]

    # How it waits.

    def _order(
        self,
        what: str,
        arguments: Sequence[tuple[object, ...]],
        workers: Sequence[Worker] | None = None,
        frozen_after: float = 0.0,
    ) -> Watch:
        """Let workers (None: all) do something, each with arguments of its own, and watch them."""
        workers = self._workers if workers is None else workers
        for worker, own in zip(workers, arguments, strict=True):
            worker.order(what, *own)
        return Watch(workers, self._machines.wait, max(frozen_after, self.config.frozen_after), self._attend)

    def _attend(self) -> None:
        """What is due while the driver waits: to end, to hear the standby, or to pass a stop request on."""
        if self._closed:
            raise GroupClosed("the worker group was closed")
        standby = self._standby
        if standby is not None:  # or what it sends would pile up; `watch` and `recover` see to it if it is lost
            with contextlib.suppress(RankLost):
                standby.read()
        if not (self.working and self._complete):
            return
        if self._stop_request is not None:
            self._stopping, self._stop_request = self._stop_request, None
            for worker in self._workers:
                worker.request_stop(self._stopping)
        elif self._kept and self._coming and self._stopping is None and self._grow():
            self._stopping = _GROW
            for worker in self._workers:
                worker.request_stop(_GROW)

    def _grow(self) -> bool:
        """Whether ranks that were missing are ready; their models are loaded while the others work."""
        for seat, worker in list(self._coming.items()):
            try:
                worker.read()
                useless = worker.outcome is not None and worker.outcome.ended != "done"
            except RankLost:
                useless = True
            if useless:  # the next recovery starts another one, and says what is wrong
                self._coming.pop(seat).kill()
            elif worker.identity is not None and not worker.ordered and not self._reloads:
                worker.order("load", self._engine, self.config.threads)
        found = [worker for worker in self._coming.values() if worker.identity is not None]
        ready = bool(found) and all(worker.outcome is not None or self._reloads for worker in found)
        if ready:
            have = len(self._workers)
            logging.getLogger("heterostep").warning(
                "heterostep: going on with %d of %d ranks instead of %d", have + len(found), self.config.size, have
            )
        return ready

    def _pause(self, workers: Sequence[Worker]) -> None:
        self._attend()
        self._machines.wait(workers, LOOK_SECONDS)
