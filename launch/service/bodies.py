"""The HTTP API's bodies: OpenAI's video API, what heterostep adds to it, and errors in the same form."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, create_model
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from ...engine.request import GenerateRequest
from ...errors import BadField, FileGone, QueueFull, RequestError, StoreUnavailable
from ...settings import Setting, settings_of
from ..logs import say
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

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
# Calls of OpenAI's client by the end of their path, and what to do instead.
_NOT_SERVED = {
    "remix": "videos are not remixed here; make a new one with POST /v1/videos: with the same seed it stays alike",
    "edits": "videos are not edited here; make a new one with POST /v1/videos: with the same seed it stays alike",
    "extensions": "videos are not extended here; make a longer one with POST /v1/videos (num_frames or seconds)",
    "characters": "characters are not kept here; describe them in the prompt of POST /v1/videos",
}
_CODES = {401: "invalid_api_key", 403: "forbidden", 404: "not_found", 405: "method_not_allowed", 408: "timeout"}

IGNORED = ("user", "safety_identifier", "metadata", "response_format")
"""Fields of a request that cannot change a video. The answer names those that a request had and that did nothing."""


def _asked(item: Setting) -> tuple[Any, Any]:
    """A setting of `GenerateRequest` as a field of a request's body: left out or null, it takes its default."""
    annotated: Any = Annotated  # made from values, which type checkers do not follow
    kind = annotated[_KINDS[item.kind], Field(ge=item.least, gt=item.above, le=item.most)]
    if item.kind == "int":  # the bounds first, so that the schema knows them
        kind = annotated[kind, _WHOLE]
    if item.words:
        kind = annotated[kind, BeforeValidator(item.meant)]
    return kind | None, _described(item, {"x-setting": True})


def _answered(item: Setting) -> tuple[Any, Any]:
    """The same in an answer: null where a video was made before there was the setting."""
    return _KINDS[item.kind] | None, _described(item)


def _described(item: Setting, extra: dict[str, Any] | None = None) -> Any:
    text = f"{item.help[0].upper()}{item.help[1:]}."
    # x-setting: the page shows it as an input of its form.
    return Field(None, title=item.label, description=text, json_schema_extra=extra)


def _listed(value: object) -> object:
    """A form has texts alone: in one of them commas or line ends stand between several."""
    return [part.strip() for part in re.split("[,\n]", value) if part.strip()] if isinstance(value, str) else value


_KINDS: dict[str, Any] = {
    **{"int": int, "float": float, "str": str, "bool": bool},
    "tuple[str, ...]": Annotated[list[str], BeforeValidator(_listed)],
}
# An image comes as a file, and a video to change does not come at all; OpenAI's clients send seconds as a text.
# Files are the operator's.
_OTHERWISE = ("seconds", "noise", "strength")
SETTINGS = {
    item.name: item for item in settings_of(GenerateRequest) if item.kind in _KINDS and item.name not in _OTHERWISE
}
"""The settings of a request that are fields of its body."""
_Asked = create_model("_Asked", **{name: _asked(item) for name, item in SETTINGS.items()})  # type: ignore[call-overload]


class CreateVideo(_Asked):  # type: ignore[valid-type, misc]
    """A video to make. Whatever is left out, or null, takes the model's own default (`GET /v1/models`).

    The settings are those of `GenerateRequest`; only what HTTP adds to them stands here.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    ignored: ClassVar[tuple[str, ...]] = IGNORED

    prompt: str = Field(min_length=1, description="What the video shows.", examples=["a red disc moves right"])
    seed: Annotated[int, Field(ge=-1, lt=2**63), _WHOLE] | None = Field(
        None,
        title="Seed",
        description="Seed of the initial noise; if it is left out or -1, the service draws one and returns it.",
        json_schema_extra={"x-setting": True},
    )
    model: str | None = Field(None, description="The model that this service runs.", examples=["demo"])
    seconds: str | float | None = Field(
        None, description="Length, in place of `num_frames`; rounded to what the model can make."
    )
    size: str | None = Field(
        None,
        pattern=r"^[0-9]{1,5}x[0-9]{1,5}$",
        description="Width x height in pixels, in place of `width` and `height`.",
    )
    input_reference: Any = Field(
        None, description="An image to start from, for models that take one: a PNG, JPEG or WebP file in a form."
    )
    boundary_ratio: float | None = Field(
        None, description="Where the second expert begins, for clients that send it: it must be the model's own value."
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


class Generation(CreateVideo):
    """A video to make and to answer with, as MLPerf's and TensorRT-LLM's clients ask for it."""

    ignored: ClassVar[tuple[str, ...]] = tuple(name for name in IGNORED if name != "response_format")

    latent_path: str | None = Field(
        None, description="A file of initial noise in the operator's folder (`--noise-dir`); only its name counts."
    )
    output_format: Literal["mp4", "auto"] | None = Field(None, description="The file is always an MP4.")
    response_format: Literal["video_bytes", "video_path"] | None = Field(
        None, description="Whether the answer holds the file in base64 (default) or the path of its URL."
    )


class Generated(BaseModel):
    """A finished video: its file in base64, or the path of its URL."""

    video_id: str
    video_bytes: str | None = None
    video_path: str | None = None


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
    url: str | None = Field(description="Path of the file of a completed video, below the address of the service.")
    timing: dict[str, float] | None = Field(description="Seconds by stage.")
    inference_time_s: float | None = Field(description="Seconds of all stages but the queue, as AIPerf reads them.")
    stage_durations: dict[str, float] | None = Field(description="Seconds by stage, without their sum and the queue.")
    peak_memory_mb: float | None = Field(
        description="The most memory that a rank had in use (MiB), on its GPU, or of its process on a CPU."
    )
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
    defaults: dict[str, int | float | str | None]
    loras: list[str] = Field(description="LoRA weights that a request may name.")
    size_step: tuple[int, int] = Field(description="Width and height are multiples of these.")
    frame_step: int = Field(description="Frames are a multiple of this, plus one.")
    limits: dict[str, int]


class ModelInfo(BaseModel):
    """What is served, as SGLang's clients ask for it."""

    model_path: str


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


