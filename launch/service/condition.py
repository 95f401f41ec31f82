"""Whether the data directory can be written: what is in the way, told once when it begins and once when it ends."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import sqlite3
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ...errors import StoreUnavailable
from .logs import say

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
        name: what to call it: to strangers without its folder.
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
