"""Cutting a step's active tokens into one slice for each rank.

With K/V caches that are sharded by heads, or whole on each rank, no token has an owner: which rank computes which
tokens changes neither the result nor what is sent, only *how many* each rank has matters. So the active list is cut
anew at every step into consecutive slices, and a cut is nothing but a list of sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

import torch
from torch import Tensor

from ..errors import ConfigError
from .config import ParallelConfig


def cut(count: int, parts: int, weights: Sequence[float] | None = None) -> list[int]:
    """Cut `count` tokens into `parts` sizes.

    Without weights they differ by at most 1, larger ones first. With weights they follow count * w / sum(w) to
    less than 1 by the method of largest remainders, ties by index. Sizes may be 0.
    """
    assert count >= 0 and parts >= 1
    if weights is None:
        base, rest = divmod(count, parts)
        return [base + (i < rest) for i in range(parts)]
    assert len(weights) == parts, "one weight for each part"
    # Exact fractions: every rank, on whatever machine, must come to the same sizes.
    exact = [Fraction(w) for w in weights]
    quotas = [count * w / sum(exact) for w in exact]
    sizes = [int(q) for q in quotas]
    by_remainder = sorted(range(parts), key=lambda i: (sizes[i] - quotas[i], i))
    for i in by_remainder[: count - sum(sizes)]:
        sizes[i] += 1
    return sizes


def slices(sizes: Sequence[int]) -> list[slice]:
    """Return the consecutive slices that have these sizes."""
    ends = list(accumulate(sizes))
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def imbalance(sizes: Sequence[int]) -> float:
    """Max / mean of the sizes: 1.0 is perfect, and the time lost is this minus 1. 1.0 for no tokens at all."""
    return max(sizes) * len(sizes) / sum(sizes) if sum(sizes) else 1.0


def sizes_for(
    config: ParallelConfig,
    num_tokens: int,
    active: Tensor | None = None,
    grid: tuple[int, int, int] | None = None,
    speeds: Sequence[float] | None = None,
) -> list[int]:
    """Rows that each rank of the sequence axis computes at one step, ring-major.

    Args:
        config: names the cut.
        num_tokens: N.
        active: int64 [A] or [B, A]; None for all tokens.
        grid: tokens (F, Y, X) of a video, which ``interleaved`` uses.
        speeds: of the ranks, as far as ``measured`` knows them.

    Raises:
        ConfigError: a static cut was asked for with a set of tokens for each sample; counts per rank differ then.
    """
    parts = config.sequence_size
    if config.cut in ("equal", "measured"):
        return cut(num_tokens if active is None else active.shape[-1], parts, speeds or config.weights)
    if active is None:
        active = torch.arange(num_tokens)
    elif active.ndim == 2:
        raise ConfigError(f"cut={config.cut!r} needs one active set for the whole batch; cut='equal' takes any.")
    owner = owners(config.cut, num_tokens, parts, grid).to(active.device)
    sizes: list[int] = torch.bincount(owner[active], minlength=parts).tolist()
    return sizes


def owners(static_cut: str, num_tokens: int, parts: int, grid: tuple[int, int, int] | None = None) -> Tensor:
    """Owner of each token, int64 [N], of a static cut; for the benchmark.

    ``contiguous``: equal ranges, as xDiT and diffusers cut a sequence. ``interleaved``: (f + y + x) mod parts on the
    grid of tokens, the static cut that spreads moving objects best; index mod parts where no grid is given.
    """
    if static_cut == "contiguous":
        return torch.arange(parts).repeat_interleave(torch.tensor(cut(num_tokens, parts)))
    assert static_cut == "interleaved", static_cut
    if grid is None:
        return torch.arange(num_tokens) % parts
    assert grid[0] * grid[1] * grid[2] == num_tokens
    f, y, x = (torch.arange(size) for size in grid)
    return ((f[:, None, None] + y[:, None] + x) % parts).flatten()
