"""The heat map: a video under a map of how often each of its tokens was evaluated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .video import enlarge

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


def overlay_frames(frames: NDArray[np.uint8], evaluations: NDArray[np.integer[Any]]) -> Iterator[NDArray[np.uint8]]:
    """Draw a map of how often each token was evaluated over a grey copy of the video.

    Args:
        frames: uint8 [F, H, W, 3].
        evaluations: [f, y, x], how many of the steps each token went through the transformer.

    Returns:
        An iterator over F frames, uint8 [H, W, 3].
    """
    floor, high = count_range(evaluations)
    counts, height, width = np.asarray(evaluations), *frames.shape[1:3]
    colours = _colours((counts - floor) / max(high - floor, 1))
    blended, latents = _blended(), latent_frames(len(counts), len(frames))
    for pixels, latent, before in zip(frames, latents, (-1, *latents[:-1]), strict=True):
        if latent != before:  # the map stays as it is for a whole latent frame
            drawn = _spread(colours[latent][None], height, width)[0] << 8
        yield blended[drawn + _grey(pixels)]


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
    frames: NDArray[np.uint8], evaluations: NDArray[np.integer[Any]], shares: Sequence[float]
) -> Iterator[NDArray[np.uint8]]:
    """Draw a video beside the same video under a map of how often each token was evaluated.

    Args:
        frames: uint8 [F, H, W, 3].
        evaluations: [f, y, x], how many of the steps each token went through the transformer.
        shares: share of the tokens that each of the T steps evaluated, 0 to 1.

    Returns:
        An iterator over F frames, uint8 [H', W', 3]: title, original left and heat map right; below them the steps
        and a legend.
    """
    height, width = frames.shape[1:3]
    scale = scale_for(height, width)
    panel_height, panel_width = height * scale, width * scale
    canvas = _canvas(panel_width, panel_height, *count_range(evaluations), shares)
    empty, rows = np.asarray(canvas.image), slice(canvas.top, canvas.top + panel_height)
    first, second = canvas.margin, 2 * canvas.margin + panel_width
    for pixels, overlay in zip(frames, overlay_frames(frames, evaluations), strict=True):
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
