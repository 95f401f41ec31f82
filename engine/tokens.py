"""Between latents [B, C, F, Y, X] and token rows [B, N, D].

D = C * pt * ph * pw; tokens are ordered (frame, row, column), as in a model's flattened patch embedding.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from ..hsa.rows import gather_rows, write_rows

__all__ = ["Grid", "Patch", "gather_rows", "pack", "patchify", "unpack", "unpatchify", "write_rows"]


class Grid(NamedTuple):
    """How many tokens lie along each axis."""

    frames: int
    height: int
    width: int

    @property
    def num_tokens(self) -> int:
        """N."""
        return math.prod(self)


class Patch(NamedTuple):
    """How many latents one token covers along each axis."""

    frames: int
    height: int
    width: int

    def grid_of(self, latents: Tensor) -> Grid:
        """Grid of tokens of latents [B, C, F, Y, X]."""
        frames, height, width = (size // p for size, p in zip(latents.shape[-3:], self, strict=True))
        return Grid(frames, height, width)


def patchify(latents: Tensor, patch: Patch) -> Tensor:
    """[B, C, F, Y, X] -> [B, N, D]."""
    batch, channels = latents.shape[:2]
    (f, h, w), (pt, ph, pw) = patch.grid_of(latents), patch
    cells = latents.reshape(batch, channels, f, pt, h, ph, w, pw)
    return cells.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, f * h * w, -1)


def unpatchify(tokens: Tensor, patch: Patch, grid: Grid) -> Tensor:
    """[B, N, D] -> [B, C, F, Y, X]: the inverse of `patchify`."""
    batch, (f, h, w), (pt, ph, pw) = tokens.shape[0], grid, patch
    cells = tokens.reshape(batch, f, h, w, -1, pt, ph, pw).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return cells.reshape(batch, -1, f * pt, h * ph, w * pw)


def pack(rows: Tensor, patch: Patch) -> Tensor:
    """Lay token rows [B, A, D] side by side as a video one patch high: [B, C, pt, ph, A * pw].

    A model whose patch embedding has its kernel equal to its stride sees the same tokens in it as in the
    whole video.
    """
    return unpatchify(rows, patch, Grid(1, 1, rows.shape[1]))


def unpack(video: Tensor, patch: Patch) -> Tensor:
    """[B, C, pt, ph, A * pw] -> [B, A, D]: the inverse of `pack`."""
    return patchify(video, patch)
