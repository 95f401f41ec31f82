"""The image that a video starts from: checked, turned upright, and cut to the video's size."""

from __future__ import annotations

import hashlib
import io
import math
import os
import warnings
from pathlib import Path

from PIL import Image, ImageOps

from ...errors import RequestError

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_BYTES = 64 * 2**20
"""Greatest size of an image file."""
MAX_PIXELS = 50_000_000
"""Most pixels of an image; decoded it then takes 150 MB."""
MAX_SIDE = 16384
"""Greatest width and height of a video, in pixels, that libx264 encodes."""
MIN_SIDE = 16
"""Fewest pixels along a side: a video's smallest side."""

# Greyscale of more than 8 bits, which a conversion would cut off at white.
_DEEP = ("I", "F")

ImageSource = str | os.PathLike[str] | bytes | Image.Image


def read_image(source: ImageSource) -> Image.Image:
    """Check an image and decode it.

    Args:
        source: path of a PNG, JPEG or WebP file, the bytes of one, or a Pillow image.

    Returns:
        An RGB image, turned as its EXIF orientation says; transparency is dropped.

    Raises:
        RequestError: it is not there, no image, torn, animated, too small or too large.
    """
    if isinstance(source, Image.Image):
        return _upright(source, "the image")
    if isinstance(source, bytes):
        return _decoded(source, "the image")
    name = f"image {str(source)!r:.90}"
    try:
        path = Path(source).expanduser()
        there, is_file = path.exists(), path.is_file()
        content = b""
        if is_file:
            with open(path, "rb") as file:
                content = file.read(MAX_BYTES + 1)
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # a name that is too long; the home of an unknown user; a null byte
        said = getattr(error, "strerror", None) or type(error).__name__
        raise RequestError(f"{name} cannot be read ({said}); name a PNG, JPEG or WebP file") from error
    if not is_file:
        what = "is not a file" if there else "does not exist"
        raise RequestError(f"{name} {what}; name a PNG, JPEG or WebP file")
    return _decoded(content, name)


def _decoded(content: bytes, name: str) -> Image.Image:
    """Decode a file's bytes; nothing is decoded before its size is known to be fine."""
    if len(content) > MAX_BYTES:
        raise RequestError(f"{name} is larger than {MAX_BYTES >> 20} MiB; reduce it, or save it as JPEG")
    try:
        with warnings.catch_warnings():
            # Pillow's own limit is higher than ours.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise RequestError(f"{name} has more than {MAX_PIXELS // 10**6} million pixels; scale it down") from error
    except Exception as error:  # what Pillow's readers raise for torn headers has no end
        raise RequestError(f"{name} is not a PNG, JPEG or WebP image; convert it to one of these") from error
    # A photograph of a telephone can hold further pictures (MPO) without being an animation.
    frames = getattr(opened, "n_frames", 1) if opened.format != "MPO" else 1
    if frames > 1:
        raise RequestError(f"{name} is an animation of {frames} pictures; use a single picture")
    return _upright(opened, name)


def _upright(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise RequestError(
            f"{name} has {width}x{height} pixels, but the limit is {MAX_PIXELS // 10**6} million; scale it down"
        )
    if min(width, height) < MIN_SIDE:
        raise RequestError(f"{name} has {width}x{height} pixels, but each side needs at least {MIN_SIDE}; scale it up")
    if image.mode.startswith(_DEEP):
        raise RequestError(f"{name} is a grayscale image of more than 8 bits; save it with 8 bits")
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # torn data; broken EXIF
        raise RequestError(f"{name} cannot be decoded: the file is truncated or damaged; save it again") from error


def size_for(image: Image.Image, area: int, step: tuple[int, int]) -> tuple[int, int]:
    """Width and height of a video with an image's proportions: Wan's rule for image to video.

    Args:
        image: the image.
        area: pixels of a frame that the model is made for; the size stays just below it.
        step: width and height are multiples of these.
    """
    ratio = image.height / image.width
    width = round(math.sqrt(area / ratio)) // step[0] * step[0]
    height = round(math.sqrt(area * ratio)) // step[1] * step[1]
    return max(width, step[0]), max(height, step[1])


def fit_image(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scale an image until it covers width x height, and cut off what sticks out on both sides alike."""
    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)


def fingerprint(image: Image.Image) -> str:
    """SHA-256 of an RGB image's size and pixels: equal for equal pictures, whatever their files."""
    digest = hashlib.sha256(f"{image.width}x{image.height}\n".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def png(image: Image.Image) -> bytes:
    """Encode an image without loss."""
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)
    return stream.getvalue()
