"""Which processes of the service live: each holds a lock on a file of its own, which the kernel drops when it dies."""

from __future__ import annotations

import secrets
from pathlib import Path

from filelock import FileLock, Timeout


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
