"""The driver's view of worker processes: what they send, when they were last heard, and all of them at once."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ...errors import RankLost
from .messages import CAUSES, PEER, Identity, Kill, Order, Outcome, Progress, Report, StopRequest

LOOK_SECONDS = 0.25
# How long ranks may take to notice that a peer failed: a rank that is computing sees a closed connection only at its
# next collective.
_GRACE_SECONDS = 20.0
# The connections of a machine that says nothing more may never be closed.
_SILENT_GRACE_SECONDS = 3.0


class Worker(ABC):
    """One worker process, as its driver sees it.

    Attributes:
        seat: its place in the group, from 0; None for a standby, which has none.
        identity: where it runs; None until it has started.
        outcome: of its last order; None while that is carried out.
        heard: when it was last heard of, on the monotonic clock.
    """

    def __init__(self, seat: int | None) -> None:
        """Look at a process that was just started, or asked for."""
        self.seat = seat
        self.identity: Identity | None = None
        self.outcome: Outcome | None = None
        self.heard = time.monotonic()
        self._number = 0

    @property
    def silent(self) -> float:
        """Seconds since it was last heard of."""
        return time.monotonic() - self.heard

    @property
    def ordered(self) -> bool:
        """Whether it ever got an order."""
        return self._number > 0

    @property
    def alive(self) -> bool:
        """Whether its process lives, as far as is known at once."""
        return True

    def order(self, what: str, *arguments: object) -> None:
        """Let it do something; `read` takes note of the outcome."""
        self._number += 1
        self.outcome, self.heard = None, time.monotonic()
        self.post(Order(self._number, what, arguments))

    def request_stop(self, verb: str) -> None:
        """Let its order end within one step: "cancel", or "stop" after saving it."""
        self.post(StopRequest(self._number, verb))

    def read(self) -> list[Progress]:
        """What is new of its order; never waits.

        Raises:
            RankLost: the process is gone; the message says how, without a subject.
        """
        news = []
        for message in self.receive():
            self.heard = time.monotonic()
            if isinstance(message, Identity):
                self.identity = message
            elif isinstance(message, Report) and message.order == self._number:
                if isinstance(message.content, Outcome):
                    self.outcome = message.content
                else:
                    news.append(message.content)
        return news

    def trouble(self, frozen_after: float) -> RankLost | None:
        """Why it is lost, or None while it is heard; never waits."""
        try:
            self.read()
        except RankLost as lost:
            return lost
        return RankLost("frozen", f"was silent for {self.silent:.0f} s") if self.silent > frozen_after else None

    @abstractmethod
    def post(self, message: Order | StopRequest | Kill) -> None:
        """Send it a message; never waits, and does nothing if the process is gone."""

    @abstractmethod
    def receive(self) -> list[Any]:
        """The messages that it sent since the last call, also `None` for a heartbeat without any; never waits.

        Raises:
            RankLost: there will never be another one.
        """

    @abstractmethod
    def kill(self, others: Sequence[Worker] = ()) -> None:
        """End its process at once, also if it is frozen.

        Args:
            others: workers that live; one on the same machine can kill it when this process cannot reach it.
        """


class Watch:
    """The parts of all ranks in one order, watched until each has ended its part or is lost.

    Attributes:
        lost: cause and sentence of the ranks that did not end their part, by rank, the first to be noticed first.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        wait: Callable[[Sequence[Worker], float], None],
        frozen_after: float,
        attend: Callable[[], None],
    ) -> None:
        """Watch workers that have just been given an order.

        Args:
            workers: the ranks.
            wait: returns when one of some workers may have sent something, or after some seconds.
            frozen_after: seconds of silence after which a rank is killed.
            attend: called again and again meanwhile; what it raises ends the watch.
        """
        self._workers, self._wait, self._frozen_after, self._attend = workers, wait, frozen_after, attend
        self._deadline = float("inf")
        self.lost: dict[int, tuple[str, str]] = {}

    @property
    def outcomes(self) -> dict[int, Outcome]:
        """Of the ranks that ended their part, by rank."""
        found = {rank: worker.outcome for rank, worker in enumerate(self._workers) if rank not in self.lost}
        return {rank: outcome for rank, outcome in found.items() if outcome is not None}

    def progress(self) -> Iterator[Progress]:
        """What rank 0 tells, until every part has ended."""
        while busy := self._busy():
            self._attend()
            self._wait([self._workers[rank] for rank in busy], LOOK_SECONDS)
            for rank in busy:
                yield from self._look(rank)
            if time.monotonic() > self._deadline:
                for rank in self._busy():
                    self.lost[rank] = (PEER, f"rank {rank} did not notice that another one had ended")

    def end(self) -> None:
        """Wait until every part has ended."""
        for _ in self.progress():
            pass

    def root(self) -> RankLost | None:
        """What was wrong first; None if every rank ended as it should."""
        found = [(cause, text) for cause, text in self.lost.values() if cause in CAUSES]
        failed = {rank: outcome for rank, outcome in self.outcomes.items() if outcome.ended == "failed"}
        found += [(outcome.cause, f"rank {rank}: {outcome.message}") for rank, outcome in failed.items()]
        found += [(cause, text) for cause, text in self.lost.values()]
        if not found:
            return None
        order = [*CAUSES, PEER]
        cause, text = min(found, key=lambda pair: order.index(pair[0]))
        return RankLost(cause if cause in CAUSES else "error", text)

    def refusal(self) -> str | None:
        """Why ranks refused the order, in one sentence; None if none did. A rank that refuses alone is named."""
        refused = {rank: outcome.message for rank, outcome in self.outcomes.items() if outcome.ended == "refused"}
        if len(refused) == len(self._workers):
            return "; ".join(sorted(set(refused.values())))
        return "; ".join(f"rank {rank}: {message}" for rank, message in sorted(refused.items())) or None

    def _busy(self) -> list[int]:
        return [rank for rank, one in enumerate(self._workers) if rank not in self.lost and one.outcome is None]

    def _look(self, rank: int) -> Iterator[Progress]:
        worker, name = self._workers[rank], f"rank {rank} of {len(self._workers)}"
        try:
            news = worker.read()
        except RankLost as lost:
            self._lose(rank, lost.cause, f"{name} {lost}")
            return
        if rank == 0:
            yield from news
        if worker.outcome is not None and worker.outcome.ended in ("failed", "refused"):
            self._hurry()  # where a rank refuses alone, the others would wait for it
        elif worker.outcome is None and worker.silent > self._frozen_after:
            self._lose(rank, "frozen", f"{name} was silent for {worker.silent:.0f} s")
            # At once: its peers wait for it, and are set free by its end.
            worker.kill([other for other in self._workers if other is not worker])

    def _lose(self, rank: int, cause: str, text: str) -> None:
        self.lost.setdefault(rank, (cause, text))
        self._hurry(cause)

    def _hurry(self, cause: str = "") -> None:
        grace = _SILENT_GRACE_SECONDS if cause == "node" else _GRACE_SECONDS
        self._deadline = min(self._deadline, time.monotonic() + grace)
