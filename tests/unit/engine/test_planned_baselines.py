"""Baselines that evaluate whole steps at planned places, what they forecast between, and the benchmark's command."""

from __future__ import annotations

import itertools
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_ltx2
from tiny import IMAGE_KINDS, generate, tiny_pipeline
from tiny import build as pipeline_of

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import harness
import pareto

from heterostep.benchmarks.baselines import CacheDiT, DPCache, PlacedSteps, Spectrum, Trial, available, tune
from heterostep.benchmarks.baselines.cache_dit import MISSING
from heterostep.benchmarks.baselines.dpcache import cheapest_path, skipping_costs
from heterostep.benchmarks.baselines.forecast import extrapolation
from heterostep.benchmarks.baselines.spectrum import _Branch

STEPS = 10
needs_cache_dit = pytest.mark.skipif(find_spec("cache_dit") is None, reason=MISSING)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(layers=3)


@pytest.fixture(scope="module")
def dense(pipe):
    return generate(pipe, steps=STEPS)


def closeness(pipe, dense, baseline):
    with baseline.applied(pipe):
        out = generate(pipe, steps=baseline.steps)
    return float((out - dense).norm() / dense.norm())


ALL = list(range(STEPS))


@pytest.mark.parametrize(
    "baseline",
    [
        Spectrum(STEPS, warmup=STEPS),
        DPCache(STEPS, evaluated=ALL),
        DPCache(STEPS, evaluated=ALL, whole=True),
        pytest.param(CacheDiT(STEPS, evaluated=ALL), marks=needs_cache_dit),
    ],
    ids=lambda b: b.name,
)
def test_with_all_steps_evaluated_it_is_the_dense_run(pipe, dense, baseline):
    with baseline.applied(pipe):
        out = generate(pipe, steps=STEPS)
    assert baseline.compute == 1.0
    assert torch.equal(out, dense)


def test_unipc_on_all_levels_is_unipc(pipe):
    from diffusers import UniPCMultistepScheduler

    stock = pipe.scheduler
    placed = PlacedSteps(STEPS, levels=ALL)
    with placed.applied(pipe):
        out = generate(pipe, steps=placed.steps)
    pipe.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=stock.config.get("shift", 1.0)
    )
    try:
        assert torch.equal(out, generate(pipe, steps=STEPS))
    finally:
        pipe.scheduler = stock


def test_windows_grow():
    spectrum = Spectrum(20, warmup=3, window=2.0, flex=0.5)
    assert spectrum._plan(range(20)) == [0, 1, 2, 4, 6, 9, 12, 16]
    assert spectrum.predicted_compute() == pytest.approx(8 / 20)
    # A second expert begins anew.
    assert spectrum._plan(range(7, 12)) == [7, 8, 9, 11]


def test_the_regression_follows_a_polynomial_of_its_degree():
    def at(step):
        return torch.tensor([[1.0 + 0.1 * step, 2.0 - 0.02 * step**2, 0.001 * step**3]])

    branch = _Branch(ALL, range(STEPS), {"degree": 3, "ridge": 1e-9, "blend": 1.0})
    for branch.step in range(6):
        branch.learn((at(branch.step),))
    branch.step = 8
    (found,) = branch.stand_in(())
    assert torch.allclose(found, at(8), atol=1e-4)
    branch.settings = {**branch.settings, "blend": 0.0}
    (line,) = branch.stand_in(())
    assert torch.allclose(line, at(5) + 3 * (at(5) - at(4)), atol=1e-5)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_extrapolation_is_exact_for_its_order(order):
    steps = [1, 4, 6][-(order + 1) :]
    weights = extrapolation(steps, 9)
    assert sum(w * s**order for w, s in zip(weights, steps, strict=True)) == pytest.approx(9**order)


@pytest.mark.parametrize("forced", [{0, 1}, {0, 1, 2}, {0, 1, 5}])
def test_the_cheapest_path_is_the_best_of_all(forced):
    steps, count = 8, 5
    costs = np.full((steps, steps, steps + 1), np.inf)
    generator = np.random.default_rng(0)
    for before, step, following in itertools.combinations(range(steps + 1), 3):
        costs[before, step, following] = generator.random() * (following - step - 1)

    def total(path):
        path = [*path, steps]
        return sum(costs[triple] for triple in zip(path, path[1:], path[2:], strict=False))

    paths = [p for p in itertools.combinations(range(steps), count) if forced <= set(p) and p[:2] == (0, 1)]
    assert cheapest_path(costs, count, forced) == list(min(paths, key=total))


