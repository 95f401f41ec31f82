from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heterostep.errors import ConfigError
from heterostep.parallel.config import ParallelConfig
from heterostep.parallel.partition import cut, imbalance, owners, sizes_for, slices

SPEED = st.floats(1e-3, 1e3)


@given(st.integers(0, 100_000), st.integers(1, 64))
def test_equal_sizes_differ_by_at_most_one(count, parts):
    sizes = cut(count, parts)
    assert len(sizes) == parts and sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(st.integers(0, 100_000), st.lists(SPEED, min_size=1, max_size=16))
def test_weighted_sizes_follow_the_weights(count, weights):
    sizes = cut(count, len(weights), weights)
    assert sum(sizes) == count
    total = sum(map(Fraction, weights))
    assert all(abs(size - count * Fraction(w) / total) < 1 for size, w in zip(sizes, weights, strict=True))


@given(st.integers(0, 100_000), st.integers(1, 64), SPEED)
def test_equal_weights_are_no_weights(count, parts, speed):
    assert cut(count, parts, [speed] * parts) == cut(count, parts)


def test_largest_remainders_come_first_and_ties_go_by_index():
    assert cut(10, 3, [1, 1, 2]) == [3, 2, 5]
    assert cut(7, 3, [1, 5, 2]) == [1, 4, 2]
    assert cut(1, 4) == [1, 0, 0, 0]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=9))
def test_slices_are_consecutive(sizes):
    tokens = list(range(sum(sizes)))
    assert [len(tokens[s]) for s in slices(sizes)] == sizes
    assert [token for s in slices(sizes) for token in tokens[s]] == tokens


@given(st.integers(1, 500), st.integers(1, 8), st.randoms())
def test_static_cuts_give_each_token_its_owner(N, parts, random):
    active = torch.tensor(sorted(random.sample(range(N), random.randint(1, N))))
    for name in ("contiguous", "interleaved"):
        config = ParallelConfig(ulysses=parts, cut=name)
        owner = owners(name, N, parts)
        assert sizes_for(config, N, active) == [int((owner[active] == p).sum()) for p in range(parts)]
        full = sizes_for(config, N)
        assert max(full) - min(full) <= 1
    contiguous = owners("contiguous", N, parts)
    assert contiguous.equal(contiguous.sort().values)


def test_interleaving_on_the_grid_spreads_columns_that_a_stride_does_not():
    grid, parts = (3, 4, 8), 4
    column = torch.arange(3 * 4 * 8).view(grid)[:, :, 0].flatten()
    config = ParallelConfig(ring=2, ulysses=2, cut="interleaved")
    assert sizes_for(config, 96, column) == [12, 0, 0, 0]
    assert sizes_for(config, 96, column, grid) == [3, 3, 3, 3]
    assert imbalance([12, 0, 0, 0]) == parts
    assert imbalance([3, 3, 3, 3]) == imbalance([0, 0]) == 1.0


def test_equal_cut_takes_any_set_and_static_ones_need_one_for_the_batch():
    per_sample = torch.tensor([[0, 1, 2], [3, 4, 5]])
    assert sizes_for(ParallelConfig(ulysses=2), 8, per_sample) == [2, 1]
    assert sizes_for(ParallelConfig(ulysses=2), 8) == [4, 4]
    assert sizes_for(ParallelConfig(ulysses=2, weights=(1, 3)), 8) == [2, 6]
    with pytest.raises(ConfigError, match="one active set for the whole batch"):
        sizes_for(ParallelConfig(ulysses=2, cut="contiguous"), 8, per_sample)
