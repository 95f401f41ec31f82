"""What skipped steps should have moved by, once the next evaluation is there."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from heterostep.hsa.hindsight import Hindsight
from heterostep.hsa.velocity import VelocityCache

LEVELS = [1.0, 0.93, 0.81, 0.7, 0.52, 0.4, 0.21, 0.0]


def parabola(sigma: float) -> torch.Tensor:
    """Velocities [1, 3, 2] that are quadratic in sigma, a different one for every number."""
    a, b, c = (torch.randn(1, 3, 2, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3))
    return a + b * sigma + c * sigma**2


def moved_by(forecast, levels, evaluated, velocity, *, until, dtype=torch.float64, device="cpu", per_sample=False):
    """Velocities that the steps before `until` moved by in the end, with tokens evaluated as `evaluated` says."""
    cache, hindsight = VelocityCache(forecast), Hindsight(levels, forecast)
    batch, n, width = velocity(levels[0]).shape
    cache.start(batch, n, width, dtype, device)
    for i in range(until):
        fresh = None
        if ids := evaluated.get(i):
            rows = velocity(levels[i])[:, ids].to(device, dtype)
            active = None if len(ids) == n else torch.tensor([ids] if per_sample else ids, device=device)
            cache.write(active, rows, levels[i])
            if active is not None:
                chosen = torch.zeros(batch, n, width, dtype=torch.bool)
                chosen[:, ids] = True
                fresh = chosen.to(device)
        moves = cache.merged(levels[i], levels[i + 1])
        if ids:
            hindsight.evaluate(i, moves, fresh)
        hindsight.moves(i, moves)
    return hindsight.used


@pytest.mark.parametrize("forecast", ["taylor", "ab2"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_a_gap_is_exact_for_quadratic_velocity(forecast, per_sample):
    """After the evaluation that ends a gap every token has moved as exact velocities would have led it."""
    evaluated = {0: [0, 1, 2], 1: [0, 1, 2], 2: [1], 4: [0, 1], 5: [0, 1, 2]}
    moves = moved_by(forecast, LEVELS, evaluated, parabola, until=6, per_sample=per_sample)
    for i in range(1, 5):
        a, b = LEVELS[i], LEVELS[i + 1]
        mean = (parabola(a) + 4 * parabola((a + b) / 2) + parabola(b)) / 6  # Simpson's rule is exact for parabolas
        assert torch.allclose(moves[i], parabola(a) if forecast == "taylor" else mean, atol=1e-6)
    # The first step had no slope: ab2's is corrected by the chord, Taylor's moved by what was evaluated.
    chord = (parabola(LEVELS[0]) + parabola(LEVELS[1])) / 2
    assert torch.allclose(moves[0], chord if forecast == "ab2" else parabola(LEVELS[0]), atol=1e-6)


def test_held_velocities_become_the_chord():
    moves = moved_by("hold", LEVELS, {0: [0, 1, 2], 3: [0, 1, 2]}, parabola, until=4)
    v0, v3 = parabola(LEVELS[0]), parabola(LEVELS[3])
    for i in (1, 2):
        share = (LEVELS[i] - LEVELS[0]) / (LEVELS[3] - LEVELS[0])
        assert torch.allclose(moves[i], v0 + share * (v3 - v0))


def test_nothing_is_corrected_across_what_was_forgotten():
    hindsight = Hindsight(LEVELS, "taylor")
    for i in range(2):
        hindsight.evaluate(i, parabola(LEVELS[i]), None)
        hindsight.moves(i, parabola(LEVELS[i]))
    hindsight.moves(2, parabola(0.1))
    hindsight.forget()
    assert hindsight.oldest() == len(LEVELS) - 1
    assert not hindsight.evaluate(3, parabola(LEVELS[3]), None)
    assert torch.equal(hindsight.used[2], parabola(0.1))


def test_only_what_may_be_corrected_is_kept():
    hindsight = Hindsight(LEVELS, "taylor")
    fresh = torch.tensor([True, False, False])[None, :, None].expand(1, 3, 2)
    for i in range(4):
        hindsight.evaluate(i, parabola(LEVELS[i]), fresh if i else None)
        hindsight.moves(i, parabola(LEVELS[i]))
    assert hindsight.oldest() == 0  # two tokens have waited since then
    hindsight.evaluate(4, parabola(LEVELS[4]), None)
    assert hindsight.oldest() == 4
    hindsight.drop(4)
    assert hindsight.used == [] and hindsight.first == 4


def at_random(forecast, device, dtype, seed=0, steps=40):
    """Moves of a run of some steps over 6 tokens that are evaluated at random."""
    g = torch.Generator().manual_seed(seed)
    levels = [5 * s / (1 + 4 * s) for s in torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()]
    evaluated = {
        i: torch.arange(6)[torch.rand(6, generator=g) < 0.3].tolist() if i else list(range(6)) for i in range(steps)
    }

    def velocity(sigma: float) -> torch.Tensor:
        return torch.stack([torch.sin(4 * sigma * (n + 1) + torch.arange(2)) for n in range(6)])[None]

    return moved_by(forecast, levels, evaluated, velocity, until=steps, dtype=dtype, device=device)


@pytest.mark.parametrize("forecast", ["hold", "taylor", "ab2"])
def test_float32_gives_what_float64_does(forecast):
    exact = at_random(forecast, "cpu", torch.float64)
    for narrow, wide in zip(at_random(forecast, "cpu", torch.float32), exact, strict=True):
        assert torch.allclose(narrow.double(), wide, rtol=1e-4, atol=1e-4)


class NoFloat64(TorchDispatchMode):
    """A device without float64, such as Apple's; the meta device stands in for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            wide = isinstance(tensor, torch.Tensor) and tensor.device.type == "meta" and tensor.dtype == torch.float64
            assert not wide, f"{func} makes float64 on the device"
        return result


@pytest.mark.parametrize("forecast", ["hold", "taylor", "ab2"])
def test_no_float64_is_needed_of_the_device(forecast):
    with NoFloat64():
        assert all(v.device.type == "meta" for v in at_random(forecast, "meta", torch.float32, steps=12))
