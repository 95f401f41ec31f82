"""What is removed from the data directory, and when."""

from __future__ import annotations

import shutil
import time

from .database import Job
from .jobs import JobStore
from .lease import is_held
from .logs import say
from .settings import ServiceSettings

_DAY = 86400.0


def sweep(settings: ServiceSettings, store: JobStore) -> None:
    """Remove what is deleted, too old, too much, or was left half written by a process that is no more."""
    # Read before the jobs: a folder made meanwhile belongs to a job that is then unknown here.
    states = list(settings.state.iterdir())
    results = list(settings.results.iterdir())
    jobs = store.finished()
    kept = sum(job.bytes for job in jobs)
    now = time.time()
    for job in jobs:
        expired = now - (job.completed_at or 0.0) > settings.keep_days * _DAY
        if job.deleted or expired or (job.bytes and kept > settings.keep_gib * 2**30):
            kept -= job.bytes
            forget(settings, store, job)
            say("job removed", job=job.id, why="deleted" if job.deleted else "expired" if expired else "no room")
    for lock in settings.leases.glob("*.lock"):
        is_held(settings.leases, lock.stem)  # removes it if not
    known = store.known()
    finished = {job.id for job in jobs}
    for folder in states:
        if folder.name not in known or folder.name in finished:
            shutil.rmtree(folder, ignore_errors=True)
    for folder in results:
        if folder.name.startswith("."):
            # .ID.ATTEMPT.LEASE: an attempt, perhaps of a living process.
            if not is_held(settings.leases, folder.name.rpartition(".")[2]):
                shutil.rmtree(folder, ignore_errors=True)
        elif folder.name not in known:
            shutil.rmtree(folder, ignore_errors=True)


def forget(settings: ServiceSettings, store: JobStore, job: Job) -> None:
    """Remove a finished job with its files."""
    for folder in (settings.results / job.id, settings.state / job.id):
        shutil.rmtree(folder, ignore_errors=True)
    store.remove(job.id)
