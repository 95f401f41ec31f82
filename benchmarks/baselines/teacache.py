"""TeaCache (arXiv 2411.19108) for a stock transformer, by hooks of our own: diffusers has none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from .baseline import Baseline, relative_change, transformers_of
from .models import Model, model_of
from .replaced import Branch, Call, Streams, replaced


class TeaCache(Baseline):
    """Skips all blocks while the modulated input of the first one has changed little since the last
    evaluation.

    The relative L1 change of that input from step to step, after a polynomial that estimates the change of
    the output from it, is summed up; below `threshold` the step adds the last residual of the block stack
    instead of running it. Every guidance branch decides for itself. The first step and the last one are
    always evaluated.

    Args:
        dense_steps: as in `Baseline`.
        threshold: bound on the accumulated change.
        polynomial: coefficients, highest power first (`fit_polynomial`); None is the identity.
    """

    name = "teacache"

    def __init__(self, dense_steps: int, *, threshold: float, polynomial: Sequence[float] | None = None) -> None:
        polynomial = None if polynomial is None else [float(c) for c in polynomial]
        super().__init__(dense_steps, threshold=threshold, polynomial=polynomial)
        self.changes: list[tuple[float, float]] = []

    @contextmanager
    def _attached(self, pipe: Any) -> Iterator[None]:
        self.changes = []
        with ExitStack() as stack:
            for transformer in transformers_of(pipe):
                model = model_of(transformer)
                stack.enter_context(replaced(pipe, transformer, self.name, partial(_Branch, self, model)))
            yield

    def estimate(self, change: float) -> float:
        """Change of the output that a change of the input announces."""
        polynomial = self.settings["polynomial"]
        # A fitted polynomial may dip below zero where it saw few points; a negative change makes no sense.
        return change if polynomial is None else max(float(np.polyval(polynomial, change)), 0.0)


class _Branch(Branch):
    """One guidance branch."""

    def __init__(self, cache: TeaCache, model: Model) -> None:
        self.cache, self.model = cache, model
        self.signal: Tensor | None = None
        self.residual: Streams = ()
        self.output: Tensor | None = None
        self.change = self.accumulated = 0.0

    def decide(self, call: Call) -> bool:
        signal = self.model.modulated_input(call.block, call.arguments)
        evaluate = True
        if self.signal is not None:
            self.change = relative_change(signal, self.signal)
            self.accumulated += self.cache.estimate(self.change)
            evaluate = call.last or self.accumulated >= self.cache.settings["threshold"]
        self.signal = signal
        if evaluate:
            self.accumulated = 0.0
        return evaluate

    def stand_in(self, entering: Streams) -> Iterable[Tensor]:
        return (x + residual for x, residual in zip(entering, self.residual, strict=True))

    def learn(self, leaving: Streams) -> None:
        if self.output is not None:
            self.cache.changes.append((self.change, relative_change(leaving[0], self.output)))
        self.output = leaving[0]
        self.residual = tuple(x - before for x, before in zip(leaving, self.entering, strict=True))


def fit_polynomial(pipe: Any, runs: Sequence[Callable[[], Any]], steps: int, degree: int = 4) -> list[float]:
    """Calibrate: dense runs, then a polynomial from the change of the stack's input to that of its output."""
    points: list[tuple[float, float]] = []
    for run in runs:
        # Threshold 0: every step is evaluated.
        cache = TeaCache(steps, threshold=0.0)
        with cache.applied(pipe):
            run()
        points += cache.changes
    change, outcome = np.array(points).T
    return [float(c) for c in np.polyfit(change, outcome, degree)]
