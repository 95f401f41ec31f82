"""The HTTP API's bodies: OpenAI's video API, and what heterostep adds to it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from .rows import Job

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]


def _whole_number(value: object) -> object:
    """8.0 is 8: several languages and tools write every number with a point."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _one(value: int) -> int:
    if value != 1:
        raise PydanticCustomError("one_video", "one request makes one video; send a request for each")
    return value


# After the bounds: before them it would hide from the description that they are those of a number.
_WHOLE = BeforeValidator(_whole_number)
One = Annotated[int, _WHOLE, AfterValidator(_one), WithJsonSchema({"type": "integer", "const": 1})]

IGNORED = ("user", "safety_identifier", "metadata", "response_format")
"""Fields of `CreateVideo` that cannot change a video. The answer names those that a request had."""


class CreateVideo(BaseModel):
    """A video to make. Whatever is left out, or null, takes the model's own default (`GET /v1/models`)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str = Field(min_length=1, description="What the video shows.", examples=["a red disc moves right"])
    model: str | None = Field(None, description="The model that this service runs.", examples=["demo"])
    seconds: str | float | None = Field(None, description="Length; the nearest number of frames that the model makes.")
    size: str | None = Field(None, pattern=r"^[0-9]{1,5}x[0-9]{1,5}$", description="Width x height in pixels.")
    width: Annotated[int, Field(ge=1, le=99999), _WHOLE] | None = Field(
        None, description="Pixels; together with `height`, instead of `size`."
    )
    height: Annotated[int, Field(ge=1, le=99999), _WHOLE] | None = Field(
        None, description="Pixels; together with `width`."
    )
    negative_prompt: str | None = Field("", description="What it should not show.")
    num_frames: Annotated[int, Field(ge=1), _WHOLE] | None = Field(None, description="Frames; instead of `seconds`.")
    fps: Annotated[int, Field(ge=1, le=1000), _WHOLE] | None = Field(None, description="Frames per second of the file.")
    num_inference_steps: Annotated[int, Field(ge=1), _WHOLE] | None = Field(None, description="Denoising steps.")
    guidance_scale: Annotated[float, Field(ge=0, le=1000)] | None = Field(
        None, description="Guidance; at most 1 is none."
    )
    guidance_scale_2: Annotated[float, Field(ge=0, le=1000)] | None = Field(
        None, description="The same for the second expert of a model with two."
    )
    seed: Annotated[int, Field(ge=-1, lt=2**63), _WHOLE] | None = Field(
        None, description="Of the initial noise; left out or -1, the service draws one and tells it."
    )
    compute: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Share of the dense denoising work to spend; 1 is the stock pipeline."
    )
    input_reference: Any = Field(
        None, description="An image to start from, for models that take one: a PNG, JPEG or WebP file in a form."
    )
    n: One | None = Field(None, description="Videos to make: one.")
    num_outputs_per_prompt: One | None = Field(None, description="The same as `n`.")
    extra_body: dict[str, Any] | None = Field(
        None, description="More of these fields, in one object; in a form, as JSON. SGLang's clients send it."
    )
    user: Any = Field(None, description="Ignored: OpenAI's name for the caller's own user.")
    safety_identifier: Any = Field(None, description="Ignored: the newer name of `user`.")
    metadata: Any = Field(None, description="Ignored: OpenAI's notes of the caller's own.")
    response_format: Any = Field(None, description="Ignored: the file is always fetched from `/content`.")


class Problem(BaseModel):
    """Why a video could not be made."""

    code: str
    message: str


class Fault(BaseModel):
    """Something that went wrong on the way and was recovered from."""

    cause: str = Field(description="died, frozen, node, memory, timeout, error or restart.")
    message: str
    step: int = Field(description="Steps that were done.")
    saved: int = Field(0, description="Steps that were saved, where it went on.")
    at: int = Field(description="Unix time.")


class Video(BaseModel):
    """A job and, when it is completed, its video."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Status
    progress: int = Field(ge=0, le=100)
    created_at: int
    started_at: int | None
    completed_at: int | None
    expires_at: int | None
    error: Problem | None
    prompt: str
    negative_prompt: str
    size: str
    seconds: str
    remixed_from_video_id: None = None
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float | None = Field(
        description="Guidance of the second expert; null for a model with one, or where it is that of the first."
    )
    seed: int
    compute: float
    queue_position: int | None = Field(description="Jobs that come before this one, while it is queued.")
    stage: str | None = Field(description="starting, denoising or decoding, while it is in progress.")
    step: int = Field(description="Denoising steps that are done.")
    eta_seconds: float | None
    cancel_requested: bool
    hsa: dict[str, Any] | None = Field(
        description="What was computed; `steps` is the share of the tokens that each step evaluated, so far."
    )
    timing: dict[str, float] | None = Field(description="Seconds by stage.")
    faults: list[Fault]


class VideoList(BaseModel):
    """A page of videos."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(BaseModel):
    """Confirmation of a deletion."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class ModelCard(BaseModel):
    """A model that is served, with what a request to it may ask for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["heterostep"] = "heterostep"
    family: str
    inputs: list[str]
    image: Literal["none", "optional", "required"] = Field(description="Whether a video starts from an image.")
    defaults: dict[str, int | float | None]
    size_step: tuple[int, int] = Field(description="Width and height are multiples of these.")
    frame_step: int = Field(description="Frames are a multiple of this, plus one.")
    limits: dict[str, int]


class ModelList(BaseModel):
    """The models that are served: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """Whether a job could run now."""

    status: Literal["healthy", "unhealthy"]
    reason: str | None


class ErrorDetail(BaseModel):
    """One sentence for people, and a code for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer from 400 on."""

    error: ErrorDetail


def to_video(job: Job, *, position: int | None, keep_seconds: float) -> Video:
    """What users see of a job.

    Args:
        job: the job.
        position: its place in the queue.
        keep_seconds: how long finished jobs are kept.
    """
    request = job.request
    seconds = request["num_frames"] / request["fps"]
    return Video(
        id=job.id,
        model=job.model,
        status=job.status,  # type: ignore[arg-type]  # the database holds no other
        progress=job.progress,
        created_at=int(job.created_at),
        started_at=_whole(job.started_at),
        completed_at=_whole(job.completed_at),
        expires_at=int(job.completed_at + keep_seconds) if job.completed_at is not None else None,
        error=Problem.model_validate(job.error) if job.error is not None else None,
        prompt=request["prompt"],
        negative_prompt=request["negative_prompt"],
        size=f"{request['width']}x{request['height']}",
        seconds=f"{seconds:.3f}".rstrip("0").rstrip("."),
        num_frames=request["num_frames"],
        fps=request["fps"],
        num_inference_steps=request["num_inference_steps"],
        guidance_scale=request["guidance_scale"],
        guidance_scale_2=request["guidance_scale_2"],
        seed=request["seed"],
        compute=request["compute"],
        queue_position=position,
        stage=job.stage or None,
        step=job.step,
        eta_seconds=job.eta_seconds,
        cancel_requested=job.cancel_requested,
        hsa=dict(job.hsa) if job.hsa is not None else None,
        timing=dict(job.timing) if job.timing is not None else None,
        faults=[Fault.model_validate(fault) for fault in job.faults],
    )


def _whole(seconds: float | None) -> int | None:
    return int(seconds) if seconds is not None else None
