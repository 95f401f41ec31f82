"""How the engine calls a model's pipeline: one small class for each model, beside its `Adapter`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

    from ..audio import Audio
    from ..facts import ModelFacts
    from ..request import ResolvedRequest


class Recipe(Protocol):
    """A model's pipelines, as far as they differ; everything runs on stock parts."""

    embeds: ClassVar[tuple[str, ...]]
    """Arguments of the pipeline that hold the prompts, encoded, in the order of what its `encode_prompt` gives."""
    max_sequence_length: ClassVar[int]
    """Of a prompt, in the text encoder's tokens: what the pipeline itself uses when it is given one."""

    @classmethod
    def embed(cls, pipeline: Any, request: ResolvedRequest) -> dict[str, Tensor | None]:
        """Encode the prompts: values for all of `embeds`, None where a request has no use for one."""
        found = pipeline.encode_prompt(
            request.prompt,
            request.negative_prompt,
            do_classifier_free_guidance=request.guidance_scale > 1.0,
            max_sequence_length=cls.max_sequence_length,
        )
        return dict(zip(cls.embeds, found, strict=True))

    @staticmethod
    def told(embeds: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """What the transformer will get as ``encoder_hidden_states``, by guidance unit, as far as it is known."""
        return {}

    @staticmethod
    def arguments(facts: ModelFacts, request: ResolvedRequest) -> dict[str, Any]:
        """Arguments of the pipeline's call besides embeddings, image, width, height, steps, seed and callback."""

    @staticmethod
    def set_timesteps(scheduler: Any, facts: ModelFacts, request: ResolvedRequest) -> None:
        """Set a scheduler's timesteps as the pipeline's call does it."""
        scheduler.set_timesteps(request.num_inference_steps)

    @staticmethod
    def start(facts: ModelFacts, image: Image.Image | None) -> dict[str, Any]:
        """Arguments about the image that a video starts from."""

    @staticmethod
    def results(output: Any) -> tuple[Tensor, Tensor | None]:
        """Latents of the video [1, C, F, Y, X], and of the sound, out of a call with ``output_type="latent"``."""

    @staticmethod
    def finished(pipeline: Any, latents: Tensor) -> Tensor:
        """Latents of the loop [1, C, F, Y, X] as the pipeline would give them in the end."""
        return latents

    @staticmethod
    def decodable(vae: Any, latents: Tensor) -> Tensor:
        """Latents in the form and type that the VAE decodes."""

    @staticmethod
    def decode(vae: Any, latents: Tensor) -> Tensor:
        """Decode `decodable` latents: [1, 3, F, H, W], nominally from -1 to 1."""

    @staticmethod
    def audio(pipeline: Any, latents: Tensor) -> Audio:
        """Decode latents of sound; only asked for where there are any."""
        raise NotImplementedError
