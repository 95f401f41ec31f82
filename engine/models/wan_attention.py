"""Wan's attention processors, derived from diffusers' (Apache-2.0), whose order of arithmetic they keep; its RoPE."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor

from ..attention import AttentionCall, CachedAttention, CachedTextAttention, TextKV, attend
from ..registry import LastingHook
from ..tokens import Patch, gather_rows

_TEXT_LENGTH = 512
"""Text positions of Wan's models; what comes before them is the image."""


class CachedWanAttnProcessor(CachedAttention, WanAttnProcessor):
    """Wan's self-attention in which the queries of the active tokens attend to the keys of all tokens.

    A pass over all tokens is the stock one bit for bit.
    """

    def __init__(self, call: AttentionCall, replaced: WanAttnProcessor) -> None:
        """Stand in for the processor `replaced`."""
        super().__init__()
        self.take_over(call, replaced)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend: hidden_states [B, A, H * D] -> [B, A, H * D]; arguments as diffusers' WanAttnProcessor."""
        if self.stock:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        query, key, value = _project(attn, hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (t.unflatten(2, (attn.heads, -1)) for t in (query, key, value))
        if rotary_emb is not None:
            query, key = _rotate(query, *rotary_emb), _rotate(key, *rotary_emb)
        return attn.to_out[1](attn.to_out[0](self.attend(query, key, value, attention_mask)))


class CachedTextAttnProcessor(CachedTextAttention, WanAttnProcessor):
    """Wan's cross-attention with the prompt's keys and values computed once a run, bit for bit the stock one."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend: hidden_states [B, A, H * D] -> [B, A, H * D]; arguments as diffusers' WanAttnProcessor."""
        store = self.store
        if store is None or encoder_hidden_states is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        if store.text is None:
            _fill(store, attn, encoder_hidden_states)
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        image = None if store.image is None else attend(query, *store.image, None, self._attention_backend)
        assert store.text is not None
        out = attend(query, *store.text, attention_mask, self._attention_backend)
        if image is not None:
            out = out + image
        return attn.to_out[1](attn.to_out[0](out))


class RopeRows(LastingHook):
    """On the transformer's `rope`: embeddings of the active tokens at their true positions."""

    def __init__(self, call: AttentionCall, patch: Patch) -> None:
        """Follow `call`, with tokens of size `patch`."""
        super().__init__()
        self.call, self.patch = call, patch
        self._key: tuple[Any, ...] | None = None
        self._table: tuple[Tensor, Tensor] | None = None

    def new_forward(self, module: torch.nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin, each [1 or B, A, 1, D]."""
        active, grid = self.call.active, self.call.grid
        if active is None or grid is None:
            return self.fn_ref.original_forward(hidden_states)
        key = (grid, hidden_states.device, *(buffer.dtype for buffer in module.buffers()))
        if key != self._key or self._table is None:
            # The stock forward reads nothing but the shape: one expanded element stands for the whole video.
            shape = (1, 1, *(n * p for n, p in zip(grid, self.patch, strict=True)))
            self._table = self.fn_ref.original_forward(hidden_states.new_empty(1).expand(shape))
            self._key = key
        cos, sin = (t.expand(active.shape[0], -1, -1, -1) if active.ndim == 2 else t for t in self._table)
        return gather_rows(cos, active), gather_rows(sin, active)


def _fill(store: TextKV, attn: Any, states: Tensor) -> None:
    """Compute the keys and values of a prompt, and of the image that Wan's I2V puts before it."""
    if attn.add_k_proj is not None:
        length = states.shape[1] - _TEXT_LENGTH
        image, states = states[:, :length], states[:, length:]
        if attn.fused_projections:
            key, value = attn.to_added_kv(image).chunk(2, dim=-1)
        else:
            key, value = attn.add_k_proj(image), attn.add_v_proj(image)
        key = attn.norm_added_k(key)
        store.image = key.unflatten(2, (attn.heads, -1)), value.unflatten(2, (attn.heads, -1))
    if attn.fused_projections:
        key, value = attn.to_kv(states).chunk(2, dim=-1)
    else:
        key, value = attn.to_k(states), attn.to_v(states)
    key = attn.norm_k(key)
    store.text = key.unflatten(2, (attn.heads, -1)), value.unflatten(2, (attn.heads, -1))


def _project(attn: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, A, H * D], also with fused projections."""
    if getattr(attn, "fused_projections", False):
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        return query, key, value
    return attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embeddings [1 or B, A, 1, D] to x [B, A, H, D], in diffusers' order of arithmetic."""
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = x1 * cos - x2 * sin
    out[..., 1::2] = x1 * sin + x2 * cos
    return out.type_as(x)
