"""The keys and values of every token in one layer, as they were when the token was last evaluated."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """K and V [B, N, H, D] of one layer and one guidance branch.

    They are stored after normalisation and RoPE, in the kernel's layout.
    ``k`` and ``v`` are plain tensor attributes on purpose: an int or a list index here would make
    torch.compile rebuild every block. With ``history`` the previous evaluation of each row is kept too
    (twice the memory), which `keys_values` needs for its forecast.
    """

    def __init__(self, dtype: torch.dtype | None = None, history: bool = False) -> None:
        """Create an empty cache that stores `dtype` (None: as computed); the first write allocates."""
        self.dtype = dtype
        self.history = history
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.k_prev: Tensor | None = None
        self.v_prev: Tensor | None = None

    def write(self, k: Tensor, v: Tensor, active: Tensor | None = None) -> None:
        """Overwrite the rows of the active tokens.

        Args:
            k: fresh keys [B, A, H, D].
            v: fresh values [B, A, H, D].
            active: int64 [A], [B, A] for one set per sample, or None for all N tokens (allocates where
                needed).
        """
        if active is None:
            self._fit(k)
        assert self.k is not None, "a write of all tokens comes first"
        assert self.v is not None
        if self.k_prev is not None and self.v_prev is not None:
            write_rows(self.k_prev, active, gather_rows(self.k, active))
            write_rows(self.v_prev, active, gather_rows(self.v, active))
        write_rows(self.k, active, k)
        write_rows(self.v, active, v)

    def write_flat(self, k: Tensor, v: Tensor, index: Tensor) -> None:
        """Overwrite rows [M, H, D] at index int64 [M] of the flattened (sample, token) pairs, sample * N + token.

        For a rank that keeps a range of the tokens: samples may have different numbers of active ones in it.
        """
        assert self.k is not None and self.v is not None, "a write of all tokens comes first"
        for buffer, previous, rows in ((self.k, self.k_prev, k), (self.v, self.v_prev, v)):
            flat = buffer.view(-1, *buffer.shape[2:])
            if previous is not None:
                previous.view(-1, *buffer.shape[2:]).index_copy_(0, index, flat.index_select(0, index))
            flat.index_copy_(0, index, rows.to(buffer.dtype))

    def keys_values(self, dtype: torch.dtype, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return K and V [B, N, H, D] to attend to.

        Args:
            dtype: type of the queries; the cache is converted where it differs.
            weight: [B, N]; a row becomes K + weight * (K - K_prev), with weight = damp * (sigma - sigma_l) /
                (sigma_l - sigma_p), a damped linear forecast of what the row would be now; 0 for fresh rows.
        """
        assert self.k is not None, "a write of all tokens comes first"
        assert self.v is not None
        k, v = self.k.to(dtype), self.v.to(dtype)
        if weight is None or self.k_prev is None or self.v_prev is None:
            return k, v
        w = weight[:, :, None, None].to(dtype)
        return k + w * (k - self.k_prev.to(dtype)), v + w * (v - self.v_prev.to(dtype))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in (self.k, self.v, self.k_prev, self.v_prev) if t is not None)

    def reset(self) -> None:
        """Forget the values of an earlier run, which may have ended in NaN; buffers are kept."""
        # Only the forecast reads rows of before the first write, times 0: NaN would stay NaN.
        if self.history and self.k is not None and self.v is not None:
            self.k.zero_()
            self.v.zero_()

    def release(self) -> None:
        """Give the memory back."""
        self.k = self.v = self.k_prev = self.v_prev = None

    def _fit(self, like: Tensor) -> None:
        """Allocate buffers for rows like [B, N, H, D], or keep those that fit."""
        dtype = self.dtype or like.dtype
        k = self.k
        if k is not None and k.shape == like.shape and k.dtype == dtype and k.device == like.device:
            return
        # Zeros, not empty: a weight of 0 times an uninitialised NaN would still be NaN.
        # Not zeros_like: `like` may be a view into a message, whose strides are not those of a cache.
        self.k, self.v = (like.new_zeros(like.shape, dtype=dtype) for _ in range(2))
        if self.history:
            self.k_prev, self.v_prev = (like.new_zeros(like.shape, dtype=dtype) for _ in range(2))


def gather_rows(tokens: Tensor, active: Tensor | None) -> Tensor:
    """Take the rows of the active tokens.

    Args:
        tokens: [B, N, ...].
        active: int64 indices [A] shared by the batch, [B, A] one set per sample, or None for all.

    Returns:
        [B, A, ...]; `tokens` itself for None.
    """
    if active is None:
        return tokens
    if active.ndim == 1:
        return tokens.index_select(1, active)
    return tokens[_sample_ids(active), active]


def write_rows(tokens: Tensor, active: Tensor | None, rows: Tensor) -> None:
    """Overwrite the rows of the active tokens in place: the inverse of `gather_rows`.

    Args:
        tokens: [B, N, ...], changed in place.
        active: as in `gather_rows`.
        rows: [B, A, ...]; converted to the type of `tokens`.
    """
    if active is None:
        tokens.copy_(rows)
    elif active.ndim == 1:
        tokens.index_copy_(1, active, rows.to(tokens.dtype))
    else:
        tokens[_sample_ids(active), active] = rows.to(tokens.dtype)


def fill_rows(tokens: Tensor, active: Tensor | None, value: float | bool) -> None:
    """Set the rows of the active tokens to one number, in place; arguments as in `write_rows`."""
    if active is None:
        tokens.fill_(value)
    elif active.ndim == 1:
        tokens.index_fill_(1, active, value)
    else:
        tokens[_sample_ids(active), active] = value


def _sample_ids(active: Tensor) -> Tensor:
    """Return [B, 1] sample numbers that broadcast against `active` [B, A]."""
    return torch.arange(active.shape[0], device=active.device)[:, None]
