"""EasyCache (arXiv 2507.02860) for a stock transformer, in a variant of ours that holds the velocity."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch import Tensor

from .baseline import Baseline, hooked, step_of, transformers_of

_HOOK = "easycache"


class EasyCache(Baseline):
    """Skips the model while the change of its output that the change of its input predicts stays small.

    The rate k = |v_i - v_j| / |x_i - x_j| (mean absolute values, i and j the last two evaluated steps) is
    measured while sampling, so that nothing is calibrated. A step adds k |x_i - x_{i-1}| / |v| to a sum; the
    model runs once the sum reaches `threshold`. The first branch of a step decides for all of them. A skipped
    step repeats its branch's last velocity v (the published variant repeats v - x; holding v measured better,
    notes on the trained toy).

    Args:
        dense_steps: as in `Baseline`.
        threshold: bound on the accumulated relative change of the output.
        warmup: first steps that are all evaluated, at least 2.
    """

    name = "easycache"

    def __init__(self, dense_steps: int, *, threshold: float, warmup: int = 4) -> None:
        if warmup < 2:
            raise ValueError(f"warmup={warmup}: two evaluations are needed to measure a rate.")
        super().__init__(dense_steps, threshold=threshold, warmup=warmup)

    @contextmanager
    def _attached(self, pipe: Any) -> Iterator[None]:
        with ExitStack() as stack:
            for transformer in transformers_of(pipe):
                hook = _ModelHook(pipe, self.settings["threshold"], self.settings["warmup"])
                stack.enter_context(hooked(transformer, [(transformer, hook)], _HOOK))
            yield


class _State(BaseState):
    """One guidance branch: what the transformer returned last, and the velocity therein."""

    def __init__(self) -> None:
        self.answer: Any = None
        self.velocity: Tensor | None = None

    def reset(self) -> None:
        """Forget it."""
        self.answer = self.velocity = None


class _ModelHook(ModelHook):
    """Stands around the transformer's forward."""

    _is_stateful = True

    def __init__(self, pipe: Any, threshold: float, warmup: int) -> None:
        super().__init__()
        self.pipe = pipe
        self.states = StateManager(_State)
        self.threshold, self.warmup = threshold, warmup
        self._start()

    def _start(self) -> None:
        self.step = -1
        self.leader = ""
        self.evaluate = True
        self.rate: float | None = None
        self.accumulated = 0.0
        self.previous: Tensor | None = None
        self.evaluated: tuple[Tensor, Tensor] | None = None

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self.states.reset()
        self._start()
        return module

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        context, state = self.states.context, self.states.get_state()
        latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        step = step_of(self.pipe, context)
        if step != self.step:
            self.step, self.leader = step, context.name
            self._decide(latents, state.velocity)
        if not self.evaluate and state.velocity is not None:
            return state.answer
        out = self.fn_ref.original_forward(*args, **kwargs)
        state.answer, state.velocity = out, out[0]
        if context.name == self.leader:
            self._learn(latents, out[0])
        return out

    def _decide(self, latents: Tensor, velocity: Tensor | None) -> None:
        """Whether this step runs the model; called by the step's first branch."""
        self.evaluate = True
        if self.rate is not None and velocity is not None and self.step >= self.warmup:
            assert self.previous is not None
            moved = float((latents - self.previous).abs().mean())
            self.accumulated += self.rate * moved / max(float(velocity.abs().mean()), 1e-12)
            self.evaluate = self.accumulated >= self.threshold
        if self.evaluate:
            self.accumulated = 0.0
        self.previous = latents

    def _learn(self, latents: Tensor, velocity: Tensor) -> None:
        """Measure the rate anew."""
        if self.evaluated is not None:
            before, last = self.evaluated
            moved = max(float((latents - before).abs().mean()), 1e-12)
            self.rate = float((velocity - last).abs().mean()) / moved
        self.evaluated = (latents, velocity)
