"""The HTTP API's bodies: OpenAI's video API, and what heterostep adds to it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, create_model
from pydantic_core import PydanticCustomError

from ...engine.request import GenerateRequest
from ...settings import Setting, settings_of
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


def _asked(item: Setting) -> tuple[Any, Any]:
    """A setting of `GenerateRequest` as a field of a request's body: left out or null, it takes its default."""
    annotated: Any = Annotated  # made from values, which type checkers do not follow
    kind = annotated[_KINDS[item.kind], Field(ge=item.least, gt=item.above, le=item.most)]
    if item.kind == "int":  # the bounds first, so that the schema knows them
        kind = annotated[kind, _WHOLE]
    return kind | None, _described(item, {"x-setting": True})


def _answered(item: Setting) -> tuple[Any, Any]:
    """The same in an answer: null where a video was made before there was the setting."""
    return _KINDS[item.kind] | None, _described(item)


def _described(item: Setting, extra: dict[str, Any] | None = None) -> Any:
    text = f"{item.help[0].upper()}{item.help[1:]}."
    # x-setting: the page shows it as an input of its form.
    return Field(None, title=item.label, description=text, json_schema_extra=extra)


_KINDS: dict[str, Any] = {"int": int, "float": float, "str": str, "bool": bool}
# An image comes as a file.
SETTINGS = {item.name: item for item in settings_of(GenerateRequest) if item.kind in _KINDS}
"""The settings of a request that are fields of its body."""
_Asked = create_model("_Asked", **{name: _asked(item) for name, item in SETTINGS.items()})  # type: ignore[call-overload]


class CreateVideo(_Asked):  # type: ignore[valid-type, misc]
    """A video to make. Whatever is left out, or null, takes the model's own default (`GET /v1/models`).

    The settings are those of `GenerateRequest`; only what HTTP adds to them stands here.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str = Field(min_length=1, description="What the video shows.", examples=["a red disc moves right"])
    seed: Annotated[int, Field(ge=-1, lt=2**63), _WHOLE] | None = Field(
        None,
        title="Seed",
        description="Seed of the initial noise; if it is left out or -1, the service draws one and returns it.",
        json_schema_extra={"x-setting": True},
    )
    model: str | None = Field(None, description="The model that this service runs.", examples=["demo"])
    seconds: str | float | None = Field(
        None, description="Length in seconds, rounded to the nearest number of frames that the model can make."
    )
    size: str | None = Field(
        None, pattern=r"^[0-9]{1,5}x[0-9]{1,5}$", description="Width x height in pixels, in place of the two fields."
    )
    input_reference: Any = Field(
        None, description="An image to start from, for models that take one: a PNG, JPEG or WebP file in a form."
    )
    n: One | None = Field(None, description="Number of videos; it must be 1.")
    num_outputs_per_prompt: One | None = Field(None, description="The same as `n`.")
    extra_body: dict[str, Any] | None = Field(
        None, description="An object with more of these fields, in a form as JSON. SGLang's clients send it."
    )
    user: Any = Field(None, description="Ignored: OpenAI's id of the caller's user.")
    safety_identifier: Any = Field(None, description="Ignored: the newer name of `user`.")
    metadata: Any = Field(None, description="Ignored: the caller's notes.")
    response_format: Any = Field(None, description="Ignored: the file is always fetched from `/content`.")


class Problem(BaseModel):
    """Why a video could not be made."""

    code: str
    message: str


class Fault(BaseModel):
    """Something that went wrong on the way and was recovered from."""

    cause: str = Field(description="died, frozen, node, memory, timeout, error or restart.")
    message: str
    step: int = Field(description="Steps that were done when it happened.")
    saved: int = Field(0, description="Steps that were saved, from which the job resumed.")
    at: int = Field(description="Unix time.")


class _State(BaseModel):
    """A job."""

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


_Made = create_model("_Made", __base__=_State, **{name: _answered(item) for name, item in SETTINGS.items()})  # type: ignore[call-overload]


class Video(_Made):  # type: ignore[valid-type, misc]
    """A job and, when it is completed, its video. With the same settings it can be made again."""

    size: str = Field(description="Width x height in pixels.")
    seconds: str
    remixed_from_video_id: None = None
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
        status=job.status,
        progress=job.progress,
        created_at=int(job.created_at),
        started_at=_whole(job.started_at),
        completed_at=_whole(job.completed_at),
        expires_at=int(job.completed_at + keep_seconds) if job.completed_at is not None else None,
        error=Problem.model_validate(job.error) if job.error is not None else None,
        **{name: request.get(name) for name in SETTINGS},
        size=f"{request['width']}x{request['height']}",
        seconds=f"{seconds:.3f}".rstrip("0").rstrip("."),
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
