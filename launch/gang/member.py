"""The driver's view of one rank actor: where it runs, when it was last heard, and how to end it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayError

from .messages import Identity, RankLost

_BEAT_SECONDS = 0.5
"""A heartbeat without news is answered after this time."""


class Member:
    """One actor of a gang.

    Attributes:
        actor: Ray's handle.
        bundle: its place in the placement group; None for a spare, which has none.
        identity: where it runs; known when it has started.
        heard: when it was last heard of, on the monotonic clock.
    """

    def __init__(self, actor: Any, bundle: int | None) -> None:
        """Look at an actor that was just asked for."""
        self.actor, self.bundle = actor, bundle
        self.identity: Identity | None = None
        self.heard = time.monotonic()
        self.started = actor.identity.remote()
        self._beat: Any = None

    @property
    def silent(self) -> float:
        """Seconds since it was last heard of."""
        return time.monotonic() - self.heard

    def arrive(self) -> None:
        """Take note that it has started.

        Raises:
            RankLost: it has not, and never will.
        """
        try:
            self.identity = ray.get(self.started)
        except RayError as error:
            raise RankLost(cause_of(error), f"a process of the gang could not be started ({line_of(error)})") from error
        self.heard = time.monotonic()

    def renew(self) -> None:
        """Count its silence from now on, and forget the heartbeat on its way: it may tell of earlier work."""
        self.heard, self._beat = time.monotonic(), None

    def trouble(self, frozen_after: float) -> str | None:
        """The cause by which it is lost, or None while it is heard; never waits."""
        if ray.wait([self.beat()], timeout=0)[0]:
            try:
                self.take_beat()
            except RayError as error:
                return cause_of(error, self.identity.node if self.identity is not None else None)
        return "frozen" if self.silent > frozen_after else None

    def beat(self, work: str = "", seen: int = 0) -> Any:
        """The answer to the heartbeat that is on its way; one is sent if there is none."""
        if self._beat is None:
            self._beat = self.actor.beat.remote(work, seen, _BEAT_SECONDS)
        return self._beat

    def take_beat(self) -> Any:
        """The messages of a heartbeat that was answered; RayError if it never will be."""
        reference, self._beat = self._beat, None
        messages = ray.get(reference)
        self.heard = time.monotonic()
        return messages

    def end(self, others: Sequence[Member] = ()) -> None:
        """End its process at once, also if it is frozen.

        Args:
            others: members that live; one on the same machine can kill it when this process cannot reach it.
        """
        if self.identity is not None:
            if self.identity.node == ray.get_runtime_context().get_node_id():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(self.identity.pid, signal.SIGKILL)
            else:
                for other in others:
                    if other is not self and other.identity and other.identity.node == self.identity.node:
                        other.actor.end.remote(self.identity.pid)
                        break
        with contextlib.suppress(RayError):
            ray.kill(self.actor, no_restart=True)


def cause_of(error: RayError, node: str | None = None) -> str:
    """What Ray's error says of an actor's end, in one of `messages.CAUSES`.

    Args:
        error: Ray's.
        node: machine of the actor.
    """
    text = str(error)
    if isinstance(error, GetTimeoutError):
        return "timeout"
    # Of every process that is killed Ray says that the kernel may have done it for lack of memory.
    if isinstance(error, OutOfMemoryError) or "NODE_OUT_OF_MEMORY" in text or "running low on memory" in text:
        return "memory"
    if node is not None and not _node_lives(node):
        return "node"
    return "died" if isinstance(error, RayActorError) else "error"


def _node_lives(node: str) -> bool:
    return any(found["NodeID"] == node and found["Alive"] for found in ray.nodes())


def line_of(error: BaseException) -> str:
    """The first line of what an error says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
