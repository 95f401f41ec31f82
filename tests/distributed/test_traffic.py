"""Bytes that really go to other ranks, against formulas written here anew, in elements per layer and rank."""

from dataclasses import replace

import pytest
import torch

from heterostep.engine.estimate import read_sizes, sent_by_layer
from heterostep.hsa.cache import KVCache
from heterostep.parallel.attention import placement_for
from heterostep.parallel.collectives import Traffic, Transport, exchange_rows
from heterostep.parallel.config import ParallelConfig
from heterostep.parallel.mesh import Axis, ParallelMesh
from heterostep.parallel.partition import cut, sizes_for, slices
from ranks import run_ranks

H, D = 12, 4
WIDTH = H * D


def one_layer(layout, N, active, B, dtype):
    """Count one layer of a pass over `active`, after a pass over all tokens."""
    config = ParallelConfig(**layout)
    mesh = ParallelMesh.create(config)
    placement = placement_for(mesh, config)
    cache = KVCache()
    for tokens in (None, active):
        placement.traffic.take()
        sizes = sizes_for(config, N, tokens)
        rows = torch.zeros(B, sizes[mesh.sequence.rank], H, D, dtype=dtype)
        plan = placement.prepare(tokens, sizes, N, B)
        placement.attend(rows, rows, rows, plan=plan, cache=cache)
    return {name: (count.calls, count.bytes) for name, count in placement.traffic.take().items()}


def random_set(N, A):
    return torch.randperm(N, generator=torch.Generator().manual_seed(A))[:A].sort().values


# A/N = 1, .5, .25 of N = 48 divide by every P; the others divide by none.
CASES = [(48, 48), (48, 24), (48, 12), (53, 53), (53, 29), (53, 13), (53, 1)]


@pytest.mark.parametrize("P", [2, 3, 4])
def test_heads(P):
    for N, A in CASES:
        counts = run_ranks(P, one_layer, dict(ulysses=P), N, random_set(N, A), 1, torch.float32)
        for n, count in zip(cut(A, P), counts, strict=True):
            sent = 3 * n * WIDTH * (P - 1) // P, (A - n) * WIDTH // P
            assert count == {"heads_out": (1, 4 * sent[0]), "heads_home": (1, 4 * sent[1])}
            if A % P == 0:
                assert sum(sent) * P**2 == 4 * A * WIDTH * (P - 1)


@pytest.mark.parametrize("P", [2, 3, 4])
def test_gathered(P):
    for N, A in CASES:
        layout = dict(ring=P, ring_cache="gathered")
        counts = run_ranks(P, one_layer, layout, N, random_set(N, A), 1, torch.float32)
        for n, count in zip(cut(A, P), counts, strict=True):
            sent = 2 * n * WIDTH * (P - 1)
            assert count == {"keys_values": (1, 4 * sent)}
            if A % P == 0:
                assert sent * P == 2 * A * WIDTH * (P - 1)


@pytest.mark.parametrize("P", [2, 3, 4])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_sharded(P, dtype, size):
    for N, A in CASES:
        layout, active = dict(ring=P, ring_cache="sharded"), random_set(N, A)
        counts = run_ranks(P, one_layer, layout, N, active, 1, dtype)
        owned = slices(cut(N, P))
        for rank, (rows, count) in enumerate(zip(slices(cut(A, P)), counts, strict=True)):
            tokens = active[rows].tolist()
            n, m = len(tokens), sum(not owned[rank].start <= t < owned[rank].stop for t in tokens)
            assert A < N or m == 0
            out = size * (n * WIDTH * (P - 1) + 2 * m * WIDTH)
            home = (A - n) * (size * WIDTH + 4 * H)
            assert count == {"queries_keys_values": (1, out), "partial_outputs": (1, home)}


def test_a_set_for_each_sample_sends_each_sample_its_own():
    N, A, P = 53, 13, 3
    active = torch.stack([torch.arange(A), torch.arange(N)[-A:]])
    layout = dict(ring=P, ring_cache="sharded")
    owned = slices(cut(N, P))
    for rank, (rows, count) in enumerate(
        zip(slices(cut(A, P)), run_ranks(P, one_layer, layout, N, active, 2, torch.float32), strict=True)
    ):
        tokens = active[:, rows].flatten().tolist()
        away = sum(not owned[rank].start <= t < owned[rank].stop for t in tokens)
        assert count["queries_keys_values"] == (1, 4 * WIDTH * (len(tokens) * (P - 1) + 2 * away))


