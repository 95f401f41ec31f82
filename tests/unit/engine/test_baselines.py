"""The baselines run on a stock pipeline, save work, and leave it as it was; results are rendered."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

import tiny_ltx2
from tiny import IMAGE_KINDS, generate, tiny_pipeline
from tiny import build as pipeline_of

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import pareto_report

import heterostep as hs
from heterostep.benchmarks.baselines import (
    PAB,
    DPCache,
    EasyCache,
    FewerSteps,
    FirstBlock,
    MagCache,
    PlacedSteps,
    Spectrum,
    TaylorSeer,
    TeaCache,
    Trial,
    WorkCounter,
    bisect_thresholds,
    build,
    fit_polynomial,
    magnitude_ratios,
    tune,
)
from heterostep.benchmarks.baselines.baseline import steps_of_experts

STEPS = 10
FORECAST = ["unipc-placed", "spectrum", "dpcache"]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(layers=3)


@pytest.fixture(scope="module")
def dense(pipe):
    return generate(pipe, steps=STEPS)


BASELINES = [
    FewerSteps(STEPS, evaluated=5),
    FewerSteps(STEPS, evaluated=5, solver="unipc"),
    FirstBlock(STEPS, threshold=100.0),
    MagCache(STEPS, threshold=100.0, ratios=[1.0] * STEPS, max_skip=2),
    TaylorSeer(STEPS, interval=3, warmup=2),
    TeaCache(STEPS, threshold=100.0),
    EasyCache(STEPS, threshold=100.0),
    PAB(STEPS, interval=2, cross_interval=5),
    PlacedSteps(STEPS, levels=[0, 1, 2, 4, 6]),
    Spectrum(STEPS, warmup=3, window=3.0, flex=0.0),
    DPCache(STEPS, evaluated=[0, 1, 2, 5, 8]),
    DPCache(STEPS, evaluated=[0, 1, 2, 5, 8], whole=True),
]


@pytest.mark.parametrize("baseline", BASELINES, ids=lambda b: b.name)
def test_saves_work_and_leaves_the_pipeline_stock(pipe, dense, baseline):
    with baseline.applied(pipe):
        out = generate(pipe, steps=baseline.steps)
    assert 0.0 < baseline.compute < 1.0
    assert torch.isfinite(out).all()
    assert not torch.equal(out, dense)
    assert torch.equal(generate(pipe, steps=STEPS), dense)
    assert json.dumps(baseline.settings)


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        (BASELINES[0], 0.5),
        # The first block always runs; the others only at the first step.
        (BASELINES[2], (STEPS + 2) / (3 * STEPS)),
        (BASELINES[3], 4 / STEPS),
        (BASELINES[4], 5 / STEPS),
        (BASELINES[5], 2 / STEPS),
        (BASELINES[6], 4 / STEPS),
    ],
    ids=lambda v: getattr(v, "name", ""),
)
def test_compute_is_what_the_rule_implies(pipe, baseline, expected):
    with baseline.applied(pipe):
        generate(pipe, steps=baseline.steps)
    assert baseline.compute == pytest.approx(expected)
    if hasattr(baseline, "predicted_compute"):
        assert baseline.predicted_compute() == pytest.approx(expected)


@pytest.mark.parametrize("make", [FirstBlock, TeaCache, EasyCache], ids=lambda c: c.name)
def test_threshold_zero_is_dense(pipe, dense, make):
    baseline = make(STEPS, threshold=0.0)
    with baseline.applied(pipe):
        out = generate(pipe, steps=STEPS)
    assert baseline.compute == 1.0
    assert (out - dense).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["wan22", "ti2v5b", *IMAGE_KINDS])
def test_every_family(kind):
    """Two experts, timesteps for each token, an image: one interface, and a stock pipeline afterwards."""
    pipe = pipeline_of(kind)
    dense = generate(pipe, steps=STEPS)
    for baseline in BASELINES:
        with baseline.applied(pipe):
            out = generate(pipe, steps=baseline.steps)
        assert 0.0 < baseline.compute < 1.0, baseline.name
        assert torch.isfinite(out).all() and not torch.equal(out, dense), baseline.name
    assert torch.equal(generate(pipe, steps=STEPS), dense)


@pytest.fixture(scope="module")
def ltx2():
    pipe = tiny_ltx2.tiny_ltx2(layers=3)
    return pipe, tiny_ltx2.generate(pipe, steps=STEPS)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("baseline", BASELINES, ids=lambda b: b.name)
def test_video_with_sound(ltx2, baseline):
    """LTX-2, whose blocks carry two streams: both change, both are stock afterwards, and the work is what Wan's is."""
    pipe, dense = ltx2
    with baseline.applied(pipe):
        out = tiny_ltx2.generate(pipe, steps=baseline.steps)
    expected = {"unipc": 0.5, "first-block": (STEPS + 2) / (3 * STEPS), "teacache": 2 / STEPS, "easycache": 4 / STEPS}
    expected |= {"euler": 0.5, "magcache": 4 / STEPS, "taylorseer": 5 / STEPS}
    expected |= {"unipc-placed": 0.5, "spectrum": 0.5, "dpcache": 0.5}
    if baseline.name == "pab":
        assert 0.0 < baseline.compute < 1.0  # each layer at a rate of its own
    else:
        assert baseline.compute == pytest.approx(expected[baseline.name])
    assert all(torch.isfinite(x).all() and not torch.equal(x, y) for x, y in zip(out, dense, strict=True))
    assert equal(tiny_ltx2.generate(pipe, steps=STEPS), dense)


