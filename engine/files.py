"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError


def check_writable(path: str | os.PathLike[str], suffix: str) -> Path:
    """Check, before any work is done, that a file can be written.

    Args:
        path: the file to be written; it may exist already and is then replaced.
        suffix: how its name must end, e.g. `".mp4"`.

    Returns:
        The path.

    Raises:
        ConfigError: the ending is another, the folder does not exist or cannot be written, or the path is a
            folder.
    """
    target = Path(path)
    if target.suffix.lower() != suffix:
        raise ConfigError(f"output {str(path)!r} must end in {suffix}")
    folder = target.parent
    try:
        if target.is_dir():
            raise ConfigError(f"output {str(path)!r} is a folder; name a file in it")
        if not folder.is_dir():
            raise ConfigError(f"output {str(path)!r}: the folder {str(folder)!r} does not exist; create it first")
        # Tried, not asked: permissions say nothing of read-only disks, nor of what root may do.
        temporary = _beside(target)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise ConfigError(f"output {str(path)!r} cannot be written ({error.strerror})") from error
    return target


def _beside(target: Path) -> Path:
    # The ending stays last: libraries choose the file format by it. Names have a greatest length.
    return target.with_name(f".{target.stem[:40]}.{os.getpid()}{target.suffix}")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`: renamed to `path` on success, removed on an exception.

    A reader never sees half a file, and an older file survives a failed run.
    """
    target = Path(path)
    temporary = _beside(target)
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_durably(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file in one rename that a power failure does not undo.

    Raises:
        OSError: such as a full disk; an older file of that name is then still there.
    """
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(Path(path).parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system that has nothing to bring to disk
                raise
        finally:
            os.close(folder)


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write strict JSON (no NaN), indented, in one rename."""
    text = json.dumps(content, indent=1, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def checkpoint_name(step: int) -> str:
    """Name of the checkpoint after `step` steps."""
    return f"checkpoint-{step:06d}"


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder by their names, newest first; whether they are whole is not known yet."""
    found = (re.fullmatch(r"checkpoint-(\d{6,})\.json", path.name) for path in folder.iterdir())
    return sorted((int(match[1]) for match in found if match), reverse=True)
