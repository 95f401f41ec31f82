"""TeaCache (arXiv 2411.19108) for a stock transformer, by hooks of our own: diffusers has none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch import Tensor

from heterostep.engine.denoise.hook import named

from .baseline import Baseline, hooked, relative_change, step_of, transformers_of
from .models import Model, model_of

_HOOK = "teacache"


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
                model, states = model_of(transformer), StateManager(_State)
                blocks = model.blocks(transformer)
                if len(blocks) < 2:
                    raise ValueError("TeaCache needs at least two blocks.")
                hooks: list[tuple[torch.nn.Module, ModelHook]] = [(blocks[0], _FirstBlock(model, states, self, pipe))]
                hooks += [(block, _LaterBlock(model, states, self, last=block is blocks[-1])) for block in blocks[1:]]
                stack.enter_context(hooked(transformer, hooks, _HOOK))
            yield

    def estimate(self, change: float) -> float:
        """Change of the output that a change of the input announces."""
        polynomial = self.settings["polynomial"]
        # A fitted polynomial may dip below zero where it saw few points; a negative change makes no sense.
        return change if polynomial is None else max(float(np.polyval(polynomial, change)), 0.0)


class _State(BaseState):
    """One guidance branch."""

    def __init__(self) -> None:
        self.signal: Tensor | None = None
        self.entering: tuple[Tensor, ...] = ()
        self.residual: tuple[Tensor, ...] = ()
        self.output: Tensor | None = None
        self.change = 0.0
        self.accumulated = 0.0
        self.evaluate = True

    def reset(self) -> None:
        """Forget everything."""
        self.__init__()  # type: ignore[misc]


class _BlockHook(ModelHook):
    """Common to all blocks: the states of the branches, which diffusers resets at the end of a run."""

    _is_stateful = True

    def __init__(self, model: Model, states: StateManager, cache: TeaCache) -> None:
        super().__init__()
        self.model, self.states, self.cache = model, states, cache

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self.states.reset()
        return module


class _FirstBlock(_BlockHook):
    """Decides, and stands in for the whole stack where the step is skipped."""

    def __init__(self, model: Model, states: StateManager, cache: TeaCache, pipe: Any) -> None:
        super().__init__(model, states, cache)
        self.pipe = pipe

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        state, context, arguments = self.states.get_state(), self.states.context, named(module, args, kwargs)
        entering = tuple(arguments[name] for name in self.model.streams)
        signal = self.model.modulated_input(module, arguments)
        if state.signal is None:
            state.evaluate = True
        else:
            state.change = relative_change(signal, state.signal)
            state.accumulated += self.cache.estimate(state.change)
            last = step_of(self.pipe, context) == self.pipe.num_timesteps - 1
            state.evaluate = last or state.accumulated >= self.cache.settings["threshold"]
        state.signal = signal
        if not state.evaluate:
            return _answer(x + residual for x, residual in zip(entering, state.residual, strict=True))
        state.accumulated, state.entering = 0.0, entering
        return self.fn_ref.original_forward(*args, **kwargs)


class _LaterBlock(_BlockHook):
    """Runs or passes through; the last one keeps the residual of the stack."""

    def __init__(self, model: Model, states: StateManager, cache: TeaCache, last: bool) -> None:
        super().__init__(model, states, cache)
        self.last = last

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        state = self.states.get_state()
        if not state.evaluate:
            arguments = named(module, args, kwargs)
            return _answer(arguments[name] for name in self.model.streams)
        out = self.fn_ref.original_forward(*args, **kwargs)
        if self.last:
            leaving = out if isinstance(out, tuple) else (out,)
            if state.output is not None:
                self.cache.changes.append((state.change, relative_change(leaving[0], state.output)))
            state.output = leaving[0]
            state.residual = tuple(x - before for x, before in zip(leaving, state.entering, strict=True))
        return out


def _answer(streams: Iterable[Tensor]) -> Any:
    """As a block returns it: a tensor, or a tuple of several."""
    found = tuple(streams)
    return found if len(found) > 1 else found[0]


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
