"""LTX-2, 2.3 and 2.5: what the hook must know about diffusers' LTX2VideoTransformer3DModel and its pipelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffusers import LTX2VideoTransformer3DModel
from diffusers.models.transformers.transformer_ltx2 import (
    AudioVisualModelOutput,
    LTX2AudioVideoAttnProcessor,
    LTX2PerturbedAttnProcessor,
)
from torch import Tensor

from ...errors import ConfigError
from ..attention import AttentionCall
from ..registry import OwnHook
from ..tokens import Grid, Patch, gather_rows, unpatchify
from .adapter import Adapter, Site
from .ltx2_attention import CachedLTX2AttnProcessor, CachedLTX2TextAttnProcessor, Plain


class LTX2Adapter(Adapter):
    """LTX-2 text- and image-to-video with sound: a token of video is active or not, sound always is.

    The model takes packed tokens with their coordinates, so that some tokens need no packing; see `Adapter` for what
    the methods mean. Guidance by perturbed self-attention ("uncond_stg") and by isolated modalities
    ("uncond_modality") has branches of its own.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("LTX2Pipeline", "LTX2ImageToVideoPipeline")
    stock_processors: ClassVar[tuple[type, ...]] = (LTX2AudioVideoAttnProcessor, LTX2PerturbedAttnProcessor)
    moving: ClassVar[tuple[str, ...]] = (
        "hidden_states",
        "audio_hidden_states",
        "timestep",
        "audio_timestep",
        "sigma",
        "audio_sigma",
    )
    solvers: ClassVar[tuple[str, ...]] = (
        "euler",
    )  # the pipelines step sound by a copy of their scheduler, which must take their shift
    step_tensors: ClassVar[tuple[str, ...]] = ("audio_latents",)
    output: ClassVar[Any] = AudioVisualModelOutput

    @classmethod
    def recognises(cls, pipe: Any) -> bool:
        """See `Adapter`."""
        known = any(c.__name__ in cls.pipelines for c in type(pipe).__mro__)
        return known and isinstance(getattr(pipe, "transformer", None), LTX2VideoTransformer3DModel)

    @staticmethod
    def transformers(pipe: Any) -> list[tuple[int, Any]]:
        """See `Adapter`."""
        return [(0, pipe.transformer)]

    @staticmethod
    def blocks(transformer: Any) -> list[Any]:
        """See `Adapter`."""
        return list(transformer.transformer_blocks)

    @staticmethod
    def sites(transformer: Any) -> list[Site]:
        """Where video looks at video, and where sound does."""
        blocks = transformer.transformer_blocks
        return [
            *(Site(block.attn1) for block in blocks),
            *(Site(block.video_to_audio_attn, everywhere=True) for block in blocks),
        ]

    @staticmethod
    def processor(call: AttentionCall, replaced: Any, *, everywhere: bool = False) -> CachedLTX2AttnProcessor:
        """See `Adapter`."""
        return CachedLTX2AttnProcessor(call, replaced, everywhere=everywhere)

    @staticmethod
    def text_attentions(transformer: Any) -> list[Any]:
        """Where video and sound look at the prompt; none in 2.3, which scales and shifts it by each step's noise."""
        if transformer.prompt_modulation and transformer.config.use_prompt_adaln_single:
            return []
        blocks = transformer.transformer_blocks
        found = [attention for block in blocks for attention in (block.attn2, block.audio_attn2)]
        return [attention for attention in found if type(attention.processor) in LTX2Adapter.stock_processors]

    @staticmethod
    def text_processor(replaced: Any) -> CachedLTX2TextAttnProcessor:
        """See `Adapter`."""
        return CachedLTX2TextAttnProcessor(replaced)

    @staticmethod
    def hooks(transformer: Any, call: AttentionCall) -> list[tuple[Any, OwnHook]]:
        """What the first block gets is like what the others get, so that compiled blocks share their graphs."""
        return [(transformer.proj_in, Plain()), (transformer.audio_proj_in, Plain())]

    @staticmethod
    def branches(pipe: Any) -> tuple[str, ...]:
        """See `Adapter`."""
        perturbed = ("uncond_stg",) if pipe.do_spatio_temporal_guidance else ()
        isolated = ("uncond_modality",) if pipe.do_modality_isolation_guidance else ()
        return ("cond_uncond", *perturbed, *isolated)

    @staticmethod
    def units(pipe: Any, branch: str) -> tuple[str, ...]:
        """See `Adapter`."""
        if branch != "cond_uncond":
            return (branch,)
        return ("uncond", "cond") if pipe.do_classifier_free_guidance else ("cond",)

    @staticmethod
    def guidance(pipe: Any, units: Sequence[str], expert: int) -> dict[str, float]:
        """See `Adapter`. The pipeline's rescaling by the latents' spread is left out: it moves all tokens alike."""
        pushes = {
            "uncond": pipe._guidance_scale - 1.0,
            "uncond_stg": pipe._stg_scale,
            "uncond_modality": pipe._modality_scale - 1.0,
        }
        weights = {unit: -float(push) for unit, push in pushes.items() if unit in units}
        return {**weights, "cond": 1.0 - sum(weights.values())}

    @staticmethod
    def grid(module: Any, arguments: Mapping[str, Any]) -> Grid:
        """See `Adapter`."""
        size = (arguments[name] for name in ("num_frames", "height", "width"))
        return Grid(*(n // p for n, p in zip(size, _patch(module), strict=True)))

    @staticmethod
    def video(module: Any, arguments: Mapping[str, Any]) -> Tensor:
        """See `Adapter`."""
        return unpatchify(arguments["hidden_states"], _patch(module), LTX2Adapter.grid(module, arguments))

    @staticmethod
    def subset(module: Any, arguments: Mapping[str, Any], active: Tensor) -> dict[str, Any]:
        """See `Adapter`.

        Raises:
            ConfigError: the video's self-attention is masked.
        """
        if arguments.get("video_self_attention_mask") is not None:
            raise ConfigError("A mask of the video's self-attention is not supported where tokens are left out.")
        latents, timestep, coords = (arguments[name] for name in ("hidden_states", "timestep", "video_coords"))
        marks = arguments.get("video_keyframes_mask")
        if timestep.ndim == 2 and timestep.shape[1] == latents.shape[1]:
            timestep = gather_rows(timestep, active)
        return {
            **arguments,
            "hidden_states": gather_rows(latents, active),
            "timestep": timestep,
            "video_coords": gather_rows(coords.transpose(1, 2), active).transpose(1, 2),
            "video_keyframes_mask": None if marks is None else gather_rows(marks, active),
        }

    @staticmethod
    def rows(module: Any, out: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Rows of video, and the velocity of the sound."""
        return out[0], out[1:]

    @staticmethod
    def answer(module: Any, grid: Grid, rows: Tensor, others: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """See `Adapter`."""
        return (rows, *others)

    @staticmethod
    def nothing(module: Any, arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """See `Adapter`."""
        video, sound, widths = arguments["hidden_states"], arguments["audio_hidden_states"], module.config
        nought = video.new_zeros(())
        video = nought.expand(*video.shape[:2], widths.out_channels or widths.in_channels)
        return video, nought.expand(*sound.shape[:2], widths.audio_out_channels or widths.audio_in_channels)


def _patch(transformer: Any) -> Patch:
    """Size of a token in latents."""
    across = transformer.config.patch_size
    return Patch(transformer.config.patch_size_t, across, across)
