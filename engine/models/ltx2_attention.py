"""LTX-2's attention processor, derived from diffusers' (Apache-2.0), whose order of arithmetic it keeps."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_ltx2 import (
    LTX2PerturbedAttnProcessor,
    apply_interleaved_rotary_emb,
    apply_split_rotary_emb,
)
from torch import Tensor

from ..attention import AttentionCall, CachedAttention

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
        gates = None if attn.to_gate_logits is None else 2.0 * torch.sigmoid(attn.to_gate_logits(hidden_states))
        value = attn.to_v(video)
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(video))
        if query_rotary_emb is not None:
            rotate = _ROTATE[attn.rope_type]
            query, key = rotate(query, query_rotary_emb), rotate(key, key_rotary_emb or query_rotary_emb)
        out = self.attend(*(t.unflatten(2, (attn.heads, -1)) for t in (query, key, value)))
        if perturbation_mask is not None:
            out = torch.lerp(value, out, perturbation_mask)
        if gates is not None:
            out = (out.unflatten(2, (attn.heads, -1)) * gates.unsqueeze(-1)).flatten(2, 3)
        return attn.to_out[1](attn.to_out[0](out))
