from fractions import Fraction

import torch
from hypothesis import given
from hypothesis import strategies as st

from heterostep.parallel.config import ParallelConfig
from heterostep.parallel.partition import cut, imbalance, sizes_for, slices

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


def test_imbalance_is_max_over_mean():
    assert imbalance([12, 0, 0, 0]) == 4
    assert imbalance([3, 3, 3, 3]) == imbalance([0, 0]) == 1.0


def test_the_cut_takes_any_set_and_follows_speeds():
    per_sample = torch.tensor([[0, 1, 2], [3, 4, 5]])
    assert sizes_for(ParallelConfig(ulysses=2), 8, per_sample) == [2, 1]
    assert sizes_for(ParallelConfig(ulysses=2), 8) == [4, 4]
    assert sizes_for(ParallelConfig(ulysses=2, weights=(1, 3)), 8) == [2, 6]
    assert sizes_for(ParallelConfig(ulysses=2), 8, speeds=(3, 1)) == [6, 2]
