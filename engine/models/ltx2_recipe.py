"""How the engine calls LTX-2's pipelines."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from diffusers.pipelines.ltx2.pipeline_ltx2 import calculate_shift
from torch import Tensor

from ..audio import Audio
from ..quality import check_finite
from .recipe import Recipe

if TYPE_CHECKING:
    from PIL import Image

    from ..facts import ModelFacts
    from ..request import ResolvedRequest


class LTX2Recipe(Recipe):
    """Text- and image-to-video with sound; see `Recipe` for what the methods mean."""

    embeds: ClassVar[tuple[str, ...]] = (
        "prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    )
    max_sequence_length: ClassVar[int] = 1024

    @staticmethod
    def arguments(facts: ModelFacts, request: ResolvedRequest) -> dict[str, Any]:
        """See `Recipe`."""
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
            "max_sequence_length": LTX2Recipe.max_sequence_length,
        }

    @staticmethod
    def set_timesteps(scheduler: Any, facts: ModelFacts, request: ResolvedRequest) -> None:
        """See `Recipe`: shifted by the number of tokens."""
        steps, config = request.num_inference_steps, scheduler.config
        mu = calculate_shift(
            math.prod(facts.grid(request.width, request.height, request.num_frames)),
            config.get("base_image_seq_len", 1024),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.95),
            config.get("max_shift", 2.05),
        )
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)

    @staticmethod
    def start(facts: ModelFacts, image: Image.Image | None) -> dict[str, Any]:
        """See `Recipe`. Told here, since the pipeline would ask its text encoder, which not every rank has."""
        return {} if image is None else {"image": image, "image_crf": facts.image_crf}

    @staticmethod
    def results(output: Any) -> tuple[Tensor, Tensor | None]:
        """See `Recipe`."""
        return output.frames, output.audio

    @staticmethod
    def finished(pipeline: Any, latents: Tensor) -> Tensor:
        """See `Recipe`."""
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
        """See `Recipe`."""
        # The pipelines' own default of a VAE that is told how noisy its latents are.
        noise = latents.new_zeros(len(latents)) if vae.config.timestep_conditioning else None
        video: Tensor = vae.decode(latents, noise, return_dict=False)[0]
        return video

    @staticmethod
    @torch.no_grad()
    def audio(pipeline: Any, latents: Tensor) -> Audio:
        """See `Recipe`."""
        vae = pipeline.audio_vae
        spectrograms = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        check_finite(spectrograms, "the audio VAE", vae.dtype)
        samples = pipeline.vocoder(spectrograms)[0]
        check_finite(samples, "the vocoder", pipeline.vocoder.dtype)
        return Audio(
            samples=samples.float().cpu().numpy(), sample_rate=int(pipeline.vocoder.config.output_sampling_rate)
        )
