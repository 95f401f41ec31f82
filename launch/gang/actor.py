"""One rank of a gang: a Ray actor with torch.distributed inside.

Threaded, and with sync methods only: one `async def` would make it an asyncio actor, in which a step blocks heartbeat
and cancelling. Nothing heavy is imported before `prepare` or `warm`, so that a new process answers at once.
"""

from __future__ import annotations

import contextlib
import os
import signal

import ray

from ...engine.request import EngineConfig
from .messages import Identity, Outcome, Place, Progress, Work
from .outbox import Outbox

CONTROL = "control"
"""The lane of what must be answered while a step runs."""
_LANES = 8


class RankActor:
    """A process of a gang; it becomes a rank by `prepare`, in each life of the gang anew."""

    def __init__(self) -> None:
        """Start; nothing is loaded."""
        self._outbox = Outbox()
        self._rank: object | None = None

    @ray.method(concurrency_group=CONTROL)
    def identity(self) -> Identity:
        """Where this process runs."""
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        return Identity(pid=os.getpid(), node=context.get_node_id(), device=gpus[0] if gpus else "")

    @ray.method(concurrency_group=CONTROL)
    def beat(self, work: str, seen: int, seconds: float) -> list[Progress]:
        """The sign of life, with what is new; see `Outbox.since`."""
        return self._outbox.since(work, seen, seconds)

    @ray.method(concurrency_group=CONTROL)
    def wish(self, work: str, verb: str) -> None:
        """Let a piece of work end within one step: "cancel", or "stop" after saving it."""
        self._worker().wish(work, verb)

    @ray.method(concurrency_group=CONTROL)
    def end(self, pid: int) -> None:
        """Kill another process of this machine: Ray needs five seconds for one that is frozen."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def open_store(self) -> tuple[str, int]:
        """Open the store at which the ranks of the next life meet, on this machine: its address and port."""
        return self._worker().open_store(ray.util.get_node_ip_address())

    def prepare(self, place: Place, engine: EngineConfig, work: Work | None) -> Outcome:
        """Meet the other ranks, and load the model if it is not loaded; see `RankWorker.prepare`."""
        return self._worker().prepare(place, engine, work)

    def warm(self, engine: EngineConfig, threads: int | None) -> Outcome:
        """Load the model, to stand in for a rank that dies."""
        return self._worker().warm(engine, threads)

    def make(self, work: Work) -> Outcome:
        """Do this rank's part of a video; see `RankWorker.make`."""
        return self._worker().make(work)

    def _worker(self):  # type: ignore[no-untyped-def]  # importing its type would import PyTorch
        from .worker import RankWorker

        if self._rank is None:
            self._rank = RankWorker(self._outbox)
        return self._rank


def rank_actor():  # type: ignore[no-untyped-def]  # Ray's types are its own affair
    """The actor's class, to be given options and started."""
    return ray.remote(concurrency_groups={CONTROL: _LANES}, max_restarts=0, max_task_retries=0)(RankActor)
