"""A job's folder whose rank 0 is on another machine: what the rank saves there is copied to the driver's."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from ...engine.media.files import write_durably

_STATE = re.compile(r"(?:checkpoint-\d+|result)(?:-[0-9a-f]+)?\.(?:json|safetensors)")
_PROGRESS = "progress.jsonl"


def read_copies(folder: Path, known: Collection[str] = ()) -> dict[str, bytes]:
    """Files of a job's folder by name, in the order in which they must be written: manifests after what they name.

    Args:
        folder: of the job.
        known: names of what the reader has already; they are left out, but for the progress, which grows.
    """
    names = [path.name for path in folder.iterdir() if _STATE.fullmatch(path.name)]
    names.sort(key=lambda name: (name.endswith(".json"), name))
    files: dict[str, bytes] = {}
    for name in [_PROGRESS, *names]:
        if name not in known or name == _PROGRESS:
            try:
                files[name] = (folder / name).read_bytes()
            except FileNotFoundError:  # the job removes what is old, and begins without progress
                continue
    return files


def write_copies(folder: Path, files: Mapping[str, bytes], before: Collection[str]) -> list[str]:
    """Write files that `read_copies` returned, and remove those that are older than these and the last ones.

    Args:
        folder: of the job; made if it is not there.
        files: to write, in their order.
        before: what the last call returned.

    Returns:
        The names that the next call keeps.

    Raises:
        OSError: the disk is full or failing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if not (_STATE.fullmatch(name) or name == _PROGRESS):
            raise ValueError(f"no file of a job: {name!r}")
        write_durably(folder / name, content)
    states = [name for name in files if name != _PROGRESS]
    if not states:
        return list(before)
    finished = any(name.startswith("result") for name in states)  # its checkpoints are no more
    kept = {*states, *(() if finished else before)}
    for path in sorted(folder.iterdir(), key=lambda path: path.suffix != ".json"):
        if _STATE.fullmatch(path.name) and path.name not in kept:
            path.unlink(missing_ok=True)
    return states
