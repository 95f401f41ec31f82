"""Cutting a step's active tokens into one slice for each rank.

With K/V caches that are sharded by heads, or whole on each rank, no token has an owner: which rank computes which
tokens changes neither the result nor what is sent, only *how many* each rank has matters. So the active list is cut
anew at every step into consecutive slices, and a cut is nothing but a list of sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

from torch import Tensor

from .collectives import Agreement
from .config import ParallelConfig
from .mesh import ParallelMesh


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
    config: ParallelConfig, num_tokens: int, active: Tensor | None = None, speeds: Sequence[float] | None = None
) -> list[int]:
    """Rows that each rank of the sequence axis computes at one step, ring-major.

    Args:
        config: degrees and relative speeds.
        num_tokens: N.
        active: int64 [A] or [B, A]; None for all tokens.
        speeds: of the ranks, as far as they were measured; they replace those of `config`.
    """
    count = num_tokens if active is None else active.shape[-1]
    return cut(count, config.sequence_size, speeds or config.weights)


MEASURED_STEPS = 6
"""Steps over which speeds are measured; the first one, which pays for allocations, does not count."""


class Speeds:
    """Rows per second of the ranks of a sequence group, for cuts that let all of them end at the same time.

    Attributes:
        weights: by rank of the sequence axis, the same on all ranks; None until something is known.
    """

    def __init__(self, mesh: ParallelMesh, agreement: Agreement) -> None:
        """Know nothing yet."""
        self.mesh, self._agreement = mesh, agreement
        self.weights: tuple[float, ...] | None = None
        self._steps, self._rows, self._seconds = 0, 0, 0.0

    def observe(self, rows: int, seconds: float) -> None:
        """Add a step of this rank: rows that it evaluated, and how long that took without waiting for others.

        All ranks must report the same steps: they exchange what they know.
        """
        self._steps += 1
        if self._steps == 1 or self._steps > MEASURED_STEPS:
            return
        self._rows, self._seconds = self._rows + rows, self._seconds + seconds
        known = self._agreement.collect((self._rows, self._seconds))
        if any(count == 0 or spent <= 0.0 for count, spent in known):
            return
        speeds = [count / spent for count, spent in known]
        size = self.mesh.sequence.size
        # Groups for other guidance branches cut alike: the slowest of those that get the same slice counts.
        self.weights = tuple(min(speeds[rank::size]) for rank in range(size))
