"""Pyramid Attention Broadcast (arXiv 2408.12588) with diffusers' hook, repaired for guidance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.hooks.hooks import StateManager
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastHook, PyramidAttentionBroadcastState

from .baseline import Baseline, hooked, transformers_of
from .models import model_of

_HOOK = "pab"


class PAB(Baseline):
    """Within a range of timesteps attention runs at every n-th step; between, its last output is used again.

    Feed-forward layers always run, so that the least compute is their share of the work. As diffusers enables it,
    all guidance branches share one state, and the second one gets the output of the first: here each has its own.

    Args:
        dense_steps: as in `Baseline`.
        interval: n of self-attention.
        cross_interval: n of cross-attention.
        low: no attention is left out at timesteps (0 to 1000) up to this one.
        high: nor from this one on.
    """

    name = "pab"

    def __init__(
        self, dense_steps: int, *, interval: int, cross_interval: int, low: float = 100.0, high: float = 950.0
    ) -> None:
        settings = {"interval": interval, "cross_interval": cross_interval, "low": low, "high": high}
        super().__init__(dense_steps, **settings)

    @contextmanager
    def _attached(self, pipe: Any) -> Iterator[None]:
        s = self.settings
        with ExitStack() as stack:
            for transformer in transformers_of(pipe):
                model, intervals = model_of(transformer), (s["interval"], s["cross_interval"])
                hooks = [
                    (attention, _Hook((s["low"], s["high"]), interval, lambda: pipe.current_timestep))
                    for block in model.blocks(transformer)
                    for kind, interval in zip(model.attentions(block), intervals, strict=True)
                    for attention in kind
                ]
                stack.enter_context(hooked(transformer, hooks, _HOOK))
            yield

    @classmethod
    def candidates(cls, dense_steps: int) -> list[PAB]:
        """Ranges and intervals around the published ones."""
        return [
            cls(dense_steps, interval=n, cross_interval=n + more, low=low, high=high)
            for low, high in ((100.0, 850.0), (50.0, 990.0))
            for n, more in ((2, 0), (2, 2), (3, 2), (5, 3))
        ]


class _Hook(PyramidAttentionBroadcastHook):
    """Diffusers' hook with a state for each guidance branch."""

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        self.states = StateManager(PyramidAttentionBroadcastState)
        return module

    @property
    def state(self) -> PyramidAttentionBroadcastState:
        return self.states.get_state()

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self.states.reset()
        return module
