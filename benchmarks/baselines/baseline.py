"""The interface of a baseline, and the counter that says how much of the transformer it really ran."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor

from ...engine.denoise.hook import named
from .models import Part, model_of


def transformers_of(pipe: Any) -> list[Any]:
    """The transformers of a pipeline: one, or two experts in the order in which they run."""
    return [model for model in (pipe.transformer, getattr(pipe, "transformer_2", None)) if model is not None]


def steps_of_experts(pipe: Any, steps: int) -> list[range]:
    """Which of `steps` denoising steps each transformer does."""
    ratio = getattr(pipe.config, "boundary_ratio", None)
    if ratio is None:
        return [range(steps)]
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    split = int((scheduler.timesteps >= ratio * scheduler.config.num_train_timesteps).sum())
    return [range(split), range(split, steps)]


def step_of(pipe: Any, context: Any) -> int:
    """The step of a running call; image-to-video pipelines do not say it, but their scheduler counts."""
    return context.step_index if context.step_index is not None else pipe.scheduler.step_index or 0


class WorkCounter:
    """Counts the floating point operations of the transformer blocks, from outside, by the rows of tokens that enter
    the linear layers of self-attention, cross-attention and feed-forward.

    A block that a cache skips does not project queries; a partial step of HSA projects those of its active
    tokens; attention broadcast skips attention alone. The same counter so measures every method, whatever the method
    says about itself.
    """

    def __init__(self, *transformers: Any) -> None:
        """Attach to transformers; `close` detaches."""
        self.work = self.full_work = 0.0
        self.calls = 0
        self._parts: dict[str, Part] = {}
        self._handles: list[Any] = []
        for transformer in transformers:
            before = self._before(transformer)
            self._handles.append(transformer.register_forward_pre_hook(before, with_kwargs=True))
            model = model_of(transformer)
            for block in model.blocks(transformer):
                layers = model.layers(block).items()
                self._handles += [layer.register_forward_pre_hook(self._rows(part)) for part, layer in layers]

    def _before(self, transformer: Any) -> Any:
        def count(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments = named(module, args, kwargs)
            self._parts = model_of(transformer).parts(transformer, arguments)
            self.calls += 1
            dense = sum(part.blocks * part.rows * part.cost for part in self._parts.values())
            self.full_work += len(arguments["hidden_states"]) * dense

        return count

    def _rows(self, part: str) -> Any:
        def count(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            self.work += args[0].shape[0] * args[0].shape[1] * self._parts[part].cost

        return count

    @property
    def share(self) -> float:
        """Work done over what the same calls would do densely; nan before the first."""
        return self.work / self.full_work if self.full_work else math.nan

    def close(self) -> None:
        """Detach."""
        for handle in self._handles:
            handle.remove()


class Baseline(ABC):
    """One way to spend less on a clip.

    Attributes:
        name: of the method, without its settings.
        dense_steps: denoising steps of the dense run that ``compute`` refers to.
        steps: what to call the pipeline with as ``num_inference_steps``.
        settings: constructor arguments besides ``dense_steps``, ready for JSON.
    """

    name: str

    def __init__(self, dense_steps: int, **settings: Any) -> None:
        self.dense_steps = self.steps = dense_steps
        self.settings = settings
        self._work: WorkCounter | None = None

    @property
    def compute(self) -> float:
        """Transformer work of the last run over that of the dense run; nan before the first."""
        return math.nan if self._work is None else self._work.share * self.steps / self.dense_steps

    def refined(self) -> list[Baseline]:
        """Variants worth a try once this one is the best of its kind."""
        return []

    @contextmanager
    def applied(self, pipe: Any) -> Iterator[Baseline]:
        """Work on `pipe` inside the context; one run per context.

        Raises:
            ValueError: another cache or HSA is at work already.
        """
        for transformer in transformers_of(pipe):
            registry = HookRegistry.check_if_exists_or_initialize(transformer)
            if transformer.is_cache_enabled or registry.hooks:
                raise ValueError("Something else is hooked to the transformer: remove it before a baseline is applied.")
        self._work = WorkCounter(*transformers_of(pipe))
        try:
            with self._attached(pipe):
                yield self
        finally:
            self._work.close()

    @abstractmethod
    @contextmanager
    def _attached(self, pipe: Any) -> Iterator[None]:
        """Change the pipeline, and change it back."""
        yield


class DiffusersCache(Baseline):
    """A baseline that diffusers has: subclasses give its config."""

    @abstractmethod
    def _config(self, steps: range) -> Any:
        """Build the config for ``enable_cache`` of a transformer that does `steps` of the denoising steps."""

    @contextmanager
    def _attached(self, pipe: Any) -> Iterator[None]:
        pairs = zip(transformers_of(pipe), steps_of_experts(pipe, self.steps), strict=True)
        with ExitStack() as stack:
            for transformer, steps in pairs:
                if steps:
                    transformer.enable_cache(self._config(steps))
                    stack.callback(transformer.disable_cache)
            yield


@contextmanager
def hooked(root: Any, hooks: list[tuple[torch.nn.Module, ModelHook]], name: str) -> Iterator[None]:
    """Register diffusers hooks under `name` on modules of the model `root`, and remove them."""
    registries = []
    try:
        for module, hook in hooks:
            registry = HookRegistry.check_if_exists_or_initialize(module)
            registry.register_hook(hook, name)
            registries.append(registry)
        # Pipelines tell hooks the guidance branch through a cached list of registries.
        HookRegistry.check_if_exists_or_initialize(root).invalidate_child_registries_cache()
        yield
    finally:
        for registry in registries:
            registry.remove_hook(name, recurse=False)
        HookRegistry.check_if_exists_or_initialize(root).invalidate_child_registries_cache()


def relative_change(new: Tensor, old: Tensor) -> float:
    """Mean absolute difference over the mean absolute value of the old tensor (relative L1)."""
    return float((new - old).abs().mean() / old.abs().mean().clamp_min(1e-12))
