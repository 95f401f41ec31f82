"""What goes into the engine (EngineConfig, GenerateRequest) and what comes out (events, VideoOutput)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from ..errors import ConfigError, RequestError
from ..hsa.config import HSAConfig
from ..settings import check, like, setting
from .config import EngineConfig
from .facts import ModelFacts
from .lora import check_loras, parse_lora
from .media.image import MAX_SIDE
from .noise import check_noise
from .sources import Sources, check_kinds, check_sources, read_sources
from .windows import fill, frames_in

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from .media.audio import Audio
    from .media.feeding import Reader
    from .report import HSAReport

RESUME = ("auto", "never")
_MAX_LORAS = 16


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Where a job is kept, and how often.

    `checkpoint_every` belongs to the plan: policies that leave out tokens evaluate all of them once after each
    checkpoint.

    Raises:
        ConfigError: a value is not one of these.
    """

    folder: str | os.PathLike[str] = setting(
        flag="job-dir",
        metavar="DIR",
        help="folder of this one video, created if needed: checkpoints, progress and result",
    )
    checkpoint_every: int = setting(5, least=1, unit="steps", metavar="K", help="denoising steps between checkpoints")
    resume: str = setting(
        "auto",
        choices=RESUME,
        metavar="R",
        help="auto resumes at the newest complete checkpoint in the folder; with never, the job starts over and the "
        "folder's old job is deleted",
    )

    def __post_init__(self) -> None:
        check(self)
        if not isinstance(self.folder, str | os.PathLike) or not str(self.folder).strip():
            raise ConfigError(f"the job's folder must be a path, not {self.folder!r}")


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """One video to make. None means the model's own default (`heterostep info` shows them).

    Attributes:
        width, height: without them a video from an image has the image's proportions; a size of another shape shows
            the middle of it.
        image, last_image: path of a PNG, JPEG or WebP file, or a Pillow image.
        video: path of a file, or Pillow images.

    Raises:
        RequestError: a value that no model can honour. What depends on the model is checked by the engine.
    """

    prompt: str = setting(metavar="TEXT", help="what the video shows")
    negative_prompt: str | None = setting(
        None,
        metavar="TEXT",
        help="what the video should not show; left out, the text that the model's maker advises; used with a guidance "
        "scale above 1",
    )
    width: int | None = setting(
        None, least=1, most=MAX_SIDE, flag="", unit="pixels", help="pixels, a multiple of the model's step"
    )
    height: int | None = setting(
        None, least=1, most=MAX_SIDE, flag="", unit="pixels", help="pixels, a multiple of the model's step"
    )
    num_frames: int | None = setting(
        None, least=1, flag="frames", help="number of frames: 4 k + 1 for Wan, 8 k + 1 for LTX-2"
    )
    seconds: float | None = setting(
        None, above=0, most=3600, unit="seconds", help="length, in place of frames; rounded to what the model can make"
    )
    fps: int | None = setting(
        None, least=1, most=1000, help="frames per second of the file; models with sound also generate for this rate"
    )
    num_inference_steps: int | None = setting(None, least=1, flag="steps", help="number of denoising steps")
    guidance_scale: float | None = setting(
        None,
        least=0,
        most=1000,
        flag="guidance",
        metavar="G",
        help="classifier-free guidance scale; 1 or less turns guidance off",
    )
    guidance_scale_2: float | None = setting(
        None,
        least=0,
        most=1000,
        flag="guidance-2",
        metavar="G",
        help="guidance scale of the second expert of models with two; left out, that of the first",
    )
    flow_shift: float | None = setting(
        None,
        above=0,
        most=100,
        metavar="S",
        help="shift of the noise levels, for Wan: a larger one spends more of the steps on high noise",
    )
    lora: tuple[str, ...] = setting(
        (),
        metavar="L",
        help="LoRA weights, as FILE_OR_ID[:SCALE[:EXPERT]]: a safetensors file or a hub id (owner/name/file), over "
        "HTTP a name that GET /v1/models lists; the expert is high or low, for models with two; may be repeated",
    )
    seed: int = setting(0, least=0, most=2**63 - 1, help="seed of the initial noise, which is the same on every device")
    noise: str | None = setting(
        None, metavar="FILE", help="file of the initial noise, for Wan: a .safetensors or .pt file on every machine"
    )
    compute: float | None = like(HSAConfig, "compute", default=None, flag="")
    quality: float | None = like(HSAConfig, "quality", flag="")
    image: str | os.PathLike[str] | Image.Image | None = setting(
        None, metavar="FILE", help="PNG, JPEG or WebP image that the video starts from, for models that take one"
    )
    last_image: str | os.PathLike[str] | Image.Image | None = setting(
        None, metavar="FILE", help="image that the video ends with, beside one that it starts from; for some models"
    )
    video: str | os.PathLike[str] | list[Image.Image] | None = setting(
        None, metavar="FILE", help="video that is changed (Wan from text) or followed (Wan VACE)"
    )
    strength: float | None = setting(
        None,
        above=0,
        most=1,
        help="how much of a video that is given may change, from 0 to 1, which leaves nothing of it; left out, .8; all "
        "steps are made whatever it is",
    )

    window: int | None = setting(
        None,
        least=1,
        unit="frames",
        help="frames that the model sees at once, for a video from text alone; left out, a video beyond the model's "
        "own length is made in windows of that length",
    )
    overlap: int | None = setting(
        None,
        least=1,
        unit="frames",
        help="frames that neighbouring windows share, rounded up to whole latent frames; left out, 3/8 of a window",
    )
    roll_windows: bool | None = setting(
        None, help="let the windows begin elsewhere at each step, so that no seam stands still; one more window a step"
    )
    shared_noise: bool | None = setting(
        None, help="begin all windows with the same noise in another order, so that they look alike; left out, it is on"
    )
    prompt_schedule: str | None = setting(
        None,
        metavar="FILE",
        help="prompts over time, for videos in windows: lines FROM-TO: PROMPT, in frames (0-40: a red disc) or seconds "
        "(2.5s-5s: a blue disc); elsewhere the prompt holds",
    )

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise RequestError("the prompt is empty; say what the video shows")
        check_kinds(vars(self))
        if not isinstance(self.lora, list | tuple) or not all(isinstance(text, str) for text in self.lora):
            raise RequestError(f"lora must be a list of texts such as 'style.safetensors:0.8', not {self.lora!r:.80}")
        object.__setattr__(self, "lora", tuple(self.lora))  # JSON knows lists alone
        if len(self.lora) > _MAX_LORAS:
            raise RequestError(f"{len(self.lora)} sets of LoRA weights are more than the {_MAX_LORAS} that are taken")
        for text in self.lora:
            parse_lora(text)
        check(self, RequestError)
        if self.compute is not None and self.quality is not None:
            raise RequestError("compute and quality both say how much work to spend; give one of them")


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest(GenerateRequest):
    """A `GenerateRequest` with the model's defaults filled in, and valid for that model.

    It is plain data: of images and video it holds the fingerprints of what was read, cut to its size.
    """

    negative_prompt: str
    width: int
    height: int
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    image: str | None
    last_image: str | None
    video: str | None