def test_video_from_an_image_with_all_guidance():
    """LTX-2.3: timesteps of the tokens, a branch with perturbed attention and one with video and sound apart."""
    pipe = tiny_ltx2.tiny_ltx2("2.3", image=True, layers=3)
    dense = tiny_ltx2.generate(pipe, "2.3", steps=STEPS)
    for baseline in BASELINES:
        with baseline.applied(pipe):
            out = tiny_ltx2.generate(pipe, "2.3", steps=baseline.steps)
        assert 0.0 < baseline.compute < 1.0, baseline.name
        assert all(torch.isfinite(x).all() for x in out) and not equal(out, dense), baseline.name
    assert equal(tiny_ltx2.generate(pipe, "2.3", steps=STEPS), dense)


@pytest.mark.parametrize(
    "baseline",
    [
        FirstBlock(STEPS, threshold=0.0),
        MagCache(STEPS, threshold=0.0, ratios=[0.5] * STEPS),
        TaylorSeer(STEPS, interval=1, warmup=STEPS),
        TeaCache(STEPS, threshold=0.0),
        EasyCache(STEPS, threshold=0.0),
        PAB(STEPS, interval=1, cross_interval=1),
        FewerSteps(STEPS, evaluated=STEPS),
    ],
    ids=lambda b: b.name,
)
def test_with_nothing_saved_video_and_sound_are_the_dense(ltx2, baseline):
    pipe, dense = ltx2
    with baseline.applied(pipe):
        out = tiny_ltx2.generate(pipe, steps=STEPS)
    assert baseline.compute == 1.0
    assert all((x - y).abs().max() < 1e-5 for x, y in zip(out, dense, strict=True))


@pytest.mark.parametrize("baseline", [BASELINES[3], BASELINES[5]], ids=lambda b: b.name)
def test_a_skipped_step_adds_what_video_and_sound_gained_last(ltx2, baseline):
    """Diffusers' MagCache would leave the sound as it enters the first block."""
    pipe, _ = ltx2
    blocks, entering, leaving = pipe.transformer.transformer_blocks, [], []
    with baseline.applied(pipe):
        handles = [
            blocks[0].register_forward_pre_hook(lambda m, args, kwargs: entering.append(kwargs), with_kwargs=True),
            blocks[-1].register_forward_hook(lambda m, args, out: leaving.append(out)),
        ]
        tiny_ltx2.generate(pipe, steps=STEPS)
    for handle in handles:
        handle.remove()
    for stream, name in enumerate(("hidden_states", "audio_hidden_states")):
        gains = [out[stream] - kwargs[name] for out, kwargs in zip(leaving, entering, strict=True)]
        # Both skip steps 2 and 3; by the last step something newer was kept.
        assert gains[1].abs().max() > 0.1
        assert all(torch.allclose(gains[step], gains[1], atol=1e-5) for step in (2, 3))
        assert not torch.allclose(gains[STEPS - 1], gains[1], atol=1e-2)


def test_magcache_is_calibrated_on_video_with_sound(ltx2, capsys):
    pipe, dense = ltx2
    ratios = magnitude_ratios(pipe, lambda: tiny_ltx2.generate(pipe, steps=STEPS), STEPS)
    assert set(ratios) == {"cond_uncond"} and len(ratios["cond_uncond"]) == STEPS
    assert capsys.readouterr().out == ""
    assert equal(tiny_ltx2.generate(pipe, steps=STEPS), dense)


def test_counter_agrees_with_the_report_of_hsa_on_video_with_sound(ltx2):
    pipe, _ = ltx2
    counter = WorkCounter(pipe.transformer)
    session = hs.apply(pipe, hs.HSAConfig(compute=0.6, policy="steps"))
    try:
        tiny_ltx2.generate(pipe, steps=STEPS)
        assert session.report.compute < 1.0 and counter.share == pytest.approx(session.report.compute)
    finally:
        hs.remove(pipe)
        counter.close()


