"""The plan of a run: tokens of each step, fixed at its start, or made anew as a promised quality needs it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ...errors import ConfigError
from ...hsa.distance import Distance
from ...hsa.planner import StepPlanner
from ...hsa.policies import gap_costs

# A run makes its plan by these functions: they take it as it is, without its type, so that there is no circle.


def make_plan(run: Any) -> None:
    """Fix the size of every step; one after a checkpoint that would read K/V of before it is full."""
    while True:
        try:
            _begin_plan(run)
        except ConfigError as error:
            added = sum(reason == "checkpoint" for reason in run.forced.values())
            if not added:
                raise
            raise ConfigError(
                f"{str(error).rstrip('.')}; {added} of these steps follow a checkpoint, so that a larger "
                f'checkpoint_every than {run.every} would do too, or policy="steps".'
            ) from error
        counts: Sequence[int] | None = getattr(run.planner, "counts", None)
        run.counts = list(counts) if counts is not None and len(counts) == run.num_steps else None
        if run.sharding is not None:
            run.counts = run.sharding.agreement.counts(run.counts, run.num_steps)
        readers = [reader for i in sorted(run.restarts) if (reader := run.reads_kv(i)) is not None]
        if not readers:
            return
        # More full steps may move the others, and with them what is needed.
        run.forced |= dict.fromkeys(readers, "checkpoint")


def _begin_plan(run: Any) -> None:
    """Let the planner fix its counts."""
    arguments = (run.sigmas, run.grid.num_tokens, run.batch_size, frozenset(run.forced))
    if isinstance(run.planner, StepPlanner):
        switches = frozenset(i for i, reason in run.forced.items() if reason == "expert switch")
        run.planner.begin(*arguments, switches, run.conditioned)
    elif hasattr(run.planner, "begin"):
        run.planner.begin(*arguments)


def adapt_plan(run: Any, index: int) -> None:
    """With a promised quality, plan the steps from `index` on anew, if the step before has shown anything new."""
    planner, sharding = run.own_planner, run.sharding
    if planner is None or not planner.adapts or not run.records or not run.records[-1].active:
        return
    if sharding is None or sharding.agreement.leads:
        measured, span = run.replays.seen
        planner.adapt(index, _evaluated(run), measured, None if span is None else float(span))
    counts = planner.counts if sharding is None else sharding.agreement.counts(planner.counts, run.num_steps)
    assert counts is not None, "plans that adapt are known"
    take_counts(run, counts)


def take_counts(run: Any, counts: Sequence[int]) -> None:
    """Go on with a plan that adapts."""
    assert run.own_planner is not None
    run.own_planner.counts, run.counts = list(counts), list(counts)


def estimated_psnr(run: Any) -> float | None:
    """How near the run, or what of it is planned, comes to the dense one; see `HSAReport`."""
    planner, (measured, span) = run.own_planner, run.replays.seen
    whole = run.config.policy in ("joint", "steps") and run.forecast in ("taylor", "none")
    if planner is None or span is None or not whole or not run.records:
        return None
    ahead = range(run.records[-1].step + 1, run.num_steps)
    steps = _evaluated(run) + [i for i in ahead if run.count_at(i) == run.grid.num_tokens]
    if steps[:1] != [0]:  # begun in the middle
        return None
    longest = max(b - a for a, b in pairwise([*steps, run.num_steps]))
    return Distance(gap_costs(run.sigmas, planner.config, longest)).decibels(steps, measured, float(span))


def _evaluated(run: Any) -> list[int]:
    """Steps that evaluated every token so far."""
    return [record.step for record in run.records if record.active == record.total]
