"""The flags about ranks: which degrees they ask for, and what is chosen where they ask for none."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError
from ..parallel.config import ParallelConfig, check, degrees

_AXES = ("cfg", "ring", "ulysses")


def parallel_from(
    arguments: argparse.Namespace, num_heads: int, num_branches: int
) -> tuple[ParallelConfig | None, str]:
    """Return the degrees for a job, and a sentence that says why; None for one rank.

    Args:
        arguments: of `generate`; `rank` is set in a process that is a rank already.
        num_heads: attention heads of the model.
        num_branches: guidance branches of the request, 1 or 2.

    Raises:
        ConfigError: no degrees fit; the message lists those that do.
    """
    asked: dict[str, Any] = {axis: getattr(arguments, axis) for axis in _AXES if getattr(arguments, axis) is not None}
    how: dict[str, Any] = {
        name: getattr(arguments, name) for name in ("ring_cache", "kernel") if getattr(arguments, name) is not None
    }
    size = arguments.rank.world_size if arguments.rank is not None else arguments.nproc or 1
    # The widest first: branches need least exchange, then heads.
    fitting = [
        found
        for found in degrees(world_size=size, num_heads=num_heads, num_branches=num_branches)
        if all(dict(zip(_AXES, found, strict=True))[axis] == value for axis, value in asked.items())
    ]
    if not fitting:
        config = ParallelConfig(**asked, **how)
        check(config, world_size=size, num_heads=num_heads, num_branches=num_branches)
        raise ConfigError(f"{size} ranks cannot be {' x '.join(f'{a} {n}' for a, n in asked.items())}")
    if size == 1:
        if how:
            raise ConfigError(f"--{next(iter(how)).replace('_', '-')} is for several ranks; start them with --nproc P")
        return None, ""
    how |= zip(_AXES, fitting[0], strict=True)
    config = ParallelConfig(**how)
    chosen = "as asked" if len(asked) == len(_AXES) else f"for {num_heads} heads and {num_branches} guidance branch(es)"
    return config, f"{size} ranks: cfg {config.cfg} x ring {config.ring} x ulysses {config.ulysses}, {chosen}"


def own_flags(given: Sequence[str]) -> list[str]:
    """The flags for each rank: all but --nproc."""
    kept, skip = [], False
    for flag in given:
        if skip:
            skip = False
        elif flag == "--nproc":
            skip = True
        elif not flag.startswith("--nproc="):
            kept.append(flag)
    return kept