@pytest.mark.parametrize("kind", ["wan22", "wan22 i2v"])
def test_predictions_know_of_two_experts(kind):
    pipe = pipeline_of(kind)
    experts = steps_of_experts(pipe, STEPS)
    assert len(experts) == 2 and sum(map(len, experts)) == STEPS and all(experts)
    ratios = magnitude_ratios(pipe, lambda: generate(pipe, steps=STEPS), STEPS)
    assert all(len(r) == STEPS and r[0] == r[experts[1].start] == 1.0 for r in ratios.values())
    for baseline in (MagCache(STEPS, threshold=0.5, ratios=ratios["cond"]), TaylorSeer(STEPS, interval=3, warmup=2)):
        with baseline.applied(pipe):
            generate(pipe, steps=STEPS)
        assert baseline.compute == pytest.approx(baseline.predicted_compute(experts))


def test_attention_broadcast_keeps_guidance_branches_apart(pipe):
    """As diffusers enables it, the second branch gets what the first one computed, and guidance has no effect."""
    baseline = PAB(STEPS, interval=2, cross_interval=2, low=-1.0, high=1001.0)
    seen = {}
    # Not of the first block, whose self-attention has not seen the text yet.
    later = [block.attn1 for block in pipe.transformer.blocks[1:]]
    with baseline.applied(pipe):
        handles = [
            attention.register_forward_hook(lambda m, args, out: seen.setdefault(id(m), []).append(out))
            for attention in later
        ]
        generate(pipe, steps=4)
    for handle in handles:
        handle.remove()
    for cond0, uncond0, cond1, uncond1, *_ in seen.values():
        assert torch.equal(cond0, cond1) and torch.equal(uncond0, uncond1)
        assert not torch.equal(cond0, uncond0)


def test_attention_broadcast_saves_attention_alone(pipe):
    """Every layer's attention at half of the steps: the rest of the work is the feed-forward's."""
    baseline = PAB(STEPS, interval=2, cross_interval=2, low=-1.0, high=1001.0)
    with baseline.applied(pipe):
        generate(pipe, steps=STEPS)
    width, ffn, tokens, text = 48, 96, 48, 16
    attention = 8 * width**2 + 4 * tokens * width + 4 * width**2 + 4 * text * width
    feed_forward = 4 * width * ffn
    assert baseline.compute == pytest.approx((0.5 * attention + feed_forward) / (attention + feed_forward))


def test_an_exception_inside_restores_the_pipeline(pipe, dense):
    baseline = TeaCache(STEPS, threshold=100.0)
    with pytest.raises(RuntimeError), baseline.applied(pipe):
        generate(pipe, steps=2)
        raise RuntimeError
    assert torch.equal(generate(pipe, steps=STEPS), dense)


def test_refuses_to_work_beside_something_else(pipe):
    hs.apply(pipe, hs.HSAConfig(compute=0.5))
    try:
        with pytest.raises(ValueError, match="hooked"), EasyCache(STEPS, threshold=1.0).applied(pipe):
            pass
    finally:
        hs.remove(pipe)


def test_counter_agrees_with_the_report_of_hsa(pipe):
    counter = WorkCounter(pipe.transformer)
    session = hs.apply(pipe, hs.HSAConfig(compute=0.6, policy="tokens"))
    try:
        generate(pipe, steps=STEPS)
        assert counter.share == pytest.approx(session.report.compute)
    finally:
        hs.remove(pipe)
        counter.close()


def test_magcache_calibration_is_quiet_and_per_branch(pipe, dense, capsys):
    ratios = magnitude_ratios(pipe, lambda: generate(pipe, steps=STEPS), STEPS)
    assert set(ratios) == {"cond", "uncond"}
    assert all(len(r) == STEPS and r[0] == 1.0 for r in ratios.values())
    assert capsys.readouterr().out == ""
    assert torch.equal(generate(pipe, steps=STEPS), dense)


def test_magcache_prediction_counts_what_is_run(pipe):
    ratios = magnitude_ratios(pipe, lambda: generate(pipe, steps=STEPS), STEPS)["cond"]
    for threshold in (0.01, 0.1, 1.0):
        baseline = MagCache(STEPS, threshold=threshold, ratios=ratios, max_skip=3)
        with baseline.applied(pipe):
            generate(pipe, steps=STEPS)
        assert baseline.compute == pytest.approx(baseline.predicted_compute())


