"""Files that travel: of a job whose rank 0 is on another machine, copied to the driver's; and of a service's result."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from ...engine.media.files import checkpoint_steps, write_durably
from .messages import Progress

FILES: Mapping[str, tuple[str, str]] = {
    "video": ("video.mp4", "video/mp4"),
    "heatmap": ("heatmap.mp4", "video/mp4"),
    "thumbnail": ("thumbnail.webp", "image/webp"),
    "spritesheet": ("spritesheet.webp", "image/webp"),
    "report": ("report.json", "application/json"),
}
"""What can be downloaded of a finished video, by variant: file name and media type."""

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
            raise ValueError(f"not a file of a job: {name!r}")
        write_durably(folder / name, content)
    states = [name for name in files if name != _PROGRESS]
    if not states:
        return list(before)
    finished = any(name.startswith("result") for name in states)  # its checkpoints are gone
    kept = {*states, *(() if finished else before)}
    for path in sorted(folder.iterdir(), key=lambda path: path.suffix != ".json"):
        if _STATE.fullmatch(path.name) and path.name not in kept:
            path.unlink(missing_ok=True)
    return states


class Copier:
    """A folder of rank 0's own for a job whose folder it cannot reach; what is saved there is sent to the driver."""

    def __init__(self, files: Mapping[str, bytes], report: Callable[[Progress], None]) -> None:
        """Begin with the job's files."""
        self._kept = tempfile.TemporaryDirectory(prefix="heterostep-job-", ignore_cleanup_errors=True)
        self.folder = Path(self._kept.name)
        self._report, self._known = report, set(files)
        self._newest: int | None = None
        try:
            write_copies(self.folder, files, ())
        except BaseException:
            self._kept.cleanup()
            raise

    def copy(self) -> None:
        """Send what is new since the last time, if a step was saved."""
        newest = next(iter(checkpoint_steps(self.folder)), None)
        if newest != self._newest:
            self._newest = newest
            self._send()

    def close(self) -> None:
        """Send the rest, and remove the folder."""
        try:
            self._send()
        finally:
            self._kept.cleanup()

    def _send(self) -> None:
        copies = read_copies(self.folder, self._known)
        self._known |= copies.keys()
        self._report(Progress(event=None, copies=copies))
