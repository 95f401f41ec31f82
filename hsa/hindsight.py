"""Hindsight: what the steps between two evaluations should have moved by, known once the second one is there.

Notation as in `velocity`: an element of the latents was evaluated at step l, noise level sigma_l, with guided velocity
v_l, before that at step p, and now at step i. Over the gap it moved by a forecast: held, or along the line through
(sigma_p, v_p) and (sigma_l, v_l). The *residual* R is v_i less that forecast at sigma_i: the measured error of the
forecast. The parabola through all three points is the line plus R times

    w(sigma) = (sigma - sigma_l) (sigma - sigma_p) / ((sigma_i - sigma_l) (sigma_i - sigma_p)),

and without a slope (no p, or ``hold``) the chord is what was held plus R (sigma - sigma_l) / (sigma_i - sigma_l). So
every skipped step j should have moved by R w(sigma_j) more; for ``ab2``, whose velocities are means over a step, by R
times the mean of w over it. This is the corrector of predictor-corrector schemes, for any scheduler: whoever steps the
latents takes its steps again (`engine.denoise.replay`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Residual(NamedTuple):
    """What a forecast over a gap was wrong by at its end.

    Attributes:
        prev, last: steps of the two evaluations that the forecast is a line through; -1 where `last` was held.
        step: the evaluation that shows it.
        square: mean over all elements of the squared residual, without dimensions, on the device.
    """

    prev: int
    last: int
    step: int
    square: Tensor


class Hindsight:
    """The guided velocities of the last two evaluations, and those that each step since has moved by.

    An element of the latents may be evaluated at some steps and not at others: `at_last` and `at_prev` say at which, as
    one number for all (a tensor without dimensions on the host) or element by element; -1 is never.

    Attributes:
        first: the step that the oldest remembered velocity belongs to.
        used: velocities of the steps from `first` on, in the scheduler's shape and type.
        measured: the residuals so far, where all elements were evaluated at the same three steps.
    """

    def __init__(self, sigmas: Sequence[float], forecast: str) -> None:
        """Follow a run over T + 1 falling noise levels, whose skipped steps move by `forecast`."""
        self.forecast = forecast
        self._sigmas = torch.tensor(sigmas, dtype=torch.float64)
        self.first, self.used = 0, list[Tensor]()
        self.measured: list[Residual] = []
        self.forget()

    def forget(self) -> None:
        """Forget all evaluations, as at a switch of experts; velocities that steps moved by stay what they were."""
        self.last: Tensor | None = None
        self.prev: Tensor | None = None
        self.at_last = self.at_prev = torch.tensor(-1)

    def evaluate(self, step: int, velocity: Tensor, fresh: Tensor | None) -> bool:
        """Take in what an evaluated step is about to move by, and correct what the steps since `first` moved by.

        Args:
            step: i.
            velocity: as the pipeline hands it to its scheduler.
            fresh: bool, in the same shape: what was evaluated; None for everything.

        Returns:
            Whether anything was corrected.
        """
        found = self._evaluated(step, velocity.to(torch.promote_types(velocity.dtype, torch.float32)))
        corrected = False
        if self.last is not None:
            residual = found - self._line(float(self._sigmas[step]))
            if fresh is None and self.at_last.ndim == self.at_prev.ndim == 0:
                square = residual.square().mean()
                self.measured.append(Residual(int(self.at_prev), int(self.at_last), step, square))
            for place, moved in enumerate(self.used):
                skipped = self._moved_wrongly(self.first + place)
                if skipped.ndim == 0 and not bool(skipped):
                    continue
                at, weight = self._weight(self.first + place, step)
                should = (self._line(at) + _factor(weight) * residual).to(moved.dtype)
                if fresh is not None:
                    skipped = skipped & fresh
                self.used[place] = should if skipped.ndim == 0 else should.where(skipped, moved)
                corrected = True
        self._note(step, found, fresh)
        return corrected

    def moves(self, step: int, velocity: Tensor) -> None:
        """Note the velocity that a step, evaluated or not, moves by."""
        if not self.used:
            self.first = step
        self.used.append(velocity.clone())

    def oldest(self) -> int:
        """The first step whose velocity a later evaluation may still correct; T if there is none."""
        return int(self.at_last.where(self.at_last >= 0, len(self._sigmas) - 1).min())

    def drop(self, count: int) -> None:
        """Forget the velocities of the `count` oldest steps."""
        del self.used[:count]
        self.first += count

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs; the tensors are not copies."""
        names = ("first", "last", "prev", "at_last", "at_prev")
        measured = [list(residual) for residual in self.measured]
        return {"used": list(self.used), "measured": measured, **{name: getattr(self, name) for name in names}}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on where another one of the same run was when it gave its `state`."""
        self.first, self.used = state["first"], [moved.to(device) for moved in state["used"]]
        self.last, self.prev = (None if state[k] is None else state[k].to(device) for k in ("last", "prev"))
        self.measured[:] = [Residual(p, last, i, square.to(device)) for p, last, i, square in state["measured"]]
        # One number for all stays on the host, where nobody waits for it.
        self.at_last, self.at_prev = (
            state[k].to(device) if state[k].ndim else state[k].cpu() for k in ("at_last", "at_prev")
        )

    def _level(self, at: Tensor) -> Tensor:
        """Noise levels of steps; of what was never evaluated, any."""
        return self._sigmas[at] if at.ndim == 0 else self._sigmas.to(at.device, torch.float32)[at]

    def _slope_weight(self, at: float | Tensor) -> Tensor:
        """(sigma - sigma_l) / (sigma_l - sigma_p) at a noise level: the factor of (v_l - v_p); 0 without a slope."""
        span = self._level(self.at_last) - self._level(self.at_prev)
        return torch.where(self.at_prev >= 0, (at - self._level(self.at_last)) / span, 0.0)

    def _line(self, at: float) -> Tensor:
        """The forecast at a noise level."""
        assert self.last is not None
        if self.prev is None:
            return self.last
        return self.last + _factor(self._slope_weight(at)) * (self.last - self.prev)

    def _moved_wrongly(self, j: int) -> Tensor:
        """Whether step j moved by a forecast from `last`. At step l itself only ``ab2`` did."""
        return (self.at_last >= 0) & (self.at_last <= j if self.forecast == "ab2" else self.at_last < j)

    def _evaluated(self, step: int, velocity: Tensor) -> Tensor:
        """The velocity at a step's noise level; ``ab2`` moves by that of the line at the middle of the step."""
        if self.forecast != "ab2" or self.last is None:
            return velocity
        here, after = self._sigmas[step], self._sigmas[step + 1]
        known = self.at_last >= 0
        ahead = _factor(torch.where(known, (after - here) / 2 / (here - self._level(self.at_last)), 0.0))
        return (velocity + ahead * self.last) / (1 + ahead)

    def _weight(self, j: int, step: int) -> tuple[float, Tensor]:
        """Noise level of step j's forecast, and what the step owes of the residual found at `step`."""
        last, prev, here = self._level(self.at_last), self._level(self.at_prev), self._sigmas[step].item()

        def curve(at: float) -> Tensor:
            second = torch.where(self.at_prev >= 0, (at - prev) / (here - prev), 1.0)
            return (at - last) / (here - last) * second

        at, after = self._sigmas[j].item(), self._sigmas[j + 1].item()
        if self.forecast != "ab2":
            return at, curve(at)
        middle = (at + after) / 2
        return middle, (curve(at) + 4 * curve(middle) + curve(after)) / 6  # Simpson's rule is exact for parabolas

    def _note(self, step: int, velocity: Tensor, fresh: Tensor | None) -> None:
        """Make `velocity` the last evaluation of what is fresh."""
        slopes = self.forecast != "hold"
        if fresh is None or self.last is None:
            self.last, self.prev = velocity.clone(), self.last if slopes else None
            self.at_last, self.at_prev = torch.tensor(step), self.at_last if slopes else self.at_prev
            return
        if slopes:
            before = self.last if self.prev is None else self.prev
            self.prev, self.at_prev = self.last.where(fresh, before), self.at_last.where(fresh, self.at_prev)
        self.last, self.at_last = velocity.where(fresh, self.last), torch.tensor(step).where(fresh, self.at_last)


def _factor(weight: Tensor) -> Tensor | float:
    """A weight for all as a number, in which float32 stays float32."""
    return float(weight) if weight.ndim == 0 else weight
