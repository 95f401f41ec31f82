"""A finished video becomes the files that clients download."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...engine.engine import Engine
from ...engine.media.files import write_json
from ...engine.media.heatmap import overlay_frames, scale_for
from ...engine.media.video import write_mp4
from ...engine.record import run_record
from ...engine.request import VideoOutput
from .files import FILES

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
