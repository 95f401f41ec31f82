"""Setting every baseline to a wanted compute, so that methods are compared at equal cost.

Tuning sees calibration clips only. A method with several variants (orders, warm-ups, with or without a
polynomial) gets at each compute the variant with the least error there: a baseline is to be as strong as it
can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from .baseline import Baseline, steps_of_experts
from .easycache import EasyCache
from .fewer_steps import FewerSteps
from .first_block import FirstBlock
from .magcache import MagCache, magnitude_ratios
from .pab import PAB
from .taylorseer import TaylorSeer
from .teacache import TeaCache, fit_polynomial

KINDS: dict[str, type[Baseline]] = {
    "euler": FewerSteps,
    "unipc": FewerSteps,
    "first-block": FirstBlock,
    "magcache": MagCache,
    "taylorseer": TaylorSeer,
    "pab": PAB,
    "teacache": TeaCache,
    "easycache": EasyCache,
}


@dataclass(frozen=True)
class Trial:
    """A calibration clip.

    Attributes:
        run: runs the pipeline on it with a number of steps and returns the final latents.
        dense: latents of its dense run.
    """

    run: Callable[[int], Tensor]
    dense: Tensor


def build(kind: str, dense_steps: int, settings: dict[str, Any]) -> Baseline:
    """Make a baseline from its name and settings."""
    return KINDS[kind](dense_steps, **settings)


def bisect_thresholds(
    measure: Callable[[float], float],
    computes: Sequence[float],
    *,
    low: float = 1e-4,
    high: float = 4.0,
    tolerance: float = 0.01,
    rounds: int = 9,
) -> dict[float, float]:
    """Find thresholds whose compute is as wanted.

    Args:
        measure: threshold -> compute, which falls as the threshold rises (it may do so in steps).
        computes: wanted ones.
        low, high: where to search, by the logarithm.
        tolerance: good enough.
        rounds: measurements for each wanted compute, at most; what is measured serves all of them.

    Returns:
        Wanted compute -> the measured threshold that comes nearest.
    """
    seen: dict[float, float] = {}

    def compute_at(threshold: float) -> float:
        if threshold not in seen:
            seen[threshold] = measure(threshold)
        return seen[threshold]

    compute_at(low), compute_at(high)
    for wanted in computes:
        for _ in range(rounds):
            if min(abs(c - wanted) for c in seen.values()) <= tolerance:
                break
            below = [t for t, c in seen.items() if c > wanted]
            above = [t for t, c in seen.items() if c <= wanted]
            if not below or not above:
                break
            compute_at(math.exp(0.5 * (math.log(max(below)) + math.log(min(above)))))
    return {wanted: min(seen, key=lambda t: abs(seen[t] - wanted)) for wanted in computes}


def tune(
    kind: str,
    pipe: Any,
    dense_steps: int,
    computes: Sequence[float],
    trials: Sequence[Trial],
    say: Callable[[str], None] = lambda text: None,
) -> dict[float, dict[str, Any]]:
    """Settings of one method for every wanted compute.

    Args:
        kind: a key of `KINDS`.
        pipe: a stock pipeline.
        dense_steps: steps of the dense run.
        computes: shares of its work.
        trials: calibration clips.
        say: gets a line for every decision.

    Returns:
        Wanted compute -> settings for `build`.
    """
    if kind in ("euler", "unipc"):
        return {c: {"evaluated": max(round(c * dense_steps), 1), "solver": kind} for c in computes}
    candidates = _candidates(kind, pipe, dense_steps, computes, trials)
    chosen: dict[float, dict[str, Any]] = {}
    judged: dict[str, tuple[float, float]] = {}
    for wanted in computes:
        results = []
        for baseline in candidates[wanted]:
            key = repr(baseline.settings)
            if key not in judged:
                judged[key] = _judge(baseline, pipe, trials)
            results.append((*judged[key], baseline))
        # A variant that misses the compute is no candidate, unless all of them do.
        nearest = min(abs(compute - wanted) for compute, _, _ in results)
        allowed = [r for r in results if abs(r[0] - wanted) <= max(0.02, nearest + 0.005)]
        compute, error, best = min(allowed, key=lambda r: r[1])
        chosen[wanted] = best.settings
        shown = {k: v for k, v in best.settings.items() if k not in ("ratios", "polynomial")}
        say(f"{kind} at {wanted:g}: compute {compute:.3f}, relative L2 {error:.4f}, {shown}")
    return chosen


def _candidates(
    kind: str, pipe: Any, dense_steps: int, computes: Sequence[float], trials: Sequence[Trial]
) -> dict[float, list[Baseline]]:
    """Variants of a method, each tuned to each compute."""
    experts = steps_of_experts(pipe, dense_steps)
    if kind == "taylorseer":
        return {c: list(TaylorSeer.candidates(dense_steps, c, experts=experts)) for c in computes}
    if kind == "pab":
        return {c: list(PAB.candidates(dense_steps)) for c in computes}
    if kind == "magcache":
        ratios = _mean_ratios(pipe, dense_steps, trials)
        families = [
            lambda t, k=k, r=r: MagCache(dense_steps, threshold=t, ratios=ratios, max_skip=k, retention=r)
            for k in (2, 3, 4, 6, 10)
            for r in (0.05, 0.1, 0.2)
        ]
        measures = [lambda t, f=f: f(t).predicted_compute(experts) for f in families]
        found = [bisect_thresholds(m, computes, high=100.0, rounds=30, tolerance=1e-9) for m in measures]
        tuned = {c: [f(t[c]) for f, t in zip(families, found, strict=True)] for c in computes}
        return {c: _within(tuned[c], c, 0.5 / dense_steps, experts) for c in computes}
    if kind == "teacache":
        runs = [lambda t=t: t.run(dense_steps) for t in trials]
        polynomial = fit_polynomial(pipe, runs, dense_steps)
        families = [
            lambda t: TeaCache(dense_steps, threshold=t),
            lambda t: TeaCache(dense_steps, threshold=t, polynomial=polynomial),
        ]
    elif kind == "easycache":
        families = [lambda t, w=w: EasyCache(dense_steps, threshold=t, warmup=w) for w in (2, 4)]
    else:
        families = [lambda t: FirstBlock(dense_steps, threshold=t)]
    out: dict[float, list[Baseline]] = {c: [] for c in computes}
    for family in families:
        thresholds = bisect_thresholds(lambda t, f=family: _judge(f(t), pipe, trials)[0], computes)
        for c in computes:
            out[c].append(family(thresholds[c]))
    return out


def _within(baselines: list[Any], wanted: float, slack: float, experts: Sequence[range]) -> list[Any]:
    """Those whose predicted compute is within `slack` of the wanted one, or the nearest one."""
    near = [b for b in baselines if abs(b.predicted_compute(experts) - wanted) <= slack + 1e-9]
    return near or [min(baselines, key=lambda b: abs(b.predicted_compute(experts) - wanted))]


def _mean_ratios(pipe: Any, dense_steps: int, trials: Sequence[Trial]) -> list[float]:
    """Magnitude ratios, mean over clips and branches: the stock hook reads one list for all branches."""
    found = [magnitude_ratios(pipe, lambda t=t: t.run(dense_steps), dense_steps) for t in trials]
    return [float(r) for r in np.mean([ratios for run in found for ratios in run.values()], axis=0)]


def _judge(baseline: Baseline, pipe: Any, trials: Sequence[Trial]) -> tuple[float, float]:
    """Mean compute and mean relative L2 error against the dense latents, over the calibration clips."""
    computes, errors = [], []
    for trial in trials:
        with baseline.applied(pipe):
            latents = trial.run(baseline.steps)
        computes.append(baseline.compute)
        errors.append(float((latents - trial.dense).norm() / trial.dense.norm()))
    return float(np.mean(computes)), float(np.mean(errors))
