"""The rows of the table `jobs`: what they mean, and which of them cannot be read."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_args, get_origin, get_type_hints

from ...engine.request import ResolvedRequest
from ...errors import RequestError

FINISHED = ("completed", "failed", "cancelled")
STATUSES = ("queued", "in_progress", *FINISHED)
DAMAGED = "damaged"
"""Code of the error of a job whose row could not be read."""


class BadRow(ValueError):
    """A row that cannot be read; the message says which column, and why."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A row of the table `jobs`.

    Attributes:
        owner: name of the API key it was made with; empty where the service has none.
        request: a `ResolvedRequest` as a mapping.
        status: queued, in_progress, completed, failed or cancelled.
        stage: what an in_progress job does: denoising, decoding.
        progress: 0 to 100; 100 only when the files are there.
        error: code and message; of a completed job, that its files are gone.
        hsa: what was computed: for a running job the share of each step so far, `{"steps": [...]}`.
        faults: what went wrong and was recovered from: cause, message, step, at.
        attempt: how often it was begun.
        lease: the process that runs it.
        version: grows with every change.
    """

    seq: int
    id: str
    owner: str
    model: str
    request: Mapping[str, Any]
    idempotency_key: str | None
    fingerprint: str | None
    status: str
    stage: str
    progress: int
    step: int
    num_steps: int
    eta_seconds: float | None
    created_at: float
    started_at: float | None
    completed_at: float | None
    error: Mapping[str, Any] | None
    faults: tuple[Mapping[str, Any], ...]
    hsa: Mapping[str, Any] | None
    timing: Mapping[str, float] | None
    bytes: int
    attempt: int
    lease: str | None
    cancel_requested: bool
    deleted: bool
    version: int


COLUMNS = tuple(field.name for field in fields(Job))
JSON_COLUMNS = ("request", "error", "faults", "hsa", "timing")
_PLAIN = {name: hint for name, hint in get_type_hints(Job).items() if name not in JSON_COLUMNS}
_REQUEST = get_type_hints(ResolvedRequest)
# Of what a version before did not ask for.
_DEFAULTS = {item.name: item.default for item in fields(ResolvedRequest) if item.default is not MISSING}
_PROBLEM = {"code": str, "message": str}
_FAULT = {"cause": str, "message": str, "step": int, "at": int}
_COUNTS = ("width", "height", "num_frames", "fps", "num_inference_steps")
_NO_PROMPT = "(the prompt is lost)"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,80}")
# Beyond these the API's numbers and dates have no meaning.
_LARGEST = 2**62
_LATEST = 253402300800.0  # the year 10000


def read_row(row: Sequence[Any]) -> Job:
    """Return the job of a row.

    Args:
        row: the values of `COLUMNS`.

    Raises:
        BadRow: it cannot be used: text that is not JSON, values of another type or beyond all bounds.
    """
    values = dict(zip(COLUMNS, row, strict=True))
    for name in JSON_COLUMNS:
        values[name] = _parsed(name, values[name])
    for name in ("cancel_requested", "deleted"):
        if values[name] not in (0, 1):
            raise BadRow(f"the column {name} is neither 0 nor 1")
        values[name] = bool(values[name])
    for name, kind in _PLAIN.items():
        if not _is(values[name], kind):
            raise BadRow(f"the column {name} is not of its type")
        if isinstance(values[name], str) and not _is_whole(values[name]):
            raise BadRow(f"the column {name} holds half of a character")
    values["request"] = {**_DEFAULTS, **values["request"]}
    _check_request(values["request"], values["status"] in FINISHED)
    _check_meaning(values)
    values["faults"] = tuple(values["faults"])
    return Job(**values)


def mended(row: Sequence[Any], reason: str) -> dict[str, Any]:
    """What a row that cannot be read is to hold instead: a failed job, with as much as is left of the real one.

    Args:
        row: the values of `COLUMNS`.
        reason: why it cannot be read.
    """
    old = dict(zip(COLUMNS, row, strict=True))
    now = time.time()
    message = f"the entry of this video in the job store is damaged: {reason}"
    request = {**_DEFAULTS, **dict.fromkeys(_COUNTS, 1), "prompt": _NO_PROMPT, "guidance_scale": 1.0, "compute": 1.0}
    request["negative_prompt"] = ""
    new: dict[str, Any] = {
        "seq": old["seq"],
        "id": f"video_damaged_{old['seq']}",
        **{"owner": "", "model": "", "request": request, "idempotency_key": None, "fingerprint": None},
        **{"status": "failed", "stage": "", "progress": 0, "step": 0, "num_steps": 1, "eta_seconds": None},
        **{"created_at": now, "started_at": None, "completed_at": now, "faults": [], "hsa": None, "timing": None},
        "error": {"code": DAMAGED, "message": message},
        **{"bytes": 0, "attempt": 0, "lease": None, "cancel_requested": 0, "deleted": 0, "version": 0},
    }
    new |= {name: json.dumps(new[name]) for name in JSON_COLUMNS if new[name] is not None}
    ended = ("status", "stage", "error", "lease", "eta_seconds", "completed_at")
    for name in COLUMNS:
        if name not in ended and _reads({**new, name: old[name]}):
            new[name] = old[name]
    for name, value in _fields(old["request"]).items():
        trial = {**new, "request": json.dumps({**json.loads(new["request"]), name: value})}
        if name in _REQUEST and _reads(trial):
            new = trial
    return new


def _reads(values: Mapping[str, Any]) -> bool:
    try:
        read_row([values[name] for name in COLUMNS])
    except BadRow:
        return False
    return True


def _fields(request: Any) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = _parsed("request", request)
    except BadRow:
        return {}
    return fields


def _parsed(name: str, text: Any) -> Any:
    if text is None and name not in ("request", "faults"):
        return None
    if not isinstance(text, str):
        raise BadRow(f"the column {name} is not text")
    try:
        value = json.loads(text, parse_float=finite, parse_constant=finite)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()  # half of a character cannot be sent to anybody
    except (ValueError, RecursionError) as error:
        raise BadRow(f"the column {name} is not JSON") from error
    if value is None and name not in ("request", "faults"):
        return None
    if not isinstance(value, list if name == "faults" else dict):
        raise BadRow(f"the column {name} holds something else")
    return value


def _check_request(request: dict[str, Any], finished: bool) -> None:
    """Of a finished job only what is shown of it: another version may have had other rules for the rest."""
    for name, kind in _REQUEST.items():
        if name not in request and finished and (_is(None, kind) or _is((), kind)):
            continue  # there was no such setting when the video was made
        if name not in request or not _is(request[name], kind):
            raise BadRow(f"{name} in the column request is missing or not of its type")
    if request["compute"] is None and request.get("quality") is None:
        raise BadRow("compute in the column request is missing")
    for name in _COUNTS:
        if request[name] < 1:
            raise BadRow(f"{name} in the column request is below 1")
    if not finished:
        try:
            ResolvedRequest(**request)
        except (TypeError, RequestError) as error:
            raise BadRow("the column request is not a request of this version") from error


def _check_meaning(values: Mapping[str, Any]) -> None:
    """What the service, the API and the page rely on beyond types."""
    if values["status"] not in STATUSES:
        raise BadRow("its status is unknown")
    # They are names of files and folders.
    for name in ("id", "lease"):
        if values[name] is not None and not _NAME.fullmatch(values[name]):
            raise BadRow(f"the column {name} is not a name")
    if values["status"] == "in_progress" and values["lease"] is None:
        raise BadRow("the column lease does not say who makes it")
    if values["status"] in FINISHED and values["completed_at"] is None:
        raise BadRow("the column completed_at does not say when it ended")
    if values["status"] == "failed" and values["error"] is None:
        raise BadRow("the column error does not say why it failed")
    if not 0 <= values["progress"] <= 100:
        raise BadRow("the column progress is not from 0 to 100")
    for name in ("step", "num_steps", "bytes", "attempt", "version"):
        if values[name] < 0:
            raise BadRow(f"the column {name} is below 0")
    for name in ("created_at", "started_at", "completed_at"):
        if values[name] is not None and not 0 <= values[name] < _LATEST:
            raise BadRow(f"the column {name} is not a date")
    if values["error"] is not None and not _has(values["error"], _PROBLEM):
        raise BadRow("the column error holds something else")
    if not all(_has(fault, _FAULT) and _is(fault.get("saved", 0), int) for fault in values["faults"]):
        raise BadRow("the column faults holds something else")
    if values["timing"] is not None and not all(_is(value, float) for value in values["timing"].values()):
        raise BadRow("the column timing holds something else")


def _has(entry: Any, kinds: Mapping[str, Any]) -> bool:
    return isinstance(entry, dict) and all(_is(entry.get(name), kind) for name, kind in kinds.items())


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a type; a whole number will do for a float, and a list for a tuple."""
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(_is(item, get_args(kind)[0]) for item in value)
    if isinstance(value, bool):
        return kind is bool or bool in get_args(kind)
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if isinstance(value, int) and abs(value) >= _LARGEST * 2:  # SQLite has no such number
        return False
    return isinstance(value, kind) or (isinstance(value, int) and isinstance(float(value), kind))


def _is_whole(text: str) -> bool:
    """Whether text can be written and sent: half of a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def finite(text: str) -> float:
    """Parse a number of JSON; ValueError where it is NaN or infinite."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value
