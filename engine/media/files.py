"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ...errors import ConfigError

T = TypeVar("T")

# Bytes that show whether a disk has room at all.
_PROBE = 1 << 14


def check_writable(path: str | os.PathLike[str], suffix: str) -> Path:
    """Check, before any work is done, that a file can be written.

    Args:
        path: the file to be written; it may exist already and is then replaced.
        suffix: how its name must end, e.g. `".mp4"`.

    Returns:
        The path.

    Raises:
        ConfigError: the ending is another, the folder does not exist, is read-only or full, or the path is too long, a
            folder, or something else that is not a file.
    """
    text, target = os.fspath(path), Path(path)
    if text.endswith(os.sep) or os.path.isdir(text):
        raise ConfigError(f"output {text!r} is a folder; name a file in it, such as {os.path.join(text, 'x')}{suffix}")
    if target.suffix.lower() != suffix:
        raise ConfigError(f"output {text!r} must end in {suffix}, such as {target.stem or 'x'}{suffix}")
    try:
        if not target.parent.is_dir():
            raise ConfigError(f"output {text!r}: the folder {str(target.parent)!r} does not exist; create it first")
        if target.exists() and not target.is_file():
            raise ConfigError(f"output {text!r} is not a file, so it cannot be replaced; name another")
        # Tried, not asked: permissions say nothing of read-only or full disks, nor of what root may do. The name too.
        with contextlib.suppress(FileNotFoundError):
            os.lstat(target)
        with unfinished(target) as temporary:
            temporary.write_bytes(b"\0" * _PROBE)
    except (OSError, ValueError) as error:  # a ValueError for a null character
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"output {text!r} cannot be written ({_reason(error)}); name another place") from error
    return target


@contextlib.contextmanager
def unfinished(target: Path) -> Iterator[Path]:
    """Yield a path in the same folder that no other process uses, and remove what is left there.

    It is absolute: FFmpeg takes a colon in a relative one for a protocol. The ending stays last: libraries choose the
    file format by it. Names have a greatest length. Process ids are not enough: machines and containers share folders.
    """
    folder = Path(os.path.abspath(target.parent))
    temporary = folder / f".{target.stem[:40]}.{secrets.token_hex(6)}{target.suffix}"
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`: renamed to `path` on success, removed on an exception.

    A reader never sees half a file, and an older file survives a failed run.

    Args:
        path: the file.
        overwrite: whether an older file is replaced.

    Raises:
        FileExistsError: there is an older file, and it is not to be replaced.
    """
    target = Path(path)
    with unfinished(target) as temporary:
        yield temporary
        if not overwrite and os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        os.replace(temporary, target)


class Placed(NamedTuple):
    """Where a file was written, and why not where it was meant to be; None if it was."""

    path: Path
    reason: str | None


class Placing:
    """The outcome of finished work on its way into a file, elsewhere if it cannot be written where it was meant to be.

    Attributes:
        placed: where it lies; None until it is written.
        reason: why it could not be written where it was meant to be; None while it was not tried, or if it could.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
        """Begin; nothing is written yet.

        Args:
            path: where it was meant to be; then come another name in the same folder, the current folder, and the
                system's folder for temporary files.
            overwrite: whether an older file at `path` is replaced.
        """
        self.placed: Placed | None = None
        self.reason: str | None = None
        self._target, self._overwrite = Path(path), overwrite
        name = f"heterostep-{secrets.token_hex(6)}{self._target.suffix}"
        folders = (self._target.parent, Path(), Path(tempfile.gettempdir()))
        self._places = [self._target, *(folder / name for folder in folders)]

    @property
    def open(self) -> bool:
        """Whether it is not written, and there is a place where it could be."""
        return self.placed is None and bool(self._places)

    def attempt(self, write: Callable[[Path], object]) -> None:
        """Write it in the next place; should that fail, the place after it is next.

        Args:
            write: writes the file of a path that it is given.
        """
        place = self._places[0]
        try:
            with replacing(place, overwrite=self._overwrite) as temporary:
                write(temporary)
        except Exception as error:  # what encoders raise has many types, and no kind of error may cost the work
            self.reason = self.reason or _reason(error)
            del self._places[0]
        else:
            self.placed = Placed(place, self.reason)

    def outcome(self) -> Placed:
        """Where it lies.

        Raises:
            OSError: no place would take it; the message says why the first did not.
        """
        if self.placed is None:
            raise OSError(f"{str(self._target)!r} could not be written anywhere ({self.reason})")
        return self.placed


def place(path: str | os.PathLike[str], write: Callable[[Path], object], *, overwrite: bool = True) -> Placed:
    """Write the outcome of finished work as `Placing` says; `write` may be called again after it failed.

    Raises:
        OSError: no place would take it; the message says why the first did not.
    """
    placing = Placing(path, overwrite=overwrite)
    while placing.open:
        placing.attempt(write)
    return placing.outcome()


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def write_durably(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file in one rename that a power failure does not undo.

    Raises:
        OSError: such as a full disk; an older file of that name is then still there.
    """
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    flush_to_disk(Path(path).parent)


def flush_to_disk(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk: a power failure does not undo it.

    Raises:
        OSError: such as a failing disk.
    """
    if os.name != "posix" and path.is_dir():  # there a folder cannot be opened
        return
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has nothing to bring to disk
            raise
    finally:
        os.close(file)


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write strict JSON (no NaN), indented, in one rename."""
    text = json.dumps(content, indent=1, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


RESULT_NAME = "result"
"""Name of the finished video that a job's folder holds, but for its frames."""
FRAMES_NAME = "frames"
"""Name of the frames of that video."""
LATENTS_NAME = "latents"
"""Name of the video that is denoised, but not decoded yet."""


def has_result(folder: Path) -> bool:
    """Whether a job's folder holds the finished video, by the names in it."""
    return (folder / f"{RESULT_NAME}.json").is_file()


def has_latents(folder: Path) -> bool:
    """Whether a job's folder holds a video that is denoised, but not decoded yet, by the names in it."""
    return (folder / f"{LATENTS_NAME}.json").is_file()


def checkpoint_name(step: int) -> str:
    """Name of the checkpoint after `step` steps."""
    return f"checkpoint-{step:06d}"


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder by their names, newest first; whether they are whole is not known yet."""
    found = (re.fullmatch(r"checkpoint-(\d{6,})\.json", path.name) for path in folder.iterdir())
    return sorted((int(match[1]) for match in found if match), reverse=True)


def no_room(error: OSError) -> bool:
    """Whether an error means that the disk is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def when_there_is_room(write: Callable[[], T], wait: Callable[[OSError], None]) -> T:
    """Write something that must not be lost: as long as the disk is full, wait and try again.

    Args:
        write: may be called again after it failed.
        wait: called with the error after each failure; returns when it is time for another try, or raises.
    """
    while True:
        try:
            return write()
        except OSError as error:
            if not no_room(error):
                raise
            wait(error)
