"""`heterostep info`: versions, devices, and what a model's folder says about it."""

from __future__ import annotations

import dataclasses
import math

import torch

from ..engine.facts import ModelFacts, read_facts
from ..engine.record import device_name, versions
from ..engine.request import GenerateRequest, resolve
from ..parallel.config import divisors
from .logs import silence_libraries


def info(model: str, size: tuple[int, int] | None, num_frames: int | None) -> int:
    """Print what is known of a model; returns the exit code.

    Args:
        model: `"demo"`, a folder, or a hub id.
        size: width and height for which tokens are counted; None: the model's default.
        num_frames: for which tokens are counted; None: the model's default.
    """
    silence_libraries("huggingface_hub")
    facts = read_facts(model)
    width, height = size or (None, None)
    # A size can be checked without the image that a video of it would start from.
    any_image = dataclasses.replace(facts, image="none")
    sized = resolve(GenerateRequest(prompt="-", width=width, height=height, num_frames=num_frames), any_image)
    rows = [
        *(f"{name:16} {number}" for name, number in versions().items()),
        f"{'devices':16} {', '.join(_devices())}",
        "",
        *_model(facts),
        "",
        *_tokens(facts, sized.width, sized.height, sized.num_frames),
    ]
    print("\n".join(rows))
    return 0


_IMAGE = {
    "none": "no: text to video",
    "optional": "optional: text to video, or image to video with --image FILE",
    "required": "required: image to video; give --image FILE",
}


_LAST_IMAGE = {
    "none": "no",
    "optional": "optional: from --image FILE to --last-image FILE",
    "required": "required: from --image FILE to --last-image FILE",
}
_VIDEO = {
    "none": "no",
    "changed": "optional: --video FILE is changed, as far as --strength says",
    "followed": "optional: --video FILE is followed",
}


def _devices() -> list[str]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [device_name(torch.device("cuda", index)) for index in range(count)] + [device_name(torch.device("cpu"))]


def _model(facts: ModelFacts) -> list[str]:
    defaults = facts.defaults
    width_step, height_step = facts.size_step
    guidance = f"guidance {defaults.guidance_scale:g}"
    if defaults.guidance_scale_2 is not None:
        guidance += f" and {defaults.guidance_scale_2:g}"
    patch = " x ".join(str(n) for n in facts.patch)
    vae = f"{facts.vae_temporal} x {facts.vae_spatial} x {facts.vae_spatial}"
    return [
        f"{'model':16} {facts.name} ({facts.family}, {facts.pipeline})",
        f"{'transformer':16} {facts.experts} x {facts.num_layers} layers, {facts.num_heads} heads of {facts.head_dim}",
        f"{'ulysses degrees':16} {', '.join(str(n) for n in divisors(facts.shared_heads))}; ring takes any",
        f"{'image':16} {_IMAGE[facts.image]}",
        f"{'last image':16} {_LAST_IMAGE[facts.last_image]}",
        f"{'video':16} {_VIDEO[facts.video]}",
        *_audio(facts),
        f"{'token':16} {patch} latent pixels; VAE {vae}",
        f"{'valid sizes':16} width a multiple of {width_step}, height of {height_step}; "
        f"frames a multiple of {facts.frame_step}, plus 1",
        f"{'defaults':16} {defaults.width}x{defaults.height}, {defaults.num_frames} frames at "
        f"{defaults.fps} per second, {defaults.num_inference_steps} steps, {guidance}",
    ]


def _audio(facts: ModelFacts) -> list[str]:
    """What there is to say of sound, for models that make it."""
    guidance = facts.guidance
    if guidance is None:
        return []
    scales = [f"by the prompt {guidance.audio_scale:g}"] if guidance.audio_scale else []
    scales += [f"by perturbed attention in layer {guidance.block} {guidance.perturbed:g}"] if guidance.perturbed else []
    scales += [f"by isolated modalities {guidance.isolated:g}"] if guidance.isolated > 1.0 else []
    more = f"; more guidance: {', '.join(scales)}" if scales else ""
    heads = f"{facts.audio_heads} heads of {facts.audio_head_dim}"
    return [f"{'sound':16} {heads}, {facts.audio_rate:g} latents per second{more}"]


def _tokens(facts: ModelFacts, width: int, height: int, num_frames: int) -> list[str]:
    grid = facts.grid(width, height, num_frames)
    num_tokens = math.prod(grid)
    return [
        f"{'size':16} {width}x{height}, {num_frames} frames",
        f"{'tokens':16} {num_tokens:,} = {grid[0]} x {grid[1]} x {grid[2]} (frames, rows, columns)",
        f"{'K/V cache':16} {_bytes(facts.cache_bytes(num_tokens))} in bfloat16 for each of "
        f"{facts.passes(facts.defaults.guidance_scale)} guidance branches, "
        "where a policy leaves out tokens",
    ]


def _bytes(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
