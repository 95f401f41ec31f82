"""Whole steps at planned places, and a forecast of what leaves the model between them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from torch import Tensor

from .replaced import Branch, Call, Streams


class Planned(Branch):
    """A guidance branch that is evaluated at planned steps, and forecast between them.

    Attributes:
        steps: of the denoising loop, those to evaluate; the branch's first one always is.
        history: (step, what left) of the last evaluations.
    """

    def __init__(self, steps: Collection[int], order: int, keep: int | None = None) -> None:
        """Prepare.

        Args:
            steps: as above.
            order: of the polynomial through the last evaluations, as a function of the step.
            keep: evaluations to remember; None: as many as the polynomial needs.
        """
        self.steps, self.order = frozenset(steps), order
        self.keep = order + 1 if keep is None else keep
        self.history: list[tuple[int, Streams]] = []
        self.step = 0

    def decide(self, call: Call) -> bool:
        self.step = call.step
        return call.step in self.steps or not self.history

    def stand_in(self, entering: Streams) -> Iterable[Tensor]:
        known = self.history[-(self.order + 1) :]
        weights = extrapolation([step for step, _ in known], self.step)
        return weighted(weights, [streams for _, streams in known])

    def learn(self, leaving: Streams) -> None:
        self.history = [*self.history, (self.step, leaving)][-self.keep :]


class Recorder(Planned):
    """A branch that is evaluated always, and remembers everything."""

    def __init__(self) -> None:
        super().__init__((), 0, keep=1 << 30)

    def decide(self, call: Call) -> bool:
        super().decide(call)
        return True


def extrapolation(steps: Sequence[int], to: int) -> list[float]:
    """Weights of the values at `steps` in their polynomial's value at `to`."""
    weights = []
    for a in steps:
        weight = 1.0
        for b in steps:
            weight *= (to - b) / (a - b) if a != b else 1.0
        weights.append(weight)
    return weights


def weighted(weights: Sequence[float], values: Sequence[Streams]) -> Streams:
    """Weighted sums, stream by stream."""
    sums = []
    for streams in zip(*values, strict=True):
        total = streams[0] * weights[0]
        for weight, value in zip(weights[1:], streams[1:], strict=True):
            total = total + value * weight
        sums.append(total)
    return tuple(sums)
