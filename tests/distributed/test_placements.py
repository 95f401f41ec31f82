"""Every placement (parallel/attention.py, ring.py) against one process with a plain softmax.

That process keeps the same stale keys and values.
"""

import pytest
import torch

from attention_steps import follow
from heterostep.parallel.config import ParallelConfig
from ranks import run_ranks

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


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x.get("ring", 1) * x.get("ulysses", 1) == 4], ids=name_of)
def test_any_sizes_will_do(layout):
    for N in (7, 30):
        assert max(run_ranks(4, follow, layout, 2, N, False, True, "cpu", torch.float32, True)) < 1e-5


@pytest.mark.parametrize("layout", [dict(), *[x for x in LAYOUTS if x.get("ring") == 2]], ids=name_of)
def test_half_precision(layout):
    # One process rounds its output to 2^-8 of values up to 4; partial outputs are rounded before they are merged.
    ranks = ParallelConfig(**layout).world_size
    assert max(run_ranks(ranks, follow, layout, 2, 24, False, True, "cpu", torch.bfloat16)) < 3e-2
