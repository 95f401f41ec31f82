"""How good values are: whether they are finite, and how close two videos are (PSNR, SSIM, error of latents)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ...errors import RequestError

_WINDOW = 11
_SIGMA = 1.5
_WIDER = {torch.float16: "--dtype bfloat16 or float32", torch.bfloat16: "--dtype float32"}
_DAMAGED = "its weights may be damaged: copy or download the model again"


def is_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; needs no memory beside the values."""
    # Both ends are NaN where any value is.
    return not values.numel() or all(bool(end.isfinite()) for end in values.aminmax())


def check_finite(values: torch.Tensor, source: str, dtype: torch.dtype, otherwise: str = "") -> None:
    """Refuse NaN and infinite values, which would become a black video or silence.

    Args:
        values: what a network returned.
        source: that network, e.g. `"the VAE"`.
        dtype: in which it computed.
        otherwise: what would do beside another dtype, e.g. `"a lower --guidance"`.

    Raises:
        RequestError: the message names the network, the dtype, and what would do.
    """
    if not is_finite(values):
        remedies = " or ".join(remedy for remedy in (_WIDER.get(dtype), otherwise) if remedy)
        raise RequestError(
            f"{source} produced values that are not finite numbers (NaN or infinity) in "
            f"{str(dtype).removeprefix('torch.')}; {f'use {remedies}' if remedies else _DAMAGED}"
        )


def _unit(frames: NDArray[Any]) -> NDArray[np.float64]:
    """uint8 0..255 or float 0..1 -> float64 0..1."""
    if frames.dtype == np.uint8:
        return frames.astype(np.float64) / 255.0
    if not np.issubdtype(frames.dtype, np.floating):
        raise ValueError(f"frames must be uint8 or float in [0, 1], not {frames.dtype}")
    return frames.astype(np.float64)


def _pair(frames: NDArray[Any], reference: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if frames.shape != reference.shape:
        raise ValueError(f"videos must have one shape, got {frames.shape} and {reference.shape}")
    return _unit(frames), _unit(reference)


def psnr(frames: NDArray[Any], reference: NDArray[Any]) -> float:
    """Peak signal-to-noise ratio of a whole video, in dB; `inf` for equal videos.

    One mean squared error over all frames, not a mean of the frames' values, so that one equal frame does not
    make it infinite.

    Args:
        frames: [F, H, W, C], uint8, or float in [0, 1].
        reference: the same shape.
    """
    a, b = _pair(frames, reference)
    error = float(np.mean((a - b) ** 2))
    return math.inf if error == 0.0 else -10.0 * math.log10(error)


def ssim(frames: NDArray[Any], reference: NDArray[Any]) -> float:
    """Structural similarity, mean over frames, channels and window positions.

    As in Wang et al. 2004: Gaussian window 11 x 11 with sigma 1.5, K1 = .01, K2 = .03, population
    covariances, only windows that lie wholly inside the picture.

    Args:
        frames: [F, H, W, C], uint8, or float in [0, 1]; H and W at least 11.
        reference: the same shape.

    Returns:
        1.0 for equal videos, near 0 for unrelated ones.
    """
    a, b = _pair(frames, reference)
    if min(a.shape[1:3]) < _WINDOW:
        raise ValueError(f"SSIM needs frames of at least {_WINDOW} x {_WINDOW} pixels, got {a.shape[1:3]}")
    offsets = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights = weights / weights.sum()

    def blur(x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(x, weights.view(1, 1, -1, 1))
        return F.conv2d(x, weights.view(1, 1, 1, -1))

    # Frame by frame: a whole 720p video in float64 would need gigabytes.
    values = []
    for frame, other in zip(a, b, strict=True):
        x = torch.from_numpy(np.ascontiguousarray(frame.transpose(2, 0, 1)))[:, None]
        y = torch.from_numpy(np.ascontiguousarray(other.transpose(2, 0, 1)))[:, None]
        mean_x, mean_y = blur(x), blur(y)
        var_x = blur(x * x) - mean_x**2
        var_y = blur(y * y) - mean_y**2
        covariance = blur(x * y) - mean_x * mean_y
        c1, c2 = 0.01**2, 0.03**2
        similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
            (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
        )
        values.append(float(similarity.mean()))
    return float(np.mean(values))


def relative_l2(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference, in float64; any equal shapes."""
    if value.shape != reference.shape:
        raise ValueError(f"tensors must have one shape, got {tuple(value.shape)} and {tuple(reference.shape)}")
    difference = torch.linalg.vector_norm(value.double() - reference.double())
    return float(difference / torch.linalg.vector_norm(reference.double()))
