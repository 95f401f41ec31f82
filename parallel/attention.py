"""Self-attention with cached keys and values over many ranks: what is sent, what is kept, who attends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .collectives import Scratch, Traffic, Transport
from .config import ParallelConfig
from .kernels import pick
from .mesh import ParallelMesh
from .ring import Cache, Ring, Sharded, Whole


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is the same in every layer of a pass; made by `Placement.prepare`.

    Attributes:
        batch_size: B.
        rows: n, this rank's rows of the active tokens.
        peers: rows of each rank of the ulysses axis.
        ring: the ring form's own plan.
    """

    batch_size: int
    rows: int
    peers: tuple[int, ...]
    ring: Any


class Placement:
    """Cached attention on a mesh: heads are shared over the ulysses axis, then tokens over the ring axis.

    Once per step (guidance branches can share a plan), and then in each layer, on every rank of the sequence axis
    alike::

        plan = placement.prepare(active, sizes, num_tokens, batch_size)
        out = placement.attend(q, k, v, plan=plan, cache=cache, weight=weight)

    `active` is None (all N tokens, in order) or ascending int64 [A] or [B, A]; `sizes` are the rows of each rank of
    ``mesh.sequence`` (`partition.sizes_for`), which cut the active list into consecutive slices; q, k, v
    [B, n, H, D] are this rank's rows, after normalisation and RoPE.

    **Over ulysses** (P ranks) one packed all-to-all brings the q, k and v of all the group's rows with h = H / P heads
    to each rank, and another one takes the outputs back: two collectives. The cache holds h heads of all tokens. No
    token has an owner. A rank with n of the group's A rows sends, in elements per sample, with d = H * D,

        3 n d (P-1)/P + (A - n) d / P,    with equal cuts 4 A d (P-1) / P^2.

    **Over ring** see `Whole` (gathered) and `ring.Sharded`. In a hybrid they see the rows of their ulysses group
    and h heads: A and n are sums over the group, and d is h * D.

    Attributes:
        name: for logs, e.g. ``ulysses 2 x ring 2 (gathered), sdpa``.
        traffic: what all its collectives sent.
    """

    def __init__(self, mesh: ParallelMesh, ulysses: Transport, ring: Ring, scratch: Scratch, name: str) -> None:
        """Use `placement_for`."""
        self.name = name
        self.traffic = ulysses.traffic
        self._ulysses, self._ring, self._scratch = ulysses, ring, scratch
        self._ring_axis, self._device = mesh.ring, mesh.device

    def prepare(self, active: Tensor | None, sizes: Sequence[int], num_tokens: int, batch_size: int) -> Plan:
        """Plan a pass.

        Args:
            active: None for all tokens, else ascending int64 [A] or [B, A]; the same on every rank.
            sizes: rows of each rank of the sequence axis, in order; sum(sizes) = A. Any may be 0.
            num_tokens: N.
            batch_size: B.
        """
        heads = self._ulysses.axis.size
        assert len(sizes) == heads * self._ring_axis.size, "one size for each rank of the sequence axis"
        assert sum(sizes) == (num_tokens if active is None else active.shape[-1]), "sizes must sum to A"
        groups = [tuple(sizes[i : i + heads]) for i in range(0, len(sizes), heads)]
        peers = groups[self._ring_axis.rank]
        return Plan(
            batch_size=batch_size,
            rows=peers[self._ulysses.axis.rank],
            peers=peers,
            ring=self._ring.prepare(active, [sum(group) for group in groups], num_tokens, batch_size, self._device),
        )

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, plan: Plan, cache: Cache | None, weight: Tensor | None = None
    ) -> Tensor:
        """Write the fresh rows of all ranks into the cache and attend to all tokens.

        Args:
            q: queries of this rank's rows [B, n, H, D].
            k: their keys.
            v: their values.
            plan: of this pass.
            cache: of this layer and branch; None keeps nothing, which only a pass of all tokens can do.
            weight: [B, N] of the damped K/V forecast, for all tokens on every rank; None without it.

        Returns:
            [B, n, H, D]. A pass of all tokens attends to the fresh rows themselves, any other one to the cache.
        """
        assert q.shape[:2] == (plan.batch_size, plan.rows), "the plan is of another pass"
        q, k, v = self._share_heads(q, k, v, plan=plan)
        return self._share_rows(self._ring.attend(q, k, v, plan.ring, cache, weight), plan)

    def attend_everywhere(
        self, q: Tensor, k: Tensor, v: Tensor, *, plan: Plan, cache: Cache | None, weight: Tensor | None = None
    ) -> Tensor:
        """The same for few queries that are not tokens of the video, and that every rank has alike.

        Keys and values travel as in `attend`, queries do not. Over ulysses each rank attends with its heads, and an
        all-gather puts them together: M d (P-1)/P elements sent per sample. Over a sharded ring each attends to its
        keys, and an all-gather brings the partial results to all.

        Args:
            q: queries [B, M, H, D], the same on every rank.
            k: keys of this rank's rows [B, n, H, D].
            v: their values.
            plan: of this pass.
            cache: of this layer and branch, or None, as in `attend`.
            weight: as in `attend`.

        Returns:
            [B, M, H, D], in the same bits on every rank.
        """
        assert k.shape[:2] == (plan.batch_size, plan.rows), "the plan is of another pass"
        ulysses = self._ulysses.axis
        k, v = self._share_heads(k, v, plan=plan)
        mine = q.unflatten(2, (ulysses.size, -1))[:, :, ulysses.rank]
        out = self._ring.attend_everywhere(mine, k, v, plan.ring, cache, weight)
        if ulysses.size == 1:
            return out
        heads = self._ulysses.gather(out.permute(2, 0, 1, 3), [out.shape[2]] * ulysses.size, "heads_everywhere")
        return heads.permute(1, 2, 0, 3).clone(memory_format=torch.contiguous_format)

    def _share_heads(self, *tensors: Tensor, plan: Plan) -> tuple[Tensor, ...]:
        """All heads of my rows -> my heads of the group's rows: [B, n, H, D] -> [B, A, h, D], for each tensor."""
        size = self._ulysses.axis.size
        if size == 1:
            return tensors
        B, n, H, D = tensors[0].shape
        packed = self._scratch.take("packed heads", tensors[0], (size, n, len(tensors), B, H // size, D))
        for i, rows in enumerate(tensors):
            packed[:, :, i] = rows.unflatten(2, (size, H // size)).permute(2, 1, 0, 3, 4)
        mine = self._ulysses.all_to_all(packed.flatten(0, 1), [n] * size, plan.peers, "heads_out")
        return tuple(rows.transpose(0, 1) for rows in mine.unbind(1))

    def _share_rows(self, out: Tensor, plan: Plan) -> Tensor:
        """My heads of the group's rows -> all heads of my rows: [B, A, h, D] -> [B, n, H, D]."""
        size = self._ulysses.axis.size
        if size == 1:
            return out
        B, _, h, D = out.shape
        home = self._ulysses.all_to_all(out.transpose(0, 1), plan.peers, [plan.rows] * size, "heads_home")
        mine = home.view(size, plan.rows, B, h, D).permute(2, 1, 0, 3, 4)
        # A copy in any case: the message's memory is the next layer's.
        return mine.clone(memory_format=torch.contiguous_format).flatten(2, 3)


def placement_for(mesh: ParallelMesh, config: ParallelConfig, traffic: Traffic | None = None) -> Placement:
    """Return the placement that `config` asks for on `mesh`.

    ``ring_cache="auto"`` that nobody has resolved (`config.resolve`) is ``sharded``, which needs least memory.

    Args:
        mesh: this rank's place.
        config: its degrees must be those of the mesh.
        traffic: where to count what is sent; a new record by default.

    Raises:
        ConfigError: degrees of another mesh, or a kernel that is not there.
    """
    asked, made = (config.cfg, config.ring, config.ulysses), (mesh.cfg.size, mesh.ring.size, mesh.ulysses.size)
    if asked != made:
        raise ConfigError(f"cfg x ring x ulysses of {asked} on a mesh of {made}: the degrees must be the same.")
    kernel = pick(config.kernel, mesh.device)
    scratch = Scratch()
    ulysses = Transport(mesh.ulysses, traffic, scratch)
    over_ring = Transport(mesh.ring, ulysses.traffic, scratch)
    name = f"ulysses {config.ulysses}"
    ring: Ring
    if config.ring == 1:
        ring = Whole(over_ring, kernel, scratch)
    elif config.ring_cache == "gathered":
        ring, name = Whole(over_ring, kernel, scratch), f"{name} x ring {config.ring} (gathered)"
    else:
        ring = Sharded(over_ring, kernel, scratch, config.weights, config.ulysses)
        name = f"{name} x ring {config.ring} (sharded)"
    return Placement(mesh, ulysses, ring, scratch, f"{name}, {kernel.name}")
