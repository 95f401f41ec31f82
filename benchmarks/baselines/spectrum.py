"""Spectrum (arXiv 2603.01623): features before the output head, forecast by Chebyshev polynomials. After the paper."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .baseline import Baseline, steps_of_experts, transformers_of
from .forecast import Planned, weighted
from .replaced import Streams, replaced


class Spectrum(Baseline):
    """Evaluates the first steps and then one in every window, which grows; between, a ridge regression forecasts.

    The polynomials are functions of the step, fitted to all evaluations of the branch so far. The forecast is blended
    with the line through the last two evaluations. The output head runs at every step, with the present time.

    Args:
        dense_steps: as in `Baseline`.
        warmup: first steps that are all evaluated.
        window: steps to an evaluation, at first.
        flex: what each evaluation adds to the window.
        degree: of the polynomials.
        ridge: weight of the coefficients' squares.
        blend: share of the regression; the rest is the line's.
    """

    name = "spectrum"

    def __init__(
        self,
        dense_steps: int,
        *,
        warmup: int = 5,
        window: float = 2.0,
        flex: float = 0.75,
        degree: int = 4,
        ridge: float = 0.1,
        blend: float = 0.5,
    ) -> None:
        if warmup < 1 or window < 1:
            raise ValueError(f"warmup={warmup}, window={window}: both are at least 1.")
        settings = {"warmup": warmup, "window": window, "flex": flex}
        super().__init__(dense_steps, **settings, degree=degree, ridge=ridge, blend=blend)

    @contextmanager
    def _attached(self, pipe: Any) -> Iterator[None]:
        pairs = zip(transformers_of(pipe), steps_of_experts(pipe, self.steps), strict=True)
        with ExitStack() as stack:
            for transformer, own in pairs:
                make = partial(_Branch, self._plan(own), own, self.settings)
                stack.enter_context(replaced(pipe, transformer, self.name, make))
            yield

    def _plan(self, own: range) -> list[int]:
        """Which of a transformer's steps are evaluated."""
        s = self.settings
        window, skipped, chosen = s["window"], 0, []
        for number, step in enumerate(own):
            if number >= s["warmup"]:
                if (skipped + 1) % math.floor(window):
                    skipped += 1
                    continue
                window = round(window + s["flex"], 3)
            skipped = 0
            chosen.append(step)
        return chosen

    def predicted_compute(self, experts: Sequence[range] | None = None) -> float:
        """The share of steps that will be evaluated; `experts`: the steps of each transformer, each begins anew."""
        return sum(len(self._plan(own)) for own in experts or [range(self.dense_steps)]) / self.dense_steps

    @classmethod
    def candidates(cls, dense_steps: int, compute: float, experts: Sequence[range] | None = None) -> list[Spectrum]:
        """For every warm-up and first window the growth that comes nearest to `compute`, where one comes near."""
        found = []
        for warmup in (3, 5, 8, 12, 16):
            for window in (2.0, 3.0, 4.0, 6.0):
                growths = [cls(dense_steps, warmup=warmup, window=window, flex=0.05 * k) for k in range(41)]
                best = min(growths, key=lambda b: abs(b.predicted_compute(experts) - compute))
                if abs(best.predicted_compute(experts) - compute) <= 0.5 * len(experts or [1]) / dense_steps + 1e-9:
                    found.append(best)
        return found

    def refined(self) -> list[Baseline]:
        """The same steps with other regressions."""
        others = [(r, b) for r in (0.1, 0.001) for b in (0.5, 0.75, 1.0) if (r, b) != (0.1, 0.5)]
        return [Spectrum(self.dense_steps, **{**self.settings, "ridge": r, "blend": b}) for r, b in others]


class _Branch(Planned):
    """One guidance branch: the coefficients of the regression, one stack for each stream."""

    def __init__(self, steps: Collection[int], own: range, settings: dict[str, Any]) -> None:
        super().__init__(steps, order=1, keep=len(own))
        self.own, self.settings = own, settings
        self.coefficients: list[Tensor] | None = None

    def learn(self, leaving: Streams) -> None:
        super().learn(leaving)
        self.coefficients = None

    def stand_in(self, entering: Streams) -> Iterable[Tensor]:
        line = tuple(super().stand_in(entering))
        if self.coefficients is None:
            design = self._basis([step for step, _ in self.history])  # [evaluations, degree + 1]
            square = design.T @ design + self.settings["ridge"] * np.eye(design.shape[1])
            solved = torch.from_numpy(np.linalg.solve(square, design.T))
            self.coefficients = [
                _combined(solved, streams) for streams in zip(*(h for _, h in self.history), strict=True)
            ]
        here = torch.from_numpy(self._basis([self.step]))
        fitted = tuple(_combined(here, c)[0] for c in self.coefficients)
        blend = self.settings["blend"]
        return weighted((1 - blend, blend), (line, fitted))

    def _basis(self, steps: Sequence[int]) -> np.ndarray:
        """Chebyshev's polynomials at steps, those of the transformer spread over [-1, 1]: [len(steps), degree + 1]."""
        at = 2.0 * (np.array(steps) - self.own.start) / len(self.own) - 1.0
        return np.polynomial.chebyshev.chebvander(at, self.settings["degree"])


def _combined(weights: Tensor, values: Sequence[Tensor] | Tensor) -> Tensor:
    """Weights [P, K] times K tensors: [P, ...]."""
    stacked = values if isinstance(values, Tensor) else torch.stack(tuple(values))
    return torch.tensordot(weights.to(stacked), stacked, dims=1)
