"""Tokens that are given, such as a first frame: their velocity is never used, so that they get few evaluations.

A conditioned token is clean from the start, and the pipeline puts it back after every step. But other tokens attend to
its keys and values, which beyond the first layer follow what it sees of the others: steps that evaluate some tokens
leave it out, full ones renew it. To evaluate it at the first step alone was measured too, and was worse
(benchmarks/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..errors import ConfigError
from .budget import Schedule, affordable_full, bucket_of, place_steps
from .config import HSAConfig

Counts = Callable[[Schedule, HSAConfig], list[int]]


def spared_counts(counts: Counts, schedule: Schedule, config: HSAConfig, conditioned: int) -> list[int] | None:
    """Tokens per step where conditioned tokens are evaluated on full steps only.

    What is saved is spent on the others: the sum stays that of ``config.compute``. If there is more to spend than the
    others can take, more steps are full.

    Args:
        counts: the policy's, for any number of tokens.
        schedule: steps, and all N tokens.
        config: settings.
        conditioned: C, the number of conditioned tokens, 0 < C < N.

    Returns:
        T counts, to be taken from the N - C others first; None where the policy cannot work on these alone.

    Raises:
        ConfigError: the steps that must be full cost more than ``config.compute``.
    """
    required = affordable_full(schedule, config)
    n, steps = schedule.num_tokens, schedule.num_steps
    others, budget = n - conditioned, config.compute * steps * n + 1e-6

    def planned(num_full: int) -> list[int]:
        """Counts if `num_full` steps were full, on which conditioned tokens are paid for."""
        share = (budget - conditioned * num_full) / (steps * others)
        spared = counts(replace(schedule, num_tokens=others), replace(config, compute=min(max(share, 1e-9), 1.0)))
        return [n if count == others or i in required else count for i, count in enumerate(spared)]

    if budget >= others * steps + conditioned * len(required):
        full = set(place_steps([1.0] * steps, int((budget - others * steps) / conditioned), required))
        found = [n if i in full else others for i in range(steps)]
        return _topped_up(found, int(budget) - sum(found), n, bucket_of(n))
    # The more steps are paid for, the less is left and the fewer are full: the first number that is not exceeded.
    low, high = len(required), steps
    try:
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if planned(middle).count(n) <= middle else (middle + 1, high)
        found = planned(low)
    except ConfigError:  # its message would speak of another share than the one that was asked for
        return None
    return _topped_up(found, int(budget) - sum(found), others, bucket_of(n))


def _topped_up(counts: list[int], left: int, most: int, bucket: int) -> list[int]:
    """Spend what is left over on partial steps, the largest first, up to `most` tokens each."""
    for i in sorted(range(len(counts)), key=lambda i: (-counts[i], i)):
        if 0 < counts[i] < most:
            more = min(left, most - counts[i]) // bucket * bucket
            counts[i], left = counts[i] + more, left - more
    return counts
