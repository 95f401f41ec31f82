import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heterostep.hsa.policies import score_levels, top_tokens, velocity_change_rate


def by_sorting(scores, count, first=None):
    """Plain Python: round to 4 mantissa bits, sort by (first, score, -index)."""
    rows = []
    for b, row in enumerate(scores.tolist()):
        rounded = score_levels(torch.tensor([row]))
        order = sorted(
            range(len(row)),
            key=lambda n: (-(first is not None and bool(first[b, n])), -int(rounded[0, n]), n),
        )
        rows.append(sorted(order[:count]))
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), count)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.data())
def test_top_tokens_equals_sorting(batch, n, data):
    values = st.sampled_from([0.0, 0.5, 0.501, 1.0, 1.5, 3e-9, 7e4])
    scores = torch.tensor(data.draw(st.lists(st.lists(values, min_size=n, max_size=n), min_size=batch, max_size=batch)))
    first = torch.rand(batch, n, generator=torch.Generator().manual_seed(n)) < 0.2
    count = data.draw(st.integers(0, n))
    for forced in (None, first):
        assert torch.equal(top_tokens(scores, count, forced), by_sorting(scores, count, forced))


def test_ties_go_to_the_lower_index():
    assert top_tokens(torch.ones(1, 6), 3).tolist() == [[0, 1, 2]]
    assert top_tokens(torch.tensor([[1.0, 1.001, 1.002, 0.1]]), 2).tolist() == [[0, 1]]


def test_noise_in_the_last_bits_changes_nothing():
    scores = torch.rand(1, 5000, generator=torch.Generator().manual_seed(0))
    scores = (scores * 64).round() / 64 + 0.001  # away from rounding boundaries
    noisy = scores * (1 + 1e-6 * torch.randn(scores.shape, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(top_tokens(scores, 1234), top_tokens(noisy, 1234))


def test_order_of_different_magnitudes_is_kept():
    scores = torch.tensor([[1e-8, 1e-3, 5.0, 0.0, 1e6]])
    assert score_levels(scores).argsort().tolist() == [[3, 0, 1, 2, 4]]


def test_velocity_change_rate():
    old, new = torch.zeros(1, 3, 4), torch.tensor([0.2, 0.4, 0.6])[None, :, None].expand(1, 3, 4)
    rate = velocity_change_rate(new, old, 0.5, torch.tensor([[0.6, 0.9, 0.5]]))
    assert rate[0, :2].tolist() == pytest.approx([2.0, 1.0])
    assert rate[0, 2] == 0.0  # no time between the evaluations


def test_values_that_are_no_numbers_have_a_rank_too():
    """A velocity that overflowed scores NaN, with the sign bit set where a processor makes it so."""
    nan = torch.tensor([float("nan")])
    scores = torch.stack([torch.tensor(1.0), nan[0], -nan[0], torch.tensor(2.0)])[None]
    assert scores.view(torch.int32)[0, 1:3].sign().tolist() == [1, -1]
    first = torch.tensor([[True, False, False, False]])
    assert top_tokens(scores, 1, first).tolist() == [[0]]
    assert top_tokens(scores, 3).shape == (1, 3)
