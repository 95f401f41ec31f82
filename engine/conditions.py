"""What a video is to show, as the transformer takes it: the prompts' embeddings, and the image encoder's view."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .models import Recipe
from .request import ResolvedRequest

if TYPE_CHECKING:
    from PIL import Image

    from .sharding import Sharding


def encode_prompts(
    recipe: Recipe, pipeline: Any, request: ResolvedRequest, device: torch.device, sharding: Sharding | None
) -> dict[str, torch.Tensor | None]:
    """Embeddings of the prompts, by the names of the pipeline's arguments, on every rank; rank 0 makes them for all."""
    if sharding is None:
        with torch.no_grad():
            return recipe.embed(pipeline, request)

    @torch.no_grad()
    def made() -> dict[str, torch.Tensor]:
        pipeline.text_encoder.to(device)
        return {name: text.cpu() for name, text in recipe.embed(pipeline, request).items() if text is not None}

    embeds = sharding.agreement.decide(made)
    if sharding.agreement.leads and device.type == "cuda":
        pipeline.text_encoder.to("cpu")  # until the next prompt: its memory is worth more to K/V
    return {name: embeds[name].to(device) if name in embeds else None for name in recipe.embeds}


@torch.no_grad()
def seen_image(pipeline: Any, image: Image.Image | None) -> dict[str, torch.Tensor]:
    """What the transformer will be given of an image besides latents: Wan 2.1's CLIP tokens, else nothing."""
    if image is None or getattr(pipeline.transformer.config, "image_dim", None) is None:
        return {}
    view = pipeline.encode_image(image, pipeline._execution_device)
    return {"encoder_hidden_states_image": view.to(pipeline.transformer.dtype)}
