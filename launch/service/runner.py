"""`Runner`: whatever makes one video at a time, where no crash takes the service along."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...engine.request import ResolvedRequest
from .events import Event

_MAX_PAUSE = 60.0


class Pauses:
    """When to start what failed to start again: after 1, 2, 4 ... seconds, at most a minute."""

    def __init__(self) -> None:
        """Start at once."""
        self._pause, self._until = 1.0, 0.0

    @property
    def over(self) -> bool:
        """Whether it may be started now."""
        return time.monotonic() >= self._until

    def failed(self) -> None:
        """A start failed."""
        self._until = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, _MAX_PAUSE)

    def succeeded(self) -> None:
        """A start succeeded: the next pause is a short one."""
        self._pause = 1.0


@dataclass(frozen=True, kw_only=True)
class Task:
    """One attempt at a job.

    Attributes:
        id: the job's.
        request: what to make, valid for the runner's model.
        folder: empty and this attempt's own; the files of `results.FILES` go there.
        state: folder for what lets a later attempt go on where this one ended; shared by all attempts of the job.
        image: file that the video starts from, if it starts from one; `request` holds its fingerprint alone.
    """

    id: str
    request: ResolvedRequest
    folder: Path
    state: Path
    image: Path | None = None


class Runner(Protocol):
    """Makes one video at a time. Only `run` blocks; everything else may be called from other threads meanwhile."""

    @property
    def ready(self) -> bool:
        """Whether a task could run now."""
        ...

    @property
    def trouble(self) -> str | None:
        """Why not, in one sentence, if it is not just starting; None otherwise."""
        ...

    @property
    def hopeless(self) -> bool:
        """Whether starting it again cannot help: its model cannot be loaded."""
        ...

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the last sign of life; 0 before the first."""
        ...

    def tend(self) -> None:
        """Start it, or start it again after it died; called every half second while no task runs."""
        ...

    def run(self, task: Task) -> Generator[Event]:
        """Make a video.

        Raises:
            RequestError: this request cannot be served; the runner stays usable.
            Cancelled: after `cancel`.
            Stopped: after `stop`.
            RunnerLost: it died, froze or failed; `tend` brings another one.
        """
        ...

    def cancel(self) -> None:
        """Let the running task end within one step. Harmless when idle."""
        ...

    def stop(self) -> None:
        """Let the running task save its state and end within one step. Harmless when idle."""
        ...

    def close(self) -> None:
        """End its processes, a running task included."""
        ...