def resolve(request: GenerateRequest, facts: ModelFacts) -> ResolvedRequest:
    """Fill in a model's defaults and check what depends on the model; see `prepare`."""
    return prepare(request, facts)[0]


def prepare(request: GenerateRequest, facts: ModelFacts) -> tuple[ResolvedRequest, Sources]:
    """Fill in a model's defaults, and read the images or the video that the video is made from.

    Returns:
        The request, and what was read.

    Raises:
        RequestError: size or frames do not fit the model's grid (the message names the nearest that do); something for
            a second expert is given to a model with one; a shift, to one whose noise levels follow the video's size; an
            image or a video is missing, not wanted, or cannot be read.
    """
    check_sources(vars(request), facts)
    check_loras(request.lora, facts)
    if request.flow_shift is not None and not facts.takes_shift:
        raise RequestError(
            f"flow_shift is for Wan: the noise levels of {facts.name!r} ({facts.family}) follow from the video's size"
        )
    defaults = facts.defaults
    names = (item.name for item in dataclasses.fields(request) if item.name not in Sources._fields)
    given = {name: getattr(request, name) for name in names}
    values = {key: value for key, value in given.items() if value is not None}
    filled = {**given, **defaults._asdict(), **values, "seconds": None}
    if request.seconds is not None:
        if request.num_frames is not None:
            raise RequestError("seconds and num_frames say the same; give one of them")
        filled["num_frames"] = frames_in(request.seconds, facts, filled["fps"])
    sized = request.width is not None or request.height is not None
    sources, filled = read_sources(vars(request), filled, facts, sized=sized)
    # A guidance scale of the user's own is meant for both experts, as in the stock pipeline.
    if "guidance_scale" in values and "guidance_scale_2" not in values:
        filled["guidance_scale_2"] = None
    if "guidance_scale_2" in values and facts.experts == 1:
        raise RequestError(f"guidance_scale_2 is for models with two experts; {facts.name!r} has one")
    filled["negative_prompt"] = filled["negative_prompt"].strip()
    filled = fill(filled, facts, image=any(source is not None for source in sources))
    resolved = ResolvedRequest(**filled, image=None, last_image=None, video=None)
    _check_grid(resolved, facts)
    if resolved.noise is not None:
        if resolved.strength is not None or (sources.last_image is not None and facts.audio_heads):
            raise RequestError(
                "noise does not go with a video that is changed, nor with a last image of LTX-2; leave it out"
            )
        resolved = dataclasses.replace(resolved, noise=check_noise(resolved.noise, facts, resolved))
    sources = sources.cut(resolved.width, resolved.height)
    return dataclasses.replace(resolved, **sources.fingerprints), sources


