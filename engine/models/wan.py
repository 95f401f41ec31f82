"""Wan 2.1 and 2.2: what the hook must know about diffusers' WanTransformer3DModel and its pipelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffusers import WanTransformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor

from ..attention import AttentionCall
from ..registry import OwnHook
from ..tokens import Grid, Patch, gather_rows, pack, patchify, unpatchify
from .adapter import Adapter, Site
from .wan_attention import CachedTextAttnProcessor, CachedWanAttnProcessor, RopeRows


class WanAdapter(Adapter):
    """Wan text- and image-to-video: one or two experts, timesteps per video or (TI2V-5B) per token.

    Active tokens are packed into a small video of their own; see `Adapter` for what the methods mean.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("WanPipeline", "WanImageToVideoPipeline")
    stock_processors: ClassVar[tuple[type, ...]] = (WanAttnProcessor,)
    moving: ClassVar[tuple[str, ...]] = ("hidden_states", "timestep")
    solvers: ClassVar[tuple[str, ...]] = ("euler", "unipc", "dpm++")
    step_tensors: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[Any] = Transformer2DModelOutput

    @classmethod
    def recognises(cls, pipe: Any) -> bool:
        """See `Adapter`."""
        if not any(c.__name__ in cls.pipelines for c in type(pipe).__mro__):
            return False
        found = cls.transformers(pipe)
        return bool(found) and all(isinstance(t, WanTransformer3DModel) for _, t in found)

    @staticmethod
    def transformers(pipe: Any) -> list[tuple[int, Any]]:
        """See `Adapter`."""
        pair = (getattr(pipe, "transformer", None), getattr(pipe, "transformer_2", None))
        return [(expert, model) for expert, model in enumerate(pair) if model is not None]

    @staticmethod
    def blocks(transformer: Any) -> list[Any]:
        """See `Adapter`."""
        return list(transformer.blocks)

    @staticmethod
    def sites(transformer: Any) -> list[Site]:
        """Self-attention of each layer."""
        return [Site(block.attn1) for block in transformer.blocks]

    @staticmethod
    def processor(call: AttentionCall, replaced: Any, *, everywhere: bool = False) -> CachedWanAttnProcessor:
        """See `Adapter`."""
        assert not everywhere
        return CachedWanAttnProcessor(call, replaced)

    @staticmethod
    def text_attentions(transformer: Any) -> list[Any]:
        """Cross-attention modules with the stock processor."""
        found = [block.attn2 for block in transformer.blocks]
        return [attention for attention in found if type(attention.processor) is WanAttnProcessor]

    @staticmethod
    def text_processor(replaced: Any) -> CachedTextAttnProcessor:
        """See `Adapter`."""
        return CachedTextAttnProcessor(replaced)

    @staticmethod
    def hooks(transformer: Any, call: AttentionCall) -> list[tuple[Any, OwnHook]]:
        """The rotary embeddings, which are those of the small video otherwise."""
        return [(transformer.rope, RopeRows(call, _patch(transformer)))]

    @staticmethod
    def experts(pipe: Any) -> list[int]:
        """See `Adapter`."""
        timesteps, ratio = pipe.scheduler.timesteps, getattr(pipe.config, "boundary_ratio", None)
        if ratio is None:
            return [0] * len(timesteps)
        # Compared as tensors, as the pipeline does it: a float of Python's is more precise than a timestep.
        high_noise = timesteps >= ratio * pipe.scheduler.config.num_train_timesteps
        return [0 if high else 1 for high in high_noise.tolist()]

    @staticmethod
    def branches(pipe: Any) -> tuple[str, ...]:
        """See `Adapter`."""
        return ("cond", "uncond") if pipe.do_classifier_free_guidance else ("cond",)

    @staticmethod
    def units(pipe: Any, branch: str) -> tuple[str, ...]:
        """One for each branch."""
        return (branch,)

    @staticmethod
    def guidance(pipe: Any, units: Sequence[str], expert: int) -> dict[str, float]:
        """See `Adapter`."""
        if set(units) != {"cond", "uncond"}:
            return {name: 1.0 / len(units) for name in units}
        scale = pipe._guidance_scale_2 if expert == 1 else pipe._guidance_scale
        return {"cond": float(scale), "uncond": 1.0 - float(scale)}

    @staticmethod
    def grid(module: Any, arguments: Mapping[str, Any]) -> Grid:
        """See `Adapter`."""
        return _patch(module).grid_of(arguments["hidden_states"])

    @staticmethod
    def video(module: Any, arguments: Mapping[str, Any]) -> Tensor:
        """See `Adapter`."""
        latents: Tensor = arguments["hidden_states"]
        return latents[:, : module.config.out_channels]

    @staticmethod
    def subset(module: Any, arguments: Mapping[str, Any], active: Tensor) -> dict[str, Any]:
        """See `Adapter`."""
        patch, timestep = _patch(module), arguments["timestep"]
        packed = pack(gather_rows(patchify(arguments["hidden_states"], patch), active), patch)
        if timestep.ndim == 2:
            timestep = gather_rows(timestep, active)
        return {**arguments, "hidden_states": packed, "timestep": timestep}

    @staticmethod
    def rows(module: Any, out: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `Adapter`."""
        return patchify(out[0], _patch(module)), ()

    @staticmethod
    def answer(module: Any, grid: Grid, rows: Tensor, others: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """See `Adapter`."""
        return (unpatchify(rows, _patch(module), grid),)

    @staticmethod
    def nothing(module: Any, arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """See `Adapter`."""
        latents = arguments["hidden_states"]
        shape = (latents.shape[0], module.config.out_channels, *latents.shape[2:])
        return (latents.new_zeros(()).expand(shape),)


def _patch(transformer: Any) -> Patch:
    """Size of a token in latents."""
    return Patch(*transformer.config.patch_size)
