"""Video files: H.264 mp4 with or without sound."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from numpy.typing import NDArray

from ...errors import ConfigError, RequestError
from ..facts import first_line
from .audio import Audio
from .files import check_writable, replacing, unfinished
from .image import MAX_SIDE

if TYPE_CHECKING:
    from numpy.typing import NDArray


# Visually lossless for libx264, at a size that still goes into a message.
_CRF = "16"
# x264's macroblock tree, which saves a third of the bytes, reads memory that nobody wrote where frames refer to later
# ones: without such frames (B), at a few percent of the bytes, the same video is the same file.
_B_FRAMES = "0"
# Transparent for AAC in stereo.
_AUDIO_BITS = "192k"
# The ITU-R BT.709 codes of H.264's colour description; players assume BT.601 or BT.709 at will where it is
# missing.
_BT709 = 1
_LIMITED_RANGE = 1
# x264 writes other bytes with another number of threads. A number of our own makes the file the same on every machine.
_THREADS = 4


def write_mp4(
    path: str | os.PathLike[str],
    frames: NDArray[np.uint8] | Iterable[NDArray[np.uint8]],
    fps: int,
    *,
    scale: int = 1,
    audio: Audio | None = None,
) -> None:
    """Write frames as H.264 (yuv420p, BT.709) and sound as AAC, readable by browsers and phones.

    The file appears whole or not at all. Odd sizes are padded by one repeated row or column, since 4:2:0
    chroma needs even ones. One frame at a time is enlarged and encoded: the video is never in memory a second time.

    Args:
        path: ends in .mp4; its folder exists.
        frames: uint8 [F, H, W, 3], RGB; or anything that gives frames [H, W, 3] one after the other.
        fps: frames per second, at least 1.
        scale: whole factor by which every pixel is enlarged, so that tiny videos can be seen.
        audio: the sound that goes with it; what is longer than the video is left out.

    Raises:
        RequestError: the frames are of another shape or type, or `fps` or `scale` is below 1.
    """
    if fps < 1 or scale < 1:
        raise RequestError(f"fps and scale must be at least 1, got {fps} and {scale}")
    pictures = _pictures(frames, scale)
    first = next(pictures, None)
    if first is None:
        raise RequestError("frames must be uint8 [F, H, W, 3], got none")
    with replacing(path) as temporary, _opened(temporary, first.shape[0], first.shape[1], fps) as (container, stream):
        track = None if audio is None else _track(container, audio)
        for k, pixels in enumerate(chain([first], pictures)):
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709")
            container.mux(stream.encode(picture))
            if track is not None and audio is not None:  # beside its frame, so that nothing waits in memory
                _mux_audio(container, track, audio, k / fps, (k + 1) / fps)
        container.mux(stream.encode())
        if track is not None:
            container.mux(track.encode())


@contextlib.contextmanager
def _opened(path: Path, height: int, width: int, fps: int) -> Iterator[tuple[Any, Any]]:
    """Open a file for a video of an even size: its container and its stream."""
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        options = {"crf": _CRF, "preset": "medium", "bf": _B_FRAMES}
        stream: Any = container.add_stream("libx264", rate=Fraction(fps), options=options)
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.thread_count = _THREADS
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = _LIMITED_RANGE
        yield container, stream


def check_mp4(path: str | os.PathLike[str], height: int, width: int, fps: int) -> None:
    """Check, before any work is done, that `write_mp4` can write a video: it is opened as there, and removed.

    Args:
        path: ends in .mp4.
        height: in pixels of the file.
        width: in pixels of the file.
        fps: frames per second.

    Raises:
        ConfigError: the file cannot be written, or the encoder does not take the size or the rate.
    """
    target = check_writable(path, ".mp4")
    if max(height, width) > MAX_SIDE:
        raise ConfigError(
            f"output {str(path)!r} would be {width}x{height}, larger than the {MAX_SIDE} pixels H.264 allows; "
            "take a smaller size or scale"
        )
    try:
        with (
            unfinished(target) as temporary,
            _opened(temporary, height + height % 2, width + width % 2, fps) as (container, _),
        ):
            container.start_encoding()
    except (OSError, av.FFmpegError) as error:
        raise ConfigError(
            f"output {str(path)!r}: no video of {width}x{height} at {fps} frames per second can be written "
            f"({first_line(error)})"
        ) from error


def _pictures(frames: Iterable[NDArray[np.uint8]], scale: int) -> Iterator[NDArray[np.uint8]]:
    """Frames [H, W, 3] enlarged and of even size, one at a time."""
    shape = None
    for pixels in frames:
        shape = pixels.shape if shape is None else shape
        if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8 or not pixels.size:
            raise RequestError(f"frames must be uint8 [F, H, W, 3], got one of {pixels.dtype} {list(pixels.shape)}")
        if pixels.shape != shape:
            raise RequestError(f"frames must be of one size, got {list(shape)} and {list(pixels.shape)}")
        pixels = enlarge(pixels, scale)
        odd = [(0, side % 2) for side in pixels.shape[:2]]
        yield np.ascontiguousarray(np.pad(pixels, (*odd, (0, 0)), mode="edge") if any(map(any, odd)) else pixels)


def _track(container: Any, audio: Audio) -> Any:
    """A track for sound."""
    track = container.add_stream("aac", rate=audio.sample_rate, options={"b": _AUDIO_BITS})
    track.codec_context.layout = "mono" if len(audio.samples) == 1 else "stereo"
    return track


def _mux_audio(container: Any, track: Any, audio: Audio, start: float, end: float) -> None:
    """Write the samples between two times, in seconds."""
    samples = audio.part(start, end)
    if not samples.size:
        return
    frame = av.AudioFrame.from_ndarray(
        np.ascontiguousarray(samples), format="fltp", layout="mono" if len(samples) == 1 else "stereo"
    )
    frame.sample_rate = audio.sample_rate
    frame.pts = round(start * audio.sample_rate)
    frame.time_base = Fraction(1, audio.sample_rate)
    container.mux(track.encode(frame))


def enlarge(frame: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """Repeat every pixel of [H, W, 3] in both directions."""
    return frame.repeat(scale, axis=0).repeat(scale, axis=1) if scale > 1 else frame
