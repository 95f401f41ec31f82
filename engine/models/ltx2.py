"""LTX-2: what its transformer says about itself, and how its pipelines are called."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from diffusers import LTX2VideoTransformer3DModel
from diffusers.models.transformers.transformer_ltx2 import (
    AudioVisualModelOutput,
    LTX2AudioVideoAttnProcessor,
    LTX2PerturbedAttnProcessor,
)
from diffusers.pipelines.ltx2.pipeline_ltx2 import calculate_shift
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from torch import Tensor

from ...errors import ConfigError
from ..media.audio import Audio
from ..vae.ltx2 import LTX2Pieces, suits_ltx2
from ..vae.pieces import Pieces
from .base import (
    Adapter,
    AttentionCall,
    Grid,
    Patch,
    Site,
    check_finite,
    gather_rows,
    unpatchify,
)
from .hook_registry import OwnHook
from .ltx2_attention import CachedLTX2AttnProcessor, CachedLTX2TextAttnProcessor, Plain

if TYPE_CHECKING:
    from ..facts import ModelFacts
    from ..request import ResolvedRequest
    from ..sources import Sources


class LTX2Adapter(Adapter):
    """LTX-2 text- and image-to-video with sound: a token of video is active or not, sound always is.

    The model takes packed tokens with their coordinates, so that some tokens need no packing; see `Adapter` for what
    the methods mean. Guidance by perturbed self-attention ("uncond_stg") and by isolated modalities
    ("uncond_modality") has branches of its own.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("LTX2Pipeline", "LTX2ImageToVideoPipeline", "LTX2ConditionPipeline")
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
    step_schedulers: ClassVar[tuple[str, ...]] = ("audio_scheduler",)
    output: ClassVar[Any] = AudioVisualModelOutput

    @classmethod
    def recognises(cls, pipe: Any) -> bool:
        known = any(c.__name__ in cls.pipelines for c in type(pipe).__mro__)
        return known and isinstance(getattr(pipe, "transformer", None), LTX2VideoTransformer3DModel)

    @staticmethod
    def transformers(pipe: Any) -> list[tuple[int, Any]]:
        return [(0, pipe.transformer)]

    @staticmethod
    def blocks(transformer: Any) -> list[Any]:
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
        return CachedLTX2TextAttnProcessor(replaced)

    @staticmethod
    def hooks(transformer: Any, call: AttentionCall) -> list[tuple[Any, OwnHook]]:
        """What the first block gets is like what the others get, so that compiled blocks share their graphs."""
        return [(transformer.proj_in, Plain()), (transformer.audio_proj_in, Plain())]

    @staticmethod
    def branches(pipe: Any) -> tuple[str, ...]:
        perturbed = ("uncond_stg",) if pipe.do_spatio_temporal_guidance else ()
        isolated = ("uncond_modality",) if pipe.do_modality_isolation_guidance else ()
        return ("cond_uncond", *perturbed, *isolated)

    @staticmethod
    def units(pipe: Any, branch: str) -> tuple[str, ...]:
        if branch != "cond_uncond":
            return (branch,)
        return ("uncond", "cond") if pipe.do_classifier_free_guidance else ("cond",)

    @staticmethod
    def guidance(pipe: Any, units: Sequence[str], expert: int) -> dict[str, float]:
        """The pipeline's rescaling by the latents' spread is left out: it moves all tokens alike."""
        pushes = {
            "uncond": pipe._guidance_scale - 1.0,
            "uncond_stg": pipe._stg_scale,
            "uncond_modality": pipe._modality_scale - 1.0,
        }
        weights = {unit: -float(push) for unit, push in pushes.items() if unit in units}
        return {**weights, "cond": 1.0 - sum(weights.values())}

    @staticmethod
    def grid(module: Any, arguments: Mapping[str, Any]) -> Grid:
        """Frames that are given beside the video, to appear later in it, come after its own."""
        rows, columns = (arguments[name] // module.config.patch_size for name in ("height", "width"))
        return Grid(arguments["hidden_states"].shape[1] // (rows * columns), rows, columns)

    @staticmethod
    def video(module: Any, arguments: Mapping[str, Any]) -> Tensor:
        return unpatchify(arguments["hidden_states"], _patch(module), LTX2Adapter.grid(module, arguments))

    @staticmethod
    def subset(module: Any, arguments: Mapping[str, Any], active: Tensor) -> dict[str, Any]:
        """The arguments for the active tokens: their latents, noise levels and coordinates.

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
    def window(module: Any, arguments: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
        """See `Adapter`."""
        grid, count = LTX2Adapter.grid(module, arguments), stop - start
        tokens = grid.height * grid.width
        rows, first = slice(start * tokens, stop * tokens), slice(count * tokens)
        timestep, marks = arguments["timestep"], arguments.get("video_keyframes_mask")
        if timestep.ndim == 2 and timestep.shape[1] == grid.num_tokens:
            timestep = timestep[:, rows]
        [(low, high)] = LTX2Adapter.beside(module, arguments, start, stop)
        return {
            **arguments,
            "hidden_states": arguments["hidden_states"][:, rows],
            "timestep": timestep,
            "num_frames": count * _patch(module).frames,
            "video_coords": arguments["video_coords"][:, :, first],
            "video_keyframes_mask": None if marks is None else marks[:, rows],
            "audio_hidden_states": arguments["audio_hidden_states"][:, low:high],
            "audio_coords": arguments["audio_coords"][:, :, : high - low],
            "audio_num_frames": high - low,
        }

    @staticmethod
    def beside(module: Any, arguments: Mapping[str, Any], start: int, stop: int) -> list[tuple[int, int]]:
        """The sound of these frames: as much as the pipeline gives a video of that length, no latent less than that."""
        frames = module.rope.scale_factors[0] * _patch(module).frames  # of the video, for a frame of tokens
        rate = module.audio_rope.audio_latents_per_second / arguments["fps"]
        total, last = arguments["audio_num_frames"], LTX2Adapter.grid(module, arguments).frames
        # Rounded up: between windows that share a single frame there must be no latent that is in neither.
        count = min(math.ceil((frames * (stop - start - 1) + 1) * rate), total)
        low = total - count if stop == last else min(round(frames * start * rate), total - count)
        return [(low, low + count)]

    @staticmethod
    def rows(module: Any, out: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Rows of video, and the velocity of the sound."""
        return out[0], out[1:]

    @staticmethod
    def answer(module: Any, grid: Grid, rows: Tensor, others: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (rows, *others)

    @classmethod
    def spread(cls, module: Any, grid: Grid, rows: Tensor, like: Tensor) -> Tensor:
        """See `Adapter`. From an image on, the pipeline steps all frames but the given first one, unpacked."""
        if like.ndim == 3:
            return rows[..., None].expand(like.shape)
        patch = _patch(module)
        width = like.shape[1] * math.prod(patch)
        return unpatchify(rows[..., None].expand(-1, -1, width), patch, grid)[:, :, -like.shape[2] :]

    @staticmethod
    def nothing(module: Any, arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
        video, sound, widths = arguments["hidden_states"], arguments["audio_hidden_states"], module.config
        nought = video.new_zeros(())
        video = nought.expand(*video.shape[:2], widths.out_channels or widths.in_channels)
        return video, nought.expand(*sound.shape[:2], widths.audio_out_channels or widths.audio_in_channels)

    embeds: ClassVar[tuple[str, ...]] = (
        "prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    )
    max_sequence_length: ClassVar[int] = 1024

    @staticmethod
    def arguments(facts: ModelFacts, request: ResolvedRequest) -> dict[str, Any]:
        guidance, scale = facts.guidance_for(request.guidance_scale), request.guidance_scale
        assert guidance is not None
        # Where the value for sound is nothing, the pipelines take the video's.
        return {
            "frame_rate": float(request.fps),
            "num_frames": request.num_frames,
            "guidance_scale": scale,
            "audio_guidance_scale": guidance.audio_scale or scale,
            "stg_scale": guidance.perturbed,
            "audio_stg_scale": guidance.perturbed,
            "spatio_temporal_guidance_blocks": [guidance.block] if guidance.perturbed else None,
            "modality_scale": guidance.isolated,
            "audio_modality_scale": guidance.isolated,
            "guidance_rescale": guidance.rescale,
            "audio_guidance_rescale": guidance.rescale,
            "use_cross_timestep": guidance.cross_timestep,
            "max_sequence_length": LTX2Adapter.max_sequence_length,
        }

    @staticmethod
    def set_timesteps(scheduler: Any, facts: ModelFacts, request: ResolvedRequest) -> None:
        """Shifted by the number of tokens that the model sees at once."""
        sigmas, mu = _levels(request), _shift(scheduler, facts, request, request.window or request.num_frames)
        scheduler.set_timesteps(sigmas=sigmas, mu=mu)

    @staticmethod
    def start(facts: ModelFacts, request: ResolvedRequest, sources: Sources) -> dict[str, Any]:
        """With the compression, for which the pipelines would ask their text encoder, which not every rank has."""
        first, last, crf = sources.image, sources.last_image, facts.image_crf
        if first is None or last is None:
            return {} if first is None else {"image": first, "image_crf": crf}
        places = ((first, 0), (last, -1))
        return {"conditions": [LTX2VideoCondition(frames=image, index=place, crf=crf) for image, place in places]}

    @staticmethod
    def more_frames(request: ResolvedRequest) -> int:
        """A last image is one."""
        return 0 if request.last_image is None else 1

    @staticmethod
    def long(pipeline: Any, facts: ModelFacts, request: ResolvedRequest, noise: Tensor | None) -> dict[str, Any]:
        """See `Adapter`. The pipeline shifts noise levels by the length of the video, but the model sees a window."""
        given: dict[str, Any] = {}
        scheduler, vae = pipeline.scheduler, pipeline.vae
        if scheduler.config.get("use_dynamic_shifting"):
            assert request.window is not None
            whole, part = (_shift(scheduler, facts, request, n) for n in (request.num_frames, request.window))
            # The levels that the pipeline's shift turns into those of a window.
            linear = scheduler.config.get("time_shift_type") == "linear"
            odds = (1 / _levels(request) - 1) * (whole / part if linear else math.exp(whole - part))
            given["sigmas"] = 1 / (1 + odds)
        if noise is not None:  # which the pipeline takes for latents of its VAE
            given["latents"] = pipeline._denormalize_latents(
                noise, vae.latents_mean, vae.latents_std, vae.config.scaling_factor
            )
        return given

    @staticmethod
    @torch.no_grad()
    def worded(pipeline: Any, embeds: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """See `Adapter`."""
        side = getattr(pipeline.tokenizer, "padding_side", "left")
        text, mask = (embeds[name] for name in LTX2Adapter.embeds[:2])
        video, audio, mask = pipeline.connectors(text, mask, padding_side=side)
        return {
            "encoder_hidden_states": video,
            "audio_encoder_hidden_states": audio,
            "encoder_attention_mask": mask,
            "audio_encoder_attention_mask": mask,
        }

    @staticmethod
    def results(output: Any) -> tuple[Tensor, Tensor | None]:
        return output.frames, output.audio

    @staticmethod
    def finished(pipeline: Any, latents: Tensor) -> Tensor:
        vae = pipeline.vae
        given: Tensor = pipeline._denormalize_latents(
            latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor
        )
        return given

    @staticmethod
    def decodable(vae: Any, latents: Tensor) -> Tensor:
        """As they are: the pipeline has undone their normalisation."""
        return latents.to(vae.dtype)

    @staticmethod
    def decode(vae: Any, latents: Tensor) -> Tensor:
        # The pipelines' own default of a VAE that is told how noisy its latents are.
        noise = latents.new_zeros(len(latents)) if vae.config.timestep_conditioning else None
        video: Tensor = vae.decode(latents, noise, return_dict=False)[0]
        return video

    @classmethod
    def pieces(cls, vae: Any) -> Pieces:
        """See `Adapter`."""
        return LTX2Pieces(vae, cls.decode) if suits_ltx2(vae) else Pieces(vae, cls.decode)

    @staticmethod
    @torch.no_grad()
    def audio(pipeline: Any, latents: Tensor) -> Audio:
        vae = pipeline.audio_vae
        spectrograms = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        check_finite(spectrograms, "the audio VAE", vae.dtype)
        samples = pipeline.vocoder(spectrograms)[0]
        check_finite(samples, "the vocoder", pipeline.vocoder.dtype)
        return Audio(
            samples=samples.float().cpu().numpy(), sample_rate=int(pipeline.vocoder.config.output_sampling_rate)
        )


def _levels(request: ResolvedRequest) -> Any:
    """Noise levels as the pipelines space them, before they are shifted."""
    return np.linspace(1.0, 1 / request.num_inference_steps, request.num_inference_steps)


def _shift(scheduler: Any, facts: ModelFacts, request: ResolvedRequest, num_frames: int) -> float:
    """By how much the pipelines shift the noise levels of a video of that length."""
    config, (frames, *size) = scheduler.config, facts.grid(request.width, request.height, num_frames)
    num_tokens = (frames + LTX2Adapter.more_frames(request)) * math.prod(size)
    shift: float = calculate_shift(
        num_tokens,
        config.get("base_image_seq_len", 1024),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.95),
        config.get("max_shift", 2.05),
    )
    return shift


def _patch(transformer: Any) -> Patch:
    """Size of a token in latents."""
    across = transformer.config.patch_size
    return Patch(transformer.config.patch_size_t, across, across)
