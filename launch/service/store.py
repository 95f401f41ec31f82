"""The jobs: every change of one is a transaction, and survives a kill of everything that reads and writes them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ...engine.request import ResolvedRequest
from ...errors import KeyReused, QueueFull, RequestError
from .database import Database
from .rows import COLUMNS, DAMAGED, JSON_COLUMNS, Job, read_row

_CANCELLED = {"code": "cancelled", "message": "the video was cancelled"}
_FINISHED = "status IN ('completed', 'failed', 'cancelled')"
# Jobs that a whole result completes: the row is older than the files (a backup was put back), or was damaged.
_OPEN = (
    "NOT deleted AND (status = 'queued' OR (status = 'failed' AND "
    f"coalesce(error, '') LIKE '{{\"code\": \"{DAMAGED}\"%'))"
)


# What is not known of a job that was found by its result.
_ADOPTED: Mapping[str, Any] = {
    **{"seq": 0, "idempotency_key": None, "fingerprint": None, "status": "completed", "stage": "", "progress": 100},
    **{"owner": "", "eta_seconds": None, "error": None, "faults": [], "attempt": 1, "lease": None},
    **{"cancel_requested": 0, "deleted": 0, "version": 1},
}


# What a result never says of its job, and what one of an older version does not say for sure.
_UNSAID, _UNSURE = ("idempotency_key", "fingerprint"), ("owner", "created_at")


def adopted_row(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return all columns of a job that was found by its result; see `JobStore.adopt`.

    Raises:
        BadRow: the columns do not describe a job.
        KeyError: a column is missing.
    """
    columns = {**_ADOPTED, **found}
    row = {
        name: json.dumps(columns[name]) if name in JSON_COLUMNS and columns[name] is not None else columns[name]
        for name in COLUMNS
    }
    read_row([row[name] for name in COLUMNS])
    return row


