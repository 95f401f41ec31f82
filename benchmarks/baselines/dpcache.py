"""DPCache (arXiv 2602.22654): steps chosen by dynamic programming over measured costs of skipping. After the paper."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .baseline import Baseline, steps_of_experts, transformers_of
from .forecast import Planned, Recorder, extrapolation
from .replaced import replaced

FORCED = 3
"""First steps of each transformer that are always evaluated."""


class DPCache(Baseline):
    """Evaluates given steps; between, a polynomial in the step goes on from the last evaluations.

    Args:
        dense_steps: as in `Baseline`.
        evaluated: steps that are evaluated (`cheapest_path`).
        order: of the polynomial.
        whole: forecast the model's output; else what enters its output head, as published.
    """

    name = "dpcache"

    def __init__(self, dense_steps: int, *, evaluated: Sequence[int], order: int = 2, whole: bool = False) -> None:
        super().__init__(dense_steps, evaluated=list(evaluated), order=order, whole=whole)

    @contextmanager
    def _attached(self, pipe: Any) -> Iterator[None]:
        s = self.settings
        with ExitStack() as stack:
            for transformer in transformers_of(pipe):
                branch = partial(Planned, s["evaluated"], s["order"])
                stack.enter_context(replaced(pipe, transformer, self.name, branch, whole=s["whole"]))
            yield

    def predicted_compute(self) -> float:
        """The share of steps that will be evaluated."""
        return len(self.settings["evaluated"]) / self.dense_steps


def skipping_costs(pipe: Any, runs: Sequence[Callable[[], Any]], steps: int) -> dict[bool, NDArray[np.float64]]:
    """Calibrate: what it costs to skip from one evaluation to the next, given the one before.

    Args:
        pipe: the pipeline.
        runs: each calls it once, densely.
        steps: denoising steps.

    Returns:
        For both values of ``whole`` (see `DPCache`) [T, T, T + 1]: cost[i, k, j] is the sum over the steps between k
        and j of the relative L2 error of the line through i and k, mean over branches and runs; inf where i, k and j
        are not in order, or not of one transformer.
    """
    experts = [set(own) for own in steps_of_experts(pipe, steps)]
    costs = {whole: np.zeros((steps, steps, steps + 1)) for whole in (False, True)}
    for run in runs:
        branches: dict[bool, list[Recorder]] = {False: [], True: []}

        def record(whole: bool, kept: dict[bool, list[Recorder]] = branches) -> Recorder:
            kept[whole].append(Recorder())
            return kept[whole][-1]

        with ExitStack() as stack:
            for transformer in transformers_of(pipe):
                for whole in costs:
                    make = partial(record, whole)
                    stack.enter_context(replaced(pipe, transformer, f"recorder {whole}", make, whole=whole))
            run()
        for whole, kept in branches.items():
            for branch in kept:
                costs[whole] += _branch_costs(branch, steps) * len(experts) / (len(kept) * len(runs))
    for before in range(steps):
        for step in range(steps):
            for following in range(steps + 1):
                together = any({before, step, following - 1} <= own for own in experts)
                if not (before < step < following and together):
                    costs[False][before, step, following] = costs[True][before, step, following] = np.inf
    return costs


def _branch_costs(branch: Recorder, steps: int) -> NDArray[np.float64]:
    """As `skipping_costs`, of one branch, which has none at another transformer's steps."""
    costs = np.zeros((steps, steps, steps + 1))
    own = [step for step, _ in branch.history]
    rows = np.stack([np.concatenate([x.double().flatten().numpy() for x in streams]) for _, streams in branch.history])
    gram = rows @ rows.T
    at = {step: row for row, step in enumerate(own)}
    for step in own:
        for before in (b for b in own if b < step):
            total = 0.0
            for following in range(step + 1, own[-1] + 2):
                costs[before, step, following] = total
                if following in at:
                    one, two = extrapolation((before, step), following)
                    i, k, t = at[before], at[step], at[following]
                    weights, rows_of = np.array([one, two, -1.0]), [i, k, t]
                    error = weights @ gram[np.ix_(rows_of, rows_of)] @ weights
                    total += float(np.sqrt(max(error, 0.0) / gram[t, t]))
    return costs


def cheapest_path(costs: NDArray[np.float64], count: int, forced: Collection[int]) -> list[int]:
    """The `count` steps, among them the forced ones (0 and 1 are), whose skipped steps cost least.

    Dynamic programming over pairs of successive evaluations. Where another transformer takes over, its own first steps
    are forced, so that no skipped step lies between.
    """
    steps = len(costs)
    table = np.where(np.isinf(costs), 1e30, costs)
    for step in range(steps - 1):  # from one step to the next nothing is skipped, whatever was before
        table[: step + 1, step, step + 1] = 0.0
    for step in forced:  # no gap may jump over a forced step
        table[:, :step, step + 1 :] = 1e30
    value = np.full((steps, steps), 1e30)  # [before, last]
    value[0, 1] = 0.0
    choices = []
    for _ in range(count - 2):
        reach = value[:, :, None] + table[:, :, :steps]  # [before, last, next]
        choices.append(reach.argmin(0))
        value = reach.min(0)
    before, last = np.unravel_index(int((value + table[:, :, steps]).argmin()), value.shape)
    path = [int(last), int(before)]
    for choice in reversed(choices):
        path.append(int(choice[path[-1], path[-2]]))
    return path[::-1]


def candidates(
    pipe: Any, runs: Sequence[Callable[[], Any]], dense_steps: int, computes: Sequence[float]
) -> dict[float, list[DPCache]]:
    """Both places to forecast at, and both orders."""
    experts = steps_of_experts(pipe, dense_steps)
    forced = {step for own in experts for step in own[:FORCED]}
    found: dict[float, list[DPCache]] = {c: [] for c in computes}
    for whole, costs in skipping_costs(pipe, runs, dense_steps).items():
        for compute in computes:
            count = max(round(compute * dense_steps), len(forced))
            path = cheapest_path(costs, count, forced)
            found[compute] += [DPCache(dense_steps, evaluated=path, order=order, whole=whole) for order in (1, 2)]
    return found