def test_costs_are_those_of_the_line_through_two_evaluations(pipe):
    costs = skipping_costs(pipe, [lambda: generate(pipe, steps=STEPS)], STEPS)
    assert costs[False].shape == (STEPS, STEPS, STEPS + 1)
    for found in costs.values():
        assert found[2, 4, 5] == 0.0
        assert 0.0 < found[2, 4, 6] < found[2, 4, 9]
        assert np.isinf(found[4, 2, 6]) and np.isinf(found[2, 4, 4])


@pytest.mark.parametrize("kind", ["spectrum", "dpcache"])
def test_a_second_expert_begins_anew(kind):
    pipe = pipeline_of("wan22")
    dense = generate(pipe, steps=STEPS)
    settings = tune(kind, pipe, STEPS, [0.8], [Trial(lambda n: generate(pipe, steps=n), dense)])[0.8]
    baseline = {"spectrum": Spectrum, "dpcache": DPCache}[kind](STEPS, **settings)
    assert closeness(pipe, dense, baseline) < 0.05
    assert torch.equal(generate(pipe, steps=STEPS), dense)


def test_tuning_judges_all_variants_on_one_clip_and_the_best_on_the_others(pipe, dense):
    runs = [0, 0]

    def trial(clip):
        def run(steps):
            runs[clip] += 1
            return generate(pipe, steps=steps)

        return Trial(run, dense)

    tune("taylorseer", pipe, STEPS, [0.5], [trial(0), trial(1)])
    assert 1 <= runs[1] <= 4 < runs[0]


@needs_cache_dit
@pytest.mark.parametrize("kind", ["wan22", "ti2v5b", *IMAGE_KINDS])
def test_cache_dit_on_every_family_of_wan(kind):
    pipe = pipeline_of(kind)
    dense = generate(pipe, steps=STEPS)
    baseline = CacheDiT(STEPS, evaluated=[0, 1, 3, 5, 7])
    assert 0.0 < closeness(pipe, dense, baseline) < 0.5
    assert 0.5 < baseline.compute < 1.0
    assert torch.equal(generate(pipe, steps=STEPS), dense)


@needs_cache_dit
def test_cache_dit_pays_a_block_for_a_skipped_step(pipe, dense, caplog):
    baseline = CacheDiT(STEPS, evaluated=[0, 1, 3, 6])
    assert closeness(pipe, dense, baseline) < 0.1
    assert baseline.compute == pytest.approx((4 + 6 / 3) / STEPS)
    assert not caplog.records
    settings = tune("cache-dit", pipe, STEPS, [0.5], [Trial(lambda n: generate(pipe, steps=n), dense)])[0.5]
    assert len(settings["evaluated"]) == 5


def test_cache_dit_is_left_out_where_it_cannot_run(pipe, monkeypatch):
    said = []
    assert not available("cache-dit", tiny_ltx2.tiny_ltx2(layers=2), said.append)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not available("cache-dit", pipe, said.append)
    with pytest.raises(ValueError, match="not installed"), CacheDiT(STEPS, evaluated=[0]).applied(pipe):
        pass
    assert "[peers]" in said[1]
    assert available("spectrum", pipe, said.append)


@pytest.mark.slow
def test_the_command_resumes_and_reports(tmp_path, monkeypatch):
    """Two guidance scales, UniPC, one clip: what was run is compared with more later, and not run again."""
    monkeypatch.setattr(harness, "ODE_STEPS", 3)
    command = "pareto.py --solver unipc --steps 6 --guidance 1.5 4 --split tune --count 1 --computes 0.5 --latent-only "
    command += f"--methods joint unipc unipc-placed --calibration-clips 1 --work {tmp_path} --output {tmp_path}/report"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--no-ode"])
    pareto.main()
    first = results_of(tmp_path)
    assert len(first) == 2 * 4
    assert {method for _, method in first} == {"dense", "joint", "unipc", "unipc-placed"}
    assert all(set(result["against"]) == {"dense"} for result in first.values())
    text = (tmp_path / "report.md").read_text()
    assert "## Guidance 4" in text and "| joint |" not in text and "| **joint** | 1 (0) |" in text

    monkeypatch.setattr(sys, "argv", command.split())
    pareto.main()
    second = results_of(tmp_path)
    assert all(set(result["against"]) == {"dense", "ode"} for result in second.values())
    assert all(second[key]["seconds"] == first[key]["seconds"] for key in first)
    assert "| **joint** | 1 |" in (tmp_path / "report.md").read_text()
    monkeypatch.setattr(pareto.Evaluation, "_compared", None)  # nothing is left to do
    pareto.main()


def results_of(folder):
    """(guidance's folder, method) -> the last result."""
    lines = [
        (path.parent.name, line)
        for path in folder.glob("*/tune-unipc6.jsonl")
        for line in path.read_text().splitlines()
    ]
    return {(name, json.loads(line)["method"]): json.loads(line) for name, line in lines}
