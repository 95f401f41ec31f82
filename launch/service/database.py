"""The SQLite file of the jobs: tables, rows, transactions, the processes that use it, and whether it can be written.

What is in the way of writing is told once when it begins and once when it ends (`Condition`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
import shutil
import sqlite3
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ...errors import ConfigError, StoreUnavailable
from ..logs import say
from .rows import COLUMNS, JSON_COLUMNS, BadRow, Job, mended, read_row

SCHEMA = 3

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
"""
# Since version 2: what unfinished jobs start from, as PNG. Until version 2 there was a table of metrics.
_IMAGES = "CREATE TABLE images (id TEXT PRIMARY KEY, image BLOB NOT NULL)"
# What the statements below and those of `store.py` count on.
_EXPECTED = {
    "jobs": COLUMNS,
    "previews": ("id", "step", "image"),
    "images": ("id", "image"),
}
# Checking all indexes of a larger file would take many seconds.
_LARGE = 1 << 28


class Database:
    """One connection, shared by the threads of a process; several processes on one machine may share the file.

    Attributes:
        condition: whether the file can be written.
    """

    def __init__(self, path: Path) -> None:
        """Open or make the file, and check it.

        Raises:
            ConfigError: it is damaged, not a job store, or of a newer version.
        """
        self.condition = Condition(path)
        self._lock = threading.RLock()
        self._told: set[int] = set()
        self._after_commit: list[Callable[[], None]] = []
        with contextlib.ExitStack() as undo:
            try:
                self._connection = sqlite3.connect(path, timeout=10.0, isolation_level=None, check_same_thread=False)
                undo.callback(self._connection.close)
                # Whether text with a flipped bit can be used, `read_row` decides; here it would fail the whole query.
                self._connection.text_factory = lambda data: data.decode("utf-8", "replace")
                self.execute("PRAGMA journal_mode = WAL")
                self._check(path)
                found = self._make_tables()
                for table, columns in _EXPECTED.items():
                    self.execute(f"SELECT {', '.join(columns)} FROM {table} LIMIT 0")
            except (sqlite3.Error, UnicodeDecodeError) as error:
                raise ConfigError(_refusal(path, error)) from error
            if found > SCHEMA:
                raise ConfigError(f"{str(path)!r} was written by a newer version of heterostep; use that version")
            undo.pop_all()
        self.condition.opened()

    def _check(self, path: Path) -> None:
        pragma = "integrity_check" if path.stat().st_size < _LARGE else "quick_check"
        answer = self.execute(f"PRAGMA {pragma}(1)").fetchone()[0]
        if answer != "ok":
            raise ConfigError(damage(str(path), str(answer).removeprefix("*** in database main ***")))

    def _make_tables(self) -> int:
        """Make the tables that are missing; returns the version that was found."""
        with self._transaction():
            found = int(self.execute("PRAGMA user_version").fetchone()[0])
            if found == 0:
                for statement in _TABLES.split(";\n"):
                    self.execute(statement)
            if found < 2:
                self.execute(_IMAGES)
            if found < SCHEMA:
                self.execute(f"PRAGMA user_version = {SCHEMA}")
        return found

    def close(self) -> None:
        """Close the file; later calls raise StoreUnavailable."""
        with self._lock:
            self._connection.close()

    def execute(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        """Run a statement, inside `reading` or `writing`."""
        return self._connection.execute(statement, values)

    def select(self, where: str, values: Sequence[Any] = ()) -> list[Job]:
        """Return the jobs for which `where` holds.

        A row that cannot be read is made a failed job, here and in the file, so that it does not fail again.
        """
        with contextlib.suppress(BadRow):
            return [read_row(row) for row in self._rows(where, values)]
        for row in self._rows(where, values):
            try:
                read_row(row)
            except BadRow as error:
                self._mend(row, str(error))
        # What was mended may be asked for no more; what could not be written is mended for the caller alone.
        return [_read_or_mend(row) for row in self._rows(where, values)]

    def _rows(self, where: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        return self.execute(f"SELECT {', '.join(COLUMNS)} FROM jobs WHERE {where}", values).fetchall()

    def _mend(self, row: tuple[Any, ...], reason: str) -> None:
        new = mended(row, reason)
        if new["seq"] not in self._told:  # where it cannot be written, it comes again
            self._told.add(new["seq"])
            say("job damaged", logging.ERROR, job=new["id"], reason=reason)
        inside = self._connection.in_transaction
        try:
            with self.writing():
                names = ", ".join(f"{name} = ?" for name in COLUMNS)
                self.execute(f"UPDATE jobs SET {names} WHERE seq = ?", [*(new[name] for name in COLUMNS), new["seq"]])
                for table in ("previews", "images"):
                    self.execute(f"DELETE FROM {table} WHERE id = ?", (new["id"],))
        except StoreUnavailable:
            if inside:  # the transaction has ended
                raise

    def insert(self, values: Mapping[str, Any]) -> None:
        """Add a row, or change what a row of this `id` holds; `values` has every column but `seq`."""
        names = [name for name in COLUMNS if name != "seq"]
        changes = ", ".join(f"{name} = excluded.{name}" for name in names if name != "id")
        self.execute(
            f"INSERT INTO jobs ({', '.join(names)}) VALUES ({', '.join('?' * len(names))}) "
            f"ON CONFLICT (id) DO UPDATE SET {changes}",
            [values[name] for name in names],
        )

    def update(self, id: str, **columns: Any) -> None:
        """Change columns of a job; what is kept as JSON is given as it is."""
        values = [json.dumps(value) if name in JSON_COLUMNS else value for name, value in columns.items()]
        names = ", ".join(f"{name} = ?" for name in columns)
        self.execute(f"UPDATE jobs SET {names}, version = version + 1 WHERE id = ?", [*values, id])

    def after_commit(self, act: Callable[[], None]) -> None:
        """Call `act` when the transaction that runs now is in the file."""
        self._after_commit.append(act)

    def probe(self) -> None:
        """See whether the file can be written."""
        self.condition.probe(self._write_something)

    def _write_something(self) -> None:
        with self.writing():
            self.execute(f"PRAGMA user_version = {SCHEMA}")  # a page is written even where nothing changes

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Keep other threads out."""
        with self._lock, self.condition.watched():
            yield

    @contextlib.contextmanager
    def writing(self, durable: bool = True) -> Iterator[None]:
        """One transaction; inside another it is part of that.

        Args:
            durable: whether it is on the disk when it returns, safe from a power cut. A kill of the process never loses
                a finished transaction.
        """
        with self._lock, self.condition.watched():
            if self._connection.in_transaction:
                yield
                return
            self.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._after_commit = []
            with self._transaction():
                yield
            for act in self._after_commit:
                act()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # a full disk ends it by itself
                self.execute("ROLLBACK")
            raise


def _read_or_mend(row: tuple[Any, ...]) -> Job:
    try:
        return read_row(row)
    except BadRow as error:
        new = mended(row, str(error))
        return read_row([new[name] for name in COLUMNS])


def _refusal(path: Path, error: BaseException) -> str:
    # SQLITE_ERROR: the tables are not those that a job store has.
    if is_damage(error) or getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_ERROR:
        return damage(str(path), error)
    return f"{str(path)!r} cannot be used as a job store ({error})"


class Lease:
    """The proof that this process lives; whatever runs under its name was left behind if the lock is free.

    Unlike a time stamp it needs no clock and no waiting: `kill -9` releases it at once.

    Attributes:
        name: unique among all processes that ever used the folder.
    """

    def __init__(self, folder: Path) -> None:
        """Make and lock a file in `folder`."""
        self.name = secrets.token_hex(8)
        self._path = folder / f"{self.name}.lock"
        self._lock = FileLock(self._path, thread_local=False, fallback_to_soft=False)
        self._lock.acquire()

    def release(self) -> None:
        """Say that this process runs nothing any more."""
        self._path.unlink(missing_ok=True)
        self._lock.release()


def is_held(folder: Path, name: str) -> bool:
    """Whether the process that took the lease `name` lives."""
    path = folder / f"{name}.lock"
    if not path.exists():
        return False
    try:
        with FileLock(path, blocking=False, fallback_to_soft=False):
            path.unlink(missing_ok=True)
    except Timeout:
        return True
    return False


# Less than this is a full disk: results are larger.
_ROOM = 1 << 20
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_HELP = (
    "stop the service, and restore a backup of it or move it away (with -wal and -shm); the service then finds "
    "finished videos in results/"
)


def is_damage(error: BaseException | None) -> bool:
    """Whether an error of SQLite means that the file is damaged, and not that it cannot be used just now."""
    # sqlite3 raises UnicodeDecodeError where SQLite's own message quotes the damaged text.
    return isinstance(error, UnicodeDecodeError) or getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE


def damage(name: str, reason: object) -> str:
    """The sentence about a damaged store, with what would do.

    Args:
        name: what to call it; clients are not told its folder.
        reason: what SQLite says.
    """
    short = textwrap.shorten(str(reason), 100, placeholder=" ...")  # SQLite may quote half a schema
    return f"the job store {name!r} is damaged ({short}); {_HELP}"


_RESTART = "restart it: finished videos are then found again in results/"


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file a path names; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


class Condition:
    """Of one data directory, as one process sees it.

    Attributes:
        trouble: why nothing can be written, in one sentence; None while all is well.
        damaged: whether the store is damaged: it stays so until the service is restarted.
    """

    def __init__(self, store: Path) -> None:
        """Of the folder that holds a job store."""
        self._store, self._folder, self._lock = store, store.parent, threading.Lock()
        self._since = 0.0
        self.trouble: str | None = None
        self.damaged = False
        self._file: tuple[int, int] | None = None

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Turn an error of SQLite into StoreUnavailable, and keep it as the trouble."""
        try:
            yield
        except sqlite3.ProgrammingError as error:  # it was closed
            raise StoreUnavailable(f"the job store cannot be used now ({error})") from error
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise StoreUnavailable(self.failed(error)) from error

    def opened(self) -> None:
        """Take note of which file was opened: what is written to a removed one is lost with its last process."""
        self._file = _identity(self._store)

    def _look(self) -> None:
        """See whether the file is still the one that was opened."""
        if self.damaged or self._file is None or _identity(self._store) == self._file:
            return
        sentence = f"the job store {self._store.name!r} was removed or replaced while the service ran; {_RESTART}"
        with self._lock:
            self._since, self.trouble, self.damaged = time.monotonic(), sentence, True
        say("store unavailable", logging.ERROR, reason=sentence)

    def check(self) -> None:
        """Raise StoreUnavailable while there is trouble: what cannot be kept must not be begun."""
        self._look()
        if self.trouble is not None:
            raise StoreUnavailable(self.trouble)

    def failed(self, error: Exception | str) -> str:
        """Take note that something could not be read or written; returns the sentence about it."""
        damaged = isinstance(error, Exception) and is_damage(error)
        reason = getattr(error, "strerror", None) or error
        if damaged:
            sentence = damage(self._store.name, reason)
        else:
            sentence = f"the job store cannot be used now ({reason}); jobs wait until it can be written"
        with self._lock:
            begins = self.trouble is None or (damaged and not self.damaged)
            if begins:
                self._since, self.trouble, self.damaged = time.monotonic(), sentence, damaged
        if begins:
            say("store unavailable", logging.ERROR, reason=sentence)
        return sentence

    def probe(self, write: Callable[[], None]) -> None:
        """See whether the disk has room, and after trouble whether all can be written again.

        Args:
            write: writes to the store; raises StoreUnavailable.
        """
        self._look()
        if self.damaged:
            return
        if self.trouble is None:
            if shutil.disk_usage(self._folder).free < _ROOM:
                self.failed(os.strerror(errno.ENOSPC))
            return
        try:
            self._fill()
            write()
        except (OSError, StoreUnavailable):
            return
        with self._lock:
            self.trouble = None
        say("store available again", seconds=round(time.monotonic() - self._since, 3))

    def _fill(self) -> None:
        """Write as much as a small result."""
        path = self._folder / f".room-{os.getpid()}"
        try:
            with open(path, "wb") as file:
                file.write(bytes(_ROOM))
                file.flush()
                os.fsync(file.fileno())
        finally:
            path.unlink(missing_ok=True)
