"""Request parsing: what a client sent becomes a request that the model can serve, or one sentence that says why not."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pydantic
from pydantic_core import from_json, to_json
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from ...engine.config import EngineConfig
from ...engine.facts import ModelFacts
from ...engine.lora import parse_lora
from ...engine.media.image import png, read_image
from ...engine.request import GenerateRequest, ResolvedRequest, allocation, prepare, resolve
from ...errors import BadField, ConfigError, RequestError
from ...hsa.config import HSAConfig
from .bodies import IGNORED, SETTINGS, CreateVideo
from .settings import Limits

_PLAIN_FORM = "application/x-www-form-urlencoded"
_MAX_FIELDS = 32
_MAX_FIELD = 256 * 1024
# What says nothing of the video, and other ways to say what `_settled` puts into one field.
_NOT_COMPARED = {
    "width",
    "height",
    "n",
    "num_outputs_per_prompt",
    "extra_body",
    "boundary_ratio",
    "output_format",
    *IGNORED,
}
SHARES = ("compute", "quality")
"""The settings that say how much work to spend: a request has one of them."""
# What SGLang's clients send where nobody named a model.
_ANY_MODEL = "default"
# Stands for a file among the texts of a form.
_FILE = "file"
# Whatever a model makes is shorter; beyond it the number of frames is only a number.
_MAX_SECONDS = 3600.0
# C0 controls but tab and line ends, and halves of surrogate pairs, which no encoding can carry.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


class Asked(NamedTuple):
    """What a client asked for.

    Attributes:
        body: the fields.
        fingerprint: equal for equal requests.
        image: content of the file that came with them.
    """

    body: CreateVideo
    fingerprint: str
    image: bytes | None = None

    @property
    def ignored(self) -> list[str]:
        """Names of the fields that were given and do nothing."""
        return [name for name in self.body.ignored if getattr(self.body, name) is not None]


async def read_create(request: Request, takes_images: bool = False, expected: type[CreateVideo] = CreateVideo) -> Asked:
    """Read the body of a request for a video.

    Args:
        request: of HTTP.
        takes_images: whether the model does; else files are not kept.
        expected: what the body should be.

    Raises:
        BadField: it is not what `expected` says.
    """
    image = None
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind == "application/json":
            fields = _json_object("the body", await request.body())
            body = expected.model_validate(_unfolded(fields, fields.pop("extra_body", None)), strict=True)
        elif kind in (_PLAIN_FORM, "multipart/form-data"):
            texts, image = await _read_form(request, takes_images)
            body = expected.model_validate_strings(_unfolded_texts(texts))
        else:
            raise BadField(None, f"the body must be application/json, multipart/form-data or {_PLAIN_FORM}")
    except pydantic.ValidationError as error:
        raise _said(error) from error
    digest = hashlib.sha256(_settled(body).model_dump_json(exclude=_NOT_COMPARED).encode())
    if image is not None:
        digest.update(b"\0" + image)
    return Asked(body, digest.hexdigest(), image)


def _json_object(what: str, content: bytes | str, param: str | None = None) -> dict[str, Any]:
    try:
        value = from_json(content)
    except ValueError as error:
        raise BadField(param, f"{what} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise BadField(param, f'{what} must be a JSON object, such as {{"prompt": "a red disc moves right"}}')
    return value


def _unfolded(fields: dict[str, Any], extra: object) -> dict[str, Any]:
    """Put the fields of `extra_body` beside the others."""
    if extra is None:
        return fields
    if not isinstance(extra, dict) or "extra_body" in extra:
        raise BadField("extra_body", "extra_body must be an object of fields, without another extra_body in it")
    extra = {name: value for name, value in extra.items() if value is not None}
    for name, value in extra.items():
        if fields.get(name) not in (None, value):
            raise BadField(name[:80], f"{name[:80]} has another value in extra_body than beside it; give one of them")
    return {**fields, **extra}


def _unfolded_texts(texts: dict[str, str]) -> dict[str, str]:
    """The same for a form, where `extra_body` is JSON; an input of a form that was left empty is one that is absent."""
    given = texts.pop("extra_body", "")
    extra = _json_object("extra_body", given, "extra_body") if given else {}
    as_texts = {
        name: value if value is None or isinstance(value, str) else to_json(value).decode()
        for name, value in extra.items()
    }
    optional = {name for name, field in CreateVideo.model_fields.items() if not field.is_required()}
    return {name: text for name, text in _unfolded(texts, as_texts).items() if text or name not in optional}


async def _read_form(request: Request, keep_files: bool) -> tuple[dict[str, str], bytes | None]:
    """The texts of a form, and its file: it can only be the image."""
    try:
        form = await request.form(max_files=1, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD)
    except HTTPException as error:
        if error.status_code != 400:  # it is too large, or took too long
            raise
        raise BadField(None, f"the form cannot be read ({error.detail.rstrip('.')})") from error
    except OSError as error:
        raise HTTPException(503, f"the form cannot be taken now ({error.strerror}); try again later") from error
    except (LookupError, ValueError) as error:  # a charset that is none, a boundary that cannot be
        raise BadField(None, "the form cannot be read") from error
    try:
        return await _fields_of(form, keep_files)
    finally:
        await form.close()


async def _fields_of(form: FormData, keep_files: bool) -> tuple[dict[str, str], bytes | None]:
    values: dict[str, str] = {}
    image = None
    for name, value in form.multi_items():
        if name.startswith("{"):
            raise BadField(None, "the body looks like JSON; send it with the header Content-Type: application/json")
        # A reference may be a file, or an object spelled as input_reference[image_url].
        name = "input_reference" if name.partition("[")[0] == "input_reference" else name
        if name in values:
            raise BadField(name[:80], f"{name[:80]} was given twice")
        if not isinstance(value, str) and name != "input_reference":
            raise BadField(name[:80], f"{name[:80]!r} must be a text, not a file")
        values[name] = value if isinstance(value, str) else _FILE
        if isinstance(value, UploadFile) and name == "input_reference" and keep_files:
            image = await value.read()
    return values, image


def _said(error: pydantic.ValidationError) -> BadField:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"][:1])
    if first["type"] == "extra_forbidden":
        rule = "it is not ignored, since it may change the video; leave it out (/docs lists the fields)"
        return BadField(place[:80], f"there is no field {place[:80]!r}, and {rule}")
    message = first["msg"][0].lower() + first["msg"][1:]
    return BadField(place or None, f"{place}: {message}" if place else f"the body is not valid ({message})")


def _settled(body: CreateVideo) -> CreateVideo:
    """Say in one way what can be said in several, so that equal requests are equal."""
    size = body.size
    if body.width is not None and body.height is not None:
        sides = f"{body.width}x{body.height}"
        if size is not None and [int(side) for side in size.split("x")] != [body.width, body.height]:
            raise BadField("size", f"size {size} is not width x height {sides}; give one of them")
        size = sides
    elif body.width is not None or body.height is not None:
        given, missing = ("width", "height") if body.height is None else ("height", "width")
        raise BadField(missing, f"{given} was given without {missing}; give both, or size")
    seed = None if body.seed == -1 else body.seed
    return body.model_copy(update={"size": size, "seed": seed, "lora": body.lora or None})


def to_request(
    asked: Asked,
    *,
    model: str,
    facts: ModelFacts,
    limits: Limits,
    share: Mapping[str, float],
    engine: EngineConfig,
    every: int,
    loras: Collection[str] = (),
    noises: Mapping[str, Path] | None = None,
) -> tuple[ResolvedRequest, bytes | None]:
    """Turn what a client asked into a request that the model can serve, with every default filled in.

    Args:
        asked: fields and image.
        model: its public name.
        facts: its sizes.
        limits: of the service.
        share: compute or quality, where the client says neither.
        engine: how the service computes.
        every: steps between checkpoints.
        loras: names of the LoRA weights that there are.
        noises: files of initial noise by their names.

    Returns:
        The request, and the image that it starts from, as PNG of the video's size.

    Raises:
        BadField: it breaks a limit, or asks for what the model cannot do.
        RequestError: it does not fit the model's grid.
    """
    body = _settled(asked.body)
    _check_model(body, model, facts)
    _check_reference(asked, model, facts)
    _check_texts(body, limits)
    given = {name: value for name in SETTINGS if (value := getattr(body, name)) is not None}
    width, height = (int(side) for side in body.size.split("x")) if body.size is not None else (None, None)
    given |= {"width": width, "height": height, "num_frames": _frames(body, facts)}
    # Drawn here, so that every attempt at the job makes the same video.
    given.setdefault("seed", secrets.randbelow(2**31))
    if not given.keys() & set(SHARES):
        given |= share
    wanted = GenerateRequest(**given, noise=_noise(getattr(body, "latent_path", None), noises))
    _check_loras(wanted.lora, loras)
    # Without the image first: it is not scaled to a size that is then refused.
    request = resolve(wanted, replace(facts, image="none"))
    _check_limits(request, limits)
    try:
        check_plan(facts, allocation(engine, request), request, every)
    except ConfigError as error:
        for name in SHARES:
            if getattr(body, name) is not None:
                raise BadField(name, str(error)) from error
        # Nobody asked for the default; benchmarks warm up with a single step.
        wanted = replace(wanted, compute=1.0, quality=None)
        request = resolve(wanted, replace(facts, image="none"))
    return (request, None) if asked.image is None else _with_image(asked.image, wanted, facts, limits)


def _with_image(
    content: bytes, wanted: GenerateRequest, facts: ModelFacts, limits: Limits
) -> tuple[ResolvedRequest, bytes]:
    """The request with its image, and that as PNG."""
    try:
        wanted = replace(wanted, image=read_image(content))
    except RequestError as error:
        raise BadField("input_reference", str(error)) from error
    request, sources = prepare(wanted, facts)
    _check_limits(request, limits)
    assert sources.image is not None, "there was one"
    return request, png(sources.image)


def check_plan(facts: ModelFacts, hsa: HSAConfig | None, request: ResolvedRequest, every: int) -> None:
    """Refuse a share that so few steps cannot meet, and windows that roll beside a policy that leaves out tokens.

    The planner has the last word, but is seldom asked.

    It needs PyTorch, and the service's own process starts at once and stays small because it does without.

    Raises:
        ConfigError: in the planner's words.
    """
    if hsa is None or (surely_met(hsa, request.num_inference_steps, every) and not request.roll_windows):
        return
    from ...engine.denoise.checks import rehearse

    rehearse(facts, hsa, request, every)


def usual_share(hsa: HSAConfig | None) -> dict[str, float]:
    """What a request that does not say it gets: the one of `SHARES` that the service was started with."""
    if hsa is not None and hsa.quality is not None:
        return {"quality": hsa.quality}
    return {"compute": 1.0 if hsa is None else hsa.compute}


def surely_met(hsa: HSAConfig, num_steps: int, every: int) -> bool:
    """Whether a share leaves room for all full steps of any plan: the first, a change of experts, and the windows.

    Policies that leave out tokens have one more after each checkpoint, and groups evaluate every token at one step in
    eight at least.
    """
    full = 4 + (hsa.warmup or 0) + (hsa.cooldown or 0)
    if hsa.policy in ("tokens", "groups"):
        full += num_steps // every + num_steps // 8
    return hsa.compute * num_steps >= full


def _check_reference(asked: Asked, model: str, facts: ModelFacts) -> None:
    """Refuse an image where none can be used, a link to one, and none where one is needed."""
    given = asked.body.input_reference not in (None, "")
    if given and facts.image == "none":
        raise BadField("input_reference", f"model {model!r} makes videos from text alone; leave out input_reference")
    if given and asked.image is None:
        raise BadField(
            "input_reference", "input_reference must be a file in a form (multipart/form-data); links are not followed"
        )
    if not given and facts.image == "required":
        raise BadField("input_reference", f"model {model!r} makes videos from an image; send one as input_reference")


def _check_model(body: CreateVideo, model: str, facts: ModelFacts) -> None:
    """Refuse another model, or another place of the change of experts."""
    if body.model not in (None, _ANY_MODEL, model):
        raise BadField("model", f"model {body.model[:80]!r} is not served here; this service has {model!r}")
    if body.boundary_ratio not in (None, facts.boundary_ratio):
        own = f"{facts.boundary_ratio:g}" if facts.boundary_ratio is not None else "none: it has one expert"
        raise BadField(
            "boundary_ratio", f"boundary_ratio {body.boundary_ratio:g} is not the model's own ({own}); leave it out"
        )


def _check_texts(body: CreateVideo, limits: Limits) -> None:
    for name in ("prompt", "negative_prompt", "prompt_schedule"):
        text = getattr(body, name) or ""
        if len(text) > limits.prompt:
            raise BadField(name, f"{name} has {len(text)} characters, and at most {limits.prompt} are taken")
        if _UNPRINTABLE.search(text):
            raise BadField(name, f"{name} holds control characters; send plain text")


def _noise(asked: str | None, files: Mapping[str, Path] | None) -> str | None:
    """The file of initial noise that a request names, of those in the operator's folder; its own folders do not count.

    Raises:
        BadField: there is none of that name.
    """
    if asked is None:
        return None
    name = PurePosixPath(asked).name
    if not files or name not in files:
        there = f"there are {', '.join(sorted(files)[:20])}" if files else "the operator names a folder by --noise-dir"
        raise BadField("latent_path", f"there is no file of noise {name[:80]!r} here; {there}")
    return str(files[name])


def _check_loras(asked: Collection[str], known: Collection[str]) -> None:
    """Refuse LoRA weights that the operator has not put there; a file or a hub id is nobody's to name."""
    for name in (parse_lora(text).source for text in asked):
        if name not in known:
            there = f"there is {', '.join(sorted(known)[:20])}" if known else "this service has none"
            raise BadField("lora", f"there are no LoRA weights {name[:80]!r} here; {there}")


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
