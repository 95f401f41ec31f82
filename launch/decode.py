"""`heterostep decode`: final latents become the file of a video once more."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..engine.config import EngineConfig
from ..engine.decoding import decode_into, with_sound
from ..engine.facts import ModelFacts, read_facts
from ..engine.loading import load_decoder, pick_device, pick_dtype
from ..engine.models import adapter_named
from ..engine.progress import Progress
from ..engine.report import HSAReport
from ..engine.request import GenerateRequest, ResolvedRequest, VideoResult, resolve
from ..engine.stored import Latents, read_latents
from ..errors import ConfigError
from .logs import silence_libraries
from .options import Outputs, given
from .outputs import OutputFiles, elsewhere


def decode(asked: Mapping[str, Any], outputs: Outputs, progress: Progress) -> int:
    """Run the command; returns the exit code.

    Args:
        asked: `source`, a file of latents or the folder of a job; and what was given of the settings of `EngineConfig`
            and of `fps`. Without them the model, the type and the frame rate are those that the source names.
        outputs: what is written.
        progress: shows what is done.

    Raises:
        HeterostepError: a setting, the latents or the model is wrong, or the file lies elsewhere.
    """
    silence_libraries(downloads=progress.shown)
    source = asked["source"]
    latents = read_latents(Path(source))
    known = {name: latents.facts[name] for name in ("model", "dtype") if name in latents.facts}
    settings = {**known, **given(EngineConfig, asked)}
    if "model" not in settings:
        raise ConfigError(f"{source!r} does not say which model made it; name it with --model")
    config = EngineConfig(hsa=None, **settings)
    facts = read_facts(config.model)
    request = _request(latents, facts, asked.get("fps"))
    files = OutputFiles(outputs, None)
    files.check(request)
    files.announce(progress.say)
    device = pick_device(config.device)
    progress.stage(f"loading the VAE of model {config.model}")
    pipeline = load_decoder(facts, config, device, pick_dtype(config.dtype, device))
    _check_channels(source, latents, facts, pipeline.vae.config)
    video = VideoResult(
        fps=request.fps,
        hsa=None,
        report=HSAReport(steps=[], compute=1.0, evaluations=None, kv_bytes=0, num_steps=request.num_inference_steps),
        seconds={},
        latents=latents.video,
        request=request,
        audio_latents=latents.audio if facts.audio_heads else None,
    )
    progress.stage("decoding")
    video, decoder = with_sound(pipeline, adapter_named(facts.pipeline), None, video)
    decode_into(decoder, None, functools.partial(files.pending, video))
    moved = files.write({})
    frames, height, width = video.shape[:3]
    progress.say(f"{files.paths['output']}: {frames} frames of {width}x{height}, {request.fps} per second")
    if moved:
        raise elsewhere(moved, None)
    return 0


def _check_channels(source: str, latents: Latents, facts: ModelFacts, config: Any) -> None:
    """Refuse the latents of another model."""
    found, wanted = latents.video.shape[1], config.get("latent_channels") or config.get("z_dim")
    if found != wanted:
        raise ConfigError(
            f"{source!r} holds latents of {found} channels, but those of model {facts.name!r} have {wanted}; name the "
            "model that made them with --model"
        )


def _request(latents: Latents, facts: ModelFacts, fps: int | None) -> ResolvedRequest:
    """A request of the latents' size, at the frame rate of the one that made them where it is known."""
    num_latent, rows, columns = latents.video.shape[2:]
    size: dict[str, Any] = {
        "num_frames": (num_latent - 1) * facts.vae_temporal + 1,
        "height": rows * facts.vae_spatial,
        "width": columns * facts.vae_spatial,
    }
    known = latents.facts.get("request")
    if fps is None and isinstance(known, Mapping):
        fps = known.get("fps")
    usual = resolve(GenerateRequest(prompt="-", fps=fps), dataclasses.replace(facts, image="none"))
    return dataclasses.replace(usual, **size)
