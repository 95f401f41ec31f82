"""LTX-2's attention processors, derived from diffusers' (Apache-2.0), whose order of arithmetic they keep."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_ltx2 import (
    LTX2PerturbedAttnProcessor,
    apply_interleaved_rotary_emb,
    apply_split_rotary_emb,
)
from torch import Tensor

from .base import AttentionCall, CachedAttention, CachedTextAttention, attend
from .hook_registry import OwnHook

_ROTATE = {"interleaved": apply_interleaved_rotary_emb, "split": apply_split_rotary_emb}


class CachedLTX2AttnProcessor(CachedAttention, LTX2PerturbedAttnProcessor):
    """LTX-2's attention to video tokens, in which queries attend to the keys of all of them, active or not.

    At ``attn1`` the queries are the active video tokens, at ``video_to_audio_attn`` all of the sound. It stands in for
    both of diffusers' processors: without a perturbation they are the same. A pass over all tokens is the stock one bit
    for bit.
    """

    def __init__(self, call: AttentionCall, replaced: Any, *, everywhere: bool = False) -> None:
        """Stand in for the processor `replaced`."""
        super().__init__()
        self.take_over(call, replaced, everywhere=everywhere)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: tuple[Tensor, Tensor] | None = None,
        key_rotary_emb: tuple[Tensor, Tensor] | None = None,
        perturbation_mask: Tensor | None = None,
        all_perturbed: Any = None,
    ) -> Tensor:
        """Attend: hidden_states [B, M, C] -> [B, M, C]; arguments as diffusers' LTX2PerturbedAttnProcessor."""
        if all_perturbed is None:
            all_perturbed = perturbation_mask is not None and bool(torch.all(perturbation_mask == 0))
        if self.stock or all_perturbed:  # a perturbed block passes values on, row by row
            return super().__call__(
                attn,
                hidden_states,
                encoder_hidden_states,
                attention_mask,
                query_rotary_emb,
                key_rotary_emb,
                perturbation_mask,
                all_perturbed,
            )
        video = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        value = attn.to_v(video)
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(video))
        query, key = _rotated(attn, query, key, query_rotary_emb, key_rotary_emb)
        out = self.attend(*(t.unflatten(2, (attn.heads, -1)) for t in (query, key, value)))
        if perturbation_mask is not None:
            out = torch.lerp(value, out, perturbation_mask)
        return _finished(attn, out, hidden_states)


class CachedLTX2TextAttnProcessor(CachedTextAttention, LTX2PerturbedAttnProcessor):
    """LTX-2's attention to the prompt with its keys and values computed once a run, bit for bit the stock one.

    It is the stock one too where attention is perturbed, which the models do in self-attention alone.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: tuple[Tensor, Tensor] | None = None,
        key_rotary_emb: tuple[Tensor, Tensor] | None = None,
        perturbation_mask: Tensor | None = None,
        all_perturbed: Any = None,
    ) -> Tensor:
        """Attend: hidden_states [B, M, C] -> [B, M, C]; arguments as diffusers' LTX2PerturbedAttnProcessor."""
        store = self.store
        if store is None or encoder_hidden_states is None or perturbation_mask is not None or all_perturbed:
            return super().__call__(
                attn,
                hidden_states,
                encoder_hidden_states,
                attention_mask,
                query_rotary_emb,
                key_rotary_emb,
                perturbation_mask,
                all_perturbed,
            )
        if store.text is None:
            value = attn.to_v(encoder_hidden_states)
            store.text = attn.norm_k(attn.to_k(encoder_hidden_states)), value
        key, value = store.text
        batch, length, _ = key.shape
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, length, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        query = attn.norm_q(attn.to_q(hidden_states))
        query, key = _rotated(attn, query, key, query_rotary_emb, key_rotary_emb)
        query, key, value = (t.unflatten(2, (attn.heads, -1)) for t in (query, key, value))
        return _finished(attn, attend(query, key, value, attention_mask, self._attention_backend), hidden_states)


class Plain(OwnHook):
    """On a projection: its output as no view, which `torch.nn.functional.linear` makes of it.

    To the compiler a view is another kind of input, so that the first block would need graphs of its own.
    """

    def post_forward(self, module: torch.nn.Module, output: Tensor) -> Tensor:
        """Return the same memory, not copied."""
        plain: Tensor = torch.ops.aten._unsafe_view(output, output.shape)
        return plain


def _rotated(
    attn: Any,
    query: Tensor,
    key: Tensor,
    query_rotary_emb: tuple[Tensor, Tensor] | None,
    key_rotary_emb: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, M, H * D] with their rotary embeddings, those of the queries for both by default."""
    if query_rotary_emb is None:
        return query, key
    rotate = _ROTATE[attn.rope_type]
    return rotate(query, query_rotary_emb), rotate(key, key_rotary_emb or query_rotary_emb)


def _finished(attn: Any, out: Tensor, hidden_states: Tensor) -> Tensor:
    """What attention found, [B, M, H * D], gated by heads where the model has gates, through the last projection."""
    if attn.to_gate_logits is not None:
        gates = 2.0 * torch.sigmoid(attn.to_gate_logits(hidden_states))
        out = (out.unflatten(2, (attn.heads, -1)) * gates.unsqueeze(-1)).flatten(2, 3)
    return attn.to_out[1](attn.to_out[0](out))
