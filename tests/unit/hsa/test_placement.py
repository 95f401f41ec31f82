"""Placement of whole steps: the table against sums written out, the search against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from heterostep.hsa.placement import UNREACHABLE, GapCosts, add_steps, best_steps
from tiny import shifted


def written_out(costs: GapCosts, before: int | None, left: int, right: int) -> float:
    """Cost of one gap by moving every component along by hand."""
    sigma, v = costs.sigmas, costs.velocities
    slope = 0.0
    if before is not None and costs.forecast != "hold":
        slope = (v[:, left] - v[:, before]) / (sigma[left] - sigma[before])
    knots = [left, right] if before is None or costs.forecast == "hold" else [before, left, right]

    def assumed(at: torch.Tensor) -> torch.Tensor:
        if costs.correct and right < costs.num_steps:
            return sum(
                v[:, a] * math.prod(float((at - sigma[b]) / (sigma[a] - sigma[b])) for b in knots if b != a)
                for a in knots
            )
        return v[:, left] + slope * (at - sigma[left])

    error = torch.zeros(len(v), dtype=torch.float64)
    if costs.forecast == "ab2":  # the midpoint rule on a fine grid of the analytic velocity
        s, _ = costs._radius
        edges = torch.linspace(float(sigma[left]), float(sigma[right]), 4001, dtype=torch.float64)
        for a, b in itertools.pairwise(edges):
            at = (a + b) / 2
            radius = torch.sqrt(((1 - at) * s) ** 2 + at**2)
            true = (costs._amplitude * (at - (1 - at) * s**2) / radius)[:, 0]
            error += (b - a) * (true - assumed(at))
    for j in range(left + 1, right) if costs.forecast != "ab2" else ():
        error += (sigma[j + 1] - sigma[j]) * (v[:, j] - assumed(sigma[j]))
    return float((error * costs.growth[:, right]).square().sum())


@pytest.mark.parametrize("forecast", ["hold", "taylor", "ab2"])
@pytest.mark.parametrize("correct", [False, True])
def test_table_equals_sums_written_out(forecast, correct):
    costs = GapCosts(shifted(12), forecast, correct, longest=12)
    gaps = [(None, 0, 3), (0, 2, 5), (1, 4, 9), (3, 8, 12), (9, 10, 12), (None, 0, 12)]
    for before, left, right in gaps if forecast != "ab2" else gaps[1:4]:
        d, gap = 0 if before is None else left - before, right - left - 1
        found = float(costs.table[d, left, gap])
        assert found == pytest.approx(written_out(costs, before, left, right), rel=1e-4, abs=1e-12)


def test_successive_steps_cost_nothing_and_impossible_ones_are_marked():
    costs = GapCosts(shifted(10), "taylor", True, longest=4)
    assert costs.path_cost(range(10)) == pytest.approx(0.0, abs=1e-20)
    assert costs.path_cost([0, 9]) >= UNREACHABLE
    assert float(costs.table[0, 3, 0]) == UNREACHABLE
    assert float(costs.table[3, 2, 0]) == UNREACHABLE


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9, 10])
@pytest.mark.parametrize("required", [(), (7,), (4, 5)])
def test_search_finds_what_brute_force_finds(count, required):
    costs = GapCosts(shifted(10), "taylor", True, longest=10)
    if count <= len(required):
        return
    every = ((0, *rest) for rest in itertools.combinations(range(1, 10), count - 1) if set(required) <= set(rest))
    best = min(every, key=costs.path_cost)
    found = best_steps(costs, count, required)
    assert len(found) == count and found[0] == 0 and set(required) <= set(found)
    assert costs.path_cost(found) == pytest.approx(costs.path_cost(best), rel=1e-9, abs=1e-18)


def test_more_steps_never_cost_more():
    costs = GapCosts(shifted(40), "taylor", True, longest=16)
    path = best_steps(costs, 8)
    grown = add_steps(costs, path, 6)
    assert set(path) <= set(grown) and len(grown) == 14
    assert costs.path_cost(grown) < costs.path_cost(path)
    assert costs.path_cost(best_steps(costs, 14)) <= costs.path_cost(grown)
