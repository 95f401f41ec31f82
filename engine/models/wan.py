"""Wan 2.1 and 2.2: what the hook must know about diffusers' WanTransformer3DModel and its pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import ModelHook
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor

from ..attention import AttentionCall, CachedTextAttnProcessor, CachedWanAttnProcessor
from ..tokens import Grid, Patch, gather_rows


class WanAdapter:
    """Wan text- and image-to-video: one or two experts, timesteps per video or (TI2V-5B) per token."""

    pipelines = ("WanPipeline", "WanImageToVideoPipeline")
    processor = CachedWanAttnProcessor
    text_processor = CachedTextAttnProcessor

    @classmethod
    def recognises(cls, pipe: Any) -> bool:
        """Whether `pipe` is one of `pipelines` (or derived from one) with stock transformers."""
        if not any(c.__name__ in cls.pipelines for c in type(pipe).__mro__):
            return False
        found = cls.transformers(pipe)
        return bool(found) and all(isinstance(t, WanTransformer3DModel) for _, t in found)

    @staticmethod
    def transformers(pipe: Any) -> list[tuple[int, Any]]:
        """Return (expert, transformer) pairs; expert 0 does the high noise, 1 the low noise."""
        pair = (getattr(pipe, "transformer", None), getattr(pipe, "transformer_2", None))
        return [(expert, model) for expert, model in enumerate(pair) if model is not None]

    @staticmethod
    def patch(transformer: Any) -> Patch:
        """Size of a token in latents."""
        return Patch(*transformer.config.patch_size)

    @staticmethod
    def blocks(transformer: Any) -> list[Any]:
        """The layers, in the order in which they run."""
        return list(transformer.blocks)

    @staticmethod
    def attentions(transformer: Any) -> list[Any]:
        """Self-attention modules, one per layer: the only place where tokens meet."""
        return [block.attn1 for block in transformer.blocks]

    @staticmethod
    def text_attentions(transformer: Any) -> list[Any]:
        """Cross-attention modules with the stock processor, whose keys and values are those of the prompt."""
        found = [block.attn2 for block in transformer.blocks]
        return [attention for attention in found if type(attention.processor) is WanAttnProcessor]

    @staticmethod
    def conditioned(timestep: Tensor) -> Tensor | None:
        """Indices int64 [C] of the tokens that are given, seen at a run's first step; None if there are none.

        TI2V-5B puts the image into the first latent frame, whose tokens stand at timestep 0 from the start.
        """
        return (timestep == 0).all(0).nonzero()[:, 0] if timestep.ndim == 2 else None

    @staticmethod
    def experts(pipe: Any) -> list[int]:
        """Expert that the pipeline will call at each step."""
        timesteps, ratio = pipe.scheduler.timesteps, getattr(pipe.config, "boundary_ratio", None)
        if ratio is None:
            return [0] * len(timesteps)
        # Compared as tensors, as the pipeline does it: a float of Python's is more precise than a timestep.
        high_noise = timesteps >= ratio * pipe.scheduler.config.num_train_timesteps
        return [0 if high else 1 for high in high_noise.tolist()]

    @staticmethod
    def guidance(pipe: Any, branches: Sequence[str], expert: int) -> dict[str, float]:
        """Weights with which the pipeline mixes the branches' velocities into the guided one."""
        if set(branches) != {"cond", "uncond"}:
            return {name: 1.0 / len(branches) for name in branches}
        scale = pipe._guidance_scale_2 if expert == 1 else pipe._guidance_scale
        return {"cond": float(scale), "uncond": 1.0 - float(scale)}

    @staticmethod
    def branches(pipe: Any) -> tuple[str, ...]:
        """Names of the guidance branches of the running pipeline call, in the order of its calls."""
        return ("cond", "uncond") if pipe.do_classifier_free_guidance else ("cond",)

    @staticmethod
    def num_branches(pipe: Any) -> int:
        """How many guidance branches the running pipeline call evaluates per step."""
        return 2 if pipe.do_classifier_free_guidance else 1

    @staticmethod
    def rope(transformer: Any) -> tuple[Any, RopeRows]:
        """Return the module that makes rotary embeddings, and the hook that reduces them to active tokens."""
        return transformer.rope, RopeRows(WanAdapter.patch(transformer))


class RopeRows(ModelHook):
    """On the transformer's `rope`: embeddings of the active tokens at their true positions."""

    def __init__(self, patch: Patch) -> None:
        """Start inactive: the stock embeddings, of tokens of size `patch`."""
        super().__init__()
        self.call: AttentionCall | None = None
        self.grid: Grid | None = None
        self.patch = patch
        self._key: tuple[Any, ...] | None = None
        self._table: tuple[Tensor, Tensor] | None = None

    def new_forward(self, module: torch.nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin, each [1 or B, A, 1, D]."""
        active = self.call.active if self.call is not None else None
        if active is None or self.grid is None:
            return self.fn_ref.original_forward(hidden_states)
        key = (self.grid, hidden_states.device, *(buffer.dtype for buffer in module.buffers()))
        if key != self._key or self._table is None:
            # The stock forward reads nothing but the shape: one expanded element stands for the whole video.
            shape = (1, 1, *(n * p for n, p in zip(self.grid, self.patch, strict=True)))
            self._table = self.fn_ref.original_forward(hidden_states.new_empty(1).expand(shape))
            self._key = key
        cos, sin = (t.expand(active.shape[0], -1, -1, -1) if active.ndim == 2 else t for t in self._table)
        return gather_rows(cos, active), gather_rows(sin, active)
