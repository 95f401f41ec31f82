import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heterostep.hsa.cache import fill_rows, gather_rows, write_rows
from heterostep.hsa.velocity import TokenClock, VelocityCache

SIGMAS = [1.0, 0.93, 0.85, 0.7, 0.55, 0.3, 0.1, 0.0]
FIRST = torch.arange(2)


def started(forecast, n=4, width=3, batch=1):
    cache = VelocityCache(forecast)
    cache.start(batch, n, width, torch.float32, "cpu")
    return cache


def cached_euler(x, velocity, sigma, sigma_next):
    """One Euler step of dx/dsigma = v for every token, fresh or not (arXiv 2605.06892)."""
    return x + (sigma_next - sigma) * velocity


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 6))
def test_cached_euler_telescopes(seed, last):
    """k skipped steps equal one jump with the same velocity."""
    g = torch.Generator().manual_seed(seed)
    x, v = torch.randn(2, 5, 3, generator=g).double(), torch.randn(2, 5, 3, generator=g).double()
    walked = x
    for i in range(last):
        walked = cached_euler(walked, v, SIGMAS[i], SIGMAS[i + 1])
    assert torch.allclose(walked, cached_euler(x, v, SIGMAS[0], SIGMAS[last]), atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**20), st.lists(st.booleans(), min_size=6, max_size=6))
def test_ab2_telescopes_to_adams_bashforth_on_each_tokens_grid(seed, evaluated):
    """The sampler's walk equals AB2 with variable steps over the token's own evaluations alone."""
    g = torch.Generator().manual_seed(seed)
    velocities = torch.randn(7, 4, 3, generator=g)
    times = [0, *[i + 1 for i, e in enumerate(evaluated) if e]]
    cache, x = started("ab2"), torch.zeros(1, 4, 3)
    for i in range(7):
        if i == 0:
            cache.write(None, velocities[i][None], SIGMAS[i])
        elif i in times:
            cache.write(FIRST, velocities[i][None, :2], SIGMAS[i])
        x = cached_euler(x, cache.merged(SIGMAS[i], SIGMAS[i + 1]), SIGMAS[i], SIGMAS[i + 1])
    want = torch.zeros(2, 3)
    for j, i in enumerate(times):
        end = times[j + 1] if j + 1 < len(times) else 7
        h = SIGMAS[end] - SIGMAS[i]
        if j == 0:
            want = want + h * velocities[i][:2]
        else:
            r = h / (SIGMAS[i] - SIGMAS[times[j - 1]])
            want = want + h * ((1 + r / 2) * velocities[i][:2] - r / 2 * velocities[times[j - 1]][:2])
    assert torch.allclose(x[0, :2], want, atol=1e-4, rtol=1e-4)
    assert torch.allclose(x[0, 2:], -velocities[0][2:], atol=1e-5)  # one evaluation: plain Euler


@pytest.mark.parametrize("forecast", ["hold", "taylor", "ab2"])
def test_forecasts_of_a_linear_velocity(forecast):
    """v = a + b * sigma: Taylor is exact at sigma, AB2 on average over the step, hold at the last one."""
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    cache = started(forecast)
    for sigma in (0.9, 0.8):
        cache.write(None, (a + b * sigma)[None], sigma)
    at = {"hold": 0.8, "taylor": 0.6, "ab2": 0.5}[forecast]
    assert torch.allclose(cache.merged(0.6, 0.4)[0], a + b * at, atol=1e-5)


def test_taylor_returns_fresh_rows_unchanged():
    cache = started("taylor")
    cache.write(None, torch.randn(1, 4, 3), 0.9)
    cache.write(None, torch.randn(1, 4, 3), 0.8)
    rows = torch.randn(1, 2, 3)
    cache.write(FIRST, rows, 0.7)
    assert torch.equal(cache.merged(0.7, 0.6)[:, :2], rows)


@pytest.mark.parametrize("forecast", ["taylor", "ab2"])
def test_one_evaluation_has_no_slope_and_reset_forgets(forecast):
    cache, v = started(forecast), torch.randn(1, 4, 3)
    cache.write(None, v, 0.9)
    assert torch.equal(cache.merged(0.8, 0.7), v)
    cache.write(None, 2 * v, 0.8)
    assert not torch.equal(cache.merged(0.7, 0.6), 2 * v)
    cache.reset()
    cache.write(None, v, 0.7)
    assert torch.equal(cache.merged(0.6, 0.5), v)


def test_start_keeps_buffers_of_the_same_shape():
    cache = started("taylor")
    assert cache.last is not None
    pointers = {cache.last.data_ptr(), cache.prev.data_ptr()}
    cache.write(None, torch.randn(1, 4, 3), 0.9)
    cache.start(1, 4, 3, torch.bfloat16, "cpu")  # stored as float32 all the same
    assert {cache.last.data_ptr(), cache.prev.data_ptr()} == pointers
    assert cache.nbytes == 2 * 4 * 3 * 4
    cache.start(1, 5, 3, torch.float32, "cpu")
    assert cache.last.shape == (1, 5, 3)


def test_clock_counts_per_sample():
    clock = TokenClock(2, 3)
    clock.tick(None, 0.9)
    clock.tick(torch.tensor([[0], [2]]), 0.8)
    assert clock.weight(0.7).tolist() == [
        [pytest.approx(1.0, abs=1e-5), 0, 0],
        [0, 0, pytest.approx(1.0, abs=1e-5)],
    ]


@pytest.mark.parametrize("active", [None, torch.tensor([1, 3]), torch.tensor([[0, 2], [3, 1]])])
def test_rows_are_read_where_they_were_written(active):
    tokens = torch.zeros(2, 4, 3)
    count = 4 if active is None else 2
    rows = torch.randn(2, count, 3)
    write_rows(tokens, active, rows)
    assert torch.equal(gather_rows(tokens, active), rows)
    assert int((tokens.abs().sum(-1) > 0).sum()) == 2 * count
    fill_rows(tokens, active, 0.0)
    assert not tokens.any()
