"""Where to put whole evaluations on a schedule: the placement with the least expected error.

Between two evaluations the sampler moves on forecast velocities. How wrong that is depends on how fast velocity bends
at that noise level, which can be said without data: if a component of the clean video is Gaussian with standard
deviation s (in units of the noise), the flow moves it along x(sigma) = z sqrt((1 - sigma)^2 s^2 + sigma^2), so
its velocity is

    v_s(sigma) = (sigma - (1 - sigma) s^2) / sqrt((1 - sigma)^2 s^2 + sigma^2)    (times a constant z).

Latents hold components of many sizes, coarse structure above the noise's size and detail below it. Summing the squared
error of every gap over a spectrum of s gives a cost for each gap; the cheapest path from the first step to the end of
sampling is found by dynamic programming over pairs of successive evaluations (the slope of a forecast needs two).
Measured on the demo model the placement comes within 2 dB of the best one chosen with all velocities known, and gains
8 dB over even spacing; see benchmarks/reports/pareto-demo.md.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import cached_property

import torch
from torch import Tensor

SPECTRUM = (0.1, 3.0)
"""Smallest and largest standard deviation of the components, in units of the noise."""
COMPONENTS = 24
UNREACHABLE = 1e30


class GapCosts:
    """Expected squared error of every gap of a schedule, as a table.

    ``table[d, l, g]`` is the cost of evaluating step l and next step l + g + 1 (which may be T, the end) when the
    evaluation before l was step l - d; d = 0 means that there was none.
    """

    def __init__(self, sigmas: Sequence[float], forecast: str, correct: bool, longest: int) -> None:
        """Prepare for a schedule.

        Args:
            sigmas: T + 1 falling noise levels.
            forecast: "hold", "taylor" or "ab2"; what is assumed of skipped steps.
            correct: whether the next evaluation corrects them in hindsight (`velocity.VelocityCache`).
            longest: no gap is longer than this many steps.
        """
        self.sigmas = torch.tensor(sigmas, dtype=torch.float64)
        self.forecast, self.correct = forecast, correct
        self.num_steps = len(sigmas) - 1
        self.longest = min(longest, self.num_steps)

    def _velocities(self) -> Tensor:
        """v_s(sigma_j): [components, T + 1], weighted by sqrt(s): detail is plentiful but small."""
        low, high = (math.log10(x) for x in SPECTRUM)
        s = torch.logspace(low, high, COMPONENTS, dtype=torch.float64)[:, None]
        clean = (1 - self.sigmas) * s
        v = (self.sigmas - clean * s) / torch.sqrt(clean**2 + self.sigmas**2).clamp_min(1e-9)
        return v * s**0.25

    @cached_property
    def table(self) -> Tensor:
        """The costs [longest + 1, T, longest], `UNREACHABLE` where a step would lie outside of the schedule."""
        t, longest, sigma = self.num_steps, self.longest, self.sigmas
        v = self._velocities()
        h = sigma[1:] - sigma[:-1]
        zero = torch.zeros(1, dtype=torch.float64)
        sums = [torch.cat([zero, torch.cumsum(h * sigma[:-1] ** power, 0)]) for power in range(3)]
        flow = torch.cat([torch.zeros_like(v[:, :1]), torch.cumsum(h * v[:, :-1], 1)], 1)
        left = torch.arange(t)
        right = (left[:, None] + 1 + torch.arange(longest)[None]).clamp_max(t)  # [T, longest]
        after = left[:, None] + 1
        # Moments over the skipped steps l < j < i: sum h_j, sum h_j (s_j - s_l), sum h_j (s_j - s_l)(s_j - s_i).
        s_l, s_i = sigma[left][:, None], sigma[right]
        m0, m1, m2 = (total[right] - total[after] for total in sums)
        first = m1 - s_l * m0
        second = m2 - (s_l + s_i) * m1 + s_l * s_i * m0
        moved = flow[:, right] - flow[:, after] - v[:, left][:, :, None] * m0  # [S, T, longest]
        chord = (v[:, right] - v[:, left][:, :, None]) / (s_i - s_l)
        ends = (left[:, None] + 1 + torch.arange(longest)[None]) > t
        corrected = (right < t) if self.correct else torch.zeros_like(ends)
        costs = []
        for d in range(longest + 1):
            before = (left - d).clamp_min(0)
            span = sigma[left] - sigma[before]
            slope = torch.where(
                span != 0, (v[:, left] - v[:, before]) / span.where(span != 0, torch.ones_like(span)), 0.0
            )
            slope = torch.zeros_like(slope) if d == 0 or self.forecast == "hold" else slope
            error = moved - slope[:, :, None] * first
            bend = (
                second / (s_i - sigma[before][:, None]) if d and self.forecast != "hold" else torch.zeros_like(second)
            )
            error = error - corrected * (chord - slope[:, :, None]) * (first + bend)
            cost = error.square().sum(0)
            impossible = ends | ((left < d)[:, None] if d else (left > 0)[:, None])
            costs.append(cost.masked_fill(impossible, UNREACHABLE))
        return torch.stack(costs)

    def path_cost(self, steps: Sequence[int]) -> float:
        """Expected error of evaluating exactly `steps` (ascending, the first is 0)."""
        total, before = 0.0, None
        for step, following in zip(steps, [*steps[1:], self.num_steps], strict=True):
            d, gap = 0 if before is None else step - before, following - step - 1
            total += UNREACHABLE if d > self.longest or gap >= self.longest else float(self.table[d, step, gap])
            before = step
        return total


def best_steps(costs: GapCosts, count: int, required: Collection[int] = ()) -> list[int]:
    """Choose `count` steps to evaluate, among them step 0 and the required ones, with the least expected error.

    Exact: dynamic programming over (distance to the evaluation before, step), one layer per evaluation.
    """
    t, longest = costs.num_steps, costs.longest
    table = costs.table.clone()
    for step in required:  # no gap may jump over a required step
        for left in range(max(0, step - longest), step):
            table[:, left, step - left :] = UNREACHABLE
    value = torch.full((longest + 1, t), UNREACHABLE, dtype=torch.float64)
    value[0, 0] = 0.0
    choices: list[Tensor] = []
    for _ in range(count - 1):
        # reach[l, g]: best cost of a path whose last gap goes from l over g skipped steps.
        reach, choice = (value[:, :, None] + table).min(0)
        value = torch.full_like(value, UNREACHABLE)
        for gap in range(longest):
            stop = t - gap - 1
            if stop > 0:
                value[gap + 1, gap + 1 :] = reach[:stop, gap]
        choices.append(choice)
    ends = torch.full_like(value, UNREACHABLE)
    for left in range(max(0, t - longest), t):
        ends[:, left] = value[:, left] + table[:, left, t - left - 1]
    d, step = divmod(int(ends.argmin()), t)
    steps = [step]
    for choice in reversed(choices):
        step, gap = step - d, d - 1
        d = int(choice[step, gap])
        steps.append(step)
    return steps[::-1]


def add_steps(costs: GapCosts, steps: Sequence[int], more: int) -> list[int]:
    """Add `more` steps to the given ones, one after the other, each where it lowers the expected error most."""
    chosen = list(steps)
    for _ in range(min(more, costs.num_steps - len(chosen))):
        free = [i for i in range(costs.num_steps) if i not in set(chosen)]
        best = min(free, key=lambda i: (costs.path_cost(sorted([*chosen, i])), i))
        chosen = sorted([*chosen, best])
    return chosen
