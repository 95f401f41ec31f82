"""From the bytes that a client sent to a request that the model can serve, or to one sentence that says why not."""

from __future__ import annotations

import hashlib
import re
import secrets

import pydantic
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from ...engine.facts import ModelFacts
from ...engine.request import GenerateRequest, ResolvedRequest, resolve
from ...errors import RequestError
from .schemas import CreateVideo
from .settings import Limits

_MAX_FIELDS = 32
# Whatever a model makes is shorter; beyond it the number of frames is only a number.
_MAX_SECONDS = 3600.0
# C0 controls but tab and line ends, and halves of surrogate pairs, which no encoding can carry.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


class BadField(RequestError):
    """A request that names what is wrong: `param` is the field."""

    def __init__(self, param: str | None, message: str) -> None:
        """Name the field and say the rule."""
        super().__init__(message)
        self.param = param


class _FormParser(MultiPartParser):
    """Keeps the texts of a form. Of a file only its coming is noted: its bytes are not kept, its name is not used."""

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._current_part.file is None:
            super().on_part_data(data, start, end)


async def read_create(request: Request) -> tuple[CreateVideo, str]:
    """Read the body of a request for a video.

    Returns:
        The body, and a fingerprint: equal for equal requests.

    Raises:
        BadField: it is not what `CreateVideo` says.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind == "application/json":
            body = CreateVideo.model_validate_json(await request.body(), strict=True)
        elif kind == "multipart/form-data":
            body = CreateVideo.model_validate_strings(await _read_form(request))
        else:
            raise BadField(None, "the body must be application/json or multipart/form-data")
    except pydantic.ValidationError as error:
        raise _said(error) from error
    return body, hashlib.sha256(body.model_dump_json().encode()).hexdigest()


async def _read_form(request: Request) -> dict[str, str]:
    parser = _FormParser(
        request.headers, request.stream(), max_files=1, max_fields=_MAX_FIELDS, max_part_size=256 * 1024
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise BadField(None, f"the form cannot be read ({error.message.rstrip('.')})") from error
    except (LookupError, ValueError) as error:  # a charset that is none, a boundary that cannot be
        raise BadField(None, "the form cannot be read") from error
    values: dict[str, str] = {}
    for name, value in form.multi_items():
        # A reference may be a file, or an object spelled as input_reference[image_url].
        name = "input_reference" if name.partition("[")[0] == "input_reference" else name
        if name in values:
            raise BadField(name, f"{name} was given twice")
        values[name] = value if isinstance(value, str) else "file"
    return values


def _said(error: pydantic.ValidationError) -> BadField:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"][:1])
    message = first["msg"][0].lower() + first["msg"][1:]
    return BadField(place or None, f"{place}: {message}" if place else f"the body is not valid ({message})")


def to_request(body: CreateVideo, *, model: str, facts: ModelFacts, limits: Limits, compute: float) -> ResolvedRequest:
    """Turn a body into a request that the model can serve, with every default filled in.

    Args:
        body: what the client asked.
        model: its public name.
        facts: its sizes.
        limits: of the service.
        compute: where the client does not say.

    Raises:
        BadField: it breaks a limit, or asks for what the model cannot do.
        RequestError: it does not fit the model's grid.
    """
    if body.model is not None and body.model != model:
        raise BadField("model", f"model {body.model[:80]!r} is not served here; this service has {model!r}")
    if body.input_reference not in (None, ""):
        raise BadField("input_reference", f"model {model!r} makes videos from text alone; leave out input_reference")
    for name in ("prompt", "negative_prompt"):
        text = getattr(body, name)
        if len(text) > limits.prompt:
            raise BadField(name, f"{name} has {len(text)} characters, and at most {limits.prompt} are taken")
        if _UNPRINTABLE.search(text):
            raise BadField(name, f"{name} holds control characters; send plain text")
    width, height = (int(side) for side in body.size.split("x")) if body.size is not None else (None, None)
    request = resolve(
        GenerateRequest(
            prompt=body.prompt,
            negative_prompt=body.negative_prompt,
            width=width,
            height=height,
            num_frames=_frames(body, facts),
            fps=body.fps,
            num_inference_steps=body.num_inference_steps,
            guidance_scale=body.guidance_scale,
            guidance_scale_2=body.guidance_scale_2,
            # Drawn here, so that every attempt at the job makes the same video.
            seed=body.seed if body.seed is not None else secrets.randbelow(2**31),
            compute=body.compute if body.compute is not None else compute,
        ),
        facts,
    )
    _check_limits(request, limits)
    return request


def _frames(body: CreateVideo, facts: ModelFacts) -> int | None:
    """The number of frames that `num_frames` or `seconds` asks for."""
    if body.seconds is None or body.seconds == "":
        return body.num_frames
    if body.num_frames is not None:
        raise BadField("seconds", "seconds and num_frames say the same; give one of them")
    try:
        seconds = float(body.seconds)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds <= _MAX_SECONDS:
        raise BadField("seconds", f"seconds must be a number above 0 and at most {_MAX_SECONDS:g}")
    fps = body.fps if body.fps is not None else facts.defaults.fps
    return round(seconds * fps / facts.frame_step) * facts.frame_step + 1


def _check_limits(request: ResolvedRequest, limits: Limits) -> None:
    if request.num_inference_steps > limits.steps:
        raise BadField(
            "num_inference_steps",
            f"{request.num_inference_steps} steps are more than the {limits.steps} that are served",
        )
    if request.num_frames > limits.frames:
        raise BadField("num_frames", f"{request.num_frames} frames are more than the {limits.frames} that are served")
    pixels = request.width * request.height * request.num_frames
    if pixels > limits.pixels:
        raise BadField(
            "size",
            f"{request.num_frames} frames of {request.width}x{request.height} are {pixels} pixels, and at most "
            f"{limits.pixels} are served; take a smaller size or fewer frames",
        )
