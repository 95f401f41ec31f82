"""Files that travel: of a job whose rank 0 is on another machine, copied to the driver's; and of a service's result."""

from __future__ import annotations

import io
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...engine.engine import Engine
from ...engine.media.files import checkpoint_steps, write_durably, write_json
from ...engine.media.heatmap import overlay_frames, scale_for
from ...engine.media.video import write_mp4
from ...engine.record import run_record
from ...engine.request import VideoOutput
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
        self.folder = Path(tempfile.mkdtemp(prefix="heterostep-job-"))
        self._report, self._known = report, set(files)
        self._newest: int | None = None
        write_copies(self.folder, files, ())

    def copy(self) -> None:
        """Send what is new since the last time, if a step was saved."""
        newest = next(iter(checkpoint_steps(self.folder)), None)
        if newest != self._newest:
            self._newest = newest
            self._send()

    def close(self) -> None:
        """Send the rest, and remove the folder."""
        self._send()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _send(self) -> None:
        copies = read_copies(self.folder, self._known)
        self._known |= copies.keys()
        self._report(Progress(event=None, copies=copies))


_THUMBNAIL_SIDE = 512
_SPRITE_SIDE = 192
_SPRITE_COLUMNS = 4
_SPRITE_COUNT = 16


def write_files(folder: Path, engine: Engine, output: VideoOutput) -> dict[str, Any]:
    """Write every file of `files.FILES`.

    Args:
        folder: exists and is empty.
        engine: that made the video.
        output: the video.

    Returns:
        The response's block `hsa`.

    Raises:
        OSError: the disk is full or failing.
    """
    frames, report = output.frames, output.report
    assert report.evaluations is not None, "a finished run has evaluations"
    evaluations = report.evaluations.cpu().numpy()
    paths = {variant: folder / name for variant, (name, _) in FILES.items()}
    write_mp4(paths["video"], frames, output.fps, audio=output.audio)
    # Tokens of small videos would be smeared by 4:2:0 chroma.
    write_mp4(paths["heatmap"], overlay_frames(frames, evaluations), output.fps, scale=scale_for(*frames.shape[1:3]))
    paths["thumbnail"].write_bytes(webp(frames[len(frames) // 2], _THUMBNAIL_SIDE, quality=85))
    paths["spritesheet"].write_bytes(webp(_spritesheet(frames), _SPRITE_SIDE * _SPRITE_COLUMNS, quality=80))
    write_json(paths["report"], run_record(engine, output))
    return _summary(output)


def _summary(output: VideoOutput) -> dict[str, Any]:
    """The response's block `hsa`."""
    hsa, report = output.hsa, output.report
    assert report.evaluations is not None, "a finished run has evaluations"
    evaluations = report.evaluations
    return {
        "compute": output.request.compute,
        "achieved": report.compute,
        "policy": hsa.policy if hsa is not None else "dense",
        "evaluations": {
            "grid": list(evaluations.shape),
            "min": int(evaluations.min()),
            "max": int(evaluations.max()),
            "mean": float(evaluations.float().mean()),
        },
        "steps": [round(step.active / step.total, 4) for step in report.steps],
    }


def webp(pixels: NDArray[np.uint8], side: int, quality: int) -> bytes:
    """Encode uint8 [H, W, 3] as WebP, made smaller if a side is longer than `side`."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((side, side))
    stream = io.BytesIO()
    # Method 0: a fifth of the time, some more bytes.
    picture.save(stream, "WEBP", quality=quality, method=0)
    return stream.getvalue()


def _spritesheet(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Up to 16 evenly spaced frames in rows of four."""
    chosen = frames[np.unique(np.linspace(0, len(frames) - 1, _SPRITE_COUNT).round().astype(int))]
    rows = -(-len(chosen) // _SPRITE_COLUMNS)
    padded = np.zeros((rows * _SPRITE_COLUMNS, *chosen.shape[1:]), np.uint8)
    padded[: len(chosen)] = chosen
    height, width = chosen.shape[1:3]
    sheet = padded.reshape(rows, _SPRITE_COLUMNS, height, width, 3).swapaxes(1, 2)
    return np.ascontiguousarray(sheet.reshape(rows * height, _SPRITE_COLUMNS * width, 3))
