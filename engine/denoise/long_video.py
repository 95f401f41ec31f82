"""A request for a long video before the pipeline is called: how it is cut, its prompts over time, its initial noise."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from ...errors import RequestError
from ..facts import ModelFacts
from ..models import Adapter
from ..noise import read_noise
from ..request import ResolvedRequest
from ..windows import read_scenes
from .inputs import encode_prompts
from .windows import Text, Window, Windows, shared_noise
from .work_split import Sharding


def windows_for(facts: ModelFacts, request: ResolvedRequest) -> Windows | None:
    """How a request's video is cut, without its prompts over time; None: the model sees it whole."""
    if request.window is None or request.overlap is None:  # a video in windows has both
        return None
    return Windows(
        length=facts.grid(request.width, request.height, request.window)[0],
        overlap=math.ceil(request.overlap / facts.frame_step),
        roll=bool(request.roll_windows),
        anchor=facts.vae_temporal > 1,
    )


def worded_windows(
    adapter: Adapter,
    pipeline: Any,
    facts: ModelFacts,
    request: ResolvedRequest,
    device: torch.device,
    sharding: Sharding | None,
) -> Windows | None:
    """The same with the prompts over time, encoded; every rank must call it."""
    windows = windows_for(facts, request)
    if windows is None or request.prompt_schedule is None:
        return windows
    texts = []
    for start, stop, prompt in read_scenes(request.prompt_schedule, request.fps):
        part = dataclasses.replace(request, prompt=prompt)
        embeds = encode_prompts(adapter, pipeline, part, device, sharding)
        texts.append(Text(_place(start, facts), _place(stop, facts), adapter.worded(pipeline, embeds)))
    return dataclasses.replace(windows, texts=texts)


def _place(frame: float, facts: ModelFacts) -> float:
    """Where a frame of the video stands among the frames of tokens: the first one has a latent of its own."""
    latent = (frame - 1) / facts.vae_temporal + 1 if frame >= 1 else 0.0
    return latent / facts.patch[0]


def windows_of(facts: ModelFacts, request: ResolvedRequest) -> tuple[int, int]:
    """How many windows a video is made in, at least 1, and the tokens that all of them have together."""
    windows, grid = windows_for(facts, request), facts.grid(request.width, request.height, request.num_frames)
    found = [Window(0, 0, grid[0])] if windows is None else windows.of(grid[0])
    return len(found), sum(window.stop - window.start for window in found) * grid[1] * grid[2]


def opening(adapter: Adapter, pipeline: Any, facts: ModelFacts, request: ResolvedRequest) -> dict[str, Any]:
    """Arguments of the pipeline's call about its random numbers: a generator, and initial noise that it does not draw.

    Raises:
        RequestError: the file of noise does not fit the model.
    """
    generator = torch.Generator("cpu").manual_seed(request.seed)
    windows, noise = windows_for(facts, request), None
    if request.noise is not None:
        noise = read_noise(request.noise)
        channels = pipeline.vae.config.z_dim
        if noise.shape[1] != channels:
            raise RequestError(
                f"noise has {noise.shape[1]} channels, but the latents of {facts.name!r} have {channels}"
            )
        return {"generator": generator, **adapter.long(pipeline, facts, request, noise)}
    if windows is None:
        return {"generator": generator}
    if request.shared_noise:
        frames = (request.num_frames - 1) // facts.vae_temporal + 1
        size = (frames, request.height // facts.vae_spatial, request.width // facts.vae_spatial)
        noise = torch.randn(1, pipeline.transformer.config.in_channels, *size, generator=generator)
        noise = shared_noise(noise, windows, generator, facts.patch[0])
    return {"generator": generator, **adapter.long(pipeline, facts, request, noise)}
