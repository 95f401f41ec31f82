"""How the engine calls Wan's pipelines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .recipe import Recipe

if TYPE_CHECKING:
    from PIL import Image

    from ..facts import ModelFacts
    from ..request import ResolvedRequest


class WanRecipe(Recipe):
    """Text- and image-to-video; see `Recipe` for what the methods mean."""

    embeds: ClassVar[tuple[str, ...]] = ("prompt_embeds", "negative_prompt_embeds")
    max_sequence_length: ClassVar[int] = 512

    @classmethod
    def told(cls, embeds: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """See `Recipe`."""
        found = zip(("cond", "uncond"), (embeds[name] for name in cls.embeds), strict=True)
        return {unit: text for unit, text in found if text is not None}

    @staticmethod
    def arguments(facts: ModelFacts, request: ResolvedRequest) -> dict[str, Any]:
        """See `Recipe`."""
        # With a VAE that does not compress time, the pipelines add one to the number of frames that they are given.
        extra = 1 if facts.vae_temporal == 1 else 0
        return {
            "num_frames": request.num_frames - extra,
            "guidance_scale": request.guidance_scale,
            "guidance_scale_2": request.guidance_scale_2,
            "max_sequence_length": WanRecipe.max_sequence_length,
        }

    @staticmethod
    def start(facts: ModelFacts, image: Image.Image | None) -> dict[str, Any]:
        """See `Recipe`."""
        return {} if image is None else {"image": image}

    @staticmethod
    def results(output: Any) -> tuple[Tensor, Tensor | None]:
        """See `Recipe`."""
        return output.frames, None

    @staticmethod
    def decodable(vae: Any, latents: Tensor) -> Tensor:
        """Undo the normalisation, as the end of the pipelines does it."""
        latents = latents.to(vae.dtype)
        mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1).to(latents.device, latents.dtype)
        inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1).to(latents.device, latents.dtype)
        return latents / inverse_std + mean

    @staticmethod
    def decode(vae: Any, latents: Tensor) -> Tensor:
        """See `Recipe`."""
        video: Tensor = vae.decode(latents, return_dict=False)[0]
        return video
