"""Video files: H.264 mp4 with or without sound, and the heat map of how often each token was evaluated."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import chain, tee
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ...errors import ConfigError, RequestError
from ..facts import first_line
from .audio import Audio
from .files import check_writable, replacing, unfinished
from .image import MAX_SIDE

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


_BACKGROUND = (18, 18, 22)
_TEXT = (235, 235, 235)
_MIN_PANEL = 320
# What a pixel of the map shows: so much of its colour, the rest of the video's brightness.
_SHARE = 0.7
# ITU-R BT.709 luma of R, G and B, in 65536ths.
_LUMA = (13933, 46871, 4732)
# The colour map viridis (CC0), 256 x RGB: equal steps look equal, in grey too.
_VIRIDIS = np.frombuffer(bytes.fromhex(
    "44015444025645045745055946075a46085c460a5d460b5e470d60470e6147106347116447136548146748166848176948186a481a6c"
    "481b6d481c6e481d6f481f70482071482173482374482475482576482677482878482979472a7a472c7a472d7b472e7c472f7d46307e"
    "46327e46337f463480453581453781453882443983443a83443b84433d84433e85423f85424086424186414287414487404588404688"
    "3f47883f48893e49893e4a893e4c8a3d4d8a3d4e8a3c4f8a3c508b3b518b3b528b3a538b3a548c39558c39568c38588c38598c375a8c"
    "375b8d365c8d365d8d355e8d355f8d34608d34618d33628d33638d32648e32658e31668e31678e31688e30698e306a8e2f6b8e2f6c8e"
    "2e6d8e2e6e8e2e6f8e2d708e2d718e2c718e2c728e2c738e2b748e2b758e2a768e2a778e2a788e29798e297a8e297b8e287c8e287d8e"
    "277e8e277f8e27808e26818e26828e26828e25838e25848e25858e24868e24878e23888e23898e238a8d228b8d228c8d228d8d218e8d"
    "218f8d21908d21918c20928c20928c20938c1f948c1f958b1f968b1f978b1f988b1f998a1f9a8a1e9b8a1e9c891e9d891f9e891f9f88"
    "1fa0881fa1881fa1871fa28720a38620a48621a58521a68522a78522a88423a98324aa8325ab8225ac8226ad8127ad8128ae8029af7f"
    "2ab07f2cb17e2db27d2eb37c2fb47c31b57b32b67a34b67935b77937b87838b9773aba763bbb753dbc743fbc7340bd7242be7144bf70"
    "46c06f48c16e4ac16d4cc26c4ec36b50c46a52c56954c56856c66758c7655ac8645cc8635ec96260ca6063cb5f65cb5e67cc5c69cd5b"
    "6ccd5a6ece5870cf5773d05675d05477d1537ad1517cd2507fd34e81d34d84d44b86d54989d5488bd6468ed64590d74393d74195d840"
    "98d83e9bd93c9dd93ba0da39a2da37a5db36a8db34aadc32addc30b0dd2fb2dd2db5de2bb8de29bade28bddf26c0df25c2df23c5e021"
    "c8e020cae11fcde11dd0e11cd2e21bd5e21ad8e219dae319dde318dfe318e2e418e5e419e7e419eae51aece51befe51cf1e51df4e61e"
    "f6e620f8e621fbe723fde725"
), np.uint8).reshape(256, 3)  # fmt: skip


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
    return _spread(values[latent_frames(len(values), num_frames)], height, width)


def latent_frames(num_latent: int, num_frames: int) -> NDArray[np.integer[Any]]:
    """The latent frame of each video frame, [num_frames]; see `spread_tokens`."""
    if num_latent == num_frames:
        return np.arange(num_frames)
    run = max((num_frames - 1) // max(num_latent - 1, 1), 1)
    return np.minimum(-(-np.arange(num_frames) // run), num_latent - 1)


def _spread(values: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """[F, Y, X] -> [F, height, width]."""
    return values.repeat(height // values.shape[1], axis=1).repeat(width // values.shape[2], axis=2)


def count_range(evaluations: NDArray[np.integer[Any]]) -> tuple[int, int]:
    """Counts at the two ends of the heat map's colours."""
    low, high = int(evaluations.min()), int(evaluations.max())
    # A map of equal counts is all one colour; the scale then runs from nothing to that count.
    return (low if high > low else 0), high


