"""Metrics for Prometheus, and the `Follower` that writes an attempt's progress into them and into the job store.

Metrics count from the start of the process; Prometheus' `rate` knows what a restart is.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from ...engine.request import Decoding, Event, Started, StepDone
from ...errors import StoreUnavailable
from ..workers.messages import Outcome
from .rows import Job
from .runner import Runner
from .store import JobStore

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
_IMBALANCES = (1.0, 1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 4.0)
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

COUNTERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "heterostep_requests": ("Videos by how they ended; rejected: the queue was full.", ("status",)),
    "heterostep_recoveries": ("Jobs that were begun again, by what had happened.", ("cause",)),
    "heterostep_http_requests": ("HTTP requests.", ("method", "route", "code")),
}
HISTOGRAMS: Mapping[str, tuple[str, tuple[str, ...], tuple[float, ...]]] = {
    "heterostep_queue_seconds": ("Time from the request to its first step.", (), _SECONDS),
    "heterostep_stage_seconds": ("Time of each stage of a video.", ("stage",), _SECONDS),
    "heterostep_step_seconds": ("Time of a denoising step.", (), _SECONDS),
    "heterostep_recovery_seconds": ("Time from the loss of a runner to its job's next step.", ("cause",), _SECONDS),
    "heterostep_rank_imbalance": ("Most tokens of a rank over their mean, at an evaluated step.", (), _IMBALANCES),
    "heterostep_active_fraction": ("Share of the tokens that a step evaluated.", (), _SHARES),
}


class Metrics:
    """The metrics of one service, and its page `/metrics`."""

    def __init__(self, replica: str = "") -> None:
        """Start with nothing counted.

        Args:
            replica: which of several processes behind one address this is; becomes a label, since each counts alone.
        """
        disable_created_metrics()
        self._replica, self._registry = replica, CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._counters = {
            name: Counter(name, text, labels, registry=self._registry) for name, (text, labels) in COUNTERS.items()
        }
        self._histograms = {
            name: Histogram(name, text, labels, buckets=buckets, registry=self._registry)
            for name, (text, labels, buckets) in HISTOGRAMS.items()
        }

    def watch(self, store: JobStore, runners: Sequence[Runner]) -> None:
        """Add what is measured when the page is asked for: the queue, and the runners of this process."""
        depth, running, size, ready, age = (
            Gauge(f"heterostep_{name}", text, labels, registry=self._registry)
            for name, text, labels in (
                ("queue_depth", "Jobs that wait.", ()),
                ("running", "Jobs that are made.", ()),
                ("result_bytes", "Size of all results.", ()),
                ("runner_ready", "1 if a job could run there now.", ("runner",)),
                ("heartbeat_age_seconds", "Since the last sign of life.", ("runner",)),
            )
        )
        depth.set_function(lambda: store.counts().get("queued", 0))
        running.set_function(lambda: store.counts().get("in_progress", 0))
        size.set_function(store.result_bytes)
        for index, runner in enumerate(runners):
            ready.labels(str(index)).set_function(partial(getattr, runner, "ready"))
            age.labels(str(index)).set_function(partial(getattr, runner, "heartbeat_age"))

    def count(self, name: str, **labels: str) -> None:
        """Add one to a counter."""
        self._counters[name].labels(**labels).inc()

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add a value to a histogram."""
        histogram = self._histograms[name]
        (histogram.labels(**labels) if labels else histogram).observe(value)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        """All metrics, with the label of the replica."""
        added = {"replica": self._replica} if self._replica else {}
        for metric in self._registry.collect():
            metric.samples = [sample._replace(labels={**sample.labels, **added}) for sample in metric.samples]
            yield metric


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
            if self._job.attempt == 1 and event.resumed_at is None:
                self._metrics.observe("heterostep_queue_seconds", time.time() - self._job.created_at)
            eta = None if event.eta_seconds is None else event.eta_seconds + self._rest
            self._tell(stage="denoising", step=self.step, progress=self._progress(), eta_seconds=eta)
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
