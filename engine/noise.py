"""Initial noise from a file, for comparisons with other programs that begin with the same."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from .facts import ModelFacts, first_line

if TYPE_CHECKING:
    import torch

SUFFIXES = (".safetensors", ".pt")


def read_noise(path: str | os.PathLike[str]) -> torch.Tensor:
    """The tensor of a file, as float32: the only one of a safetensors file, or one that `torch.save` wrote.

    Nothing of the file is run: of other pickles than those of tensors none is opened.

    Raises:
        RequestError: there is no such file, or it holds something else.
    """
    import torch
    from safetensors.torch import load_file

    file = Path(path).expanduser()
    if file.suffix not in SUFFIXES or not file.is_file():
        raise RequestError(
            f"there is no file of noise {str(path)[:200]!r}; name one that ends in {' or '.join(SUFFIXES)}"
        )
    try:
        if file.suffix == ".pt":
            found: Any = torch.load(file, map_location="cpu", weights_only=True)
        else:
            (found,) = load_file(file).values()
    except Exception as error:  # the readers have many ways to fail
        raise RequestError(f"noise {file.name!r} cannot be read as one tensor ({first_line(error)})") from error
    if not isinstance(found, torch.Tensor) or not found.is_floating_point() or not torch.isfinite(found).all():
        raise RequestError(f"noise {file.name!r} must be a tensor of finite floating-point numbers")
    return found.float()


def check_noise(path: str, facts: ModelFacts, video: Any) -> str:
    """The absolute path of a file of noise that fits a video.

    Raises:
        RequestError: it does not, or the model draws other noise besides.
    """
    if facts.audio_rate:
        raise RequestError(f"noise is for Wan: {facts.name!r} ({facts.family}) also draws that of the sound")
    shape, (width, height, num_frames) = tuple(read_noise(path).shape), (video.width, video.height, video.num_frames)
    size = ((num_frames - 1) // facts.vae_temporal + 1, height // facts.vae_spatial, width // facts.vae_spatial)
    if len(shape) != 5 or shape[0] != 1 or shape[2:] != size:
        wanted = ", ".join(map(str, size))
        raise RequestError(
            f"noise {Path(path).name!r} has the shape {list(shape)}, but {num_frames} frames of {width}x{height} need "
            f"[1, channels, {wanted}]"
        )
    return str(Path(path).expanduser().absolute())


def noise_identity(path: str | None) -> str | None:
    """SHA-256 of a file of noise; None where the noise is drawn."""
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RequestError(f"the file of noise {path[:200]!r} is gone ({error.strerror})") from error
