"""One attempt's progress, written into the job store and the metrics."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from ...engine.request import Decoding, Event, Started, StepDone
from ...errors import StoreUnavailable
from ..workers.messages import Outcome
from .metrics import Metrics
from .rows import Job
from .store import JobStore

# Progress of a quick model is written no more often than anybody can see it.
_WRITE_SECONDS = 0.1
# Denoising is nearly all of the work; the last percents are decoding and writing.
_DENOISED = 95


def num_pixels(job: Job) -> int:
    """Width x height x frames."""
    request = job.request
    return int(request["width"] * request["height"] * request["num_frames"])


class Follower:
    """Sees the events of one attempt.

    Attributes:
        step: how many steps are done.
        made: the result, when it is there.
    """

    def __init__(self, job: Job, store: JobStore, metrics: Metrics, rest: Callable[[int], float]) -> None:
        """Follow an attempt at `job`; `rest` estimates the seconds from the last step to the files, from the pixels."""
        self._job, self._store, self._metrics = job, store, metrics
        self._rest = rest(num_pixels(job))
        self._written, self._preview = 0.0, b""
        self._shares: list[float] = []
        self.step = 0
        self.made: Outcome | None = None

    def see(self, event: Event | Outcome) -> None:
        """Write down what an event says."""
        if isinstance(event, Started):
            self.step = event.resumed_at or 0
            # What an earlier attempt evaluated is told at the end.
            self._shares = [0.0] * self.step
            if self._job.attempt == 1:
                self._metrics.observe("heterostep_queue_seconds", time.time() - self._job.created_at)
            self._tell(stage="denoising", step=self.step, progress=self._progress())
        elif isinstance(event, StepDone):
            self._step(event)
        elif isinstance(event, Decoding):
            self._tell(stage="decoding", step=self.step, progress=_DENOISED, eta_seconds=self._rest)
        elif isinstance(event, Outcome):
            self.made = event

    def _step(self, event: StepDone) -> None:
        self.step = event.step
        self._shares.append(round(event.share, 4))
        self._preview = event.preview or self._preview
        self._metrics.observe("heterostep_step_seconds", event.seconds)
        self._metrics.observe("heterostep_active_fraction", event.share)
        now = time.monotonic()
        if now - self._written < _WRITE_SECONDS and event.step < event.num_steps:
            return
        self._tell(
            preview=self._preview or None,
            stage="denoising",
            step=event.step,
            progress=self._progress(),
            hsa={"steps": self._shares},
            eta_seconds=event.eta_seconds + self._rest,
        )
        self._written, self._preview = now, b""

    def _tell(self, **columns: Any) -> None:
        # A video is worth more than the news of it: where they cannot be written, it is made nevertheless.
        with contextlib.suppress(StoreUnavailable):
            self._store.progress(self._job, **columns)

    def _progress(self) -> int:
        return int(_DENOISED * self.step // self._job.request["num_inference_steps"])
