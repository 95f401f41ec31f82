"""The result of a measurement: SGLang's keys, what they leave out, and a table for people."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..results.result import SCHEMA, row
from .client import Outcome
from .run import Measured
from .settings import LoadSettings
from .workload import units

PERCENTILES = (50, 90, 95, 99)
INTERRUPTED = "interrupted"


def result(settings: LoadSettings, measured: Measured, command: str, environment: dict[str, Any]) -> dict[str, Any]:
    """The result, ready for JSON; docs/benchmarks.md names its keys.

    Args:
        settings: what was asked.
        measured: what happened.
        command: that was given.
        environment: of the start.
    """
    made = [outcome for outcome in measured.outcomes if not outcome.error]
    failed = [outcome for outcome in measured.outcomes if outcome.error not in ("", INTERRUPTED)]
    seconds = measured.seconds
    outputs = len(made) * settings.num_outputs_per_prompt
    errors = Counter(outcome.error for outcome in failed)
    found = {
        "schema": SCHEMA,
        "verb": "serving",
        "command": command,
        "environment": environment,
        "settings": dataclasses.asdict(settings),
        "warmup_policy": f"{settings.warmup_requests} request(s) of the first kind before",
        "seeds": [settings.random_request_seed],
        "notes": [],
        "server": measured.server,
        "interrupted": measured.interrupted,
        "duration": seconds,
        "completed_requests": len(made),
        "completed_outputs": outputs,
        "failed_requests": len(failed),
        "interrupted_requests": sum(outcome.error == INTERRUPTED for outcome in measured.outcomes),
        "unsent_requests": measured.unsent,
        "throughput_qps": len(made) / seconds if seconds else 0.0,
        "output_throughput_ops": outputs / seconds if seconds else 0.0,
        "videos_per_hour": 3600 * outputs / seconds if seconds else 0.0,
        **_spread("latency", [outcome.latency for outcome in made]),
        **_spread("queue_time", [outcome.queue for outcome in made]),
        **_spread("inference_time", [outcome.inference for outcome in made]),
        **_memory([outcome.peak_memory_mb for outcome in made]),
        "stage_durations_mean": _stages(made),
        **_slo(settings, measured),
        "errors": dict(errors.most_common()),
        "error_messages": {outcome.error: outcome.message for outcome in reversed(failed)},
        "warmup": [_plain(outcome) for outcome in measured.warmup],
        "requests": [_plain(outcome) for outcome in measured.outcomes],
    }
    found["rows"] = [_row(found, made)]
    return found


def _row(found: dict[str, Any], made: Sequence[Outcome]) -> dict[str, Any]:
    """The figures in the form of all results."""
    names = ("completed_requests", "failed_requests", "videos_per_hour", "slo_attainment_rate")
    spreads = (f"{name}_{key}" for name in ("latency", "queue_time") for key in ("p50", "p90", "p99"))
    metrics = {name: found[name] for name in (*names, *spreads)}
    seconds = [outcome.latency for outcome in made if outcome.latency is not None]
    if seconds:
        metrics["latency_p50"] = {"value": found["latency_p50"], "low": min(seconds), "high": max(seconds)}
    return row({"load": "open" if np.isfinite(float(found["settings"]["request_rate"])) else "closed"}, metrics)


def _plain(outcome: Outcome) -> dict[str, Any]:
    return dataclasses.asdict(outcome)


def _spread(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean, median and percentiles of what is known; None where nothing is."""
    known = [value for value in values if value is not None]
    keys = ("mean", "median", *(f"p{percentile}" for percentile in PERCENTILES))
    if not known:
        return {f"{name}_{key}": None for key in keys}
    figures = [float(np.mean(known)), float(np.median(known)), *map(float, np.percentile(known, PERCENTILES))]
    return {f"{name}_{key}": figure for key, figure in zip(keys, figures, strict=True)}


def _memory(values: Sequence[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    figures = (max(known), float(np.mean(known)), float(np.median(known))) if known else (None, None, None)
    keys = ("peak_memory_mb_max", "peak_memory_mb_mean", "peak_memory_mb_median")
    return dict(zip(keys, figures, strict=True))


def _stages(made: Sequence[Outcome]) -> dict[str, float]:
    names = list(dict.fromkeys(name for outcome in made for name in outcome.stages))
    return {
        name: float(np.mean([outcome.stages[name] for outcome in made if name in outcome.stages])) for name in names
    }


def _slo(settings: LoadSettings, measured: Measured) -> dict[str, Any]:
    """Requests within their limit; of all that were sent and not interrupted. None where there is no limit."""
    limits = [_limit(settings, measured, outcome) for outcome in measured.outcomes]
    if not (settings.slo or settings.slo_seconds) or None in limits:
        return {"slo_attainment_rate": None, "slo_met_success": None}
    pairs = [
        (outcome, limit)
        for outcome, limit in zip(measured.outcomes, limits, strict=True)
        if outcome.error != INTERRUPTED and limit is not None
    ]
    met = sum(not outcome.error and (outcome.latency or 0.0) <= limit for outcome, limit in pairs)
    return {"slo_attainment_rate": met / len(pairs) if pairs else 0.0, "slo_met_success": met}


def _limit(settings: LoadSettings, measured: Measured, outcome: Outcome) -> float | None:
    if settings.slo_seconds is not None:
        return settings.slo_seconds
    warm = [other for other in measured.warmup if not other.error and other.latency is not None]
    if not warm:
        return None
    base, cost = units(warm[-1].body), units(outcome.body)
    ratio = cost / base if base and cost else 1.0
    return (warm[-1].latency or 0.0) * ratio * settings.slo_scale


def table(found: dict[str, Any]) -> str:
    """The result as lines for people."""
    rows = [
        ("completed requests", f"{found['completed_requests']}"),
        ("failed requests", f"{found['failed_requests']}"),
        *((f"  {kind}", f"{count}  {found['error_messages'][kind]}") for kind, count in found["errors"].items()),
        ("duration", _seconds(found["duration"])),
        ("requests per second", f"{found['throughput_qps']:.4g}"),
        ("videos per hour", f"{found['videos_per_hour']:.4g}"),
    ]
    if found["interrupted"]:
        rows.insert(
            0, ("interrupted", f"{found['interrupted_requests']} in flight, {found['unsent_requests']} not sent")
        )
    for name in ("latency", "queue_time", "inference_time"):
        if found[f"{name}_mean"] is not None:
            keys = ("mean", "p50", "p90", "p95", "p99")
            rows.append(
                (name.replace("_", " "), ", ".join(f"{key} {_seconds(found[f'{name}_{key}'])}" for key in keys))
            )
    if found["peak_memory_mb_max"] is not None:
        rows.append(("peak memory", f"{found['peak_memory_mb_max']:.0f} MiB"))
    if found["slo_attainment_rate"] is not None:
        rows.append(("within the limit", f"{found['slo_attainment_rate']:.1%}"))
    return "\n".join(f"{name:20} {value}" for name, value in rows)


def _seconds(value: float) -> str:
    return f"{value:.3g} s"
