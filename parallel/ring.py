"""The ring axis: two forms of sharing the tokens of a layer, whatever its number of heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .collectives import Scratch, Transport
from .kernels import Kernel, merge
from .partition import cut, slices


class Cache(Protocol):
    """What a placement needs of the K/V cache of one layer; `hsa.cache.KVCache` is one."""

    def write(self, k: Tensor, v: Tensor, active: Tensor | None = None) -> None:
        """Overwrite rows [B, A, H, D] of the tokens [A] or [B, A]; None: all, and allocate."""

    def write_flat(self, k: Tensor, v: Tensor, index: Tensor) -> None:
        """Overwrite rows [M, H, D] at index [M] of the flattened (sample, token) pairs."""

    def keys_values(self, dtype: Any, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return K and V of all kept tokens, [B, N, H, D]."""


class Ring(Protocol):
    """One form of sharing the tokens of some heads among the ranks of the ring axis."""

    def prepare(
        self, active: Tensor | None, sizes: Sequence[int], num_tokens: int, batch_size: int, device: torch.device
    ) -> Any:
        """Plan a pass on `device`; `sizes` are the rows of each rank of the ring axis."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: Any, cache: Cache | None, weight: Tensor | None) -> Tensor:
        """Attend with this ring rank's rows of q, k, v [B, n, h, D] -> [B, n, h, D]."""

    def attend_everywhere(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Any, cache: Cache | None, weight: Tensor | None
    ) -> Tensor:
        """The same for queries [B, M, h, D] that all ring ranks have alike -> [B, M, h, D] on all of them."""


class Whole:
    """Ring form `gathered`: the cache is whole on each ring rank, and fresh K/V rows go to all of them.

    One all-gather a layer, K and V in one message; queries and outputs stay. A rank with n rows sends 2 n d (R-1)
    elements per sample, R the ring's size: with equal cuts 2 A d (R-1) / R. With one ring rank nothing moves.
    """

    @dataclass(frozen=True, kw_only=True)
    class Plan:
        """Which tokens are fresh, and how many each ring rank has."""

        active: Tensor | None
        sizes: tuple[int, ...]

    def __init__(self, ring: Transport, kernel: Kernel, scratch: Scratch) -> None:
        """Gather over `ring`, attend by `kernel`."""
        self._transport, self._kernel, self._scratch = ring, kernel, scratch

    def prepare(
        self, active: Tensor | None, sizes: Sequence[int], num_tokens: int, batch_size: int, device: torch.device
    ) -> Whole.Plan:
        """See `Ring`."""
        return self.Plan(active=active, sizes=tuple(sizes))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Whole.Plan, cache: Cache | None, weight: Tensor | None
    ) -> Tensor:
        """See `Ring`."""
        if self._transport.axis.size > 1:
            B, n, H, D = k.shape
            packed = self._scratch.take("packed keys_values", k, (n, 2, B, H, D))
            packed[:, 0], packed[:, 1] = k.transpose(0, 1), v.transpose(0, 1)
            k, v = (t.transpose(0, 1) for t in self._transport.gather(packed, plan.sizes, "keys_values").unbind(1))
        if cache is not None:
            cache.write(k, v, plan.active)
        if plan.active is not None:
            assert cache is not None, "a pass of some tokens needs the others' keys and values"
            k, v = cache.keys_values(q.dtype, weight)
        return self._kernel.attend_out(q, k, v)

    attend_everywhere = attend  # queries do not travel in any case


@dataclass(frozen=True, kw_only=True)
class Routes:
    """Where the units of one message go, and where they arrive. A unit is one row of q, k or v of one sample, [h * D].

    Attributes:
        send: units for each ring rank.
        receive: units from each ring rank.
        outgoing: which of my units [q; k; v] (or [k; v]), each by sample, go out in what order; int64 [sum(send)].
        keys: where the K rows of my tokens arrive, by sample and token.
        values: the same for V.
    """

    send: list[int]
    receive: list[int]
    outgoing: Tensor
    keys: Tensor
    values: Tensor


