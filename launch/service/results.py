"""The files of a finished job, and how they become one whole that a kill cannot tear."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...engine.files import checkpoint_steps

MANIFEST = "manifest.json"

FILES: Mapping[str, tuple[str, str]] = {
    "video": ("video.mp4", "video/mp4"),
    "heatmap": ("heatmap.mp4", "video/mp4"),
    "thumbnail": ("thumbnail.webp", "image/webp"),
    "spritesheet": ("spritesheet.webp", "image/webp"),
    "report": ("report.json", "application/json"),
}
"""What can be downloaded, by variant: file name and media type."""


def complete(folder: Path, target: Path, manifest: Mapping[str, Any]) -> None:
    """Make a folder of files the result of its job.

    The manifest is written last, everything is flushed to the disk, and one rename makes it visible: wherever a
    machine dies, `target` either is not there or is whole.

    Raises:
        OSError: the disk is full or failing.
    """
    (folder / MANIFEST).write_text(json.dumps(manifest, allow_nan=False), encoding="utf-8")
    for path in [*folder.iterdir(), folder]:
        _flush(path)
    shutil.rmtree(target, ignore_errors=True)  # of an attempt whose end could not be recorded
    folder.rename(target)
    _flush(target.parent)


def is_complete(target: Path) -> bool:
    """Whether `complete` made this folder."""
    return (target / MANIFEST).is_file()


def read_manifest(target: Path) -> dict[str, Any]:
    """What `complete` was told."""
    content: dict[str, Any] = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
    return content


def folder_bytes(folder: Path) -> int:
    """Size of the files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def saved_step(state: Path) -> int:
    """How many steps of an unfinished job need not be done again, by the names in its folder of states."""
    return next(iter(checkpoint_steps(state)), 0) if state.is_dir() else 0


def _flush(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
