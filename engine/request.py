"""What goes into the engine (EngineConfig, GenerateRequest) and what comes out (events, VideoOutput)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from PIL import Image

from ..errors import ConfigError, HeterostepError, RequestError
from ..hsa.config import HSAConfig
from ..parallel.config import ParallelConfig
from .facts import ModelFacts
from .image import fingerprint, fit_image, read_image, size_for

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from .audio import Audio
    from .report import HSAReport

DTYPES = ("auto", "float32", "bfloat16", "float16")
_MAX_SEED = 2**63 - 1
# Far beyond what any model was trained for; at 1e38 float32 overflows.
_MAX_GUIDANCE = 1000.0
# Containers count in ticks of 1 / fps seconds, in 32 bits.
_MAX_FPS = 1000


class Cancelled(HeterostepError):
    """The run was stopped by `Engine.cancel` or by closing its stream."""


class Interrupted(Cancelled):
    """The run was stopped by `Engine.save_and_stop`; the job can go on in another process.

    Attributes:
        step: number of steps that need not be done again.
    """

    def __init__(self, message: str, step: int) -> None:
        """Say what happened, and where the job goes on."""
        super().__init__(message)
        self.step = step


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What an engine loads, and where it runs.

    Attributes:
        model: `"demo"` (ships with heterostep), a local folder in diffusers format, or a hub id.
        hsa: how steps are allocated to tokens, for every request that does not override `compute`; None runs
            the stock pipeline, every token at every step.
        dtype: of text encoder and transformer: `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"`: bfloat16
            on a GPU, float32 on the CPU. The VAE always runs in float32, as Wan's makers advise.
        device: a torch device such as `"cuda"`, `"cuda:1"` or `"cpu"`, or `"auto"`: the first GPU, else the
            CPU.
        parallel: degrees of a job of several ranks, each of which makes an engine with the same settings, and is asked
            for the same videos; None for one rank.
        shard_weights: let each rank keep a part of the transformers' weights, and gather one layer at a time: for
            models too large for a device. LoRA weights cannot be loaded into them then.

    Raises:
        ConfigError: a value is not one of these.
    """

    model: str = "demo"
    hsa: HSAConfig | None = field(default_factory=HSAConfig)
    dtype: str = "auto"
    device: str = "auto"
    parallel: ParallelConfig | None = None
    shard_weights: bool = False

    def __post_init__(self) -> None:
        if self.parallel is not None and not isinstance(self.parallel, ParallelConfig):
            raise ConfigError(
                f"parallel must be a ParallelConfig such as ParallelConfig(ulysses=2), not {self.parallel!r}"
            )
        if not isinstance(self.shard_weights, bool):
            raise ConfigError(f"shard_weights must be True or False, not {self.shard_weights!r}")
        if self.shard_weights and (self.parallel is None or self.parallel.world_size == 1):
            raise ConfigError("shard_weights needs several ranks to share the weights; name them with parallel")
        if self.shard_weights and self.parallel is not None and self.parallel.cut == "measured":
            raise ConfigError(
                "shard_weights with cut='measured': ranks that gather each layer together wait for each other, so that "
                "none is seen to be faster; take cut='equal'"
            )
        if not isinstance(self.model, str) or not self.model.strip():
            raise ConfigError("model must be 'demo', a folder, or a hub id (owner/name), not an empty name")
        if self.hsa is not None and not isinstance(self.hsa, HSAConfig):
            raise ConfigError(f"hsa must be an HSAConfig such as HSAConfig(compute=0.5), or None, not {self.hsa!r}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if not isinstance(self.device, str) or not self.device:
            raise ConfigError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', not {self.device!r}")


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """One video to make. None means the model's own default (`heterostep info` shows them).

    Attributes:
        prompt: what the video shows.
        negative_prompt: what it should not show; used only if `guidance_scale` is above 1.
        width: pixels, a multiple of the model's step (16 or 32).
        height: pixels, likewise.
        num_frames: frames, k * t + 1 where t is the VAE's temporal factor (4 for Wan).
        fps: frames per second of the file; models without sound do not hear of it.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 or less runs without it, at half the cost or less.
        guidance_scale_2: the same for the second expert of Wan 2.2; None takes `guidance_scale`.
        seed: of the initial noise; the same seed gives the same noise on every device.
        compute: share of the dense denoising work to spend, in (0, 1]; None takes that of the engine's `hsa`,
            1.0 is the stock pipeline.
        image: what the video starts from, for models that take one: path of a PNG, JPEG or WebP file, or a Pillow
            image. Without width and height the video has the image's proportions; a size of another shape shows the
            middle of it.

    Raises:
        RequestError: a value that no model can honour. What depends on the model is checked by the engine.
    """

    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    fps: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    seed: int = 0
    compute: float | None = None
    image: str | os.PathLike[str] | Image.Image | None = None

    def __post_init__(self) -> None:
        if self.image is not None and not (isinstance(self.image, str | os.PathLike | Image.Image) and self.image):
            raise RequestError(f"image must be the path of a file or a Pillow image, not {self.image!r:.80}")
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise RequestError("the prompt is empty; say what the video shows")
        if not isinstance(self.negative_prompt, str):
            raise RequestError("negative_prompt must be a text")
        for name in ("width", "height", "num_frames", "fps", "num_inference_steps"):
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or value < 1):
                raise RequestError(f"{name} must be a whole number of at least 1, not {value!r}")
        for name in ("guidance_scale", "guidance_scale_2"):
            value = getattr(self, name)
            if value is not None and (not _is_number(value) or not 0 <= value <= _MAX_GUIDANCE):
                raise RequestError(f"{name} must be a finite number from 0 to {_MAX_GUIDANCE:g}, not {value!r}")
        if self.fps is not None and self.fps > _MAX_FPS:
            raise RequestError(f"fps must be at most {_MAX_FPS}, not {self.fps}")
        if not _is_int(self.seed) or not 0 <= self.seed <= _MAX_SEED:
            raise RequestError(f"seed must be a whole number from 0 to 2**63 - 1, not {self.seed!r}")
        if self.compute is not None and (not _is_number(self.compute) or not 0 < self.compute <= 1):
            raise RequestError(f"compute must be above 0 and at most 1 (1 is dense), not {self.compute!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest:
    """A `GenerateRequest` with the model's defaults filled in, and valid for that model.

    It is plain data: of the image it holds the `image.fingerprint` of what the video starts from, cut to its size.
    """

    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float | None
    seed: int
    compute: float | None
    image: str | None = None


def resolve(request: GenerateRequest, facts: ModelFacts) -> ResolvedRequest:
    """Fill in a model's defaults and check what depends on the model; see `prepare`."""
    return prepare(request, facts)[0]


def prepare(request: GenerateRequest, facts: ModelFacts) -> tuple[ResolvedRequest, Image.Image | None]:
    """Fill in a model's defaults, and read the image that the video starts from.

    Returns:
        The request, and the image in RGB and of the video's size.

    Raises:
        RequestError: size or frames do not fit the model's grid (the message names the nearest that do); a second
            guidance scale is given to a model with one expert; an image is missing, not wanted, or cannot be read.
    """
    _check_image(request, facts)
    image = None if request.image is None else read_image(request.image)
    defaults = facts.defaults
    given = {item.name: getattr(request, item.name) for item in dataclasses.fields(request) if item.name != "image"}
    values = {key: value for key, value in given.items() if value is not None}
    filled = {**defaults._asdict(), "compute": None, **values}
    if image is not None and request.width is None and request.height is None:
        filled["width"], filled["height"] = size_for(image, defaults.width * defaults.height, facts.size_step)
    # A guidance scale of the user's own is meant for both experts, as in the stock pipeline.
    if "guidance_scale" in values and "guidance_scale_2" not in values:
        filled["guidance_scale_2"] = None
    if "guidance_scale_2" in values and facts.experts == 1:
        raise RequestError(f"guidance_scale_2 is for models with two experts; {facts.name!r} has one")
    resolved = ResolvedRequest(**filled)
    _check_grid(resolved, facts)
    if image is None:
        return resolved, None
    image = fit_image(image, resolved.width, resolved.height)
    return dataclasses.replace(resolved, image=fingerprint(image)), image


def _check_image(request: GenerateRequest, facts: ModelFacts) -> None:
    if request.image is not None and facts.image == "none":
        raise RequestError(f"model {facts.name!r} makes videos from text alone; leave out the image")
    if request.image is None and facts.image == "required":
        raise RequestError(f"model {facts.name!r} makes videos from an image; give one (--image FILE)")


def _check_grid(request: ResolvedRequest, facts: ModelFacts) -> None:
    width_step, height_step = facts.size_step
    if request.width % width_step or request.height % height_step:
        nearest = f"{_nearest(request.width, width_step)}x{_nearest(request.height, height_step)}"
        raise RequestError(
            f"size {request.width}x{request.height} does not fit model {facts.name!r}: width must be a "
            f"multiple of {width_step} and height of {height_step}; the nearest size is {nearest}"
        )
    if (request.num_frames - 1) % facts.frame_step:
        nearest_frames = _nearest(request.num_frames - 1, facts.frame_step, least=0) + 1
        raise RequestError(
            f"{request.num_frames} frames do not fit model {facts.name!r}: their number must be a multiple "
            f"of {facts.frame_step}, plus 1; the nearest is {nearest_frames}"
        )
    if facts.audio_rate and round(request.num_frames / request.fps * facts.audio_rate) < 1:
        raise RequestError(
            f"{request.num_frames} frames at {request.fps} per second are too short for sound, which needs "
            f"{1000 / facts.audio_rate:.0f} ms; take more frames or fewer per second"
        )
    grid = facts.grid(request.width, request.height, request.num_frames)
    if max(grid) > facts.rope_max:
        raise RequestError(
            f"{request.num_frames} frames of {request.width}x{request.height} are {grid[0]} x {grid[1]} x "
            f"{grid[2]} tokens (frames, rows, columns), but model {facts.name!r} takes at most "
            f"{facts.rope_max} along each axis"
        )


def _nearest(value: int, step: int, least: int | None = None) -> int:
    return max(step if least is None else least, (value + step // 2) // step * step)


@dataclass(frozen=True, kw_only=True)
class Started:
    """The request is valid and work begins.

    Attributes:
        request: with all defaults filled in.
        num_tokens: N, tokens of the video.
        resumed_at: steps that were done before, of a job that goes on; all of them for a finished one, whose video
            follows at once; None for a run from the start.
    """

    request: ResolvedRequest
    num_tokens: int
    resumed_at: int | None = None


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """A denoising step is done.

    Attributes:
        step: how many steps are done, this one included: from 1 to `num_steps`.
        num_steps: of the whole run.
        sigma: noise level at which the step began.
        active: tokens that went through the transformer.
        total: N, all tokens.
        seconds: that this step took.
        eta_seconds: estimate of the time left for denoising.
        preview: a WebP picture of the middle frame as it would be now; only services ask for it, not at every step.
    """

    step: int
    num_steps: int
    sigma: float
    active: int
    total: int
    seconds: float
    eta_seconds: float
    preview: bytes | None = None

    @property
    def share(self) -> float:
        """Share of the tokens that went through the transformer, 0 to 1."""
        return self.active / self.total


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Denoising is done; the VAE turns latents into frames.

    Attributes:
        seconds: that denoising took.
    """

    seconds: float


@dataclass(frozen=True, kw_only=True)
class VideoOutput:
    """A finished video.

    Attributes:
        frames: uint8 [F, H, W, 3].
        fps: frames per second.
        hsa: the allocation used; None where the stock pipeline ran alone (compute 1).
        report: what was computed, step by step and token by token.
        seconds: by stage: `encode_text`, `denoise`, `decode`, `total`; of a job also `checkpoint`. Denoising and
            checkpoints before a resume are counted, steps that a break lost are not.
        latents: final latents, float32 [1, C, F, Y, X] on the CPU, as the pipeline gives them.
        request: with all defaults filled in.
        audio: the sound that goes with it; None for models without.
        audio_latents: its final latents, float32 [1, C, M, bins] on the CPU.
    """

    frames: NDArray[np.uint8]
    fps: int
    hsa: HSAConfig | None
    report: HSAReport
    seconds: Mapping[str, float]
    latents: torch.Tensor
    request: ResolvedRequest
    audio: Audio | None = None
    audio_latents: torch.Tensor | None = None


Event = Started | StepDone | Decoding | VideoOutput
