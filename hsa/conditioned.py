"""Tokens that are given, such as a first frame: their velocity is never used, so that they get few evaluations.

A conditioned token is clean from the start, and the pipeline puts it back after every step. Other tokens attend to its
keys and values, which change little: they are those of its last evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..errors import ConfigError
from .budget import Schedule, affordable_full, place_steps
from .config import HSAConfig

Counts = Callable[[Schedule, HSAConfig], list[int]]


def spared_counts(counts: Counts, schedule: Schedule, config: HSAConfig, conditioned: int) -> list[int] | None:
    """Tokens per step where conditioned tokens are evaluated only on steps that must be full.

    What is saved is spent on the others: the sum stays that of ``config.compute``. If there is more to spend than the
    others can take, more steps are full.

    Args:
        counts: the policy's, for any number of tokens.
        schedule: steps, and all N tokens.
        config: settings.
        conditioned: C, the number of conditioned tokens, 0 < C < N.

    Returns:
        T counts: N, at most N - C, or 0; None where the policy cannot work on N - C tokens alone.

    Raises:
        ConfigError: the steps that must be full cost more than ``config.compute``.
    """
    full = affordable_full(schedule, config)
    n, steps = schedule.num_tokens, schedule.num_steps
    others, budget = n - conditioned, config.compute * steps * n + 1e-6
    share = (budget - conditioned * len(full)) / (steps * others)
    if share >= 1.0:
        more = int((budget - others * steps) / conditioned)
        full = set(place_steps([1.0] * steps, max(more, len(full)), full))
        return [n if i in full else others for i in range(steps)]
    try:
        spared = counts(replace(schedule, num_tokens=others), replace(config, compute=share))
    except ConfigError:  # its message would speak of another share than the one that was asked for
        return None
    return [n if i in full else count for i, count in enumerate(spared)]
