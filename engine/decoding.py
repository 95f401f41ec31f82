"""Final latents become frames and sound, as the end of the stock pipeline's call makes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .denoise.work_split import Sharding, can_share, decode_shared
from .media.audio import Audio
from .models import Adapter
from .models.base import check_finite
from .request import ResolvedRequest


def decode_frames(
    pipeline: Any, adapter: Adapter, sharding: Sharding | None, latents: torch.Tensor, request: ResolvedRequest
) -> NDArray[np.uint8]:
    """Decode latents [1, C, F, Y, X] into uint8 [F, H, W, 3], on every rank.

    Raises:
        RequestError: the VAE returns NaN or infinite values; on all ranks alike.
    """
    video, dtype = _video(pipeline, adapter, sharding, latents), pipeline.vae.dtype
    if sharding is None:
        assert video is not None
        check_finite(video, "the VAE", dtype)
        return _pixels(pipeline, video)
    sharding.agreement.decide(lambda: None if video is None else check_finite(video, "the VAE", dtype))
    frames = None if video is None else torch.from_numpy(_pixels(pipeline, video))
    shape = (request.num_frames, request.height, request.width, 3)
    sent: NDArray[np.uint8] = sharding.agreement.send(frames, shape, torch.uint8).cpu().numpy()
    return sent


def decode_audio(pipeline: Any, adapter: Adapter, latents: torch.Tensor) -> Audio:
    """Decode the latents of sound into samples, on this rank."""
    audio = adapter.audio(pipeline, latents.to(pipeline._execution_device))
    pipeline.maybe_free_model_hooks()
    return audio


@torch.no_grad()
def _video(pipeline: Any, adapter: Adapter, sharding: Sharding | None, latents: torch.Tensor) -> torch.Tensor | None:
    """Decoded [1, 3, F, H, W] on rank 0; the others help with large videos."""
    vae = pipeline.vae
    shared = sharding is not None and can_share(vae, latents)
    if sharding is not None and not (shared or sharding.agreement.leads):
        return None
    latents = adapter.decodable(vae, latents.to(pipeline._execution_device))
    if shared:
        assert sharding is not None
        video = decode_shared(vae, latents, sharding.agreement, adapter.decode)
    else:
        video = adapter.decode(vae, latents)
    pipeline.maybe_free_model_hooks()
    return video


def _pixels(pipeline: Any, video: torch.Tensor) -> NDArray[np.uint8]:
    """Decoded [1, 3, F, H, W] -> uint8 [F, H, W, 3]."""
    frames = pipeline.video_processor.postprocess_video(video, output_type="np")[0]
    pixels: NDArray[np.uint8] = (frames * 255.0).round().astype(np.uint8)
    return pixels
