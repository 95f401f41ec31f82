"""A run's estimate of its distance from the dense one, and plans that follow from a promised quality."""

from __future__ import annotations

import math

import pytest
import torch

import heterostep as hs
from heterostep.engine.request import GenerateRequest, allocation
from heterostep.hsa.distance import LINE, Distance
from heterostep.hsa.hindsight import Residual
from heterostep.hsa.placement import GapCosts
from tiny import generate, shifted, tiny_pipeline

T = 20


@pytest.fixture(scope="module")
def runs():
    """Dense latents, and for each setting the latents and the report: UniPC."""
    pipe, found = tiny_pipeline("unipc"), {}
    for name, config in {
        "dense": hs.HSAConfig(compute=1.0),
        "0.25": hs.HSAConfig(compute=0.3),
        "0.5": hs.HSAConfig(compute=0.5),
        "low": hs.HSAConfig(quality=30.0),
        "high": hs.HSAConfig(quality=80.0),
    }.items():
        session = hs.apply(pipe, config)
        found[name] = generate(pipe, steps=T), session.report
    return found


def test_more_work_is_estimated_to_be_nearer(runs):
    assert runs["dense"][1].estimated_psnr is None  # there is no distance
    assert 0 < runs["0.25"][1].estimated_psnr < runs["0.5"][1].estimated_psnr


def test_a_higher_promise_takes_more_work_up_to_all(runs):
    low, high = runs["low"][1], runs["high"][1]
    assert 2 / T < low.compute < 0.5 < high.compute
    assert {step.active for step in low.steps} == {0, low.steps[0].total}
    if high.compute == 1.0:
        assert torch.allclose(runs["high"][0], runs["dense"][0], atol=1e-5)


def test_a_run_without_hindsight_estimates_nothing():
    pipe = tiny_pipeline("euler")
    session = hs.apply(pipe, hs.HSAConfig(compute=0.5, correct=False))
    generate(pipe, steps=8)
    assert session.report.estimated_psnr is None


def test_the_estimate_scales_with_what_was_measured():
    distance = Distance(GapCosts(shifted(T), "taylor", True, longest=T))
    steps = [0, 2, 4, 5, 9, 14]
    expected = [Residual(-1, 0, 2, torch.tensor(distance.costs.line_error(None, 0, 2)))]
    for p, last, i in zip(steps, steps[1:], steps[2:], strict=False):
        expected.append(Residual(p, last, i, torch.tensor(distance.costs.line_error(p, last, i))))
    larger = [residual._replace(square=100 * residual.square) for residual in expected]
    near, far = (distance.decibels(steps, measured, 8.0) for measured in (expected, larger))
    assert far == pytest.approx(near - 20 * LINE[1], abs=1e-3)
    assert distance.decibels(range(T), expected, 8.0) is None
    assert distance.decibels(steps, [r._replace(square=torch.tensor(math.nan)) for r in expected], 8.0) is None


def test_a_plan_has_the_fewest_steps_that_keep_the_promise():
    distance = Distance(GapCosts(shifted(T), "taylor", True, longest=T))
    before = 0
    for quality in (20, 40, 60, 80):
        steps = distance.plan(quality, 8.0, [0], [], 1, {7})
        assert steps[0] == 0 and 7 in steps
        assert distance.decibels(steps, [], 8.0) is None or distance.decibels(steps, [], 8.0) >= quality
        assert before <= len(steps)
        before = len(steps)
    broken = Residual(0, 1, 2, torch.tensor(math.nan))  # of a run that overflowed: no reason to hurry
    assert len(distance.plan(40, 8.0, [0, 1, 2], [broken], 3, ())) == T
    # What is lost already is no reason to give up what is left.
    lost = distance.plan(90, 8.0, [0, 1, 12], [], 13, ())
    assert 13 in lost or len(lost) > 3


def test_quality_and_compute_say_two_things():
    with pytest.raises(hs.ConfigError, match="give one of them"):
        hs.HSAConfig(quality=40, compute=0.3)
    with pytest.raises(hs.ConfigError, match='policy="joint"'):
        hs.HSAConfig(quality=40, policy="tokens")
    with pytest.raises(hs.RequestError, match="give one of them"):
        GenerateRequest(prompt="a", compute=0.5, quality=40)
    with pytest.raises(hs.RequestError, match=r"from 30 to 80, or draft \(45\), or high \(55\), not 'best'"):
        GenerateRequest(prompt="a", quality="best")
    assert hs.HSAConfig(quality="high").quality == 55.0
    assert GenerateRequest(prompt="a", quality="draft").quality == 45.0


def test_a_request_takes_the_place_of_what_the_engine_was_given():
    engine = hs.EngineConfig(hsa=hs.HSAConfig(compute=1.0))
    found = allocation(engine, GenerateRequest(prompt="a", quality=30))
    assert (found.quality, found.compute) == (30.0, 0.5)
    engine = hs.EngineConfig(hsa=hs.HSAConfig(quality=30))
    assert allocation(engine, GenerateRequest(prompt="a")).quality == 30.0
    assert allocation(engine, GenerateRequest(prompt="a", compute=0.3)).quality is None
