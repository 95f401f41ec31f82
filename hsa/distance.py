"""How far a run ends from the dense one, estimated from what its evaluations show, and how many more a promise needs.

`placement` knows what every gap adds to the error at the end, and what residual it would show (`hindsight`), for
components of an assumed size. The residual that a gap did show says how much more, or less, there is in this video: its
part of the error is scaled by that ratio. A gap that nothing was measured of takes the ratio of the one before it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import pairwise

from .hindsight import Residual
from .placement import GapCosts, Paths

EARLY, LATER, DECIDED = 0.1, 0.02, 0.9
"""Least ratios that are expected of gaps to come, above and below the noise level `DECIDED`: what is measured first is
too little. On the demo model ratios rise where it is decided what is seen, and again where detail forms."""
SPAN = 8.0
"""Span of clean latents before anything is known of them: their standard deviation is about 1."""
LINE = (3.7, 0.75)
"""Constant and slope from expected to true decibels, of the demo model (benchmarks/LOG.md). Below 1, because velocities
are rougher than those of the components: where gaps are short, more is left of an error than is expected."""


class Distance:
    """The expected distance of a run from the dense one, in its latents."""

    def __init__(self, costs: GapCosts) -> None:
        """Estimate for the schedule of `costs`, which must know every gap that is asked for."""
        self.costs = costs

    def square(self, steps: Sequence[int], measured: Sequence[Residual]) -> tuple[float, float]:
        """Expected mean square of what the gaps between evaluated steps add to the final error.

        Args:
            steps: ascending; T as the last one stands for the end.
            measured: the residuals that they showed.

        Returns:
            The expected square, and the last ratio of measured to expected.
        """
        ratios, ratio, total = self._ratios(measured), EARLY, 0.0
        for place, (left, right) in enumerate(pairwise(steps)):
            ratio = ratios.get(right, ratio)
            if right > left + 1:
                total += ratio * self.costs.cost(steps[place - 1] if place else None, left, right)
        return total, ratio

    def _ratios(self, measured: Sequence[Residual]) -> dict[int, float]:
        """Measured over expected residuals, by the step that showed them."""
        found = {}
        for residual in measured:
            prev = residual.prev if residual.prev >= 0 else None
            expected = self.costs.line_error(prev, residual.last, residual.step)
            if expected > 0.0:
                found[residual.step] = float(residual.square) / expected
        return found

    def decibels(self, steps: Sequence[int], measured: Sequence[Residual], span: float) -> float | None:
        """Expected PSNR of the final latents against the dense run's; None where the run is the dense one, or broken.

        Args:
            steps: evaluated ones, ascending.
            measured: the residuals that they showed.
            span: largest less least value of the clean latents, which is the peak.
        """
        square, _ = self.square([*steps, self.costs.num_steps], measured)
        if not (0.0 < square < math.inf and 0.0 < span < math.inf):
            return None
        return LINE[0] + LINE[1] * 10 * math.log10(span**2 / square)

    def plan(
        self,
        quality: float,
        span: float | None,
        steps: Sequence[int],
        measured: Sequence[Residual],
        start: int,
        required: Collection[int],
    ) -> list[int]:
        """Choose the fewest steps with which a promise is kept.

        Args:
            quality: PSNR that is promised, in dB.
            span: as above; None: not known yet.
            steps: evaluated so far, ascending.
            measured: the residuals that they showed.
            start: first step that may still be evaluated.
            required: steps that are evaluated in any case.

        Returns:
            All evaluated steps, ascending. Where the promise is broken already, the rest adds a dB at most.
        """
        done, ratio = self.square(steps, measured)
        expected = (quality - LINE[0]) / LINE[1]
        allowed = max((span or SPAN) ** 2 / 10 ** (expected / 10) - done, done / 4)
        ratio = max(ratio, EARLY if self.costs.sigmas[steps[-1]] > DECIDED else LATER)
        paths = Paths(self.costs, required, steps, start)
        for more, cost in enumerate(paths.costs):
            if ratio * cost <= allowed:
                return [*steps, *paths.steps(more)]
        return [*steps, *range(start, self.costs.num_steps)]
