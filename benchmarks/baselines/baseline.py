"""The interface of a baseline, and the counter that says how much of the transformer it really ran."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor


class WorkCounter:
    """Counts the token rows that went through the transformer blocks, from outside, by the input of
    ``attn1.to_q``.

    A block that a cache skips does not project queries; a partial step of HSA projects those of its active
    tokens. The same counter so measures every method, whatever the method says about itself.
    """

    def __init__(self, transformer: Any) -> None:
        """Attach to a Wan transformer; `close` detaches."""
        self.rows = self.calls = self.full_rows = 0
        self._layers = len(transformer.blocks)
        self._patch = math.prod(transformer.config.patch_size)
        self._handles = [b.attn1.to_q.register_forward_pre_hook(self._count_rows) for b in transformer.blocks]
        self._handles.append(transformer.register_forward_pre_hook(self._count_call, with_kwargs=True))

    def _count_rows(self, module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        self.rows += args[0].shape[0] * args[0].shape[1]

    def _count_call(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self.calls += 1
        self.full_rows += self._layers * latents.shape[0] * latents[0, 0].numel() // self._patch

    @property
    def share(self) -> float:
        """Rows evaluated over those that the same calls would evaluate densely; nan before the first."""
        return self.rows / self.full_rows if self.full_rows else math.nan

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

    @contextmanager
    def applied(self, pipe: Any) -> Iterator[Baseline]:
        """Work on `pipe` inside the context; one run per context.

        Raises:
            ValueError: two experts, or another cache or HSA is at work already.
        """
        transformer = pipe.transformer
        if getattr(pipe, "transformer_2", None) is not None:
            raise ValueError("The baselines are written for pipelines with one transformer.")
        registry = HookRegistry.check_if_exists_or_initialize(transformer)
        if transformer.is_cache_enabled or registry.hooks:
            raise ValueError("Something else is hooked to the transformer: remove it before a baseline is applied.")
        self._work = WorkCounter(transformer)
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
    def _config(self) -> Any:
        """Build the config for ``enable_cache``."""

    @contextmanager
    def _attached(self, pipe: Any) -> Iterator[None]:
        pipe.transformer.enable_cache(self._config())
        try:
            yield
        finally:
            pipe.transformer.disable_cache()


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
