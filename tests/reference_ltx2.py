"""An independent reference of HSA on LTX-2: the stock pipeline, whose transformer recomputes every token at every step
and attends to stale keys and values where a plan says so.

Nothing is imported from heterostep; attention is a plain einsum.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from diffusers.models.transformers.transformer_ltx2 import LTX2PerturbedAttnProcessor
from reference import History, replayed
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Rotary embedding by complex numbers: [B, T, H * D] -> [B, T, H, D]."""
    if cos.ndim == 3:  # interleaved, over all heads at once
        z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        turned = torch.view_as_real(z * torch.complex(cos[..., 0::2], sin[..., 0::2])).flatten(2)
        return turned.unflatten(2, (heads, -1))
    first, second = x.unflatten(2, (heads, -1)).chunk(2, dim=-1)
    z = torch.complex(first, second) * torch.complex(cos, sin).transpose(1, 2)
    return torch.cat([z.real, z.imag], dim=-1)


class MaskedProcessor(LTX2PerturbedAttnProcessor):
    """All video rows are computed; keys and values of inactive ones are replaced by those of their last evaluation."""

    def __init__(self, name: str, reference: ReferenceLTX2) -> None:
        super().__init__()
        self.name, self.reference = name, reference

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        query_rotary_emb=None,
        key_rotary_emb=None,
        perturbation_mask=None,
        all_perturbed=None,
    ):
        r, video = self.reference, hidden_states if encoder_hidden_states is None else encoder_hidden_states
        out = attn.to_v(video)
        if not all_perturbed:
            q = rotate(attn.norm_q(attn.to_q(hidden_states)), *query_rotary_emb, attn.heads)
            k = rotate(attn.norm_k(attn.to_k(video)), *(key_rotary_emb or query_rotary_emb), attn.heads)
            mixed = []
            for name, fresh in ((f"{self.name} k", k), (f"{self.name} v", out.unflatten(2, (attn.heads, -1)))):
                stale = r.history.at(name, r.sigma, r.damp) if r.damp and name in r.history.last else None
                rows = r.history.mix(name, fresh, r.mask)
                mixed.append(rows if stale is None else torch.where(r.mask[:, :, None, None], fresh, stale))
            scores = torch.einsum("bqhd,bkhd->bhqk", q, mixed[0]) * q.shape[-1] ** -0.5
            out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), mixed[1]).flatten(2)
        if attn.to_gate_logits is not None:
            gates = 2 * torch.sigmoid(attn.to_gate_logits(hidden_states))
            out = (out.unflatten(2, (attn.heads, -1)) * gates[..., None]).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


class ReferenceLTX2:
    """Takes a stock pipeline over for runs under a plan; `plans` holds None, [0], [A] or [B, A] per step."""

    def __init__(self, pipe: Any, plans: list[Tensor | None], *, damp: float = 0.0, correct: bool = True) -> None:
        self.pipe, self.plans, self.damp = pipe, plans, damp
        if correct:
            pipe.scheduler = replayed(pipe.scheduler, self.evaluated)
        self.calls: Counter[str] = Counter()
        self.kept: dict[str, tuple[History, History]] = {}
        for i, block in enumerate(pipe.transformer.transformer_blocks):
            block.attn1.set_processor(MaskedProcessor(f"self {i}", self))
            block.video_to_audio_attn.set_processor(MaskedProcessor(f"cross {i}", self))
        self.stock, pipe.transformer.forward = pipe.transformer.forward, self.forward

    def forward(self, **arguments: Any) -> tuple[Tensor, Tensor]:
        """What the transformer answers: the velocities of its guidance branch, fresh and forecast."""
        perturbed = "stg" if arguments["spatio_temporal_guidance_blocks"] else "main"
        name = "modality" if arguments["isolate_modalities"] else perturbed
        step, sigmas = self.calls[name], self.pipe.scheduler.sigmas.tolist()
        self.calls[name] += 1
        self.sigma = sigmas[step]
        video, sound = arguments["hidden_states"], arguments["audio_hidden_states"]
        self.mask, everything = self._mask(video, step), torch.ones(sound.shape[:2], dtype=torch.bool)
        self.history, heard = self.kept.setdefault(name, (History(), History()))
        if self.mask.any():
            fresh = self.stock(**arguments)
            self.history.mix("velocity", fresh[0], self.mask)
            self.history.tick(self.sigma, self.mask)
            heard.mix("velocity", fresh[1], everything)
            heard.tick(self.sigma, everything)
        return tuple(history.at("velocity", self.sigma) for history in (self.history, heard))

    def evaluated(self, step: int, velocity: Tensor) -> Tensor:
        """Which elements of a velocity are fresh: all of sound, of the video those of active tokens."""
        mask = self.mask[: len(velocity)]
        if velocity.ndim == 5:  # from an image on, all frames but the first, unpacked; a token is one latent
            frames = velocity.shape[2] + 1
            mask = mask.unflatten(1, (frames, *velocity.shape[3:]))[:, None, 1:]
        elif velocity.shape[1] == mask.shape[1]:
            mask = mask[..., None]
        else:
            mask = mask.any(1)[:, None, None]
        return mask.expand(velocity.shape)

    def _mask(self, video: Tensor, step: int) -> Tensor:
        """Active tokens of each sample in the batch, which may hold each video twice."""
        mask, plan = torch.zeros(video.shape[:2], dtype=torch.bool), self.plans[step]
        for row in range(len(mask)):
            if plan is None:
                mask[row] = True
            else:
                mask[row, plan[row % len(plan)] if plan.ndim == 2 else plan] = True
        return mask