class JobStore:
    """Every change of a job is one transaction; several processes on one machine may share the file.

    What a user must not lose (that a job exists, how it ended) is on the disk when the call returns. Progress is not
    worth a disk flush: after a power cut it may be a little older.
    """

    def __init__(self, path: Path, ended: Callable[[str], None] = lambda status: None) -> None:
        """Open or make the file.

        Args:
            path: of the file.
            ended: called with the status of every job that this process has ended.

        Raises:
            ConfigError: the file is damaged, or no job store.
        """
        self._db, self._ended = Database(path), ended

    @property
    def trouble(self) -> str | None:
        """Why nothing can be written, in one sentence; None while all is well."""
        return self._db.condition.trouble

    def failed(self, error: OSError) -> None:
        """Take note that a file beside the store could not be written."""
        self._db.condition.failed(error)

    def probe(self) -> None:
        """See whether the disk has room, and after trouble whether all can be written again."""
        self._db.probe()

    def mend(self) -> None:
        """Read every row, so that those that cannot be read are failed jobs from now on."""
        with self._db.reading():
            self._db.select("1")

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    # Users' side.

    def create(
        self,
        *,
        id: str,
        owner: str,
        model: str,
        request: ResolvedRequest,
        max_queue: int,
        idempotency_key: str | None = None,
        fingerprint: str | None = None,
        image: bytes | None = None,
    ) -> tuple[Job, bool]:
        """Queue a job, or find the one that the same `idempotency_key` made.

        Args:
            id: the server's own, new.
            owner: whose key.
            model: that will make it.
            request: what to make.
            max_queue: how many jobs may wait.
            idempotency_key: the client's name for this request.
            fingerprint: of what the client asked, to tell a repetition from another request.
            image: what the video starts from, a file's content; kept until the job is finished.

        Returns:
            The job, and whether it is new.

        Raises:
            QueueFull: `max_queue` jobs wait.
            KeyReused: `idempotency_key` was used for another request.
            StoreUnavailable: the store, or the disk that it is on, cannot be written.
        """
        self._db.condition.check()
        with self._db.writing():
            earlier = self._earlier(owner, idempotency_key, fingerprint)
            if earlier is not None:
                return earlier, False
            waiting = self._db.execute("SELECT count(*) FROM jobs WHERE status = 'queued'").fetchone()[0]
            if waiting >= max_queue:
                raise QueueFull(
                    f"{waiting} videos are waiting, and the queue holds at most {max_queue}; try again later"
                )
            text, steps, now = json.dumps(asdict(request)), request.num_inference_steps, time.time()
            self._db.execute(
                "INSERT INTO jobs (id, owner, model, request, num_steps, idempotency_key, fingerprint, created_at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (id, owner, model, text, steps, idempotency_key, fingerprint, now),
            )
            if image is not None:
                self._db.execute("INSERT INTO images VALUES (?, ?)", (id, image))
            return self._db.select("id = ?", (id,))[0], True

    def _earlier(self, owner: str, idempotency_key: str | None, fingerprint: str | None) -> Job | None:
        """The job that an Idempotency-Key made before."""
        if idempotency_key is None:
            return None
        rows = self._db.select("owner = ? AND idempotency_key = ? AND NOT deleted", (owner, idempotency_key))
        if rows and rows[0].fingerprint != fingerprint:
            raise KeyReused("this Idempotency-Key was used for another request; use a new key for a new request")
        return rows[0] if rows else None

    def get(self, id: str, owner: str) -> Job | None:
        """Return a job of an owner; None if there is none, or it is another's."""
        with self._db.reading():
            rows = self._db.select("id = ? AND owner = ? AND NOT deleted", (id, owner))
        return rows[0] if rows else None

    def page(
        self, owner: str, *, after: str | None, limit: int, newest_first: bool, statuses: Sequence[str] = ()
    ) -> tuple[list[Job], bool]:
        """Return up to `limit` jobs of an owner, of these statuses if any are given, and whether there are more.

        Raises:
            RequestError: `after` is not a job of this owner.
        """
        sign, order = ("<", "DESC") if newest_first else (">", "ASC")
        where = "owner = ? AND NOT deleted"
        values: tuple[str | int, ...] = (owner,)
        with self._db.reading():
            if after is not None:
                cursor = self.get(after, owner)
                if cursor is None:
                    raise RequestError(
                        "after must be the id of one of your videos; leave it out to start at the first page"
                    )
                where, values = f"{where} AND seq {sign} ?", (owner, cursor.seq)
            if statuses:
                where, values = f"{where} AND status IN ({', '.join('?' * len(statuses))})", (*values, *statuses)
            rows = self._db.select(f"{where} ORDER BY seq {order} LIMIT {limit + 1:d}", values)
        return rows[:limit], len(rows) > limit

    def position(self, job: Job) -> int:
        """How many jobs are served before a queued one."""
        with self._db.reading():
            found = self._db.execute(
                "SELECT count(*) FROM jobs WHERE status = 'queued' AND model = ? AND seq < ?", (job.model, job.seq)
            ).fetchone()
        return int(found[0])

    def preview(self, id: str, since: int) -> tuple[int, bytes] | None:
        """Return the newest preview of a job as (step, WebP), if it is of a later step than `since`."""
        with self._db.reading():
            found = self._db.execute("SELECT step, image FROM previews WHERE id = ? AND step > ?", (id, since))
            return found.fetchone()

    def cancel(self, id: str, owner: str) -> Job | None:
        """Cancel a queued job at once, or ask for the end of a running one; a finished one stays as it is."""
        with self._db.writing():
            job = self.get(id, owner)
            if job is None:
                return None
            if job.status == "queued":
                self._finish(job, "cancelled", error=_CANCELLED)
            elif job.status == "in_progress":
                self._db.update(id, cancel_requested=1)
            return self._db.select("id = ?", (id,))[0]

    def delete(self, id: str, owner: str) -> Job | None:
        """Make a job unfindable; a running one is cancelled, and cleaned up afterwards."""
        with self._db.writing():
            job = self.cancel(id, owner)
            if job is not None:
                self._db.update(id, deleted=1, idempotency_key=None)
            return job

    # Runners' side.

    def claim(self, lease: str, model: str) -> Job | None:
        """Take the oldest queued job of a model, for the process that holds `lease`."""
        with self._db.writing():
            rows = self._db.select("status = 'queued' AND model = ? ORDER BY seq LIMIT 1", (model,))
            if not rows:
                return None
            job = rows[0]
            self._db.update(
                job.id,
                status="in_progress",
                stage="starting",
                lease=lease,
                attempt=job.attempt + 1,
                started_at=job.started_at or time.time(),
            )
            return self._db.select("id = ?", (job.id,))[0]

    def image(self, job: Job) -> bytes | None:
        """Return the file that a job was created with, if it was and is not finished."""
        with self._db.reading():
            found = self._db.execute("SELECT image FROM images WHERE id = ?", (job.id,)).fetchone()
        return found[0] if found is not None else None

    def progress(self, job: Job, preview: bytes | None = None, **columns: Any) -> None:
        """Say how far a job is; not worth a disk flush. No-op where the job is no longer this attempt's."""
        with self._db.writing(durable=False):
            if self._held(job):
                self._db.update(job.id, **columns)
                if preview is not None:
                    row = (job.id, columns["step"], preview)
                    self._db.execute("INSERT OR REPLACE INTO previews VALUES (?, ?, ?)", row)

    def cancelled(self, ids: list[str]) -> list[str]:
        """Which of these jobs their owners want to end."""
        with self._db.reading():
            marks = ", ".join("?" * len(ids))
            found = self._db.execute(f"SELECT id FROM jobs WHERE cancel_requested AND id IN ({marks})", ids)
            return [id for (id,) in found]

    def finish(self, job: Job, status: str, **columns: Any) -> bool:
        """End a job; False where it is no longer this attempt's."""
        with self._db.writing():
            if not self._held(job):
                return False
            self._finish(job, status, **columns)
            return True

    def requeue(self, job: Job, fault: Mapping[str, Any] | None) -> bool:
        """Put a job back to where it was in the queue, with what went wrong; None takes the attempt back."""
        with self._db.writing():
            if not self._held(job):
                return False
            current = self._db.select("id = ?", (job.id,))[0]
            if current.cancel_requested:
                self._finish(current, "cancelled", error=_CANCELLED)
                return True
            faults = [*current.faults, fault] if fault is not None else list(current.faults)
            attempt = current.attempt if fault is not None else current.attempt - 1
            self._db.update(
                job.id,
                status="queued",
                stage="",
                lease=None,
                eta_seconds=None,
                faults=faults,
                attempt=attempt,
            )
            return True

    def give_up(self, job: Job, fault: Mapping[str, Any], error: Mapping[str, Any]) -> bool:
        """Fail a job for good, with what went wrong the last time."""
        with self._db.writing():
            if not self._held(job):
                return False
            faults = [*self._db.select("id = ?", (job.id,))[0].faults, fault]
            self._finish(job, "failed", error=error, faults=faults)
            return True

    def running(self) -> list[Job]:
        """Jobs that some process runs, or ran when it died."""
        with self._db.reading():
            return self._db.select("status = 'in_progress'", ())

    def counts(self) -> dict[str, int]:
        """Number of jobs by status."""
        with self._db.reading():
            return dict(self._db.execute("SELECT status, count(*) FROM jobs WHERE NOT deleted GROUP BY status"))

    def finished(self) -> list[Job]:
        """Finished jobs, oldest first."""
        with self._db.reading():
            return self._db.select(f"{_FINISHED} ORDER BY completed_at")

    def unwanted(self, id: str) -> Job | None:
        """A finished job that its owner has removed, if this is one."""
        with self._db.reading():
            return next(iter(self._db.select(f"id = ? AND deleted AND {_FINISHED}", (id,))), None)

    def known(self) -> set[str]:
        """Ids of all jobs."""
        with self._db.reading():
            return {id for (id,) in self._db.execute("SELECT id FROM jobs")}

    def settled(self) -> set[str]:
        """Ids of all jobs, without those that a whole result would complete: see `adopt`."""
        with self._db.reading():
            return {id for (id,) in self._db.execute(f"SELECT id FROM jobs WHERE NOT ({_OPEN})")}

    def adopt(self, found: Mapping[str, Any], still_there: Callable[[], bool]) -> bool:
        """Complete a job whose whole result is there, while the store knows nothing of it or of its end.

        Args:
            found: the columns of the job that are known: all that have no default, `hsa` and `timing`; without the
                owner, where the result does not name it. A row that is there then keeps its own.
            still_there: whether the result is there; asked when nobody can remove it any more.

        Returns:
            Whether it was adopted; not, where the job has ended already, or is made just now.

        Raises:
            BadRow: the columns do not describe a job.
        """
        row = adopted_row(found)
        id = row["id"]
        with self._db.writing():
            if self._db.execute(f"SELECT 1 FROM jobs WHERE id = ? AND NOT ({_OPEN})", (id,)).fetchone():
                return False
            if not still_there():
                return False
            self._db.insert({**row, **self._own_columns(found)})
            for table in ("previews", "images"):
                self._db.execute(f"DELETE FROM {table} WHERE id = ?", (id,))
            return True

    def _own_columns(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """What the row of a result's job knows better than the result."""
        own: dict[str, Any] = {}
        for job in self._db.select("id = ?", (found["id"],)):
            if "owner" not in found:
                own |= {name: getattr(job, name) for name in _UNSURE}
            if found.get("owner", job.owner) == job.owner:  # another owner may have used the same key
                own |= {name: getattr(job, name) for name in _UNSAID}
        return own

    def tell(self, id: str, error: Mapping[str, Any] | None) -> bool:
        """Say at a completed job what is wrong with its files, None if nothing; returns whether that is news."""
        with self._db.reading():
            found = self._db.select("id = ? AND status = 'completed'", (id,))
            if not found or found[0].error == error:
                return False
            with self._db.writing():
                self._db.update(id, error=error)
            return True

    def result_bytes(self) -> int:
        """Size of all results."""
        with self._db.reading():
            return int(self._db.execute("SELECT coalesce(sum(bytes), 0) FROM jobs").fetchone()[0])

    def remove(self, id: str) -> None:
        """Delete the row of a finished job."""
        with self._db.writing():
            self._db.execute("DELETE FROM previews WHERE id = ?", (id,))
            self._db.execute(f"DELETE FROM jobs WHERE id = ? AND {_FINISHED}", (id,))

    def _held(self, job: Job) -> bool:
        held = self._db.execute(
            "SELECT 1 FROM jobs WHERE id = ? AND status = 'in_progress' AND lease = ? AND attempt = ?",
            (job.id, job.lease, job.attempt),
        )
        return held.fetchone() is not None

    def _finish(self, job: Job, status: str, **columns: Any) -> None:
        ended = {"stage": "", "lease": None, "eta_seconds": None, "completed_at": time.time()}
        self._db.update(job.id, status=status, **ended, **columns)
        for table in ("previews", "images"):
            self._db.execute(f"DELETE FROM {table} WHERE id = ?", (job.id,))
        self._db.after_commit(partial(self._ended, status))
