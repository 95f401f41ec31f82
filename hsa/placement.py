"""Where to put whole evaluations on a schedule: the placement with the least expected error.

Between two evaluations the sampler moves on forecast velocities. How wrong that is at a noise level, and what the
error has grown to at the end, can be said without data for Gaussian components: one whose clean values have standard
deviation s, in units of the noise, moves along x(sigma) = z r(sigma), r = sqrt((1 - sigma)^2 s^2 + sigma^2), so that

    v_s(sigma) = r'(sigma) = (sigma - (1 - sigma) s^2) / r(sigma)      is its velocity (times a constant z), and
    dx(0) = dx(sigma) * s / r(sigma)                                   is what becomes of an error made at sigma.

Detail (s < 1) bends late and forgets errors; what is decided early, such as where an object is, acts like a component
far above the noise (s >> 1): it bends early and multiplies errors. On the demo model with guidance an error made at
sigma .95 grows 30-fold, one at .8 3.5-fold, one at .2 shrinks to .8: the curve of s = 30. The squared final error of
every gap, summed over a spectrum of s, is the gap's cost, and dynamic programming over pairs of successive evaluations
(a forecast's slope needs two) finds the cheapest path from the first step to the end of sampling.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import cached_property

import torch
from torch import Tensor

SPECTRUM = (0.1, 30.0)
"""Smallest and largest standard deviation of the components, in units of the noise."""
DETAIL = 0.25
"""Exponent of a component's amplitude in s below s = 1: fine detail carries less, what is decided early does not."""
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
            sigmas: T + 1 falling noise levels; the last two may be equal.
            forecast: "hold", "taylor" or "ab2"; what is assumed of skipped steps.
            correct: whether the next evaluation corrects them in hindsight (`hindsight`).
            longest: no gap is longer than this many steps.
        """
        self.sigmas = torch.tensor(sigmas, dtype=torch.float64)
        self.forecast, self.correct = forecast, correct
        self.num_steps = len(sigmas) - 1
        self.longest = min(longest, self.num_steps)

    @cached_property
    def _radius(self) -> tuple[Tensor, Tensor]:
        """Sizes s [components, 1] and r(sigma_j) [components, T + 1]."""
        low, high = (math.log10(x) for x in SPECTRUM)
        s = torch.logspace(low, high, COMPONENTS, dtype=torch.float64)[:, None]
        return s, torch.sqrt(((1 - self.sigmas) * s) ** 2 + self.sigmas**2).clamp_min(1e-9)

    @cached_property
    def _amplitude(self) -> Tensor:
        """How much of each component there is: [components, 1]."""
        s = self._radius[0]
        return s.clamp_max(1.0) ** DETAIL

    @cached_property
    def velocities(self) -> Tensor:
        """v_s(sigma_j) times the components' amplitudes: [components, T + 1]."""
        s, radius = self._radius
        return self._amplitude * (self.sigmas - (1 - self.sigmas) * s**2) / radius

    @cached_property
    def growth(self) -> Tensor:
        """What an error made by sigma_j has become at the end, s / r(sigma_j): [components, T + 1]."""
        s, radius = self._radius
        return s / radius

    @cached_property
    def _gaps(self) -> tuple[Tensor, Tensor]:
        """Left ends [T, 1] and right ends [T, longest] of all gaps, those beyond the end clamped to T."""
        left = torch.arange(self.num_steps)[:, None]
        return left, (left + 1 + torch.arange(self.longest)).clamp_max(self.num_steps)

    def _moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is to be forecast over each gap, by a step along sigma as Euler's.

        Returns:
            The true displacement less that of holding v_l, [components, T, longest], and two moments of the skipped
            steps j, [T, longest]: sums over (sigma_{j+1} - sigma_j) of (sigma_j - sigma_l), and of
            (sigma_j - sigma_l) (sigma_j - sigma_i). They are integrals over the gap for ``ab2``.
        """
        (left, right), sigma, v = self._gaps, self.sigmas, self.velocities
        s_l, s_i = sigma[left], sigma[right]
        if self.forecast == "ab2":  # integrals over the whole gap; that of v_s is r
            radius, span = self._amplitude * self._radius[1], s_i - s_l
            moved = radius[:, right] - radius[:, left] - v[:, left] * span
            return moved, span**2 / 2, -(span**3) / 6
        h = sigma.diff()
        sums = torch.cat(
            [torch.zeros(3, 1, dtype=h.dtype), (torch.stack([h * sigma[:-1] ** p for p in range(3)])).cumsum(1)], 1
        )
        flow = torch.cat([torch.zeros_like(v[:, :1]), (h * v[:, :-1]).cumsum(1)], 1)
        m0, m1, m2 = sums[:, right] - sums[:, left + 1]
        moved = flow[:, right] - flow[:, left + 1] - v[:, left] * m0
        return moved, m1 - s_l * m0, m2 - (s_l + s_i) * m1 + s_l * s_i * m0

    @cached_property
    def table(self) -> Tensor:
        """The costs [longest + 1, T, longest], `UNREACHABLE` where a step would lie outside of the schedule."""
        (left, right), sigma, v = self._gaps, self.sigmas, self.velocities
        moved, first, second = self._moments()
        chord = (v[:, right] - v[:, left]) / _nonzero(sigma[right] - sigma[left])
        outside = left + torch.arange(self.longest) >= self.num_steps
        corrected = (right < self.num_steps) & self.correct
        costs = []
        for d in range(self.longest + 1):
            before = (left - d).clamp_min(0)
            slope, bend = torch.zeros_like(v[:, left]), torch.zeros_like(first)
            if d and self.forecast != "hold":
                span = (sigma[left] - sigma[before]).masked_fill(left == before, 1.0)
                slope = (v[:, left] - v[:, before]) / span
                bend = second / _nonzero(sigma[right] - sigma[before])
            error = moved - slope * first - corrected * (chord - slope) * (first + bend)
            cost = (error * self.growth[:, right]).square().sum(0)
            impossible = outside | ((left < d) if d else (left > 0))
            costs.append(cost.masked_fill(impossible, UNREACHABLE))
        return torch.stack(costs)

    def line_error(self, prev: int | None, last: int, step: int) -> float:
        """Expected squared error, at step `step`, of the line through the velocities of steps `prev` and `last`.

        Without `prev` the velocity of `last` is held.
        """
        sigma, error = self.sigmas, self.velocities[:, step] - self.velocities[:, last]
        if prev is not None:
            slope = (self.velocities[:, last] - self.velocities[:, prev]) / (sigma[last] - sigma[prev])
            error = error - slope * (sigma[step] - sigma[last])
        return float(error.square().sum())

    def path_cost(self, steps: Sequence[int]) -> float:
        """Expected error of evaluating exactly `steps` (ascending, the first is 0)."""
        before = [None, *steps]
        return sum(map(self.cost, before, steps, [*steps[1:], self.num_steps]))

    def cost(self, prev: int | None, left: int, right: int) -> float:
        """Cost of one gap, from step `left` to the next evaluation `right`; the one before `left` was `prev`."""
        d, gap = 0 if prev is None else left - prev, right - left - 1
        return UNREACHABLE if d > self.longest or gap >= self.longest else float(self.table[d, left, gap])


def _nonzero(span: Tensor) -> Tensor:
    """Spans in sigma as divisors. A schedule may end with a step without length, over which nothing changes."""
    return span.masked_fill(span == 0, 1.0)


class Paths:
    """The cheapest ways on from where a run stands, one for every number of evaluations that may still come.

    Exact: dynamic programming over (distance to the evaluation before, step), one layer per evaluation.

    Attributes:
        costs: the expected errors of the gaps that are left after the last evaluation, by the number of evaluations to
            come, from none on; `UNREACHABLE` where there is no such path.
    """

    def __init__(
        self,
        costs: GapCosts,
        required: Collection[int] = (),
        done: Sequence[int] = (0,),
        start: int = 1,
        most: int | None = None,
    ) -> None:
        """Search all.

        Args:
            costs: of the gaps.
            required: steps that are evaluated whatever they cost.
            done: evaluations so far, ascending; the last two matter.
            start: first step that may be evaluated.
            most: evaluations to come at most; None: as many as there are steps.
        """
        self._steps = t = costs.num_steps
        longest, last = costs.longest, done[-1]
        table = costs.table.clone()
        for step in required:  # no gap may jump over a required step
            for left in range(max(0, step - longest), step):
                table[:, left, step - left :] = UNREACHABLE
        table[:, last, : start - last - 1] = UNREACHABLE
        value = torch.full((longest + 1, t), UNREACHABLE, dtype=torch.float64)
        value[min(last - done[-2], longest) if len(done) > 1 else 0, last] = 0.0
        self._choices: list[Tensor] = []
        self._ends: list[int] = []
        self.costs: list[float] = []
        for layer in range((t - start if most is None else most) + 1):
            if layer:
                # reach[l, g]: best cost of a path whose last gap goes from l over g skipped steps.
                reach, choice = (value[:, :, None] + table).min(0)
                value = torch.full_like(value, UNREACHABLE)
                for gap in range(longest):
                    stop = t - gap - 1
                    if stop > 0:
                        value[gap + 1, gap + 1 :] = reach[:stop, gap]
                self._choices.append(choice)
            ends = torch.full_like(value, UNREACHABLE)
            for left in range(max(0, t - longest), t):
                ends[:, left] = value[:, left] + table[:, left, t - left - 1]
            self._ends.append(int(ends.argmin()))
            self.costs.append(min(float(ends.min()), UNREACHABLE))

    def steps(self, more: int) -> list[int]:
        """The steps of the cheapest path with `more` evaluations to come, ascending."""
        d, step = divmod(self._ends[more], self._steps)
        found = []
        for choice in reversed(self._choices[:more]):
            found.append(step)
            step, gap = step - d, d - 1
            d = int(choice[step, gap])
        assert self.costs[more] < UNREACHABLE, "`longest` is too short for the required steps"
        return found[::-1]


def best_steps(costs: GapCosts, count: int, required: Collection[int] = ()) -> list[int]:
    """Choose `count` steps to evaluate, among them step 0 and the required ones, with the least expected error."""
    return [0, *Paths(costs, required, most=count - 1).steps(count - 1)]


def add_steps(costs: GapCosts, steps: Sequence[int], more: int) -> list[int]:
    """Add `more` steps to the given ones, one after the other, each where it lowers the expected error most."""
    chosen = list(steps)
    for _ in range(min(more, costs.num_steps - len(chosen))):
        free = [i for i in range(costs.num_steps) if i not in set(chosen)]
        best = min(free, key=lambda i: (costs.path_cost(sorted([*chosen, i])), i))
        chosen = sorted([*chosen, best])
    return chosen
