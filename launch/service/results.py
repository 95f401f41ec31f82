"""The files of finished jobs: one whole that a kill cannot tear; what is deleted when; what the job store has lost."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ...engine.media.files import flush_to_disk, has_latents, has_result, place, write_durably
from ...errors import RequestError
from ..logs import say
from ..workers.messages import FILES
from .database import is_held
from .rows import Job, finite
from .settings import ServiceSettings, public_name
from .store import JobStore, adopted_row

MANIFEST = "manifest.json"

_DAY = 86400.0
# What `job_facts` says.
_FACTS = ("id", "owner", "model", "request", "faults", "created_at", "started_at", "completed_at")
# .ID.ATTEMPT.LEASE: an attempt, perhaps of a living process; and what `delete_job` had no time to remove.
_ATTEMPT = re.compile(r"\.[^.]+\.\d+\.([0-9a-f]+)")
_DELETED = ".forgotten"


def complete(folder: Path, target: Path, manifest: Mapping[str, Any]) -> None:
    """Make a folder of files the result of its job.

    The manifest is written last, everything is flushed to the disk, and one rename makes it visible: wherever a
    machine dies, `target` either is not there or is whole.

    Raises:
        OSError: the disk is full or failing.
    """
    (folder / MANIFEST).write_bytes(_as_json(manifest))
    for path in [*folder.iterdir(), folder]:
        flush_to_disk(path)
    shutil.rmtree(target, ignore_errors=True)  # of an attempt whose end could not be recorded
    folder.rename(target)
    flush_to_disk(target.parent)


def rescue(name: str, write: Callable[[Path], object], error: OSError) -> RequestError:
    """Keep a video, whose result cannot be written, in the system's folder for temporary files; the log says where.

    Args:
        name: of the attempt.
        write: writes the video to a path.
        error: why the result cannot be written.

    Returns:
        What to tell the client.

    Raises:
        OSError: no place takes the video.
    """
    kept = place(Path(tempfile.gettempdir(), f"heterostep-{name.strip('.')}.mp4"), write).path
    say("results cannot be written", logging.ERROR, reason=str(error), video=str(kept))
    return RequestError(
        f"the video is made, but its files could not be written ({error.strerror or error}); whoever runs the "
        "service finds the video by its log"
    )


def is_complete(target: Path) -> bool:
    """Whether `complete` made this folder, and its manifest can be read."""
    try:
        manifest = read_manifest(target)
        seconds = manifest["timing"]
        return isinstance(manifest["hsa"], dict) and all(
            isinstance(n, int | float) for n in (seconds["total"], *seconds.values())
        )
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return False


def read_manifest(target: Path) -> dict[str, Any]:
    """What `complete` was told.

    Raises:
        OSError: it is not there.
        ValueError: it is damaged.
    """
    text = (target / MANIFEST).read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text, parse_float=finite, parse_constant=finite)
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
    """What the manifest of a result says of its job, so that the job can be restored if the store has lost it."""
    started = job.started_at if job.started_at is not None else completed_at
    return {
        **{"id": job.id, "owner": job.owner, "model": job.model, "request": dict(job.request)},
        **{"faults": list(job.faults), "created_at": job.created_at, "started_at": started},
        "completed_at": completed_at,
    }


def read_job(target: Path) -> dict[str, Any] | None:
    """Return the columns of the completed job whose result a folder is; None if it is none, or does not say enough.

    A result of an older version says it in its report; its owner is then unknown, and is left out.
    """
    try:
        if not is_complete(target) or gone(target, ("video",)):
            return None
        manifest = read_manifest(target)
        facts = _from_job(manifest["job"]) if "job" in manifest else _from_report(target, manifest)
        if facts["id"] != target.name:
            return None  # a copy under another name
        steps = facts["request"]["num_inference_steps"]
        known = {name: manifest[name] for name in ("hsa", "timing")}
        facts = {**facts, **known, "num_steps": steps, "step": steps, "bytes": folder_bytes(target)}
        adopted_row(facts)  # whether the store can hold it
        return facts
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None


def _from_job(job: Mapping[str, Any]) -> dict[str, Any]:
    return {name: job[name] for name in _FACTS}


def _from_report(target: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    report = json.loads((target / FILES["report"][0]).read_text(encoding="utf-8"))
    seconds, ended = manifest["timing"], (target / MANIFEST).stat().st_mtime
    started = ended - seconds["total"]
    return {
        **{"id": target.name, "model": _model_name(report["model"]), "request": report["request"]},
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


def clean_up(settings: ServiceSettings, store: JobStore) -> list[Path]:
    """Remove what is deleted, too old, too much, or was left half written by a process that has ended.

    Nothing else: a result that the store does not know is made a completed job again where it says enough of itself.

    Returns:
        Folders that belong to no job and stay.
    """
    # Read before the jobs: a folder made meanwhile belongs to a job that is then unknown here.
    states = _folders(settings.state)
    for folder in _folders(settings.results):
        attempt = _ATTEMPT.fullmatch(folder.name)
        if folder.name.endswith(_DELETED) or (attempt and not is_held(settings.leases, attempt[1])):
            shutil.rmtree(folder, ignore_errors=True)
    for lock in settings.leases.glob("*.lock"):
        is_held(settings.leases, lock.stem)  # removes it if not
    jobs = store.finished()
    _remove_finished(settings, store, jobs)
    finished = {job.id: job.status for job in jobs}
    for folder in states:
        if folder.name in finished:
            remove_state(settings, folder.name, finished[folder.name])
    return adopt(settings, store)


def remove_state(settings: ServiceSettings, id: str, status: str) -> Path | None:
    """Remove what a finished job would have been resumed from.

    Args:
        settings: of the service.
        id: of the job.
        status: how it ended.

    Returns:
        The folder if it stays, until the job is removed: the job failed, and this is the only place of its video, or of
        what was denoised but could not be decoded.
    """
    state = settings.state / id
    if status == "failed" and (has_result(state) or has_latents(state)):
        return state
    shutil.rmtree(state, ignore_errors=True)
    return None


def _remove_finished(settings: ServiceSettings, store: JobStore, jobs: list[Job]) -> None:
    """Remove finished jobs that are deleted, too old or too much.

    A row may be damaged: before files are removed for what it says, their own age and size are looked at.
    """
    now, limit = time.time(), settings.keep_gib * 2**30
    sizes = {job.id: job.bytes for job in jobs}
    if sum(sizes.values()) > limit:
        sizes = {job.id: folder_bytes(settings.results / job.id) for job in jobs}
    kept = sum(sizes.values())
    failures: list[OSError] = []
    for job in jobs:
        expired = now - (job.completed_at or 0.0) > settings.keep_days * _DAY
        expired = expired and now - newest(settings.results / job.id) > settings.keep_days * _DAY
        if job.deleted or expired or (sizes[job.id] and kept > limit):
            kept -= sizes[job.id]
            try:
                delete_job(settings, store, job)
            except OSError as error:
                failures.append(error)
                continue
            say("job removed", job=job.id, why="deleted" if job.deleted else "expired" if expired else "no room")
    if failures:
        say("jobs cannot be removed", logging.ERROR, count=len(failures), reason=str(failures[0]))


def adopt(settings: ServiceSettings, store: JobStore) -> list[Path]:
    """Make completed jobs of whole results that the store does not know, or knows as unfinished.

    It was removed, an older backup of it was put back, or its rows were damaged.

    Returns:
        Folders that belong to no job and stay.
    """
    # Read before the jobs: a folder made meanwhile belongs to a job that is then unknown here.
    folders = [*_folders(settings.results), *_folders(settings.state)]
    settled = store.settled()
    results = {path.name: path for path in folders if path.parent == settings.results and path.name not in settled}
    found = [facts for facts in map(read_job, results.values()) if facts is not None]
    adopted = 0
    for facts in sorted(found, key=lambda facts: facts["created_at"]):
        adopted += store.adopt(facts, functools.partial(is_complete, results[facts["id"]]))
    if adopted:
        say("videos found again by their files", logging.WARNING, count=adopted, folder=str(settings.results))
    known = store.known()
    return [path for path in folders if path.name not in known and not path.name.startswith(".")]


def describe_results(settings: ServiceSettings, store: JobStore) -> None:
    """Write beside each result of an older version which job it belongs to."""
    for job in store.finished():
        target = settings.results / job.id
        if job.status == "completed" and not job.deleted and is_complete(target):
            try:
                describe(target, job_facts(job, job.completed_at or 0.0))
            except OSError as error:
                say("results cannot be described", reason=str(error))
                return


def delete_job(settings: ServiceSettings, store: JobStore, job: Job) -> None:
    """Remove a finished job with its files."""
    target = settings.results / job.id
    # In one step, so that half of a result is never taken for one that the store has lost.
    hidden = settings.results / f".{job.id}{_DELETED}"
    shutil.rmtree(hidden, ignore_errors=True)
    if target.is_dir():
        target.rename(hidden)
    try:
        store.remove(job.id)
    finally:  # on a full disk above all
        for folder in (hidden, settings.state / job.id):
            shutil.rmtree(folder, ignore_errors=True)


def remove_unknown(settings: ServiceSettings, store: JobStore) -> list[Path]:
    """Remove what belongs to no job and cannot be made one; returns it."""
    unknown = adopt(settings, store)
    for folder in unknown:
        shutil.rmtree(folder)
    return unknown


def _folders(parent: Path) -> list[Path]:
    return [path for path in parent.iterdir() if path.is_dir() and not path.is_symlink()]
