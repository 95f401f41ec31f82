"""Which processes of the service live: each holds a lock on a file of its own, which the kernel drops when it dies."""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path


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
        while True:
            self._file = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX)
            # Between the two, another process may have taken the file for one that was left behind.
            if self._path.exists() and os.path.samestat(os.fstat(self._file), self._path.stat()):
                return
            os.close(self._file)

    def release(self) -> None:
        """Say that this process runs nothing any more."""
        self._path.unlink(missing_ok=True)
        os.close(self._file)


def is_held(folder: Path, name: str) -> bool:
    """Whether the process that took the lease `name` lives."""
    path = folder / f"{name}.lock"
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    path.unlink(missing_ok=True)
    return False
