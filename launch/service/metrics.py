"""Figures for Prometheus, kept in the job store: they survive a restart, and every process tells the same ones."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from .condition import StoreUnavailable
from .jobs import JobStore
from .runner import Runner

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


class Tally:
    """Counts in memory, written to the job store now and then: a kill loses the last two seconds of them.

    How jobs ended is not counted here but in the transaction that ends them, so those figures are exact.
    """

    def __init__(self) -> None:
        """Start with nothing counted."""
        self._lock = threading.Lock()
        self._changes: defaultdict[tuple[str, str], float] = defaultdict(float)

    def count(self, name: str, **labels: str) -> None:
        """Add one to a counter."""
        with self._lock:
            self._changes[name, json.dumps(labels)] += 1.0

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add a value to a histogram."""
        bucket = next((f"{edge:g}" for edge in HISTOGRAMS[name][2] if value <= edge), "+Inf")
        with self._lock:
            self._changes[name, json.dumps({**labels, "le": bucket})] += 1.0
            self._changes[name, json.dumps({**labels, "le": "sum"})] += value

    def flush(self, store: JobStore) -> None:
        """Write what was counted since the last time."""
        with self._lock:
            changes, self._changes = self._changes, defaultdict(float)
        if not changes:
            return
        try:
            store.add_figures(changes)
        except BaseException:
            with self._lock:
                for key, value in changes.items():
                    self._changes[key] += value
            raise


class _Figures:
    """A collector in prometheus_client's sense."""

    def __init__(self, store: JobStore, tally: Tally, runners: Sequence[Runner]) -> None:
        self._store, self._tally, self._runners = store, tally, runners

    def collect(self) -> Iterator[Metric]:
        with contextlib.suppress(StoreUnavailable):  # what cannot be written now is told later
            self._tally.flush(self._store)
        figures: defaultdict[str, dict[tuple[tuple[str, str], ...], float]] = defaultdict(dict)
        for (name, labels), value in self._store.figures().items():
            pairs = _pairs(name, labels)
            if pairs is not None:
                figures[name][pairs] = value
        for name, (text, keys) in COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=keys)
            for pairs, value in figures[name].items():
                counter.add_metric([dict(pairs)[label] for label in keys], value)
            yield counter
        for name, (text, keys, edges) in HISTOGRAMS.items():
            yield _histogram(name, text, keys, edges, figures[name])
        yield from self._gauges()

    def _gauges(self) -> Iterator[Metric]:
        counts = self._store.counts()
        yield GaugeMetricFamily("heterostep_queue_depth", "Jobs that wait.", value=counts.get("queued", 0))
        yield GaugeMetricFamily("heterostep_running", "Jobs that are made.", value=counts.get("in_progress", 0))
        yield GaugeMetricFamily("heterostep_result_bytes", "Size of all results.", value=self._store.result_bytes())
        ready = GaugeMetricFamily("heterostep_runner_ready", "1 if a job could run there now.", labels=["runner"])
        age = GaugeMetricFamily("heterostep_heartbeat_age_seconds", "Since the last sign of life.", labels=["runner"])
        for index, runner in enumerate(self._runners):
            ready.add_metric([str(index)], float(runner.ready))
            age.add_metric([str(index)], runner.heartbeat_age)
        yield ready
        yield age


def _pairs(name: str, labels: str) -> tuple[tuple[str, str], ...] | None:
    """The labels of a figure; None for one that is damaged, or of another version."""
    if name in COUNTERS:
        wanted = {*COUNTERS[name][1]}
    elif name in HISTOGRAMS:
        wanted = {*HISTOGRAMS[name][1], "le"}
    else:
        return None
    try:
        found = json.loads(labels)
    except (TypeError, ValueError):
        return None
    if not isinstance(found, dict) or found.keys() != wanted or not all(isinstance(v, str) for v in found.values()):
        return None
    return tuple(found.items())


def _histogram(
    name: str,
    text: str,
    labels: Sequence[str],
    edges: Sequence[float],
    figures: Mapping[tuple[tuple[str, str], ...], float],
) -> Metric:
    found: defaultdict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for pairs, value in figures.items():
        values = dict(pairs)
        found[tuple(values[label] for label in labels)][values["le"]] = value
    histogram = HistogramMetricFamily(name, text, labels=labels)
    names = [*(f"{edge:g}" for edge in edges), "+Inf"]
    for key, counts in found.items():
        totals = accumulate(counts.get(edge, 0.0) for edge in names)
        histogram.add_metric(key, list(zip(names, totals, strict=True)), counts.get("sum", 0.0))
    return histogram


class Metrics:
    """The page `/metrics`."""

    def __init__(self, store: JobStore, tally: Tally, runners: Sequence[Runner]) -> None:
        """Gather from the job store, what is not yet written to it, and the runners of this process."""
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Figures(store, tally, runners))
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)
