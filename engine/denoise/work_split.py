"""One rank's share of a run: which tokens it evaluates at a step, and what it sends to and gets from the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...parallel.attention import Placement, Plan, placement_for
from ...parallel.collectives import Agreement, Traffic, Transport, exchange_rows
from ...parallel.config import ParallelConfig, check
from ...parallel.mesh import ParallelMesh
from ...parallel.partition import Speeds, cut, imbalance, sizes_for, slices
from ..models import Adapter
from ..report import ParallelRecord, RankReport, Sent
from .schedulers import adds_noise
from .windows import Blend

_PASS = "pass"
_OUTSIDE = ("plan", "velocity", "result")
"""Traffic that is not part of a pass of the transformer."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """This rank's part of one step.

    Attributes:
        sizes: tokens of each rank of the sequence axis.
        rows: n, tokens of this rank, which may be none.
        tokens: their indices, int64 [n] or [B, n]. Of a rank without any: token 0, for a pass must have one; its rows
            are dropped.
        plan: of the attention.
    """

    sizes: list[int]
    rows: int
    tokens: Tensor
    plan: Plan


class Sharding:
    """What a run on many ranks shares: the mesh, the attention's placement, and a record of all traffic.

    Every rank runs the same pipeline on the same latents.

    Attributes:
        mesh: this rank's place.
        config: the degrees.
        traffic: what was sent since the last `record`.
        placement: the attention.
        agreement: how the ranks come to one decision.
        speeds: of the ranks, where they are measured.
    """

    def __init__(self, mesh: ParallelMesh, config: ParallelConfig) -> None:
        """Share the work over `mesh` as `config` says.

        Raises:
            ConfigError: an attention kernel that is not there.
        """
        self.mesh, self.config = mesh, config
        self.traffic = Traffic()
        self.placement: Placement = placement_for(mesh, config, self.traffic)
        self._sequence, self._group = Transport(mesh.sequence, self.traffic), Transport(mesh.group, self.traffic)
        self._windows = Transport(mesh.windows, self.traffic)
        self._groups = Transport(mesh.cfg, self.traffic)
        self.agreement = Agreement(mesh, self.traffic)
        self.speeds = Speeds(mesh, self.agreement)

    @classmethod
    def of_ranks(cls, config: ParallelConfig | None, device: torch.device) -> Sharding | None:
        """Join the ranks that a configuration asks for; None for one rank."""
        if config is None or config.world_size == 1:
            return None
        return cls(ParallelMesh.create(config, device), config)

    def check(self, num_heads: int, num_branches: int) -> None:
        """Raise ConfigError unless the degrees suit a model's heads and a request's guidance branches."""
        check(self.config, world_size=self.mesh.world.size, num_heads=num_heads, num_branches=num_branches)

    def own(self, names: Sequence[str]) -> str:
        """Return the one of `names`, as many as the cfg degree, that this rank's group evaluates."""
        return names[self.mesh.cfg.rank]

    def share(self, active: Tensor | None, grid: tuple[int, int, int], batch_size: int) -> Share:
        """Cut the active tokens (None: all of `grid`; [A]; [B, A]), and plan the attention to them."""
        num_tokens = grid[0] * grid[1] * grid[2]
        sizes = sizes_for(self.config, num_tokens, active, self.speeds.weights)
        listed = torch.arange(num_tokens, device=self.mesh.device) if active is None else active
        rank = self.mesh.sequence.rank
        tokens = listed[..., slices(sizes)[rank]]
        if not sizes[rank]:
            tokens = listed.new_zeros((*listed.shape[:-1], 1))
        plan = self.placement.prepare(active, sizes, num_tokens, batch_size)
        return Share(sizes=sizes, rows=sizes[rank], tokens=tokens, plan=plan)

    def attend(
        self, share: Share, q: Tensor, k: Tensor, v: Tensor, cache: Any, weight: Tensor | None, everywhere: bool = False
    ) -> Tensor:
        """Attention of one layer to all tokens, over all ranks: with this rank's rows of k and v [B, n, H, D].

        q are the same rows, or, `everywhere`, queries [B, M, H, D] that all ranks have alike; of the shape of q.
        """
        attend = self.placement.attend_everywhere if everywhere else self.placement.attend
        if share.rows == k.shape[1]:
            return attend(q, k, v, plan=share.plan, cache=cache, weight=weight)
        k, v = k[:, :0], v[:, :0]  # the token that stands for none
        if everywhere:
            return attend(q, k, v, plan=share.plan, cache=cache, weight=weight)
        attend(q[:, :0], k, v, plan=share.plan, cache=cache, weight=weight)
        return q.new_zeros(q.shape[0], 1, *q.shape[2:])

    def gather(self, rows: Tensor, share: Share) -> Tensor:
        """This rank's velocity rows [B, n or 1, D] of a branch -> those of all active tokens [B, A, D]."""
        return exchange_rows(rows[:, : share.rows], share.sizes, self._sequence, "velocity")

    def gather_branches(self, rows: Tensor, share: Share) -> list[Tensor]:
        """The same where each cfg group evaluated a branch of its own: [B, A, D] for each, in their order."""
        sizes = share.sizes * self.mesh.cfg.size
        every = exchange_rows(rows[:, : share.rows], sizes, self._group, "velocity")
        return list(every.split(sum(share.sizes), dim=1))

    def same(self, others: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What each rank of the sequence axis has computed alike, such as sound, in the bits of the first of them."""
        return tuple(self._sequence.broadcast(other.contiguous(), 0, "velocity") for other in others)

    def same_branches(self, others: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """The same where each cfg group evaluated a branch of its own: one tuple for each, in their order."""
        groups, batch = self.mesh.cfg.size, len(others[0]) if others else 0
        every = [self._groups.gather(other, [batch] * groups, "velocity").split(batch) for other in self.same(others)]
        return list(zip(*every, strict=True)) if others else [()] * groups

    def deal(self, num_windows: int) -> list[range]:
        """Numbers of the windows that each group of ranks evaluates, the same at all steps: their K/V stay there.

        Raises:
            ConfigError: there are more groups than windows; on all ranks alike.
        """
        groups = self.mesh.windows.size
        if num_windows < groups:
            raise ConfigError(
                f"windows={groups} with {num_windows} window(s) of the video: at most one group of ranks for each, so "
                f"at most windows={num_windows}."
            )
        return [range(part.start, part.stop) for part in slices(cut(num_windows, groups))]

    def sizes(self, counts: Sequence[int], dealt: Sequence[range]) -> list[int]:
        """Tokens that each rank of a guidance branch evaluates, group by group, of windows with so many active ones."""
        ranks, weights = self.config.sequence_size, self.speeds.weights or self.config.weights
        sizes: list[int] = []
        for numbers in dealt:
            parts = [cut(counts[i], ranks, weights) for i in numbers]
            sizes.extend(sum(column) for column in zip(*parts, strict=True))
        return sizes

    def join(self, blend: Blend, dealt: Sequence[range]) -> None:
        """Give every group of windows what the others have summed up: the rows of the active tokens in their windows.

        B D sum(A_g) (W - 1) / W elements are sent by each rank on average; A_g are the active tokens of a group's
        windows, of which only those where two groups overlap are in two of them.
        """
        if self.mesh.windows.size == 1:
            return
        assert blend.rows is not None
        blend.rows = self._joined(blend.rows, [blend.reach(numbers) for numbers in dealt], blend.dtype)
        for number, other in enumerate(blend.others):
            spans = [blend.reach(numbers, number) for numbers in dealt]
            blend.others[number] = self._joined(other, spans, blend.dtype)

    def _joined(self, sums: Tensor, spans: Sequence[tuple[int, int]], dtype: torch.dtype) -> Tensor:
        """Sums [B, M, D] of this group over its span -> those of all groups over all of M."""
        low, high = spans[self.mesh.windows.rank]
        sizes = [end - start for start, end in spans]
        every = exchange_rows(sums[:, low:high].to(dtype), sizes, self._windows, "velocity").split(sizes, dim=1)
        joined = torch.zeros_like(sums)
        for part, (start, end) in zip(every, spans, strict=True):
            joined[:, start:end] += part
        return joined

    def timed(self) -> AbstractContextManager[None]:
        """Take the time of this rank's pass, without making a GPU wait."""
        return self.traffic.recorded(_PASS, 0, self.mesh.device)

    def record(self, sizes: Sequence[int]) -> ParallelRecord:
        """Describe the step that ends: tokens of each rank, and what this rank did since the last call."""
        totals = self.traffic.take()
        passed = totals.pop(_PASS, None)
        sent = {
            name: Sent(calls=count.calls, bytes=count.bytes, seconds=count.seconds) for name, count in totals.items()
        }
        inside = sum(count.seconds for name, count in sent.items() if name not in _OUTSIDE)
        seconds = max(passed.seconds - inside, 0.0) if passed is not None else 0.0
        if sizes and self.config.cut == "measured":
            rank, size = self.mesh.sequence.rank, self.mesh.sequence.size
            own = sizes[rank + (size * self.mesh.windows.rank if len(sizes) > size else 0)]
            self.speeds.observe(own * (passed.calls if passed is not None else 1), seconds)
        return ParallelRecord(tokens=list(sizes), imbalance=imbalance(sizes), seconds=seconds, sent=sent)

    def rank_report(self, steps: Sequence[ParallelRecord], kv_bytes: int, models: Sequence[Any]) -> RankReport:
        """Sum up this rank's steps, and look at its memory."""
        sent: dict[str, Sent] = {}
        for step in steps:
            for name, more in step.sent.items():
                had = sent.get(name, Sent(calls=0, bytes=0, seconds=0.0))
                sent[name] = Sent(
                    calls=had.calls + more.calls, bytes=had.bytes + more.bytes, seconds=had.seconds + more.seconds
                )
        weights = sum(_held(parameter) for model in models for parameter in model.parameters())
        return RankReport(
            rank=self.mesh.world.rank,
            sent=sent,
            kv_bytes=kv_bytes,
            weight_bytes=weights,
            peak_bytes=peak_bytes(self.mesh.device),
        )


def _held(parameter: Tensor) -> int:
    """Bytes of a parameter that are on this rank."""
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.nbytes


def peak_bytes(device: torch.device) -> int:
    """The most memory in use so far: of the GPU by this process, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check_degrees(sharding: Sharding, adapter: Adapter, pipe: Any) -> None:
    """Refuse degrees of parallelism that do not suit a model, or what guides a call of `pipe`.

    Raises:
        ConfigError: on all ranks alike.
    """
    sites = adapter.sites(adapter.transformers(pipe)[0][1])
    units = [unit for name in adapter.branches(pipe) for unit in adapter.units(pipe, name)]
    sharding.check(math.gcd(*(site.attention.heads for site in sites)), len(units))


def check_ranks(sharding: Sharding, adapter: Adapter, pipe: Any, latents: Tensor) -> None:
    """Refuse ranks that cannot work on one video together; `latents` are those that a run begins with.

    Raises:
        ConfigError: on all ranks alike.
    """
    check_degrees(sharding, adapter, pipe)
    if not sharding.agreement.same(latents):
        raise ConfigError(
            "The ranks begin with different latents: they must make the same video, so give the pipeline the same "
            "prompt and size and a generator with the same seed on every rank."
        )
    if adds_noise(pipe.scheduler) and not sharding.agreement.same(random_state(latents.device)):
        raise ConfigError(
            f"{type(pipe.scheduler).__name__} adds random noise at each step, and the ranks' random numbers differ: "
            "call torch.manual_seed with one seed on every rank."
        )


def random_state(device: torch.device) -> Tensor:
    """State of the random numbers that are drawn on a device without a generator of their own."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
