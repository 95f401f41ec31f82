"""The flags about ranks: which degrees they ask for, and what is chosen where they ask for none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError
from ..parallel.config import ParallelConfig, check, choose, degrees, resolve
from ..parallel.kernels import pick

if TYPE_CHECKING:
    from .options import Command
    from .rank import Rank

_AXES = ("cfg", "ring", "ulysses")


def parallel_from(
    command: Command, num_heads: int, num_branches: int, kv_bytes: int, device: torch.device, rank: Rank | None = None
) -> tuple[ParallelConfig | None, str]:
    """Return the degrees for a job, and a sentence that says why; None for one rank.

    Args:
        command: names degrees, or leaves them out.
        num_heads: attention heads of the model.
        num_branches: guidance branches of the request, 1 or 2.
        kv_bytes: K/V of all tokens, layers and branches of the request.
        device: where the ranks compute.
        rank: this process, if it is a rank already.

    Raises:
        ConfigError: no degrees fit; the message lists those that do.
    """
    asked: dict[str, Any] = {axis: command.degrees[axis] for axis in _AXES if axis in command.degrees}
    how: dict[str, Any] = {name: value for name, value in command.degrees.items() if name not in _AXES}
    size = rank.world_size if rank is not None else command.ranks.nproc or 1
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
        if command.shard_weights:
            how["shard_weights"] = True
        if how:
            raise ConfigError(f"--{next(iter(how)).replace('_', '-')} needs several ranks; start them with --nproc P")
        return None, ""
    config, reason = choose(size, num_heads, num_branches)
    if asked:
        config = ParallelConfig(**dict(zip(_AXES, fitting[0], strict=True)))  # type: ignore[arg-type]
        reason = f"{size} ranks: cfg {config.cfg} x ring {config.ring} x ulysses {config.ulysses}"
    config = replace(config, **{"ring_cache": "auto"} | how)
    pick(config.kernel, device)
    if config.ring > 1 and config.ring_cache == "auto":
        config, why = resolve(config, kv_bytes=kv_bytes, free_bytes=_free_bytes(device, size))
        if rank is not None:  # free memory differs from rank to rank, the form must not
            gathered = rank.decide("gathered", lambda: config.ring_cache == "gathered")
            config = replace(config, ring_cache="gathered" if gathered else "sharded")
        reason = f"{reason}; {why}"
    return config, reason


def refit(wished: ParallelConfig | None, size: int, num_heads: int, num_branches: int) -> ParallelConfig | None:
    """Return the degrees for a number of ranks that may have changed; None for one rank.

    Args:
        wished: taken as they are where they fit; else new ones are chosen, with the same kernel, cut and ring cache.
            None: chosen.
        size: how many ranks there are.
        num_heads: attention heads of the model.
        num_branches: guidance branches of the request.
    """
    if size == 1:
        return None
    if wished is not None:
        fitting = degrees(world_size=size, num_heads=num_heads, num_branches=num_branches)
        if (wished.cfg, wished.ring, wished.ulysses) in fitting:
            return wished
    config, _ = choose(size, num_heads, num_branches)
    if wished is None:
        return config
    ring_cache = config.ring_cache if wished.ring_cache == "auto" else wished.ring_cache
    return replace(config, ring_cache=ring_cache, kernel=wished.kernel, cut=wished.cut)


def _free_bytes(device: torch.device, ranks: int) -> int | None:
    """Memory that a rank of this machine may take; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // ranks
    except (ValueError, OSError, AttributeError):
        return None


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