class Sharded:
    """Ring form `sharded`: each ring rank keeps K/V of its own range of tokens, and queries travel.

    Two collectives a layer: an all-to-all takes every query to every rank, and fresh K/V rows to the rank that owns
    their token, in one message; each rank attends to its own keys; another all-to-all takes the partial outputs home,
    where they are merged by their logsumexp in float32. With R ranks, e bytes per element, d = H * D, and n of the A
    rows on this rank, m of them owned by others, it sends per sample, in bytes,

        n d (R-1) e + 2 m d e + (A - n) (d e + 4 H).

    A partial output keeps the kernel's own precision, e bytes (4 in a float32 model): to widen it would double the
    bytes and add nothing. A pass of all tokens, cut as the ranges are, has m = 0.

    Ranges are consecutive and fixed for the life of the object. They are those of a pass of all tokens, so faster
    ranks own more keys too. A change of weights needs another object and then a pass of all tokens.
    """

    @dataclass(frozen=True, kw_only=True)
    class Plan:
        """What is the same in all layers of a pass.

        Attributes:
            shape: (B, A, n), n the rows of this ring rank.
            sizes: active rows of each ring rank.
            all: routes of queries, keys and values.
            rows: routes of keys and values alone.
            queries: where the queries of all ranks arrive, by sample; [B * A].
            slots: where these rows belong in the flattened cache; None in a pass of all tokens.
            owned: my range of tokens.
        """

        shape: tuple[int, int, int]
        sizes: tuple[int, ...]
        all: Routes
        rows: Routes
        queries: Tensor
        slots: Tensor | None
        owned: slice

    def __init__(
        self,
        ring: Transport,
        kernel: Kernel,
        scratch: Scratch,
        weights: Sequence[float] | None = None,
        ranks_per_part: int = 1,
    ) -> None:
        """Travel over `ring`, attend by `kernel`.

        Args:
            ring: transport of the ring axis.
            kernel: one with a logsumexp.
            scratch: memory for messages.
            weights: relative speeds of all ranks of the sequence axis; None: equally fast.
            ranks_per_part: how many of these, the ulysses degree, form one ring rank.
        """
        self._transport, self._kernel, self._scratch = ring, kernel, scratch
        self._weights, self._ranks_per_part = weights, ranks_per_part

    def ranges(self, num_tokens: int) -> list[slice]:
        """Return the tokens that each ring rank owns."""
        per_part = self._ranks_per_part
        sizes = cut(num_tokens, self._transport.axis.size * per_part, self._weights)
        return slices([sum(sizes[i : i + per_part]) for i in range(0, len(sizes), per_part)])

    def prepare(
        self, active: Tensor | None, sizes: Sequence[int], num_tokens: int, batch_size: int, device: torch.device
    ) -> Sharded.Plan:
        """See `Ring`. Computed on the host from the active list alone, so it waits for the device once."""
        me, B, n = self._transport.axis.rank, batch_size, sizes[self._transport.axis.rank]
        ranges = self.ranges(num_tokens)
        tokens = torch.arange(num_tokens) if active is None else active.cpu()
        tokens = tokens.expand(B, -1)
        owner = torch.bucketize(tokens, torch.tensor([r.stop for r in ranges]), right=True)
        rows = torch.tensor(sizes)
        my_owner = owner[:, slices(sizes)[me]].flatten()
        leaving = my_owner.argsort(stable=True).split(torch.bincount(my_owner, minlength=len(sizes)).tolist())
        # `nonzero` lists my tokens by sample and then token.
        source = torch.arange(len(sizes)).repeat_interleave(rows)
        sample, position = (owner == me).nonzero(as_tuple=True)
        kept_source = source[position]
        everything, begin = _routes(leaving, kept_source, rows * B, me, device)
        row = torch.arange(tokens.shape[1]) - (rows.cumsum(0) - rows)[source]
        queries = (begin[source] + row) + torch.arange(B)[:, None] * rows[source]
        owned = ranges[me]
        slots = sample * (owned.stop - owned.start) + tokens[sample, position] - owned.start
        return self.Plan(
            shape=(B, tokens.shape[1], n),
            sizes=tuple(sizes),
            all=everything,
            rows=_routes(leaving, kept_source, torch.zeros_like(rows), me, device, rows_of_each=B * n)[0],
            queries=queries.flatten().to(device),
            slots=None if active is None else slots.to(device),
            owned=owned,
        )

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Sharded.Plan, cache: Cache | None, weight: Tensor | None
    ) -> Tensor:
        """See `Ring`."""
        (B, A, _), (H, D) = plan.shape, q.shape[2:]
        arrived = self._sent((q, k, v), plan.all, "queries_keys_values")
        every_q = torch.index_select(arrived, 0, plan.queries, out=self._scratch.take("queries", q, (B * A, H * D)))
        k, v = self._kept(arrived, plan.all, plan, (H, D), cache, weight)
        return self._merged(*self._kernel.attend(every_q.view(B, A, H, D), k, v), plan)

    def attend_everywhere(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Sharded.Plan, cache: Cache | None, weight: Tensor | None
    ) -> Tensor:
        """See `Ring`. All ranks merge the same partial results in the same order."""
        arrived = self._sent((k, v), plan.rows, "keys_values")
        k, v = self._kept(arrived, plan.rows, plan, (q.shape[2], q.shape[3]), cache, weight)
        out, lse = self._kernel.attend(q, k, v)
        partial = self._with_bits(out, lse)
        parts = self._transport.gather(partial, [len(partial)] * len(plan.sizes), "partial_everywhere")
        return self._without_bits(parts.view(len(plan.sizes), *partial.shape), out, lse)

    def _sent(self, tensors: Sequence[Tensor], routes: Routes, name: str) -> Tensor:
        """Send rows [B, n, H, D] along their routes: what arrives, [sum(receive), H * D]."""
        like, width = tensors[0], tensors[0].shape[2] * tensors[0].shape[3]
        units = self._scratch.take("units", like, (len(tensors), *like.shape))
        for i, rows in enumerate(tensors):
            units[i] = rows
        leaving = self._scratch.take("leaving", like, (sum(routes.send), width))
        torch.index_select(units.view(-1, width), 0, routes.outgoing, out=leaving)
        return self._transport.all_to_all(leaving, routes.send, routes.receive, name)

    def _kept(
        self,
        arrived: Tensor,
        routes: Routes,
        plan: Sharded.Plan,
        heads: tuple[int, int],
        cache: Cache | None,
        weight: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Store the rows of my tokens that arrived; return K and V of all my tokens."""
        B = plan.shape[0]
        k, v = (
            torch.index_select(arrived, 0, where, out=self._scratch.take(name, arrived, (len(where), arrived.shape[1])))
            for name, where in (("keys", routes.keys), ("values", routes.values))
        )
        k, v = (rows.unflatten(1, heads) for rows in (k, v))
        if plan.slots is None:
            k, v = (t.view(B, len(t) // B, *heads) for t in (k, v))
            if cache is not None:
                cache.write(k, v)
            return k, v
        assert cache is not None, "a pass of some tokens needs the others' keys and values"
        cache.write_flat(k, v, plan.slots)
        return cache.keys_values(arrived.dtype, None if weight is None else weight[:, plan.owned])

    def _merged(self, out: Tensor, lse: Tensor, plan: Sharded.Plan) -> Tensor:
        """Send partial results [B, A, H, D] with lse [B, A, H] home and merge them: [B, n, H, D]."""
        n = plan.shape[2]
        partial = self._with_bits(out, lse)
        home = self._transport.all_to_all(partial, plan.sizes, [n] * len(plan.sizes), "partial_outputs")
        return self._without_bits(home.view(len(plan.sizes), n, *home.shape[1:]), out, lse)

    def _with_bits(self, out: Tensor, lse: Tensor) -> Tensor:
        """Rows first, [M, B, H, D + ...]: the lse as further elements, bit for bit: one message, nothing rounded."""
        bits, D = lse.unsqueeze(-1).view(out.dtype), out.shape[-1]
        shape = (out.shape[1], out.shape[0], out.shape[2], D + bits.shape[-1])
        partial = self._scratch.take("partial", out, shape)
        partial[..., :D], partial[..., D:] = out.transpose(0, 1), bits.transpose(0, 1)
        return partial

    @staticmethod
    def _without_bits(parts: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        """Merge parts [R, M, B, H, D + ...], each as of `_with_bits(out, lse)`: [B, M, H, D]."""
        D = out.shape[-1]
        lses = parts[..., D:].contiguous().view(lse.dtype).squeeze(-1)
        return merge(parts[..., :D], lses)[0].to(out.dtype).transpose(0, 1)


def _routes(
    leaving: Sequence[Tensor],
    kept_source: Tensor,
    queries: Tensor,
    me: int,
    device: torch.device,
    rows_of_each: int | None = None,
) -> tuple[Routes, Tensor]:
    """Routes of a message: to each rank my queries, if they travel, then K and then V of the tokens it owns.

    Args:
        leaving: for each rank, which of my rows, by sample, it owns.
        kept_source: which rank each of my own tokens' rows comes from, by sample and token.
        queries: units of queries that come from each rank; 0 where they do not travel.
        me: this rank.
        device: where the indices are needed.
        rows_of_each: rows of q, k or v on this rank, all samples; by default as many as its queries.

    Returns:
        The routes, and where the units of each rank begin among those that arrive.
    """
    mine = int(queries[me])
    rows = mine if rows_of_each is None else rows_of_each
    outgoing = [part for of in leaving for part in (torch.arange(mine), of + mine, of + mine + rows)]
    kept = torch.bincount(kept_source, minlength=len(leaving))
    begin = (queries + 2 * kept).cumsum(0) - queries - 2 * kept
    arrival = torch.empty_like(kept_source)
    arrival[kept_source.argsort(stable=True)] = torch.arange(len(kept_source))
    keys = arrival - (kept.cumsum(0) - kept)[kept_source] + (begin + queries)[kept_source]
    routes = Routes(
        send=[mine + 2 * len(of) for of in leaving],
        receive=(queries + 2 * kept).tolist(),
        outgoing=torch.cat(outgoing).to(device),
        keys=keys.to(device),
        values=(keys + kept[kept_source]).to(device),
    )
    return routes, begin
