"""The demo transformer: the stock class at demo size, with weights that start where training would take long to get.

A small model spends most of a short training on finding out that neighbours in space and time matter, and that the
padding of its text does not. Both can be said beforehand, in the weights, with no change to the class:

* *Where to look.* Rotary embedding turns queries and keys by their position, so constant biases q and k in one rotary
  pair of frequency w add |q||k| cos(w (p_k - p_q) + angle) to a score: a bump around an offset of one's choice. Each
  head starts with its own: the same place in all frames, around in the same frame, the previous frame, the next one.
* *What to ignore.* WanPipeline pads captions to 512 rows of zeros. One feature of the text starts as a sign of padding,
  and one channel of every head's keys and queries as a strong dislike of it. Otherwise seven words share a hundredth of
  the attention, and of the gradient, with 505 equal keys.

A third thing is said for good: *the noise level is a smooth knob*. The stock embedding of time has sinusoids down to a
period of 6 timesteps of 1,000. What a short training leaves in the weights of these makes the velocity jump from step
to step, by as much as it really changes, which no solver and no forecast can follow.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from latents import CHANNELS
from text import MARK, WIDTH

HEADS, HEAD_DIM, LAYERS, FFN = 4, 32, 6, 512
PATCH = 2
OFFSETS = ((0, 0, 4.0), (0, 5.0, 2.0), (-1, 4.0, 2.5), (1, 4.0, 2.5))
"""For each head of self-attention: offset in frames of the bump, its height over frames and over rows and columns, in
nats; 0 is flat."""
DISLIKE = 9.0
"""By how many nats padding starts below a word."""
FASTEST = 0.1
"""Greatest frequency of the time embedding that is used, in radians per timestep."""


def build_transformer() -> WanTransformer3DModel:
    """The stock class, initialised as above; blocks start near the identity, their gates open."""
    model = WanTransformer3DModel(
        patch_size=(1, PATCH, PATCH), num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=CHANNELS,
        out_channels=CHANNELS, text_dim=WIDTH, freq_dim=64, ffn_dim=FFN, num_layers=LAYERS, cross_attn_norm=True,
        rope_max_seq_len=64,
    )  # fmt: skip
    with torch.no_grad():
        for block in model.blocks:
            torch.nn.init.normal_(block.attn1.to_out[0].weight, std=0.02)
            torch.nn.init.normal_(block.attn2.to_out[0].weight, std=0.02)
            torch.nn.init.zeros_(block.ffn.net[2].weight)
            for layer in (block.attn1.to_out[0], block.attn2.to_out[0], block.ffn.net[2]):
                torch.nn.init.zeros_(layer.bias)
            torch.nn.init.zeros_(block.scale_shift_table)
            block.scale_shift_table[:, (2, 5)] = 1.0  # a closed gate starves the layer behind it of gradient
            _look_around(block)
            _ignore_padding(block)
        _mark_padding(model)
        _pass_noise(model)
        smooth_time(model)
    return model


def slow_features(model: WanTransformer3DModel) -> torch.Tensor:
    """Mask [freq_dim] of the sinusoids of the time embedding that are used, on the model's device."""
    half = model.config.freq_dim // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=model.device) / half)
    return (frequencies <= FASTEST).float().repeat(2)  # of cosines, then of sines


def smooth_time(model: WanTransformer3DModel) -> None:
    """Silence the fast sinusoids of the time embedding."""
    with torch.no_grad():
        model.condition_embedder.time_embedder.linear_1.weight *= slow_features(model)


