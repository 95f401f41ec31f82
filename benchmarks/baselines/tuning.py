"""Setting every baseline to a wanted compute, so that methods are compared at equal cost.

Tuning sees calibration clips only. A method with several variants (orders, warm-ups, with or without a
polynomial) gets at each compute the variant with the least error there: a baseline is to be as strong as it
can be. All variants are judged on the first clip, and the best three on the others too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from . import dpcache
from .baseline import Baseline, steps_of_experts
from .cache_dit import CacheDiT
from .dpcache import DPCache
from .easycache import EasyCache
from .fewer_steps import FewerSteps, PlacedSteps
from .first_block import FirstBlock
from .magcache import MagCache, magnitude_ratios
from .pab import PAB
from .spectrum import Spectrum
from .taylorseer import TaylorSeer
from .teacache import TeaCache, fit_polynomial

KINDS: dict[str, type[Baseline]] = {
    "euler": FewerSteps,
    "unipc": FewerSteps,
    "unipc-placed": PlacedSteps,
    "first-block": FirstBlock,
    "magcache": MagCache,
    "taylorseer": TaylorSeer,
    "pab": PAB,
    "teacache": TeaCache,
    "easycache": EasyCache,
    "spectrum": Spectrum,
    "dpcache": DPCache,
    "cache-dit": CacheDiT,
}


_Found = tuple[float, float, Baseline]
"""Compute, error, variant."""
SHORTLIST = 3
"""Variants that are judged on more than one clip."""


@dataclass(frozen=True)
class Trial:
    """A calibration clip.

    Attributes:
        run: runs the pipeline on it with a number of steps and returns the final latents.
        dense: latents of its dense run.
    """

    run: Callable[[int], Tensor]
    dense: Tensor


def available(kind: str, pipe: Any, say: Callable[[str], None]) -> bool:
    """Whether a method can run here, with this pipeline; why not, if it cannot, is said."""
    reason = CacheDiT.unfit(pipe) if kind == CacheDiT.name else None
    if reason is not None:
        say(f"left out {kind}: {reason}")
    return reason is None


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
    judge = _Judge(kind, pipe, trials)
    for wanted in computes:
        compute, error, best = judge.best(candidates[wanted], wanted)
        others = best.refined()
        if others:
            compute, error, best = judge.best([best, *others], wanted)
        chosen[wanted] = best.settings
        shown = {k: v for k, v in best.settings.items() if k not in ("ratios", "polynomial")}
        say(f"{kind} at {wanted:g}: compute {compute:.3f}, relative L2 {error:.4f}, {shown}")
    return chosen


class _Judge:
    """Compares variants of a method on the calibration clips; what was run once serves again."""

    def __init__(self, kind: str, pipe: Any, trials: Sequence[Trial]) -> None:
        self.kind, self.pipe, self.trials = kind, pipe, trials
        self._seen: dict[tuple[str, int], tuple[float, float]] = {}

    def best(self, baselines: Sequence[Baseline], wanted: float) -> tuple[float, float, Baseline]:
        """Compute, error and variant of the best one that meets a compute."""
        first = self._near([(*self._measured(b, 1), b) for b in baselines], wanted)
        shortlist = sorted(first, key=lambda found: found[1])[:SHORTLIST]
        every = [(*self._measured(b, len(self.trials)), b) for _, _, b in shortlist]
        return min(self._near(every, wanted), key=lambda found: found[1])

    def _near(self, found: Sequence[_Found], wanted: float) -> list[_Found]:
        """Those whose compute is as wanted: a variant that misses it is no candidate, unless all of them do."""
        if self.kind == CacheDiT.name:
            # Its skipped steps cost one block: it is given the full steps that others have, and so more work.
            return list(found)
        nearest = min(abs(compute - wanted) for compute, _, _ in found)
        return [f for f in found if abs(f[0] - wanted) <= max(0.02, nearest + 0.005)]

    def _measured(self, baseline: Baseline, clips: int) -> tuple[float, float]:
        key = (repr(baseline.settings), clips)
        if key not in self._seen:
            self._seen[key] = _judge(baseline, self.pipe, self.trials[:clips])
        return self._seen[key]


def _candidates(
    kind: str, pipe: Any, dense_steps: int, computes: Sequence[float], trials: Sequence[Trial]
) -> Mapping[float, Sequence[Baseline]]:
    """Variants of a method, each tuned to each compute."""
    experts = steps_of_experts(pipe, dense_steps)
    dense_runs = [partial(trial.run, dense_steps) for trial in trials]
    if kind == "taylorseer":
        return {c: TaylorSeer.candidates(dense_steps, c, experts=experts) for c in computes}
    if kind == "spectrum":
        return {c: Spectrum.candidates(dense_steps, c, experts) for c in computes}
    if kind == "dpcache":
        return dpcache.candidates(pipe, dense_runs, dense_steps, computes)
    if kind in ("unipc-placed", "cache-dit"):
        placed = {c: PlacedSteps.candidates(pipe, dense_steps, c) for c in computes}
        if kind == "unipc-placed":
            return placed
        levels = {c: [p.settings["levels"] for p in placed[c]] for c in computes}
        return {c: CacheDiT.candidates(dense_steps, len(levels[c][0]), levels[c]) for c in computes}
    if kind == "pab":
        return {c: PAB.candidates(dense_steps) for c in computes}
    if kind == "magcache":
        ratios = _mean_ratios(pipe, dense_steps, trials)
        return {c: _magcaches(dense_steps, c, ratios, experts) for c in computes}
    families: list[Callable[..., Baseline]]
    if kind == "teacache":
        polynomial = fit_polynomial(pipe, dense_runs, dense_steps)
        families = [partial(TeaCache, dense_steps), partial(TeaCache, dense_steps, polynomial=polynomial)]
    elif kind == "easycache":
        families = [partial(EasyCache, dense_steps, warmup=warmup) for warmup in (2, 4)]
    else:
        families = [partial(FirstBlock, dense_steps)]
    out: dict[float, list[Baseline]] = {c: [] for c in computes}
    for family in families:

        def measure(threshold: float, family: Callable[..., Baseline] = family) -> float:
            return _judge(family(threshold=threshold), pipe, trials)[0]

        for wanted, threshold in bisect_thresholds(measure, computes).items():
            out[wanted].append(family(threshold=threshold))
    return out


def _magcaches(dense_steps: int, compute: float, ratios: list[float], experts: Sequence[range]) -> list[MagCache]:
    """For every limit and retention the threshold that gives a compute, as far as it can be had."""
    found = []
    for max_skip in (2, 3, 4, 6, 10):
        for retention in (0.05, 0.1, 0.2):
            family = partial(MagCache, dense_steps, ratios=ratios, max_skip=max_skip, retention=retention)

            def measure(threshold: float, family: Callable[..., MagCache] = family) -> float:
                return family(threshold=threshold).predicted_compute(experts)

            thresholds = bisect_thresholds(measure, [compute], high=100.0, rounds=30, tolerance=1e-9)
            found.append(family(threshold=thresholds[compute]))
    return _within(found, compute, 0.5 / dense_steps, experts)


def _within(baselines: list[Any], wanted: float, slack: float, experts: Sequence[range]) -> list[Any]:
    """Those whose predicted compute is within `slack` of the wanted one, or the nearest one."""
    near = [b for b in baselines if abs(b.predicted_compute(experts) - wanted) <= slack + 1e-9]
    return near or [min(baselines, key=lambda b: abs(b.predicted_compute(experts) - wanted))]


def _mean_ratios(pipe: Any, dense_steps: int, trials: Sequence[Trial]) -> list[float]:
    """Magnitude ratios, mean over clips and branches: the stock hook reads one list for all branches."""
    found = [magnitude_ratios(pipe, partial(trial.run, dense_steps), dense_steps) for trial in trials]
    return [float(r) for r in np.mean([ratios for run in found for ratios in run.values()], axis=0)]


def _judge(baseline: Baseline, pipe: Any, trials: Sequence[Trial]) -> tuple[float, float]:
    """Mean compute, and geometric mean of the relative L2 errors against the dense latents, over calibration clips."""
    computes, errors = [], []
    for trial in trials:
        with baseline.applied(pipe):
            latents = trial.run(baseline.steps)
        computes.append(baseline.compute)
        error = float((latents - trial.dense).norm() / trial.dense.norm())
        errors.append(math.log(max(error, 1e-9)) if math.isfinite(error) else math.inf)
    return float(np.mean(computes)), float(np.exp(np.mean(errors)))
