"""What is removed from the data directory, and when; and what is found there that the job store has lost."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import shutil
import time
from pathlib import Path

from .jobs import JobStore
from .lease import is_held
from .logs import say
from .results import describe, folder_bytes, is_complete, job_facts, newest, read_job
from .rows import BadRow, Job
from .settings import ServiceSettings

_DAY = 86400.0
# .ID.ATTEMPT.LEASE: an attempt, perhaps of a living process; and what `forget` had no time to remove.
_ATTEMPT = re.compile(r"\.[^.]+\.\d+\.([0-9a-f]+)")
_FORGOTTEN = ".forgotten"


def sweep(settings: ServiceSettings, store: JobStore) -> list[Path]:
    """Remove what is deleted, too old, too much, or was left half written by a process that is no more.

    Nothing else: a result that the store does not know is made a completed job again where it says enough of itself.

    Returns:
        Folders that belong to no job and stay.
    """
    # Read before the jobs: a folder made meanwhile belongs to a job that is then unknown here.
    states = _folders(settings.state)
    for folder in _folders(settings.results):
        attempt = _ATTEMPT.fullmatch(folder.name)
        if folder.name.endswith(_FORGOTTEN) or (attempt and not is_held(settings.leases, attempt[1])):
            shutil.rmtree(folder, ignore_errors=True)
    for lock in settings.leases.glob("*.lock"):
        is_held(settings.leases, lock.stem)  # removes it if not
    jobs = store.finished()
    _remove_finished(settings, store, jobs)
    finished = {job.id for job in jobs}
    for folder in states:
        if folder.name in finished:
            shutil.rmtree(folder, ignore_errors=True)
    return adopt(settings, store)


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
                forget(settings, store, job)
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
    for facts in sorted(found, key=lambda facts: str(facts["created_at"])):
        with contextlib.suppress(BadRow):
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


def forget(settings: ServiceSettings, store: JobStore, job: Job) -> None:
    """Remove a finished job with its files."""
    target = settings.results / job.id
    # In one step, so that half of a result is never taken for one that the store has lost.
    hidden = settings.results / f".{job.id}{_FORGOTTEN}"
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
