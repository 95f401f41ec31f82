"""The Wan transformer's forward pass written for training speed, on the parameters of the stock class.

`WanTransformer3DModel.forward` spends most of a small model's time outside matrix products and attends to 512 text
positions of which all but a few are the same padding. Here the padding is one key whose weight is its count, positions
are rotated by a matrix built once, and the whole is one graph for `torch.compile`. `train_transformer.py --check`
compares it with the stock class; nothing at generation time uses it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel

TEXT_POSITIONS = 512


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [B, N, H, D] by angles given as cos, sin [N, 1, D / 2]."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def _self_attention(attn, x, cos, sin):
    b, n, d = x.shape
    weight = torch.cat([attn.to_q.weight, attn.to_k.weight, attn.to_v.weight])
    bias = torch.cat([attn.to_q.bias, attn.to_k.bias, attn.to_v.bias])
    q, k, v = F.linear(x, weight, bias).chunk(3, dim=-1)
    q = F.rms_norm(q, (d,), attn.norm_q.weight, attn.norm_q.eps)
    k = F.rms_norm(k, (d,), attn.norm_k.weight, attn.norm_k.eps)
    q, k, v = (t.view(b, n, attn.heads, -1) for t in (q, k, v))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return attn.to_out[0](out.transpose(1, 2).flatten(2))


def _text_attention(attn, x, text, weight_of_key):
    b, n, d = x.shape
    q = F.rms_norm(attn.to_q(x), (d,), attn.norm_q.weight, attn.norm_q.eps).view(b, n, attn.heads, -1)
    k = F.rms_norm(attn.to_k(text), (d,), attn.norm_k.weight, attn.norm_k.eps).view(b, -1, attn.heads, d // attn.heads)
    v = attn.to_v(text).view(b, -1, attn.heads, d // attn.heads)
    scores = torch.einsum("bnhd,bkhd->bhnk", q, k) * (d // attn.heads) ** -0.5 + weight_of_key[:, None, None]
    return attn.to_out[0](torch.einsum("bhnk,bkhd->bnhd", scores.softmax(-1), v).flatten(2))


def text_keys(embeddings: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Zero-padded embeddings [B, L, C] -> with one padding row appended [B, L + 1, C], and log-weights [B, L + 1].

    The positions beyond a caption's length, up to `TEXT_POSITIONS`, are padding.
    """
    b, rows_given, c = embeddings.shape
    rows = torch.cat([embeddings, embeddings.new_zeros(b, 1, c)], dim=1)
    index = torch.arange(rows_given, device=embeddings.device)
    weights = torch.where(index[None] < lengths[:, None], 0.0, -torch.inf)
    padding = torch.log(TEXT_POSITIONS - lengths.float())[:, None]
    return rows, torch.cat([weights, padding], dim=1).to(embeddings.dtype)


def forward(
    model: WanTransformer3DModel,
    latents: torch.Tensor,
    timestep_features: torch.Tensor,
    text: torch.Tensor,
    text_weights: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> torch.Tensor:
    """Velocity [B, C, F, Y, X] for latents of that shape; `timestep_features` [B, freq_dim] are the sinusoids."""
    b, c, f, y, x = latents.shape
    _, ph, pw = model.config.patch_size
    rows = latents.view(b, c, f, y // ph, ph, x // pw, pw).permute(0, 2, 3, 5, 1, 4, 6).reshape(b, -1, c * ph * pw)
    h = F.linear(rows, model.patch_embedding.weight.flatten(1), model.patch_embedding.bias)
    embed = model.condition_embedder
    temb = embed.time_embedder(timestep_features)
    modulation = embed.time_proj(F.silu(temb)).unflatten(1, (6, -1))
    text = embed.text_embedder(text)
    d = (h.shape[-1],)
    for block in model.blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = (block.scale_shift_table + modulation).chunk(6, dim=1)
        h = h + _self_attention(block.attn1, F.layer_norm(h, d, eps=1e-6) * (1 + scale1) + shift1, cos, sin) * gate1
        normed = F.layer_norm(h, d, block.norm2.weight, block.norm2.bias, eps=1e-6)
        h = h + _text_attention(block.attn2, normed, text, text_weights)
        normed = F.layer_norm(h, d, eps=1e-6) * (1 + scale2) + shift2
        inner = F.gelu(block.ffn.net[0].proj(normed), approximate="tanh")
        h = h + block.ffn.net[2](inner) * gate2
    shift, scale = (model.scale_shift_table + temb[:, None]).chunk(2, dim=1)
    out = model.proj_out(F.layer_norm(h, d, eps=1e-6) * (1 + scale) + shift)
    return out.view(b, f, y // ph, x // pw, ph, pw, -1).permute(0, 6, 1, 2, 4, 3, 5).reshape(b, -1, f, y, x)