def overlay_frames(
    frames: Iterable[NDArray[np.uint8]],
    evaluations: NDArray[np.integer[Any]],
    shape: tuple[int, ...] | None = None,
) -> Iterator[NDArray[np.uint8]]:
    """Draw a map of how often each token was evaluated over a grey copy of the video.

    Args:
        frames: uint8 [F, H, W, 3], or anything that gives frames [H, W, 3] one after the other.
        evaluations: [f, y, x], how many of the steps each token went through the transformer.
        shape: [F, H, W, 3]; None: that of the array `frames`.

    Returns:
        An iterator over F frames, uint8 [H, W, 3].
    """
    floor, high = count_range(evaluations)
    count, height, width = _shape(frames, shape)[:3]
    counts = np.asarray(evaluations)
    colours = _colours((counts - floor) / max(high - floor, 1))
    blended, latents = _blended(), latent_frames(len(counts), count)
    for pixels, latent, before in zip(frames, latents, (-1, *latents[:-1]), strict=True):
        if latent != before:  # the map stays as it is for a whole latent frame
            drawn = _spread(colours[latent][None], height, width)[0] << 8
        yield blended[drawn + _grey(pixels)]


def _shape(frames: Any, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    found: tuple[int, ...] = frames.shape if shape is None else shape
    return found


def _colours(heat: NDArray[np.floating[Any]]) -> NDArray[np.integer[Any]]:
    """Rows of the colour map for values from 0 to 1."""
    return (heat * len(_VIRIDIS)).astype(np.intp).clip(0, len(_VIRIDIS) - 1)


def _blended() -> NDArray[np.uint8]:
    """What the map shows of every colour (256) over every brightness of the video (256): uint8 [256 * 256, 3]."""
    colours = _SHARE * _VIRIDIS.astype(np.float32)[:, None]
    greys = (1.0 - _SHARE) * np.arange(256, dtype=np.float32)[None, :, None]
    return (colours + greys).round().astype(np.uint8).reshape(-1, 3)


def _grey(pixels: NDArray[np.uint8]) -> NDArray[np.integer[Any]]:
    """Luma of uint8 [H, W, 3], 0 to 255."""
    red, green, blue = (weight * pixels[..., k].astype(np.uint32) for k, weight in enumerate(_LUMA))
    return (red + green + blue + 32768) >> 16


def heatmap_frames(
    frames: Iterable[NDArray[np.uint8]],
    evaluations: NDArray[np.integer[Any]],
    shares: Sequence[float],
    shape: tuple[int, ...] | None = None,
) -> Iterator[NDArray[np.uint8]]:
    """Draw a video beside the same video under a map of how often each token was evaluated.

    Args:
        frames: as in `overlay_frames`.
        evaluations: [f, y, x], how many of the steps each token went through the transformer.
        shares: share of the tokens that each of the T steps evaluated, 0 to 1.
        shape: as in `overlay_frames`.

    Returns:
        An iterator over F frames, uint8 [H', W', 3]: title, original left and heat map right; below them the steps
        and a legend.
    """
    shape = _shape(frames, shape)
    height, width = shape[1:3]
    scale = scale_for(height, width)
    panel_height, panel_width = height * scale, width * scale
    canvas = _canvas(panel_width, panel_height, *count_range(evaluations), shares)
    empty, rows = np.asarray(canvas.image), slice(canvas.top, canvas.top + panel_height)
    first, second = canvas.margin, 2 * canvas.margin + panel_width
    # Each frame is needed twice, but can be taken once.
    originals, again = tee(frames)
    for pixels, overlay in zip(originals, overlay_frames(again, evaluations, shape), strict=True):
        page = empty.copy()
        page[rows, first : first + panel_width] = enlarge(pixels, scale)
        page[rows, second : second + panel_width] = enlarge(overlay, scale)
        yield page


def heatmap_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of the pages of `heatmap_frames` for a video of this size."""
    scale = scale_for(height, width)
    page = _canvas(width * scale, height * scale, 0, 1, [1.0]).image
    return page.height, page.width


class _Canvas:
    """What does not change: titles and legend. `top` and `margin` say where the panels go."""

    def __init__(self, panel_width: int, panel_height: int, unit: int) -> None:
        self.margin, self.top = unit, 2 * unit
        size = (3 * unit + 2 * panel_width, self.top + panel_height + 4 * unit)
        # Even in both directions, as the video needs it.
        self.image = Image.new("RGB", (size[0] + size[0] % 2, size[1] + size[1] % 2), _BACKGROUND)
        self.draw = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(round(0.72 * unit))

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

    # As the map shows these counts: over the video's white pixels in the upper row, over black ones in the lowest.
    greys = np.linspace(255, 0, unit // 2).round().astype(np.intp)
    pixels = _blended()[(_colours(np.linspace(0.0, 1.0, panel_width)) << 8) + greys[:, None]]
    canvas.image.paste(Image.fromarray(pixels), (second, y))
    canvas.text(second, below, str(low), "lm")
    canvas.text(second + panel_width, below, str(high), "rm")
    canvas.text(second + panel_width / 2, below, f"evaluations of {len(shares)}", "mm")
    return canvas


def scale_for(height: int, width: int, least: int = _MIN_PANEL) -> int:
    """The smallest whole factor that makes a video's longer side at least `least` pixels."""
    return max(1, -(-least // max(height, width)))
