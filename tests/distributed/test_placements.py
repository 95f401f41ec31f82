"""Every placement against one process that keeps the same stale keys and values and attends by a plain softmax."""

import pytest
import torch

from heterostep.hsa.cache import KVCache
from heterostep.parallel.attention import placement_for
from heterostep.parallel.collectives import Transport, exchange_rows
from heterostep.parallel.config import ParallelConfig
from heterostep.parallel.mesh import ParallelMesh
from heterostep.parallel.partition import sizes_for, slices
from ranks import run_ranks

H, D = 12, 8  # 12 heads: 2, 3 and 4 ranks can share them

LAYOUTS = [
    dict(),
    dict(ulysses=2),
    dict(ring=2, ring_cache="gathered"),
    dict(ring=2, ring_cache="sharded"),
    dict(ulysses=3),
    dict(ring=3, ring_cache="gathered"),
    dict(ring=3, ring_cache="sharded"),
    dict(ulysses=4),
    dict(ring=4, ring_cache="gathered"),
    dict(ring=4, ring_cache="sharded"),
    dict(ring=2, ulysses=2, ring_cache="gathered"),
    dict(ring=2, ulysses=2, ring_cache="sharded"),
]
WEIGHTED = [
    dict(ulysses=2, weights=(1.0, 3.0)),
    dict(ring=2, ring_cache="gathered", weights=(3.0, 1.0)),
    dict(ring=3, ring_cache="sharded", weights=(1.0, 5.0, 2.0)),
    dict(ring=2, ulysses=2, ring_cache="sharded", weights=(4.0, 1.0, 1.0, 1.0)),
]


def name_of(layout):
    return "-".join(f"{k}={v}" for k, v in layout.items()) or "one-rank"


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


def follow(layout, B, N, history, keep=True):
    """Run the steps on this rank; largest error against the reference, and what the ranks' rows look like together."""
    config = ParallelConfig(**layout)
    mesh = ParallelMesh.create(config)
    placement = placement_for(mesh, config)
    cache, reference = KVCache(history=history), Reference(B, N)
    g = torch.Generator().manual_seed(7)
    worst = 0.0
    for active in active_sets(B, N, seed=N) if keep else [None]:
        A = N if active is None else active.shape[-1]
        q, k, v = torch.randn(3, B, A, H, D, generator=g)
        weight = torch.rand(B, N, generator=g) if history else None
        expected = reference.attend(q, k, v, active, weight)
        sizes = sizes_for(config, N, active)
        mine = slices(sizes)[mesh.sequence.rank]
        plan = placement.prepare(active, sizes, N, B)
        out = placement.attend(
            q[:, mine], k[:, mine], v[:, mine], plan=plan, cache=cache if keep else None, weight=weight
        )
        assert out.shape == (B, mine.stop - mine.start, H, D) and out.dtype == q.dtype
        whole = exchange_rows(out.flatten(2), sizes, Transport(mesh.sequence)).view(B, A, H, D)
        worst = max(worst, (whole - expected).abs().max().item())
    return worst


@pytest.mark.parametrize("layout", LAYOUTS + WEIGHTED, ids=name_of)
def test_placement_equals_one_process(layout):
    ranks = ParallelConfig(**layout).world_size
    for B, N, history in ((1, 24, False), (2, 37, True), (3, 5, False)):
        assert max(run_ranks(ranks, follow, layout, B, N, history)) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_fewer_tokens_than_ranks(layout):
    for N in (1, 2, 3):
        assert max(run_ranks(ParallelConfig(**layout).world_size, follow, layout, 2, N, True)) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_a_dense_pass_needs_no_cache(layout):
    assert max(run_ranks(ParallelConfig(**layout).world_size, follow, layout, 1, 19, False, False)) < 1e-5
