"""The flags about ranks: which degrees they ask for, and what is chosen where they ask for none."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..errors import ConfigError
from ..parallel.config import ParallelConfig, Topology, check, choose, degrees, resolve
from ..parallel.config import read as read_topology
from ..parallel.kernels import pick

_AXES = ("cfg", "ring", "ulysses")


def parallel_from(
    given: Mapping[str, Any],
    size: int,
    num_heads: int,
    num_branches: int,
    kv_bytes: int,
    device: torch.device,
    *,
    shard_weights: bool = False,
    decide: Callable[[str, Callable[[], bool]], bool] | None = None,
) -> tuple[ParallelConfig | None, str]:
    """Return the degrees for a job, and a sentence that says why; None for one rank.

    Args:
        given: settings of `ParallelConfig` that were asked for.
        size: number of ranks.
        num_heads: attention heads of the model.
        num_branches: guidance branches of the request, 1 or 2.
        kv_bytes: K/V of all tokens, layers and branches of the request.
        device: where the ranks compute.
        shard_weights: whether the weights are to be shared too.
        decide: in a process that is a rank already, asks rank 0.

    Raises:
        ConfigError: no degrees fit; the message lists those that do.
    """
    asked: dict[str, Any] = {axis: given[axis] for axis in _AXES if axis in given}
    how: dict[str, Any] = {name: value for name, value in given.items() if name not in _AXES}
    fitting = _fitting(asked, size, num_heads, num_branches)
    if not fitting:
        config = ParallelConfig(**asked, **how)
        check(config, world_size=size, num_heads=num_heads, num_branches=num_branches)
        raise ConfigError(f"{size} ranks cannot be {' x '.join(f'{a} {n}' for a, n in asked.items())}")
    if size == 1:
        if shard_weights:
            how["shard_weights"] = True
        if how:
            raise ConfigError(f"--{next(iter(how)).replace('_', '-')} needs several ranks; start them with --nproc P")
        return None, ""
    config, reason = choose(size, num_heads, num_branches, topology=_links(device, size))
    if asked:
        config = ParallelConfig(**dict(zip(_AXES, fitting[0], strict=True)))  # type: ignore[arg-type]
        reason = f"{size} ranks: cfg {config.cfg} x ring {config.ring} x ulysses {config.ulysses}"
    config = replace(config, **{"ring_cache": "auto"} | how)
    pick(config.kernel, device)
    if config.ring > 1 and config.ring_cache == "auto":
        config, why = resolve(config, kv_bytes=kv_bytes, free_bytes=_free_bytes(device, size))
        if decide is not None:  # free memory differs from rank to rank, the form must not
            gathered = decide("gathered", lambda: config.ring_cache == "gathered")
            config = replace(config, ring_cache="gathered" if gathered else "sharded")
        reason = f"{reason}; {why}"
    return config, reason


def refit(asked: Mapping[str, Any], size: int, num_heads: int, num_branches: int) -> ParallelConfig | None:
    """Return the degrees for a number of ranks that may have changed; None for one rank.

    Args:
        asked: settings of `ParallelConfig`, all or some. Where the degrees among them do not fit, others are chosen,
            with the same kernel, cut and ring cache.
        size: how many ranks there are.
        num_heads: attention heads of the model.
        num_branches: guidance branches of the request.
    """
    if size == 1:
        return None
    axes = {axis: asked[axis] for axis in _AXES if axis in asked}
    how = {
        name: value for name, value in asked.items() if name not in _AXES and (name, value) != ("ring_cache", "auto")
    }
    fitting = _fitting(axes, size, num_heads, num_branches) if axes else []
    if fitting:
        return ParallelConfig(**dict(zip(_AXES, fitting[0], strict=True)), **how)  # type: ignore[arg-type]
    how.pop("weights", None)  # of other ranks
    return replace(choose(size, num_heads, num_branches)[0], **how)


def _fitting(axes: Mapping[str, int], size: int, num_heads: int, num_branches: int) -> list[tuple[int, int, int]]:
    """The degrees (cfg, ring, ulysses) that fit, and have the given ones on their axes; the widest first.

    Branches need least exchange, then heads.
    """
    return [
        found
        for found in degrees(world_size=size, num_heads=num_heads, num_branches=num_branches)
        if all(dict(zip(_AXES, found, strict=True))[axis] == value for axis, value in axes.items())
    ]


def _links(device: torch.device, ranks: int) -> Topology | None:
    """What NVML says of this machine's GPUs, where the ranks are on them; None where it cannot be asked."""
    if device.type != "cuda" or ranks > torch.cuda.device_count():
        return None
    try:
        return read_topology()
    except ConfigError:  # they would only be named in the reason
        return None


def _free_bytes(device: torch.device, ranks: int) -> int | None:
    """Memory that a rank of this machine may take; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // ranks
    except (ValueError, OSError, AttributeError):
        return None
