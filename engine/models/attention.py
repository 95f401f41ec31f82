"""Attention with cached keys and values, on one rank or, by way of `sharding.py`, on many, whatever the model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from ...hsa.cache import KVCache, gather_rows, write_rows


class AttentionCall:
    """What the processors of one transformer must know about the forward pass that is running.

    Attributes:
        cached: whether this pass touches the caches; otherwise the processors are the stock ones.
        active: None when all tokens are in the pass, else int64 [A] or [B, A].
        grid: tokens of the whole video.
        weight: weight [B, N] of the damped K/V forecast, or None.
        attend: on many ranks, attention of this rank's rows: (q, k, v, cache, everywhere) -> out, of the shape of q
            [B, n, H, D]; `everywhere` as in `CachedAttention`.
    """

    def __init__(self) -> None:
        """Start inactive."""
        self.cached = False
        self.active: Tensor | None = None
        self.grid: Grid | None = None
        self.weight: Tensor | None = None
        self.attend: Callable[[Tensor, Tensor, Tensor, KVCache | None, bool], Tensor] | None = None

    def clear(self) -> None:
        """Make the processors stock again."""
        self.__init__()  # type: ignore[misc]


class CachedAttention:
    """The part of an attention processor that no model changes: fresh K/V rows go to the cache, queries see all rows.

    A processor derives from this and from the model's stock processor. ``cache`` is set before each pass to the
    guidance branch's cache of this layer. ``everywhere`` says that the queries are no video tokens but something that
    every rank has whole, such as sound.
    """

    _attention_backend: Any
    _parallel_config: Any

    def take_over(self, call: AttentionCall, replaced: Any, *, everywhere: bool = False) -> None:
        """Stand in for the processor `replaced`, with the same attention kernel."""
        self.call = call
        self.cache: KVCache | None = None
        self.everywhere = everywhere
        self._attention_backend = replaced._attention_backend
        self._parallel_config = replaced._parallel_config

    @property
    def stock(self) -> bool:
        """Whether this pass wants nothing but the stock processor."""
        return not self.call.cached or (self.cache is None and self.call.attend is None)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend after normalisation and RoPE: q [B, M, H, D], fresh k and v [B, A, H, D] -> [B, M, H * D]."""
        cache, shared = self.cache, self.call.attend
        if shared is not None:
            return shared(query, key, value, cache, self.everywhere).flatten(2, 3).type_as(query)
        assert cache is not None
        cache.write(key, value, self.call.active)
        if self.call.active is not None:
            key, value = cache.keys_values(query.dtype, self.call.weight)
        return attend(query, key, value, mask, self._attention_backend)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, backend: Any) -> Tensor:
    """Attend by the kernel that diffusers calls `backend`: q [B, M, H, D], k and v [B, N, H, D] -> [B, M, H * D]."""
    out = dispatch_attention_fn(
        query, key, value, attn_mask=mask, dropout_p=0.0, is_causal=False, backend=backend, parallel_config=None
    )
    return out.flatten(2, 3).type_as(query)


class TextKV:
    """Keys and values of the prompt in one layer, for one guidance branch: good until prompt or weights change."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self.text: tuple[Tensor, Tensor] | None = None
        self.image: tuple[Tensor, Tensor] | None = None


class CachedTextAttention:
    """The part of a processor of attention to the prompt that no model changes.

    A processor derives from this and from the model's stock processor. ``store`` is set before each pass to the
    guidance branch's; without it the processor is the stock one.
    """

    def __init__(self, replaced: Any) -> None:
        """Stand in for the processor `replaced`, with the same attention kernel."""
        super().__init__()
        self.store: TextKV | None = None
        self._attention_backend = replaced._attention_backend
        self._parallel_config = replaced._parallel_config


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