def _look_around(block: WanTransformerBlock) -> None:
    """Give every head of self-attention its bump."""
    attn = block.attn1
    side = 2 * (HEAD_DIM // 6)
    starts = (0, HEAD_DIM - 2 * side, HEAD_DIM - side)  # of the rotary pairs over frames, rows, columns
    sizes = (HEAD_DIM - 2 * side, side, side)
    for layer in (attn.to_q, attn.to_k):
        torch.nn.init.zeros_(layer.bias)
    for head, (frames, over_frames, over_space) in enumerate(OFFSETS):
        for start, size, offset, height in zip(
            starts, sizes, (frames, 0, 0), (over_frames, over_space, over_space), strict=True
        ):
            for pair in (0, 1):  # the two highest frequencies: the second tells offsets of a whole turn apart
                rows = slice(head * HEAD_DIM + start + 2 * pair, head * HEAD_DIM + start + 2 * pair + 2)
                turn = -offset * 10_000.0 ** (-2 * pair / size)
                attn.to_q.bias[rows] = torch.tensor([1.0, 0.0])
                attn.to_k.bias[rows] = torch.tensor([math.cos(turn), math.sin(turn)])
                # Queries and keys are divided by their root mean square (about .65 here) before these weights.
                gain = 0.65 * math.sqrt(height * math.sqrt(HEAD_DIM))
                attn.norm_q.weight[rows] = attn.norm_k.weight[rows] = max(gain, 0.3)
                attn.to_q.weight[rows] *= 0.2
                attn.to_k.weight[rows] *= 0.2


def _mark_padding(model: WanTransformer3DModel) -> None:
    """Make channel 0 of the projected text large for padding (rows of zeros) and about zero for words."""
    embedder = model.condition_embedder.text_embedder
    embedder.linear_1.weight[0] = 0
    embedder.linear_1.weight[0, MARK] = -2.0
    embedder.linear_1.bias[0] = 2.0
    embedder.linear_2.weight[0] = 0
    embedder.linear_2.weight[:, 0] = 0
    embedder.linear_2.weight[0, 0] = 2.0
    embedder.linear_2.bias[0] = 0


def _ignore_padding(block: WanTransformerBlock) -> None:
    """Let the first channel of every head's keys see that mark, and that of its queries reject it."""
    attn = block.attn2
    rows = torch.arange(HEADS) * HEAD_DIM
    attn.to_q.weight[rows] = 0
    attn.to_q.bias[rows] = -1.0
    attn.to_k.weight[rows] = 0
    attn.to_k.weight[:, 0] = 0
    attn.to_k.weight[rows, 0] = 1.0
    attn.to_k.bias[rows] = 0
    score = 1.6 * 5.2 / math.sqrt(HEAD_DIM)  # of padding, with both norms' weights at 1
    attn.norm_q.weight[rows] = attn.norm_k.weight[rows] = math.sqrt(DISLIKE / score)


def _pass_noise(model: WanTransformer3DModel) -> None:
    """Noise in, noise out: velocity carries eps, so a token's own values must pass through the residual stream."""
    rows = CHANNELS * PATCH * PATCH
    model.patch_embedding.weight.mul_(0.3)
    model.patch_embedding.weight[:rows].copy_(torch.eye(rows).view(rows, CHANNELS, 1, PATCH, PATCH) * 1.5)
    # Rows leave as (ph, pw, c), they came in as (c, ph, pw).
    out_of_in = torch.arange(rows).view(CHANNELS, PATCH, PATCH).permute(1, 2, 0).flatten()
    model.proj_out.weight.mul_(0.1)
    model.proj_out.weight[:, :rows] += torch.eye(rows)[out_of_in] * 0.4
    model.proj_out.bias.zero_()
    model.scale_shift_table.zero_()


def text_attention(model: WanTransformer3DModel, text: torch.Tensor, words: int) -> list[float]:
    """Share of each block's text attention that goes to the first `words` of zero-padded `text` [1, L, WIDTH].

    Queries are taken for random hidden states: a figure to look at, not a measurement of a clip.
    """
    shares = []
    hidden = F.layer_norm(torch.randn(256, HEADS * HEAD_DIM), (HEADS * HEAD_DIM,))
    rows = model.condition_embedder.text_embedder(text)[0]
    for block in model.blocks:
        attn = block.attn2
        q = attn.norm_q(attn.to_q(hidden)).view(-1, HEADS, HEAD_DIM)
        k = attn.norm_k(attn.to_k(rows)).view(-1, HEADS, HEAD_DIM)
        scores = torch.einsum("nhd,khd->nhk", q, k) / math.sqrt(HEAD_DIM)
        shares.append(scores.softmax(-1)[..., :words].sum(-1).mean().item())
    return shares
