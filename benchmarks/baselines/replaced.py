"""Hooks that run a part of a transformer, the stack of its blocks or all of it, or let something stand in for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch import Tensor

from ...engine.denoise.hook import named
from .baseline import hooked, step_of
from .models import Model, model_of

Streams = tuple[Tensor, ...]
"""What enters or leaves: of Wan one tensor, of LTX-2 video and sound."""


class Call(NamedTuple):
    """A call that a branch decides about.

    Attributes:
        step: of the denoising loop; `last`: whether it is the loop's last.
        block: the first block, or the transformer.
        arguments: what it was called with, by name.
    """

    step: int
    last: bool
    block: Any
    arguments: dict[str, Any]


class Branch(BaseState, ABC):
    """What a cache knows of one guidance branch of one transformer: it decides, stands in, and learns.

    Attributes:
        evaluate: what was decided about the present call.
        entering: what entered at the last evaluation.
    """

    evaluate = True
    entering: Streams = ()

    @abstractmethod
    def decide(self, call: Call) -> bool:
        """Whether to evaluate at this call."""

    @abstractmethod
    def stand_in(self, entering: Streams) -> Iterable[Tensor]:
        """What leaves where nothing is evaluated."""

    @abstractmethod
    def learn(self, leaving: Streams) -> None:
        """Take what left at an evaluation."""

    def reset(self) -> None:
        """Nothing: the branches of a run end with it."""


class _Hook(ModelHook):
    """Common to all: the branches, which diffusers ends with the run."""

    _is_stateful = True

    def __init__(self, pipe: Any, model: Model, states: StateManager) -> None:
        super().__init__()
        self.pipe, self.model, self.states = pipe, model, states

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self.states.reset()
        return module

    def entering(self, module: Any, args: Any, kwargs: Any, names: tuple[str, ...]) -> tuple[Branch, Streams]:
        """The branch of a call, which has decided, and what enters."""
        branch, arguments = self.states.get_state(), named(module, args, kwargs)
        step = step_of(self.pipe, self.states.context)
        branch.evaluate = branch.decide(Call(step, step == self.pipe.num_timesteps - 1, module, arguments))
        found = tuple(arguments[name] for name in names)
        if branch.evaluate:
            branch.entering = found
        return branch, found


class _FirstBlock(_Hook):
    """Decides, and stands in for the whole stack."""

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        branch, entering = self.entering(module, args, kwargs, self.model.streams)
        if branch.evaluate:
            return self.fn_ref.original_forward(*args, **kwargs)
        return _answer(branch.stand_in(entering))


class _LaterBlock(_Hook):
    """Runs or passes through; after the last one the branch learns."""

    def __init__(self, pipe: Any, model: Model, states: StateManager, last: bool) -> None:
        super().__init__(pipe, model, states)
        self.last = last

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        branch = self.states.get_state()
        if not branch.evaluate:
            arguments = named(module, args, kwargs)
            return _answer(arguments[name] for name in self.model.streams)
        out = self.fn_ref.original_forward(*args, **kwargs)
        if self.last:
            branch.learn(out if isinstance(out, tuple) else (out,))
        return out


class _Whole(_Hook):
    """Stands around the transformer; pipelines want its answer as a tuple."""

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        branch, entering = self.entering(module, args, kwargs, ("hidden_states",))
        if not branch.evaluate:
            return tuple(branch.stand_in(entering))
        out = self.fn_ref.original_forward(*args, **kwargs)
        branch.learn(tuple(out))
        return out


def _answer(streams: Iterable[Tensor]) -> Any:
    """As a block returns it: a tensor, or a tuple of several."""
    found = tuple(streams)
    return found if len(found) > 1 else found[0]


@contextmanager
def replaced(
    pipe: Any, transformer: Any, name: str, branch: Callable[[], Branch], *, whole: bool = False
) -> Iterator[None]:
    """Let branches decide what is evaluated.

    Args:
        pipe: the pipeline.
        transformer: one of its transformers.
        name: of the hooks.
        branch: makes the state of a guidance branch.
        whole: the transformer is replaced with its output head; else its blocks alone are, so that the head sees the
            present time.

    Raises:
        ValueError: the stack has one block, which cannot be run and stood in for.
    """
    model, states = model_of(transformer), StateManager(branch)
    hooks: list[tuple[torch.nn.Module, ModelHook]]
    if whole:
        hooks = [(transformer, _Whole(pipe, model, states))]
    else:
        first, *others = model.blocks(transformer)
        if not others:
            raise ValueError(f"{name} needs at least two blocks.")
        hooks = [(first, _FirstBlock(pipe, model, states))]
        hooks += [(block, _LaterBlock(pipe, model, states, last=block is others[-1])) for block in others]
    with hooked(transformer, hooks, name):
        yield
