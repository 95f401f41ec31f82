"""Video files: H.264 mp4 with or without sound, and the heat map that shows where the work went."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..errors import RequestError
from .audio import Audio
from .files import replacing

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

_COLOUR_MAP = "viridis"
_BACKGROUND = (18, 18, 22)
_TEXT = (235, 235, 235)
_MIN_PANEL = 320


def write_mp4(
    path: str | os.PathLike[str], frames: NDArray[np.uint8], fps: int, *, scale: int = 1, audio: Audio | None = None
) -> None:
    """Write frames as H.264 (yuv420p, BT.709) and sound as AAC, readable by browsers and phones.

    The file appears whole or not at all. Odd sizes are padded by one repeated row or column, since 4:2:0
    chroma needs even ones.

    Args:
        path: ends in .mp4; its folder exists.
        frames: uint8 [F, H, W, 3], RGB.
        fps: frames per second, at least 1.
        scale: whole factor by which every pixel is enlarged, so that tiny videos can be seen.
        audio: the sound that goes with it; what is longer than the video is left out.

    Raises:
        RequestError: the frames are of another shape or type, or `fps` or `scale` is below 1.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise RequestError(f"frames must be uint8 [F, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    if fps < 1 or scale < 1:
        raise RequestError(f"fps and scale must be at least 1, got {fps} and {scale}")
    frames = _enlarge(frames, scale)
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    with (
        replacing(path) as temporary,
        av.open(str(temporary), "w", options={"movflags": "+faststart"}) as container,
    ):
        options = {"crf": _CRF, "preset": "medium", "bf": _B_FRAMES}
        stream: Any = container.add_stream("libx264", rate=Fraction(fps), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = _LIMITED_RANGE
        track = None if audio is None else _track(container, audio)
        for k, pixels in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709")
            container.mux(stream.encode(picture))
            if track is not None and audio is not None:  # beside its frame, so that nothing waits in memory
                _mux_audio(container, track, audio, k / fps, (k + 1) / fps)
        container.mux(stream.encode())
        if track is not None:
            container.mux(track.encode())


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


def _enlarge(frames: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    return frames.repeat(scale, axis=1).repeat(scale, axis=2) if scale > 1 else frames


def spread_tokens(values: NDArray[Any], num_frames: int, height: int, width: int) -> NDArray[Any]:
    """Give every pixel of a video its token's value.

    Args:
        values: [F, Y, X], one for each token.
        num_frames: frames of the video. The VAE is causal: the first latent frame is one video frame, each
            later one a run of (num_frames - 1) / (F - 1).
        height: pixels, a multiple of Y.
        width: pixels, a multiple of X.

    Returns:
        [num_frames, height, width], the type of `values`.
    """
    num_latent, rows, columns = values.shape
    if num_latent == num_frames:
        index = np.arange(num_frames)
    else:
        run = (num_frames - 1) // max(num_latent - 1, 1)
        index = np.minimum(-(-np.arange(num_frames) // max(run, 1)), num_latent - 1)
    return values[index].repeat(height // rows, axis=1).repeat(width // columns, axis=2)


def count_range(evaluations: NDArray[np.integer[Any]]) -> tuple[int, int]:
    """Counts at the two ends of the heat map's colours."""
    low, high = int(evaluations.min()), int(evaluations.max())
    # A map of equal counts is all one colour; the scale then runs from nothing to that count.
    return (low if high > low else 0), high


def overlay_frames(frames: NDArray[np.uint8], evaluations: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
    """Draw a map of how often each token was evaluated over a grey copy of the video.

    Args:
        frames: uint8 [F, H, W, 3].
        evaluations: [f, y, x], how many of the steps each token went through the transformer.

    Returns:
        uint8 [F, H, W, 3].
    """
    floor, high = count_range(evaluations)
    heat = (spread_tokens(np.asarray(evaluations), *frames.shape[:3]) - floor) / max(high - floor, 1)
    colours = matplotlib.colormaps[_COLOUR_MAP](heat)[..., :3] * 255.0
    grey = frames.astype(np.float64) @ np.array([0.2126, 0.7152, 0.0722])
    overlay: NDArray[np.uint8] = (0.7 * colours + 0.3 * grey[..., None]).round().astype(np.uint8)
    return overlay


def heatmap_frames(
    frames: NDArray[np.uint8], evaluations: NDArray[np.integer[Any]], shares: Sequence[float]
) -> NDArray[np.uint8]:
    """Draw a video beside the same video under a map of how often each token was evaluated.

    Args:
        frames: uint8 [F, H, W, 3].
        evaluations: [f, y, x], how many of the steps each token went through the transformer.
        shares: share of the tokens that each of the T steps evaluated, 0 to 1.

    Returns:
        uint8 [F, H', W', 3]: title, original left and heat map right; below them the steps and a legend.
    """
    num_frames, height, width = frames.shape[:3]
    scale = scale_for(height, width)
    floor, high = count_range(evaluations)
    overlay = overlay_frames(frames, evaluations)

    left, right = _enlarge(frames, scale), _enlarge(overlay, scale)
    panel_height, panel_width = left.shape[1:3]
    frame_of = _canvas(panel_width, panel_height, floor, high, shares)
    margin, top = frame_of.margin, frame_of.top
    page = np.repeat(np.asarray(frame_of.image, dtype=np.uint8)[None], num_frames, axis=0)
    page[:, top : top + panel_height, margin : margin + panel_width] = left
    second = 2 * margin + panel_width
    page[:, top : top + panel_height, second : second + panel_width] = right
    return page


class _Canvas:
    """What does not change: titles and legend. `top` and `margin` say where the panels go."""

    def __init__(self, panel_width: int, panel_height: int, unit: int) -> None:
        self.margin, self.top = unit, 2 * unit
        size = (3 * unit + 2 * panel_width, self.top + panel_height + 4 * unit)
        # Even in both directions, as the video needs it.
        self.image = Image.new("RGB", (size[0] + size[0] % 2, size[1] + size[1] % 2), _BACKGROUND)
        self.draw = ImageDraw.Draw(self.image)
        font = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
        self.font = ImageFont.truetype(str(font), round(0.72 * unit))

    def text(self, x: float, y: float, text: str, anchor: str) -> None:
        self.draw.text((x, y), text, fill=_TEXT, font=self.font, anchor=anchor)


def _canvas(panel_width: int, panel_height: int, low: int, high: int, shares: Sequence[float]) -> _Canvas:
    unit = max(20, min(panel_width, panel_height) // 16)
    canvas = _Canvas(panel_width, panel_height, unit)
    second = 2 * unit + panel_width
    canvas.text(unit, unit, "video", "lm")
    canvas.text(second, unit, f"where the work went: {np.mean(shares):.0%} of dense", "lm")

    y = canvas.top + panel_height + unit
    below = y + unit // 2 + round(0.8 * unit)
    edges = np.linspace(unit, unit + panel_width, len(shares) + 1)
    for left, right, share in zip(edges, edges[1:], shares, strict=False):
        # Steps without work stay visible as dark cells: the strip is the whole schedule.
        tone = round(45 + 190 * share)
        canvas.draw.rectangle((left, y, max(right - 2, left), y + unit // 2 - 1), fill=(tone, tone, tone))
    canvas.text(unit, below, "first", "lm")
    canvas.text(unit + panel_width, below, "last", "rm")
    canvas.text(unit + panel_width / 2, below, "steps, by share computed", "mm")

    bar = np.linspace(0.0, 1.0, panel_width)[None, :].repeat(unit // 2, axis=0)
    pixels = (matplotlib.colormaps[_COLOUR_MAP](bar)[..., :3] * 255.0).round().astype(np.uint8)
    canvas.image.paste(Image.fromarray(pixels), (second, y))
    canvas.text(second, below, str(low), "lm")
    canvas.text(second + panel_width, below, str(high), "rm")
    canvas.text(second + panel_width / 2, below, f"evaluations of {len(shares)}", "mm")
    return canvas


def scale_for(height: int, width: int, least: int = _MIN_PANEL) -> int:
    """The smallest whole factor that makes a video's longer side at least `least` pixels."""
    return max(1, -(-least // max(height, width)))