def with_sources(request: GenerateRequest, facts: ModelFacts) -> GenerateRequest:
    """The request with its images and its video read, for ranks on other machines than the files."""
    if request.image is None and request.video is None:
        return request
    resolved, sources = prepare(request, facts)
    return dataclasses.replace(request, width=resolved.width, height=resolved.height, **sources._asdict())


def allocation(config: EngineConfig, request: ResolvedRequest) -> HSAConfig | None:
    """The allocation for one request; None where the stock pipeline needs no hook."""
    hsa = config.hsa
    if request.compute is not None:
        hsa = dataclasses.replace(hsa or HSAConfig(), compute=request.compute, quality=None)
    elif request.quality is not None:
        hsa = dataclasses.replace(hsa or HSAConfig(), compute=HSAConfig.compute, quality=request.quality)
    # All tokens at every step under the model's own scheduler is the stock pipeline, bit for bit.
    return None if hsa is None or (hsa.compute == 1.0 and hsa.solver is None) else hsa


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
            f"{1000 / facts.audio_rate:.0f} ms; use more frames or a lower fps"
        )
    seen = min(request.window or request.num_frames, request.num_frames)
    grid = facts.grid(request.width, request.height, seen)
    if max(grid) > facts.rope_max:
        raise RequestError(
            f"{seen} frames of {request.width}x{request.height} are {grid[0]} x {grid[1]} x "
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
        resumed_at: steps that were done before, of a job that resumes; all of them for a finished one, whose video
            follows at once; None for a run from the start.
        eta_seconds: that denoising may take, as `heterostep plan` says; None on a device that it does not know.
    """

    request: ResolvedRequest
    num_tokens: int
    resumed_at: int | None = None
    eta_seconds: float | None = None


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
class VideoResult:
    """A finished video but for its frames, which go elsewhere.

    Attributes:
        fps: frames per second.
        hsa: the allocation used; None where the stock pipeline ran alone (compute 1).
        report: what was computed, step by step and token by token.
        seconds: by stage: `encode_text`, `denoise`, `decode`, `total`; of a job also `checkpoint`. Denoising and
            checkpoints before a resume are counted, steps that a break lost are not. `decode` includes the time of
            files that are written meanwhile.
        latents: final latents, float32 [1, C, F, Y, X] on the CPU, as the pipeline gives them.
        request: with all defaults filled in.
        audio: the sound that goes with it; None for models without.
        audio_latents: its final latents, float32 [1, C, M, bins] on the CPU.
    """

    fps: int
    hsa: HSAConfig | None
    report: HSAReport
    seconds: Mapping[str, float]
    latents: torch.Tensor
    request: ResolvedRequest
    audio: Audio | None = None
    audio_latents: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the frames: F, H, W, 3."""
        return self.request.num_frames, self.request.height, self.request.width, 3


@dataclass(frozen=True, kw_only=True)
class VideoOutput(VideoResult):
    """A finished video.

    Attributes:
        frames: uint8 [F, H, W, 3].
    """

    frames: NDArray[np.uint8]

    @classmethod
    def of(cls, video: VideoResult, frames: NDArray[np.uint8]) -> VideoOutput:
        """A video with its frames."""
        values = {item.name: getattr(video, item.name) for item in dataclasses.fields(VideoResult)}
        return cls(**values, frames=frames)


class FrameSink:
    """Where the frames of a video go while it is decoded; this one has no use for them."""

    def pending(self, video: VideoResult) -> Sequence[Reader]:
        """Say what takes the frames next.

        It is asked again after all frames were given, for files that could not be written; no readers: it is content.

        Args:
            video: finished but for its frames, whose `seconds` do not count decoding yet.
        """
        return ()


Event = Started | StepDone | Decoding | VideoResult
