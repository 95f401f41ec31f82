"""Keys and values that take less of a GPU's memory: in 8 bits, or in host memory."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .cache import KVCache, write_rows

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Largest value of a type."""
_LEAST = 1e-7
"""Scale of rows that are all zeros; float16 has nothing smaller."""


def make_caches(count: int, dtype: str | None, *, history: bool, host: bool) -> list[Any]:
    """Make the caches of all layers, in the order in which they are read.

    Args:
        count: how many.
        dtype: as `HSAConfig.kv_dtype`.
        history: as `KVCache`; not with 8 bits.
        host: whether they are kept in host memory.
    """
    names = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
    if dtype in names:
        caches: list[Any] = [SmallKVCache(names[dtype]) for _ in range(count)]
    else:
        stored = None if dtype is None else getattr(torch, dtype)
        caches = [KVCache(stored, history=history) for _ in range(count)]
    if not host:
        return caches
    kept = [HostKVCache(cache) for cache in caches]
    for one, other in pairwise(kept):
        one.following = other
    return kept


class SmallKVCache(KVCache):
    """K and V in 8 bits, with a float16 scale for each token and head.

    Keys lie around a mean that differs from channel to channel, and takes most of the 8 bits: it is subtracted before,
    and added after. It is that of the last write of all tokens.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        """Create an empty cache of int8 or float8_e4m3fn."""
        super().__init__(dtype)
        self.k_scale: Tensor | None = None
        self.v_scale: Tensor | None = None
        self.mean: Tensor | None = None

    def write(self, k: Tensor, v: Tensor, active: Tensor | None = None) -> None:
        """See `KVCache`."""
        if active is None:
            self._fit_small(k)
            self.mean = k.float().mean(1, keepdim=True)
        assert self.mean is not None, "a write of all tokens comes first"
        for buffer, scales, rows in ((self.k, self.k_scale, k.float() - self.mean), (self.v, self.v_scale, v.float())):
            assert buffer is not None and scales is not None
            values, scale = self._small(rows)
            write_rows(buffer, active, values)
            write_rows(scales, active, scale)

    def write_flat(self, k: Tensor, v: Tensor, index: Tensor) -> None:
        """See `KVCache`."""
        assert self.mean is not None and self.k is not None, "a write of all tokens comes first"
        mean = self.mean[index // self.k.shape[1], 0]
        for buffer, scales, rows in ((self.k, self.k_scale, k.float() - mean), (self.v, self.v_scale, v.float())):
            assert buffer is not None and scales is not None
            values, scale = self._small(rows)
            buffer.view(-1, *buffer.shape[2:]).index_copy_(0, index, values)
            scales.view(-1, *scales.shape[2:]).index_copy_(0, index, scale)

    def keys_values(self, dtype: torch.dtype, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `KVCache`; there is no forecast of them."""
        assert self.mean is not None, "a write of all tokens comes first"
        k = self._whole(self.k, self.k_scale).add_(self.mean)
        return k.to(dtype), self._whole(self.v, self.v_scale).to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = (self.k, self.v, self.k_scale, self.v_scale, self.mean)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def release(self) -> None:
        """Give the memory back."""
        super().release()
        self.k_scale = self.v_scale = self.mean = None

    def _fit_small(self, like: Tensor) -> None:
        """Allocate buffers for rows like [B, N, H, D], or keep those that fit."""
        if self.k is not None and self.k.shape == like.shape and self.k.device == like.device:
            return
        # The bytes of either type: not every operation knows 8-bit floats.
        self.k, self.v = (like.new_zeros(like.shape, dtype=torch.int8) for _ in range(2))
        self.k_scale, self.v_scale = (like.new_zeros((*like.shape[:-1], 1), dtype=torch.float16) for _ in range(2))

    def _small(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [..., D] as bytes, and their scales [..., 1]."""
        assert self.dtype is not None
        largest = _LARGEST[self.dtype]
        scale = (rows.abs().amax(-1, keepdim=True) / largest).clamp(min=_LEAST).to(torch.float16)
        # Rounded down, the scale would push the largest value out of the range.
        values = (rows / scale.float()).clamp(-largest, largest)
        if self.dtype is torch.int8:
            return values.round_().to(torch.int8), scale
        return values.to(self.dtype).view(torch.int8), scale

    def _whole(self, values: Tensor | None, scale: Tensor | None) -> Tensor:
        assert values is not None and scale is not None and self.dtype is not None
        return values.view(self.dtype).float() * scale.float()


class HostKVCache:
    """A cache whose rows lie in pinned host memory; a copy comes to the device one layer ahead, on a stream of its own.

    The values are those of the cache that it wraps, bit for bit. On the CPU nothing is copied.
    """

    def __init__(self, inner: KVCache) -> None:
        """Wrap an empty cache.

        Attributes:
            following: the cache that is read after this one.
        """
        self._inner = inner
        self.following: HostKVCache | None = None
        self._copy: KVCache | None = None
        self._ready: Any = None
        self._device: torch.device | None = None

    def write(self, k: Tensor, v: Tensor, active: Tensor | None = None) -> None:
        """See `KVCache`."""
        self._device = k.device
        if active is None:
            self._copy = None
        else:
            self._arrive()
            if self._copy is not None:
                self._copy.write(k, v, active)
        self._inner.write(k.cpu(), v.cpu(), None if active is None else active.cpu())
        if active is None:
            self._pin()

    def write_flat(self, k: Tensor, v: Tensor, index: Tensor) -> None:
        """See `KVCache`."""
        self._arrive()
        if self._copy is not None:
            self._copy.write_flat(k, v, index)
        self._inner.write_flat(k.cpu(), v.cpu(), index.cpu())

    def keys_values(self, dtype: torch.dtype, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `KVCache`."""
        if self._copy is None:
            self.fetch()
        self._arrive()
        assert self._copy is not None
        found = self._copy.keys_values(dtype, weight)
        self._copy = None  # its memory is the next layer's
        if self.following is not None:
            self.following.fetch()
        return found

    def fetch(self) -> None:
        """Begin to copy the rows to the device, if there are any."""
        if self._device is None or self._inner.k is None:
            return
        if self._device.type != "cuda":
            self._copy = self._moved()
            return
        stream = _stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._copy = self._moved()
            self._ready = stream.record_event()

    @property
    def nbytes(self) -> int:
        """Bytes held, in host memory."""
        return self._inner.nbytes

    def reset(self) -> None:
        """See `KVCache`."""
        self._copy = None
        self._inner.reset()

    def release(self) -> None:
        """See `KVCache`."""
        self._copy = None
        self._inner.release()

    def _moved(self) -> KVCache:
        twin = copy.copy(self._inner)
        for name, value in vars(twin).items():
            if isinstance(value, Tensor):
                # On the CPU too a copy: a write to it must not come before the write to what is kept.
                setattr(twin, name, value.to(self._device, non_blocking=True, copy=True))
        return twin

    def _arrive(self) -> None:
        """Let the present stream wait for the copy."""
        if self._ready is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._ready)
            for value in vars(self._copy).values() if self._copy is not None else ():
                if isinstance(value, Tensor):
                    value.record_stream(current)
            self._ready = None

    def _pin(self) -> None:
        if self._device is None or self._device.type != "cuda":
            return
        for name, value in vars(self._inner).items():
            if isinstance(value, Tensor) and not value.is_pinned():
                setattr(self._inner, name, value.pin_memory())


def _stream(device: torch.device) -> Any:
    """A stream from PyTorch's pool."""
    return torch.cuda.Stream(device)
