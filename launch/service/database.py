"""The SQLite file of the jobs: its tables, its rows, and its transactions."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ...errors import ConfigError, HeterostepError

SCHEMA = 2

_TABLES = """
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    model TEXT NOT NULL,
    request TEXT NOT NULL,
    idempotency_key TEXT,
    fingerprint TEXT,
    status TEXT NOT NULL DEFAULT 'queued',
    stage TEXT NOT NULL DEFAULT '',
    progress INTEGER NOT NULL DEFAULT 0,
    step INTEGER NOT NULL DEFAULT 0,
    num_steps INTEGER NOT NULL DEFAULT 0,
    eta_seconds REAL,
    created_at REAL NOT NULL,
    started_at REAL,
    completed_at REAL,
    error TEXT,
    faults TEXT NOT NULL DEFAULT '[]',
    hsa TEXT,
    timing TEXT,
    bytes INTEGER NOT NULL DEFAULT 0,
    attempt INTEGER NOT NULL DEFAULT 0,
    lease TEXT,
    cancel_requested INTEGER NOT NULL DEFAULT 0,
    deleted INTEGER NOT NULL DEFAULT 0,
    version INTEGER NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX by_idempotency ON jobs(owner, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX by_status ON jobs(status, seq);
CREATE INDEX by_owner ON jobs(owner, seq);
CREATE TABLE previews (id TEXT PRIMARY KEY, step INTEGER NOT NULL, image BLOB NOT NULL);
CREATE TABLE figures (name TEXT, labels TEXT, value REAL NOT NULL, PRIMARY KEY (name, labels));
"""
# Since version 2: what unfinished jobs start from, as PNG.
_IMAGES = "CREATE TABLE images (id TEXT PRIMARY KEY, image BLOB NOT NULL)"


class StoreUnavailable(HeterostepError):
    """The job store cannot be read or written: a full or failing disk, or a lock that is never released."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A row of the table `jobs`.

    Attributes:
        owner: name of the API key it was made with; empty where the service has none.
        request: a `ResolvedRequest` as a mapping.
        status: queued, in_progress, completed, failed or cancelled.
        stage: what an in_progress job does: denoising, decoding.
        progress: 0 to 100; 100 only when the files are there.
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


_COLUMNS = [field.name for field in fields(Job)]
_JSON = ("request", "error", "faults", "hsa", "timing")


def _job(row: tuple[Any, ...]) -> Job:
    values = dict(zip(_COLUMNS, row, strict=True))
    for name in _JSON:
        values[name] = json.loads(values[name]) if values[name] is not None else None
    values["faults"] = tuple(values["faults"])
    for name in ("cancel_requested", "deleted"):
        values[name] = bool(values[name])
    return Job(**values)


class Database:
    """One connection, shared by the threads of a process; several processes on one machine may share the file."""

    def __init__(self, path: Path) -> None:
        """Open or make the file.

        Raises:
            ConfigError: it is not a job store, or of a newer version.
        """
        self._lock = threading.RLock()
        try:
            self._connection = sqlite3.connect(path, timeout=10.0, isolation_level=None, check_same_thread=False)
            self.execute("PRAGMA journal_mode = WAL")
            with self.writing():
                found = self.execute("PRAGMA user_version").fetchone()[0]
                if found == 0:
                    for statement in _TABLES.split(";\n"):
                        self.execute(statement)
                if found < SCHEMA:
                    self.execute(_IMAGES)
                    self.execute(f"PRAGMA user_version = {SCHEMA}")
        except (sqlite3.Error, StoreUnavailable) as error:
            raise ConfigError(f"{str(path)!r} cannot be used as a job store ({error})") from error
        if found > SCHEMA:
            raise ConfigError(f"{str(path)!r} was made by a newer version of heterostep; use that one")

    def close(self) -> None:
        """Close the file; later calls raise StoreUnavailable."""
        with self._lock:
            self._connection.close()

    def execute(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        """Run a statement, inside `reading` or `writing`."""
        return self._connection.execute(statement, values)

    def select(self, where: str, values: Sequence[Any] = ()) -> list[Job]:
        """Return the jobs for which `where` holds."""
        return [_job(row) for row in self.execute(f"SELECT {', '.join(_COLUMNS)} FROM jobs WHERE {where}", values)]

    def update(self, id: str, **columns: Any) -> None:
        """Change columns of a job; what is kept as JSON is given as it is."""
        values = [json.dumps(value) if name in _JSON else value for name, value in columns.items()]
        names = ", ".join(f"{name} = ?" for name in columns)
        self.execute(f"UPDATE jobs SET {names}, version = version + 1 WHERE id = ?", [*values, id])

    def add_figures(self, changes: Mapping[tuple[str, str], float]) -> None:
        """Add to figures by (name, labels as JSON)."""
        for (name, labels), value in changes.items():
            self.execute(
                "INSERT INTO figures VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET value = value + excluded.value",
                (name, labels, value),
            )

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Keep other threads out."""
        with self._lock, _translated():
            yield

    @contextlib.contextmanager
    def writing(self, durable: bool = True) -> Iterator[None]:
        """One transaction; inside another it is part of that.

        Args:
            durable: whether it is on the disk when it returns, safe from a power cut. A kill of the process never loses
                a finished transaction.
        """
        with self._lock, _translated():
            if self._connection.in_transaction:
                yield
                return
            self.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # a full disk ends it by itself
                    self.execute("ROLLBACK")
                raise


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StoreUnavailable(f"the job store cannot be used now ({error})") from error
