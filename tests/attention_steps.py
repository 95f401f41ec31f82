"""Cached attention over ranks beside one process that keeps the same stale keys and values."""

import torch
import torch.distributed as dist

from heterostep.hsa.cache import KVCache
from heterostep.parallel.attention import placement_for
from heterostep.parallel.collectives import Transport, exchange_rows
from heterostep.parallel.config import ParallelConfig
from heterostep.parallel.mesh import ParallelMesh
from heterostep.parallel.partition import sizes_for, slices

H, D = 12, 8  # 12 heads: 2, 3 and 4 ranks can share them


class Reference:
    """K and V of all tokens as they were last written, and the time before; a softmax in float64."""

    def __init__(self, B, N):
        self.now, self.before = (torch.zeros(2, B, N, H, D, dtype=torch.float64) for _ in range(2))

    def attend(self, q, k, v, active, weight):
        rows = torch.arange(self.now.shape[2]) if active is None else active
        for b, tokens in enumerate(rows.expand(q.shape[0], -1)):
            self.before[:, b, tokens] = self.now[:, b, tokens]
            self.now[:, b, tokens] = torch.stack([k[b], v[b]]).double()
        keys, values = self.now
        if weight is not None and active is not None:
            keys, values = self.now + weight.double()[:, :, None, None] * (self.now - self.before)
        scores = torch.einsum("bahd,bnhd->bhan", q.double(), keys) / D**0.5
        return torch.einsum("bhan,bnhd->bahd", scores.softmax(-1), values)


def active_sets(B, N, seed):
    """A full pass, then sets of many sizes, for the batch and for each sample, one full pass between."""
    g = torch.Generator().manual_seed(seed)

    def some(count, samples=None):
        rows = [torch.randperm(N, generator=g)[:count].sort().values for _ in range(samples or 1)]
        return torch.stack(rows) if samples else rows[0]

    odd = max(N // 2, 1) | 1
    sets = [None, some(min(odd, N)), some(1), some(max(N // 4, 1), B), torch.arange(N)[: max(N // 3, 1)], some(1, B)]
    return [*sets, None, some(N), some(min(odd, N), B), torch.arange(N)[-max(N // 3, 1) :]]


def follow(layout, B, N, history, keep=True, device="cpu", dtype=torch.float32, any_cut=False):
    """Run all steps on this rank and return the largest error of all ranks' rows.

    `keep`: whether there is a cache; without it only the first step, a dense one, can be made. On "cuda" each rank
    has the GPU of its number. `any_cut`: sizes at random instead of the configured ones.
    """
    device = torch.device(device, dist.get_rank()) if device == "cuda" else torch.device(device)
    config = ParallelConfig(**layout)
    mesh = ParallelMesh.create(config, device)
    placement = placement_for(mesh, config)
    cache, reference = KVCache(history=history), Reference(B, N)
    g = torch.Generator().manual_seed(7)
    worst, results = 0.0, []
    for active in active_sets(B, N, seed=N) if keep else [None]:
        A = N if active is None else active.shape[-1]
        q, k, v = torch.randn(3, B, A, H, D, generator=g).to(dtype)
        weight = torch.rand(B, N, generator=g) if history else None
        expected = reference.attend(q, k, v, active, weight)
        sizes = sizes_for(config, N, active)
        if any_cut:
            sizes = torch.randint(config.sequence_size, (A,), generator=g).bincount(minlength=len(sizes)).tolist()
        mine = slices(sizes)[mesh.sequence.rank]
        plan = placement.prepare(None if active is None else active.to(device), sizes, N, B)
        out = placement.attend(
            *(rows[:, mine].to(device) for rows in (q, k, v)),
            plan=plan,
            cache=cache if keep else None,
            weight=None if weight is None else weight.to(device),
        )
        assert out.shape == (B, mine.stop - mine.start, H, D) and out.dtype == q.dtype
        results.append((out, out.clone()))
        whole = exchange_rows(out.flatten(2), sizes, Transport(mesh.sequence)).view(B, A, H, D)
        worst = max(worst, (whole.cpu() - expected).abs().max().item())
    # Messages share their memory, results must not.
    assert all(torch.equal(out, copy) for out, copy in results)
    return worst