@pytest.mark.parametrize("form", ["gathered", "sharded"])
def test_hybrid_is_heads_and_then_ring_with_fewer_heads(form):
    N, A = 53, 29
    active = random_set(N, A)
    layout = dict(ring=2, ulysses=2, ring_cache=form)
    sizes = cut(A, 4)
    owned = [0, sum(cut(N, 4)[:2]), N]
    for rank, count in enumerate(run_ranks(4, one_layer, layout, N, active, 1, torch.float32)):
        ring, n, group = rank // 2, sizes[rank], sum(sizes[rank // 2 * 2 :][:2])
        assert count["heads_out"] == (1, 4 * 3 * n * WIDTH // 2)
        assert count["heads_home"] == (1, 4 * (group - n) * WIDTH // 2)
        width = WIDTH // 2
        if form == "gathered":
            assert count["keys_values"] == (1, 4 * 2 * group * width)
        else:
            mine = active[: sum(sizes[:2])] if ring == 0 else active[sum(sizes[:2]) :]
            m = int(((mine < owned[ring]) | (mine >= owned[ring + 1])).sum())
            assert count["queries_keys_values"] == (1, 4 * (group * width + 2 * m * width))
            assert count["partial_outputs"] == (1, 4 * (A - group) * (width + H // 2))


def rows_and_broadcast(sizes):
    mesh = ParallelMesh.create(ParallelConfig(cfg=3))
    transport = Transport(mesh.world)
    mine = slices(sizes)[mesh.world.rank]
    rows = torch.arange(2 * sum(sizes) * 5.0).view(2, sum(sizes), 5)
    together = exchange_rows(rows[:, mine], sizes, transport, "velocity")
    word = transport.broadcast(torch.full((7,), float(mesh.world.rank)), 1, "plan")
    return torch.equal(together, rows), word.unique().tolist(), transport.traffic.take(), transport.traffic.take()


def test_exchange_and_broadcast_are_counted_and_the_record_starts_anew():
    sizes = [4, 0, 3]
    for rank, (equal, word, counts, after) in enumerate(run_ranks(3, rows_and_broadcast, sizes)):
        assert equal and word == [1.0] and after == {}
        assert counts["velocity"][:2] == (1, 2 * 4 * 2 * 5 * sizes[rank])
        assert counts["plan"][:2] == (1, 2 * 4 * 7 if rank == 1 else 0)
        assert counts["velocity"].seconds > 0.0


def test_one_rank_sends_and_counts_nothing():
    transport = Transport(Axis(), Traffic())
    rows = torch.randn(1, 3, 2)
    assert exchange_rows(rows, [3], transport) is rows
    assert transport.gather(rows, [1], "x") is rows
    assert transport.all_to_all(rows, [1], [1], "x") is rows
    assert transport.broadcast(rows, 0, "x") is rows
    assert transport.traffic.totals() == {}


PLANNED = [
    dict(ulysses=2),
    dict(ring=2, ring_cache="gathered"),
    dict(ring=2, ring_cache="sharded"),
    dict(ulysses=4),
    dict(ring=2, ulysses=2, ring_cache="gathered"),
    dict(ring=2, ulysses=2, ring_cache="sharded"),
]


@pytest.mark.parametrize("layout", PLANNED, ids=str)
def test_plan_foresees_what_is_sent(layout):
    config, N = ParallelConfig(**layout), 48
    P = config.world_size
    sizes = read_sizes("wan2.1-1.3b")
    sizes = replace(sizes, facts=replace(sizes.facts, num_heads=H, head_dim=D))
    for A in (48, 24):
        planned = sent_by_layer(config, sizes, A, 4, everything=A == N)
        counts = run_ranks(P, one_layer, layout, N, random_set(N, A), 1, torch.float32)
        assert {name for count in counts for name in count} == set(planned)
        for name, sent in planned.items():
            counted = sum(count[name][1] for count in counts) / P
            # Which tokens have to move to their owners depends on the video; the plan counts the worst case.
            moves = name == "queries_keys_values" and A < N
            assert counted <= sent if moves else counted == sent
