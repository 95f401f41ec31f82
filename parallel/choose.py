"""The automatic choice of degrees and of the ring's cache, each with its reason.

Inputs must be the same on every rank (the least free memory of all, for instance): the choice is then, too.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ..errors import ConfigError
from .config import ParallelConfig
from .topology import Topology

GIB = 2**30
KV_SHARE = 0.7
"""Part of the free memory that K/V may take; activations need the rest."""


def choose(
    world_size: int,
    num_heads: int,
    num_branches: int,
    *,
    kv_bytes: int | None = None,
    free_bytes: int | None = None,
    topology: Topology | None = None,
) -> tuple[ParallelConfig, str]:
    """Choose cfg, ring and ulysses for a job, and what a ring rank keeps.

    As many guidance branches side by side as possible: they exchange velocities only, once a step. Then as many ranks
    on ulysses as the heads allow, the rest on ring. Of all valid degrees these send the fewest bytes and keep the
    fewest, whatever the links: P ranks in r islands send (r-1)/r * 4 A d / P elements out of theirs by heads alone, and
    r/2 >= 1 times as many by ulysses inside and ring across.

    Args:
        world_size: ranks of the job.
        num_heads: attention heads of a layer.
        num_branches: guidance branches, 1 without guidance.
        kv_bytes: K/V of all tokens, layers, heads and branches (`kv_bytes`); None: not known.
        free_bytes: memory that is free on the fullest rank, weights loaded; None: not known.
        topology: links of this machine; only says in the reason whether ulysses groups have fast ones.

    Returns:
        The degrees and one sentence that says why.
    """
    if min(world_size, num_heads, num_branches) < 1:
        raise ConfigError("The choice of degrees needs at least one rank, one head and one guidance branch.")
    cfg = math.gcd(world_size, num_branches)
    ulysses = math.gcd(world_size // cfg, num_heads)
    ring = world_size // cfg // ulysses
    reasons = [f"{world_size} rank(s), {num_branches} guidance branch(es), {num_heads} heads"]
    if cfg > 1:
        reasons.append(f"cfg {cfg}: branches side by side exchange velocities only")
    if ulysses > 1:
        reasons.append(f"ulysses {ulysses}: the most of the {world_size // cfg} ranks of a branch that share the heads")
    if ring > 1:
        reasons.append(f"ring {ring}: the ranks that the heads leave over")
    if topology is not None and ulysses > 1 and len(topology.order) >= ulysses:
        where = "spans GPUs without NVLink" if topology.split(ulysses) else "has NVLink inside"
        reasons.append(f"a ulysses group {where}")
    config, why = resolve(ParallelConfig(cfg=cfg, ring=ring, ulysses=ulysses), kv_bytes=kv_bytes, free_bytes=free_bytes)
    return config, "; ".join([*reasons, why] if why else reasons)


def resolve(
    config: ParallelConfig, *, kv_bytes: int | None = None, free_bytes: int | None = None
) -> tuple[ParallelConfig, str]:
    """Replace ``ring_cache="auto"`` by what fits: gathered sends less, sharded keeps less.

    Returns:
        The configuration, unchanged where nothing is to choose, and why; the reason also says where K/V do not fit at
        all. Without figures sharded is taken: it needs no more memory than any other placement.
    """
    if kv_bytes is None or free_bytes is None:
        if config.ring == 1 or config.ring_cache != "auto":
            return config, ""
        return replace(config, ring_cache="sharded"), "ring cache sharded: free memory is not known"
    room = int(free_bytes * KV_SHARE)
    gathered = kv_bytes // (config.cfg * config.ulysses)
    sharded = gathered // config.ring
    form = config.ring_cache
    if form == "auto":
        form = "gathered" if gathered <= room else "sharded"
    needed = gathered if form == "gathered" else sharded
    figures = f"K/V {needed / GIB:.2f} GiB per rank, room for {room / GIB:.2f} GiB"
    if config.ring > 1:
        figures = f"ring cache {form}: {figures}"
        if form == "sharded" and gathered > room:
            figures = f"{figures}, not for {gathered / GIB:.2f} GiB gathered"
    if needed > room:
        figures = f"{figures}: too little, so take more ranks or a narrower kv_dtype"
    return (replace(config, ring_cache=form) if config.ring > 1 else config), figures


def kv_bytes(
    *, num_tokens: int, num_layers: int, width: int, num_branches: int, itemsize: int, history: bool = False
) -> int:
    """Bytes of K and V of a whole video: 2 N d L per branch, twice that with the history of the K/V forecast."""
    return 2 * num_tokens * width * num_layers * num_branches * itemsize * (2 if history else 1)
