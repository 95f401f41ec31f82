"""A finished video becomes the files that clients download."""

from __future__ import annotations

import functools
import io
import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ...engine.denoise.work_split import peak_bytes
from ...engine.engine import Engine
from ...engine.media.feeding import Frames, Reader
from ...engine.media.files import no_room, when_there_is_room, write_json
from ...engine.media.video import heatmap_frames, overlay_frames, scale_for, write_mp4
from ...engine.record import run_record
from ...engine.request import FrameSink, VideoResult
from .messages import FILES

Writers = Mapping[str, Callable[[Path, Frames], object]]
"""What writes each file from the frames, by its name."""

_THUMBNAIL_SIDE = 512
_SPRITE_SIDE = 192
_SPRITE_COLUMNS = 4
_SPRITE_COUNT = 16


class Rendering(FrameSink):
    """Files that show the frames, in a temporary folder of its own; a context manager.

    Attributes:
        folder: of the files; None until the first is written.
    """

    def __init__(self, writers: Callable[[VideoResult], Writers], wait: Callable[[OSError], None]) -> None:
        """Prepare; nothing is written yet.

        Args:
            writers: what writes each file of a video, by its name.
            wait: called while the disk is full; returns when it is time for another try, or raises.
        """
        self._make_writers, self._wait = writers, wait
        self._kept: tempfile.TemporaryDirectory[str] | None = None
        self._written: set[str] = set()
        self._full: OSError | None = None

    def __enter__(self) -> Rendering:
        """Nothing more is done."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the files."""
        if self._kept is not None:
            self._kept.cleanup()

    def pending(self, video: VideoResult) -> Sequence[Reader]:
        """What writes the files that are not there; after a pause if the disk was full."""
        if self._full is not None:
            self._wait(self._full)
            self._full = None
        writers = self._make_writers(video)
        if writers:  # before the threads, each of which would make one
            when_there_is_room(self._folder, self._wait)
        return [functools.partial(self._write, name, writers[name]) for name in writers if name not in self._written]

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        """Write another file; waits while the disk is full."""
        when_there_is_room(lambda: write(self._folder() / name), self._wait)

    def read(self) -> dict[str, bytes]:
        """The files by name."""
        return {path.name: path.read_bytes() for path in self._folder().iterdir()}

    def _folder(self) -> Path:
        if self._kept is None:
            self._kept = tempfile.TemporaryDirectory(prefix="heterostep-result-")
        return Path(self._kept.name)

    def _write(self, name: str, write: Callable[[Path, Frames], object], frames: Frames) -> None:
        try:
            write(self._folder() / name, frames)
            self._written.add(name)
        except OSError as error:
            if not no_room(error):
                raise
            self._full = error


def frame_writers(video: VideoResult, scale: int) -> Writers:
    """What writes each file of `generate` that shows the frames, by the name of its flag."""

    def heatmap(path: Path, frames: Frames) -> None:
        report = video.report
        assert report.evaluations is not None, "a finished run has evaluations"
        shares = [step.active / step.total for step in report.steps]
        pages = heatmap_frames(frames, report.evaluations.cpu().numpy(), shares, video.shape)
        write_mp4(path, pages, video.fps)

    return {
        "output": lambda path, frames: write_mp4(path, frames, video.fps, scale=scale, audio=video.audio),
        "heatmap": heatmap,
    }


def service_writers(video: VideoResult, learn: Callable[[Frames], object] | None) -> Writers:
    """What writes each file of a service's result that shows the frames.

    Args:
        video: whose files they are.
        learn: learns from the frames too.
    """
    report, shape = video.report, video.shape
    assert report.evaluations is not None, "a finished run has evaluations"
    evaluations = report.evaluations.cpu().numpy()

    def heatmap(path: Path, frames: Frames) -> None:
        # Tokens of small videos would be smeared by 4:2:0 chroma.
        overlay = overlay_frames(frames, evaluations, shape)
        write_mp4(path, overlay, video.fps, scale=scale_for(*shape[1:3]))

    def thumbnail(path: Path, frames: Frames) -> None:
        middle = next(itertools.islice(frames, shape[0] // 2, None))
        path.write_bytes(webp(middle, _THUMBNAIL_SIDE, quality=85))

    def spritesheet(path: Path, frames: Frames) -> None:
        path.write_bytes(webp(_spritesheet(frames, shape[0]), _SPRITE_SIDE * _SPRITE_COLUMNS, quality=80))

    writers = {
        "video": lambda path, frames: write_mp4(path, frames, video.fps, audio=video.audio),
        "heatmap": heatmap,
        "thumbnail": thumbnail,
        "spritesheet": spritesheet,
    }
    named: dict[str, Callable[[Path, Frames], object]] = {FILES[name][0]: write for name, write in writers.items()}
    return named if learn is None else {**named, "preview": lambda _, frames: learn(frames)}  # it writes nothing


def write_report(path: Path, engine: Engine, video: VideoResult) -> None:
    """Write a service's report of a video."""
    write_json(path, run_record(engine, video))


def summary(output: VideoResult, device: torch.device) -> dict[str, Any]:
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
        "peak_bytes": max(rank.peak_bytes for rank in report.ranks) if report.ranks else peak_bytes(device),
    }


def webp(pixels: NDArray[np.uint8], side: int, quality: int) -> bytes:
    """Encode uint8 [H, W, 3] as WebP, made smaller if a side is longer than `side`."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((side, side))
    stream = io.BytesIO()
    # Method 0: a fifth of the time, some more bytes.
    picture.save(stream, "WEBP", quality=quality, method=0)
    return stream.getvalue()


def _spritesheet(frames: Frames, count: int) -> NDArray[np.uint8]:
    """Up to 16 evenly spaced ones of `count` frames in rows of four."""
    places = set(np.linspace(0, count - 1, _SPRITE_COUNT).round().astype(int).tolist())
    chosen = np.stack([frame for place, frame in enumerate(frames) if place in places])
    rows = -(-len(chosen) // _SPRITE_COLUMNS)
    padded = np.zeros((rows * _SPRITE_COLUMNS, *chosen.shape[1:]), np.uint8)
    padded[: len(chosen)] = chosen
    height, width = chosen.shape[1:3]
    sheet = padded.reshape(rows, _SPRITE_COLUMNS, height, width, 3).swapaxes(1, 2)
    return np.ascontiguousarray(sheet.reshape(rows * height, _SPRITE_COLUMNS * width, 3))
