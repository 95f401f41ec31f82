"""Runs that no product could afford, to find where the error of a plan comes from; for `diagnostics.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor

from heterostep.benchmarks.baselines.baseline import hooked
from heterostep.engine.models.hook_registry import registered
from heterostep.engine.models.wan import CachedWanAttnProcessor
from heterostep.hsa.cache import KVCache
from heterostep.hsa.policies import top_tokens

_HOOK = "oracle"


class Recorder:
    """A planner that asks another one and keeps its plans: `plans[step]` is None, [0] or [A]."""

    def __init__(self, planner: Any) -> None:
        self._planner = planner
        self._plans: dict[int, Tensor | None] = {}
        self.begin, self.observe, self.reason = planner.begin, planner.observe, planner.reason

    @property
    def counts(self) -> Sequence[int]:
        """Tokens per step."""
        return self._planner.counts

    def plan(self, step: int, num_steps: int, sigma: float, num_tokens: int) -> Tensor | None:
        """Ask, and keep."""
        self._plans[step] = self._planner.plan(step, num_steps, sigma, num_tokens)
        return self._plans[step]

    @property
    def plans(self) -> list[Tensor | None]:
        """One plan for each step; steps at which everything is forced to be active are not planned: None."""
        return [self._plans.get(step) for step in range(len(self.counts))]


class OtherSelection:
    """A policy with the counts of another one that chooses its tokens at random or by age alone."""

    def __init__(self, policy: Any, how: str, seed: int = 0) -> None:
        """Choose ``random`` (seeded) or ``age`` (those not evaluated for the longest time; ties by index)."""
        self.counts, self.how, self.seed = policy.counts, how, seed

    def select(self, step: int, sigma: float, count: int, tokens: Any, max_age: int) -> Tensor:
        """Choose int64 [B, count], ascending."""
        if self.how == "age":
            return top_tokens(tokens.age.float(), count)
        generator = torch.Generator().manual_seed(self.seed * 1000 + step)
        scores = torch.rand(tokens.age.shape, generator=generator).to(tokens.age.device)
        return scores.topk(count, dim=1).indices.sort(1).values


class ActiveOnlyProcessor(CachedWanAttnProcessor):
    """Active tokens attend to active tokens only: K/V synchronisation off."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Attend as the stock processor does."""
        return WanAttnProcessor.__call__(self, *args, **kwargs)


class _FrozenCache(KVCache):
    """Takes rows at full steps only."""

    def write(self, k: Tensor, v: Tensor, active: Tensor | None = None) -> None:
        """Overwrite all rows, or none."""
        if active is None:
            super().write(k, v)


def without_sync(pipe: Any) -> None:
    """Turn the K/V synchronisation of an applied session off; `hs.remove` ends it."""
    for block in pipe.transformer.blocks:
        block.attn1.processor.__class__ = ActiveOnlyProcessor


def with_frozen_kv(session: Any) -> None:
    """Let partial steps attend to the keys and values of the last full step, their own tokens' too."""
    run = session._run
    make = run.branch

    def branch(name: str, num_layers: int) -> Any:
        made = make(name, num_layers)
        for layer in made.layers:
            layer.__class__ = _FrozenCache
        return made

    run.branch = branch


class Replay:
    """A planner that repeats kept plans."""

    def __init__(self, plans: Sequence[Tensor | None], num_tokens: int) -> None:
        self._plans = list(plans)
        self.counts = [num_tokens if p is None else p.numel() for p in self._plans]

    def plan(self, step: int, num_steps: int, sigma: float, num_tokens: int) -> Tensor | None:
        """Repeat."""
        return self._plans[step]


@contextmanager
def fresh(pipe: Any, plans: Sequence[Tensor | None], what: str) -> Iterator[None]:
    """On a pipeline whose session repeats `plans` (`Replay`): keep one of its two sources of error away.

    Args:
        pipe: with `hs.apply(..., planner=Replay(plans, N))` done.
        plans: the same ones; None (all), [0] (none) or [A] for every step.
        what: ``kv``: before a partial pass all keys and values are computed anew, so that only velocities are
            stale (needs kv_forecast=0). ``velocity``: after it all tokens' velocities are computed anew from
            the keys and values as they are, so that only those are stale (needs forecast="hold").
    """
    transformer = pipe.transformer
    with hooked(transformer, [(transformer, _FreshHook(transformer, list(plans), what))], _HOOK):
        yield


class _Unused(BaseState):
    def reset(self) -> None:
        pass


class _ReadOnly:
    """Stands for a cache in a pass over all tokens that must not change it."""

    def __init__(self, cache: KVCache) -> None:
        self.keys_values = cache.keys_values

    def write(self, *_: Any) -> None:
        """Ignore the rows of this pass: those of the active tokens are in the cache, equal to them."""


class _FreshHook(ModelHook):
    """Stands around the hook of HSA and makes one more pass over all tokens."""

    _is_stateful = True

    def __init__(self, transformer: Any, plans: list[Tensor | None], what: str) -> None:
        super().__init__()
        self.plans, self.what = plans, what
        self.contexts = StateManager(_Unused)
        self.inner = registered(transformer)
        if what == "velocity":
            # This pass reads keys and values at skipped steps too, before which HSA itself would not keep them.
            self.inner.run.needs_kv = lambda index: True

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self.contexts.reset()
        return module

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        context = self.contexts.context
        active = self.plans[context.step_index]
        partial = active is not None and active.numel() > 0
        if self.what == "kv" and partial:
            self._pass(context.name, None, args, kwargs)
        out = self.fn_ref.original_forward(*args, **kwargs)
        if self.what == "velocity" and active is not None:
            latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            self.inner.call.grid = self.inner.run.grid
            everything = torch.arange(self.inner.run.grid.num_tokens, device=latents.device)
            return self._pass(context.name, everything, args, kwargs)
        return out

    def _pass(self, name: str, active: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """All tokens through the model; they overwrite the cache (None) or read it."""
        hook = self.inner
        branch = hook.run.branches[name]
        for processor, cache in zip(hook.processors, branch.layers, strict=True):
            processor.cache = cache if active is None else _ReadOnly(cache)
        hook.call.cached, hook.call.active = True, active
        if active is not None and hook.run.kv_damping:
            # Zero for what was evaluated at this very step.
            hook.call.weight = branch.velocity.clock.weight(hook.run.step.sigma) * hook.run.kv_damping
        try:
            return hook.fn_ref.original_forward(*args, **kwargs)
        finally:
            hook.call.clear()
            for processor in hook.processors:
                processor.cache = None
