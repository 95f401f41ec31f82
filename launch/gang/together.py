"""Something that all ranks do at once, watched by the driver until each has ended its part or is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from .member import Member, cause_of
from .messages import CAUSES, Outcome, Progress

_LOOK_SECONDS = 0.5
# From the first failure to the end of those who only notice it. A closed connection is seen at once, but only by who
# looks at it: between two collectives a rank may compute for a while.
_GRACE_SECONDS = 20.0


class Together:
    """The parts of all ranks of one call.

    Attributes:
        outcomes: of the ranks that ended their part, by rank.
        lost: cause and sentence of the ranks that did not, by rank, in the order in which it was noticed.
    """

    def __init__(
        self,
        members: Sequence[Member],
        calls: Sequence[Any],
        frozen_after: float,
        attend: Callable[[], None],
        work: str = "",
    ) -> None:
        """Watch `calls`, one of each rank, until they end.

        Args:
            members: the ranks.
            calls: references to their `Outcome`s.
            frozen_after: seconds of silence after which a rank is killed.
            attend: called again and again meanwhile; what it raises ends the watch.
            work: id of the work whose messages are wanted.
        """
        self._members, self._frozen_after, self._attend, self._work = members, frozen_after, attend, work
        self._calls = dict(zip(calls, range(len(members)), strict=True))
        self._seen = 0
        self._deadline = float("inf")
        self.outcomes: dict[int, Outcome] = {}
        self.lost: dict[int, tuple[str, str]] = {}
        for member in members:
            member.renew()

    def messages(self) -> Iterator[Progress]:
        """What rank 0 tells, until every part has ended."""
        while self._calls:
            self._attend()
            yield from self._look()
            if time.monotonic() > self._deadline:
                for rank in self._calls.values():
                    self.lost[rank] = ("peer", f"rank {rank} did not notice that another one had ended")
                break
        if self._work and 0 not in self.lost and 0 in self.outcomes:
            yield from self._last()

    def wait(self) -> None:
        """Wait until every part has ended."""
        for _ in self.messages():
            pass

    def root(self) -> tuple[str, str] | None:
        """Cause and sentence of what was wrong first; None if every rank ended as it should."""
        found = [(cause, text) for cause, text in self.lost.values() if cause in CAUSES]
        failed = {rank: outcome for rank, outcome in self.outcomes.items() if outcome.ended == "failed"}
        found += [(outcome.cause, f"rank {rank}: {outcome.message}") for rank, outcome in failed.items()]
        found += [(cause, text) for cause, text in self.lost.values()]
        if not found:
            return None
        order = [*CAUSES, "peer"]
        cause, text = min(found, key=lambda pair: order.index(pair[0]))
        return (cause if cause in CAUSES else "error"), text

    def _look(self) -> Iterator[Progress]:
        living = {rank: member for rank, member in enumerate(self._members) if rank not in self.lost}
        beats = {member.beat(self._work, self._seen): rank for rank, member in living.items() if rank in self._busy}
        ready, _ = ray.wait([*self._calls, *beats], num_returns=1, timeout=_LOOK_SECONDS)
        for reference in ready:
            if reference in self._calls:
                self._ended(reference)
            elif beats[reference] not in self.lost:
                yield from self._heard(beats[reference])
        for rank, member in living.items():
            if rank in self._busy and member.silent > self._frozen_after:
                self._lose(rank, "frozen", f"rank {rank} of {len(self._members)} was silent for {member.silent:.0f} s")
                # At once: its peers wait for it, and are set free by its end.
                member.end([other for other in self._members if other is not member])

    @property
    def _busy(self) -> set[int]:
        return set(self._calls.values())

    def _ended(self, reference: Any) -> None:
        rank = self._calls[reference]
        try:
            outcome = ray.get(reference)
        except RayError as error:
            self._lose_to(rank, error)
            return
        del self._calls[reference]
        self.outcomes[rank] = outcome
        if outcome.ended == "failed":
            self._hurry()

    def _heard(self, rank: int) -> Iterator[Progress]:
        try:
            messages = self._members[rank].take_beat()
        except RayError as error:
            self._lose_to(rank, error)
            return
        if rank == 0:
            self._seen += len(messages)
            yield from messages

    def _last(self) -> Iterator[Progress]:
        """What rank 0 said between the last heartbeat and its end."""
        actor = self._members[0].actor
        try:
            yield from ray.get(actor.beat.remote(self._work, self._seen, 0.0), timeout=self._frozen_after)
        except RayError as error:
            self._lose_to(0, error)

    def _lose_to(self, rank: int, error: RayError) -> None:
        identity = self._members[rank].identity
        cause = cause_of(error, identity.node if identity is not None else None)
        words = {"died": "died", "node": "was lost with its machine", "memory": "was killed for lack of memory"}
        self._lose(rank, cause, f"rank {rank} of {len(self._members)} {words.get(cause, 'ended')}")

    def _lose(self, rank: int, cause: str, text: str) -> None:
        self.lost.setdefault(rank, (cause, text))
        self._calls = {reference: other for reference, other in self._calls.items() if other != rank}
        self._hurry()

    def _hurry(self) -> None:
        self._deadline = min(self._deadline, time.monotonic() + _GRACE_SECONDS)