def test_teacache_polynomial_is_fitted_to_dense_runs(pipe):
    polynomial = fit_polynomial(pipe, [lambda: generate(pipe, steps=STEPS)], STEPS, degree=2)
    assert len(polynomial) == 3
    assert all(math.isfinite(c) for c in polynomial)
    cache = TeaCache(STEPS, threshold=1.0, polynomial=polynomial)
    assert cache.estimate(0.1) >= 0.0


def test_bisection_shares_measurements():
    calls = []

    def measure(threshold):
        calls.append(threshold)
        return 1.0 / (1.0 + threshold)

    found = bisect_thresholds(measure, [0.75, 0.5, 0.25])
    for wanted, threshold in found.items():
        assert 1.0 / (1.0 + threshold) == pytest.approx(wanted, abs=0.01)
    assert len(calls) == len(set(calls)) < 27


@pytest.mark.parametrize(
    "kind", ["euler", "first-block", "magcache", "taylorseer", "pab", "teacache", "easycache", *FORECAST]
)
def test_tuning_meets_the_compute(pipe, dense, kind):
    def run(steps):
        return generate(pipe, steps=steps)

    settings = tune(kind, pipe, STEPS, [0.6], [Trial(run, dense)])[0.6]
    baseline = build(kind, STEPS, settings)
    with baseline.applied(pipe):
        run(baseline.steps)
    assert baseline.compute == pytest.approx(0.6, abs=0.11)


def fake_result(clip, method, target, seconds, decibels):
    against = {"psnr": decibels, "ssim": 0.9, "relative_l2": 0.1, "latent_psnr": decibels - 5}
    return {
        "clip": clip,
        "key": f"{method}{target}",
        "method": method,
        "target": target,
        "settings": {},
        "compute": target,
        "seconds": seconds,
        "cpu_seconds": seconds,
        "dense_seconds": 10.0,
        "dense_cpu_seconds": 10.0,
        "against": {"dense": against, "ode": {**against, "psnr": decibels - 1}},
        "score": {"colour": True, "size": True, "direction": clip == "a", "single": True},
    }


@pytest.fixture
def results():
    found = []
    for clip, extra in (("a", 0.0), ("b", 2.0)):
        for target in (0.5, 0.25):
            found.append(fake_result(clip, "joint", target, 10 * target, 40 * target + 20 + extra))
            found.append(fake_result(clip, "euler", target, 10 * target + 1, 40 * target + 18 + 1.5 * extra))
    return found


def test_report_pairs_clips_and_compares_at_equal_time(results):
    summary = pareto_report.summarise(results)
    rows = {(r["method"], r["target"]): r for r in summary["rows"]}
    assert rows["euler", 0.5]["time"] == pytest.approx(0.6)
    # Differences 2 and 1 on the two clips.
    difference = rows["euler", 0.5]["dense"]["default_minus_this"]
    assert difference["mean"] == pytest.approx(1.5)
    assert difference["error"] == pytest.approx(0.5)
    assert rows["joint", 0.25]["score"]["direction"] == 0.5
    equal = {(e["method"], e["target"]): e for e in summary["equal_time"]}
    # At .25 Euler takes .35 of dense: there the default has 40 * .35 + 20 (+ extra).
    assert equal["euler", 0.25]["dense"]["mean"] == pytest.approx(34.0 - 28.0 - 0.5)
    # Slower than the default at its largest compute: that one stands in.
    assert equal["euler", 0.5]["dense"]["mean"] == pytest.approx(1.5)


def test_report_writes_three_files(results, tmp_path):
    environment = {"date": "today", "device": "CPU", "threads": 1, "git": "0", "command": "pareto.py"}
    environment["versions"] = {"torch": "2", "diffusers": "0"}
    facts = {
        "split": "tune",
        "solver": "unipc",
        "steps": 40,
        "model": "m",
        "calibration_clips": 2,
        "command": "pareto.py",
    }
    paths = pareto_report.write(
        tmp_path / "report", {3.0: results, 6.0: results}, {**facts, "environment": environment}
    )
    assert [p.suffix for p in paths] == [".json", ".md", ".png"]
    assert all(p.stat().st_size for p in paths)
    text = paths[1].read_text()
    assert "## Guidance 3" in text and "### compute 0.5" in text
    # Twice: the baseline that comes nearest to the default, and its row.
    assert "| 6 | 0.5 | dense | 41.00 ± 1.00 | euler | +1.50 ± 0.50 | +3.0 |" in text
    assert "+1.50 ± 0.50" in text
    assert json.loads(paths[0].read_text())["guidance"]["6"]["metric"] == "psnr"
