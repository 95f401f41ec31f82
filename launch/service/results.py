"""The files of a finished job, and how they become one whole that a kill cannot tear."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...engine.media.files import write_durably
from ..workers.files import FILES
from .rows import Job
from .settings import public_name

MANIFEST = "manifest.json"


def complete(folder: Path, target: Path, manifest: Mapping[str, Any]) -> None:
    """Make a folder of files the result of its job.

    The manifest is written last, everything is flushed to the disk, and one rename makes it visible: wherever a
    machine dies, `target` either is not there or is whole.

    Raises:
        OSError: the disk is full or failing.
    """
    (folder / MANIFEST).write_bytes(_as_json(manifest))
    for path in [*folder.iterdir(), folder]:
        _flush(path)
    shutil.rmtree(target, ignore_errors=True)  # of an attempt whose end could not be recorded
    folder.rename(target)
    _flush(target.parent)


def is_complete(target: Path) -> bool:
    """Whether `complete` made this folder, and its manifest can be read."""
    try:
        manifest = read_manifest(target)
        return isinstance(manifest, dict) and {"hsa", "timing"} <= manifest.keys()
    except (OSError, ValueError, RecursionError):
        return False


def read_manifest(target: Path) -> dict[str, Any]:
    """What `complete` was told."""
    content: dict[str, Any] = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
    return content


def describe(target: Path, job: Mapping[str, Any]) -> None:
    """Add to a result that an older version made the job that it belongs to; see `read_job`."""
    manifest = read_manifest(target)
    if "job" not in manifest:
        path = target / MANIFEST
        before = path.stat()
        write_durably(path, _as_json({**manifest, "job": job}))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def job_facts(job: Job, completed_at: float) -> dict[str, Any]:
    """What the manifest of a result says of its job, so that the job can be made anew where the store has lost it."""
    started = job.started_at if job.started_at is not None else completed_at
    return {
        **{"id": job.id, "owner": job.owner, "model": job.model, "request": dict(job.request)},
        **{"faults": list(job.faults), "created_at": job.created_at, "started_at": started},
        "completed_at": completed_at,
    }


def read_job(target: Path) -> dict[str, Any] | None:
    """Return the columns of the completed job whose result a folder is; None if it is none, or does not say enough.

    A result of an older version says it in its report; its owner is then unknown, and is nobody.
    """
    try:
        if not is_complete(target) or gone(target, ("video",)):
            return None
        manifest = read_manifest(target)
        facts = manifest["job"] if "job" in manifest else _from_report(target, manifest)
        if facts["id"] != target.name:
            return None  # a copy under another name
        steps = facts["request"]["num_inference_steps"]
        known = {name: manifest[name] for name in ("hsa", "timing")}
        return {**facts, **known, "num_steps": steps, "step": steps, "bytes": folder_bytes(target)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _from_report(target: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    report = json.loads((target / FILES["report"][0]).read_text(encoding="utf-8"))
    seconds, ended = manifest["timing"], (target / MANIFEST).stat().st_mtime
    started = ended - seconds["total"]
    return {
        **{"id": target.name, "owner": "", "model": _model_name(report["model"]), "request": report["request"]},
        **{"faults": [], "created_at": started - seconds["queued"], "started_at": started, "completed_at": ended},
    }


def _model_name(model: str) -> str:
    return Path(model).name if Path(model).is_absolute() else public_name(model)


def gone(target: Path, variants: Iterable[str] = FILES) -> list[str]:
    """Names of the files of a result that are not there any more, or are empty."""
    names = [FILES[variant][0] for variant in variants]
    return [name for name in names if not _has_content(target / name)]


def _has_content(path: Path) -> bool:
    try:
        return path.is_file() and path.stat().st_size > 0
    except OSError:
        return False


def newest(folder: Path) -> float:
    """When a file of a result was written last, in Unix time; 0 if there is none."""
    with contextlib.suppress(FileNotFoundError):
        return max((path.stat().st_mtime for path in folder.iterdir()), default=0.0)
    return 0.0


def folder_bytes(folder: Path) -> int:
    """Size of the files in a folder; 0 if it is not there."""
    with contextlib.suppress(FileNotFoundError):
        return sum(path.stat().st_size for path in folder.iterdir())
    return 0


def _as_json(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, allow_nan=False).encode()


def _flush(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
