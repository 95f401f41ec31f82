"""Means over clips with their standard errors, and paired differences: what every report here is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Results = Sequence[dict[str, Any]]
"""One for each clip, method and compute."""


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the mean (nan for fewer than two values)."""
    array = np.array(values, dtype=float)
    if not len(array):
        return math.nan, math.nan
    return float(array.mean()), float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else math.nan


def time_ratio(results: Results, name: str = "seconds") -> tuple[float, float]:
    """Median over clips of a time over the dense time beside it, ``dense_`` and its name; quartile distance."""
    ratios = [r[name] / r[f"dense_{name}"] for r in results if r[f"dense_{name}"]]
    if not ratios:
        return math.nan, math.nan
    low, middle, high = np.percentile(ratios, (25, 50, 75))
    return float(middle), float(high - low)


def paired(first: Results, second: Results, value: Callable[[dict[str, Any]], float | None]) -> list[float]:
    """Differences first - second over the clips that both have."""
    other = {r["clip"]: value(r) for r in second}
    pairs = [(value(r), other.get(r["clip"])) for r in first]
    return [a - b for a, b in pairs if a is not None and b is not None]


def summary_of(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard error, by name."""
    return dict(zip(("mean", "error"), mean_and_error(values), strict=True))


def plus_minus(found: dict[str, float] | None, *, digits: int = 2, sign: bool = False) -> str:
    """``mean ± error`` as text; a dash for nothing."""
    if not found:
        return "–"
    mean = f"{found['mean']:{'+' if sign else ''}.{digits}f}"
    return mean if math.isnan(found["error"]) else f"{mean} ± {found['error']:.{digits}f}"
