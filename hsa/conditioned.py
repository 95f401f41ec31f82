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
from .budget import Schedule, affordable_full, place_steps
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
        T counts: N, less than N - C, or 0 (or N - C, where the others are to be evaluated at all steps); None where the
        policy cannot work on N - C tokens alone.

    Raises:
        ConfigError: the steps that must be full cost more than ``config.compute``.
    """
    required = affordable_full(schedule, config)
    n, steps = schedule.num_tokens, schedule.num_steps
    others, budget = n - conditioned, config.compute * steps * n + 1e-6
    num_full = len(required)
    while True:
        share = (budget - conditioned * num_full) / (steps * others)
        if share >= 1.0:
            more = int((budget - others * steps) / conditioned)
            full = set(place_steps([1.0] * steps, max(more, num_full), required))
            return [n if i in full else others for i in range(steps)]
        if share <= 0.0:
            return None
        try:
            spared = counts(replace(schedule, num_tokens=others), replace(config, compute=share))
        except ConfigError:  # its message would speak of another share than the one that was asked for
            return None
        found = [n if count == others or i in required else count for i, count in enumerate(spared)]
        # A smaller share has no more full steps: this ends, and does not cost more than was asked for.
        if found.count(n) <= num_full:
            return found
        num_full = found.count(n)