def to_video(job: Job, *, position: int | None, keep_seconds: float, openai_statuses: bool = False) -> Video:
    """What users see of a job.

    Args:
        job: the job.
        position: its place in the queue.
        keep_seconds: how long finished jobs are kept.
        openai_statuses: whether a cancelled one has failed, with the code `cancelled`.
    """
    request, timing = job.request, dict(job.timing) if job.timing is not None else None
    seconds = request["num_frames"] / request["fps"]
    peak = (job.hsa or {}).get("peak_bytes")
    return Video(
        id=job.id,
        model=job.model,
        status="failed" if openai_statuses and job.status == "cancelled" else job.status,
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
        url=f"/v1/videos/{job.id}/content" if job.status == "completed" else None,
        timing=timing,
        inference_time_s=timing["total"] if timing is not None else None,
        stage_durations={name: timing[name] for name in timing if name not in ("queued", "total")} if timing else None,
        peak_memory_mb=round(peak / 2**20, 1) if peak is not None else None,
        faults=[Fault.model_validate(fault) for fault in job.faults],
    )


def _whole(seconds: float | None) -> int | None:
    return int(seconds) if seconds is not None else None


def error_answer(
    status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Any = None
) -> JSONResponse:
    """One sentence for people and a code for programs, as the openai client expects them."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": param, "code": code or _CODES.get(status)}
    return JSONResponse({"error": error}, status, headers)


def add_error_answers(app: FastAPI, retry_after: Callable[[], int]) -> None:
    """Turn every exception into an answer of that form.

    Args:
        app: the application.
        retry_after: seconds after which a place in the queue should be free.
    """

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if error.status_code == 405 or "endpoint" not in request.scope:
            return _no_route(request)
        return error_answer(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def validation(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        # The last name: of a list's item the index comes after it.
        name = next((part for part in reversed(first["loc"]) if isinstance(part, str)), "body")
        return error_answer(400, f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}", param=name)

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return error_answer(400, str(error), param=error.param if isinstance(error, BadField) else None)

    @app.exception_handler(QueueFull)
    async def full(request: Request, error: QueueFull) -> Response:
        headers = {"retry-after": str(retry_after())}
        return error_answer(429, str(error), code="queue_full", headers=headers)

    @app.exception_handler(StoreUnavailable)
    async def unavailable(request: Request, error: StoreUnavailable) -> Response:
        # Not logged: the store has said it, once.
        return error_answer(503, str(error), headers={"retry-after": "5"})

    @app.exception_handler(FileGone)
    async def gone(request: Request, error: FileGone) -> Response:
        return error_answer(410, str(error), code="file_gone")

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # the client has gone

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        say("request failed", logging.ERROR, error=type(error).__name__)
        return error_answer(500, "the service failed; its log says more")


def _no_route(request: Request) -> JSONResponse:
    """404 where nothing has this path, else 405 and what it takes."""
    routes, scope, path = request.app.router.routes, request.scope, request.url.path
    allowed = [
        method
        for method in _METHODS
        if any(
            route.matches({**scope, "method": "GET" if method == "HEAD" else method})[0] is Match.FULL
            for route in routes
        )
    ]
    missing = _NOT_SERVED.get(path.rpartition("/")[2]) if "/v1/videos/" in path else None
    if not allowed:
        return error_answer(404, missing or f"there is nothing at {path[:80]!r}; /docs lists what there is")
    message = f"{path[:80]!r} takes {', '.join(allowed)}, not {request.method[:20]}"
    return error_answer(405, missing or message, headers={"allow": ", ".join(allowed)})


def openapi_body(body: type[CreateVideo] = CreateVideo) -> dict[str, Any]:
    """The body of a request for a video, as JSON or as a form with an image."""
    schema = body.model_json_schema()
    form = {**schema, "properties": {**schema["properties"], "input_reference": {"type": "string", "format": "binary"}}}
    kinds = {
        "application/json": {"schema": schema},
        "multipart/form-data": {"schema": form},
        "application/x-www-form-urlencoded": {"schema": schema},
    }
    return {"requestBody": {"required": True, "content": kinds}}
