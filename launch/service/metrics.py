"""Metrics for Prometheus. They count from the start of the process; Prometheus' `rate` knows what a restart is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

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
