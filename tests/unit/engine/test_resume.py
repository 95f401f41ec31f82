"""A run that was broken off and resumed gives the bits of an unbroken one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import heterostep as hs
from heterostep.engine.checkpoint import Saved, read_saved, write_saved
from tiny import KINDS, Fixed, embeddings, generate, tiny_image_pipeline, tiny_pipeline

T, K = 20, 4


class Recorder(hs.StepPlanner):
    """Remembers its plans."""

    def begin(self, *arguments):
        super().begin(*arguments)
        self.plans = {}

    def plan(self, step, *arguments):
        self.plans[step] = super().plan(step, *arguments)
        return self.plans[step]


def through_files(folder, state):
    """What is left of a state after it was written and read."""
    write_saved(folder, "result", Saved(kind="result", step=1, sigma=0.5, job={}, content=state))
    return dict(read_saved(folder, "result", "result").content)


def count_calls(pipe):
    """Count the calls that really reach the model: a list that grows."""
    calls = []
    for transformer in (pipe.transformer, pipe.transformer_2):
        if transformer is not None:
            transformer.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def drive(pipe, folder, *, config=None, planner=None, every=K, saves=(), state=None, **changes):
    """One run: latents, states after the steps `saves`, session, number of model calls."""
    session = hs.apply(pipe, config, planner)
    if every is not None:
        session.save_every(every)
    if state is not None:
        session.resume(state)
    states, calls = {}, count_calls(pipe)

    def on_step_end(pipe, step, timestep, tensors):
        passed = session.passed(step, tensors["latents"])
        if passed is not None:
            return passed
        if step + 1 in saves:
            states[step + 1] = through_files(folder, session.state(tensors["latents"]))
        return {}

    latents = generate(pipe, **{"steps": T, **changes}, callback_on_step_end=on_step_end)
    return latents, states, session, len(calls)


def steps_of(session):
    return [dataclasses.replace(record, seconds=0.0) for record in session.report.steps]


def check_alike(folder, build, saves, **arguments):
    """Resume at every step of `saves` and compare with the unbroken run; returns its records."""
    want, states, whole, _ = drive(build(), folder, saves=saves, **arguments)
    evaluated = sum(1 for record in whole.report.steps if record.active)
    per_step = 2 if arguments.get("guidance_scale", 3.0) > 1 else 1
    for at, state in states.items():
        got, _, session, calls = drive(build(), folder, state=state, **arguments)
        assert torch.equal(got, want), f"resumed at {at}"
        assert steps_of(session) == steps_of(whole)
        assert torch.equal(session.report.evaluations, whole.report.evaluations)
        before = sum(1 for record in whole.report.steps[:at] if record.active)
        assert calls == per_step * (evaluated - before)  # nothing is computed twice
    assert set(states) == set(saves)
    return steps_of(whole)


@pytest.mark.parametrize("policy", ["joint", "tokens", "groups", "steps"])
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_after_a_checkpoint(tmp_path, kind, policy):
    config = hs.HSAConfig(compute=0.6, policy=policy)
    records = check_alike(tmp_path, lambda: tiny_pipeline(kind), (4, 12, 16, T), config=config)
    assert sum(r.active for r in records) / sum(r.total for r in records) == pytest.approx(0.6, abs=0.02)
    partial = any(0 < r.active < r.total for r in records)
    assert partial == (policy in ("tokens", "groups"))
    assert any(r.reason == "checkpoint" for r in records) == partial  # whole steps need no keys and values


@pytest.mark.parametrize("kind", KINDS)
def test_whole_steps_are_resumed_anywhere(tmp_path, kind):
    records = check_alike(tmp_path, lambda: tiny_pipeline(kind), (1, 2, 7, 11, 19), config=hs.HSAConfig(compute=0.5))
    assert not any(r.reason == "checkpoint" for r in records)


@pytest.mark.parametrize("kind", ["unipc", "dpm++", "wan22"])
def test_fewer_steps_are_resumed_anywhere(tmp_path, kind):
    check_alike(tmp_path, lambda: tiny_pipeline(kind), (1, 3, 5, 7), config=hs.HSAConfig(compute=0.5), steps=8)


@pytest.mark.parametrize("kind", ["unipc", "wan22"])
def test_a_promised_quality_is_planned_alike(tmp_path, kind):
    check_alike(tmp_path, lambda: tiny_pipeline(kind), (2, 5, 9), config=hs.HSAConfig(quality=40.0))


@pytest.mark.parametrize("kind", ["euler", "unipc", "wan22"])
def test_dense_runs(tmp_path, kind):
    check_alike(tmp_path, lambda: tiny_pipeline(kind), (1, 8, T), config=hs.HSAConfig(compute=1.0))
    pipe = tiny_pipeline(kind)
    got, *_ = drive(pipe, tmp_path, config=hs.HSAConfig(compute=1.0))
    hs.remove(pipe)
    assert torch.equal(got, generate(pipe, steps=T))


@pytest.mark.parametrize("policy", ["joint", "tokens"])
def test_around_the_change_of_experts(tmp_path, policy):
    config = hs.HSAConfig(compute=0.6, policy=policy)
    _, _, session, _ = drive(tiny_pipeline("wan22"), tmp_path, config=config)
    found = next(r.step for r in session.report.steps if r.reason == "expert switch")
    # With a checkpoint at every one of these steps each of them is one that runs resume at alike.
    for at in (found - 1, found, found + 1):
        check_alike(tmp_path, lambda: tiny_pipeline("wan22"), (at,), config=config, every=at)


@pytest.mark.parametrize("forecast", ["hold", "taylor", "ab2"])
@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("policy", ["tokens", "joint"])
def test_forecasts_and_their_correction(tmp_path, forecast, correct, policy):
    config = hs.HSAConfig(compute=0.6, policy=policy, forecast=forecast, correct=correct)
    check_alike(tmp_path, tiny_pipeline, (4, 12), config=config)


@pytest.mark.parametrize("policy", ["tokens", "groups"])
def test_forecast_keys_and_values_begin_anew(tmp_path, policy):
    config = hs.HSAConfig(compute=0.6, policy=policy, kv_forecast=0.7)
    check_alike(tmp_path, tiny_pipeline, (4, 8, 12, 16), config=config)
    check_alike(tmp_path, lambda: tiny_pipeline("wan22"), (4, 8), config=config)


@pytest.mark.parametrize("policy", ["joint", "tokens"])
def test_without_guidance_and_with_several_videos(tmp_path, policy):
    config = hs.HSAConfig(compute=0.6, policy=policy)
    check_alike(tmp_path, tiny_pipeline, (8,), config=config, guidance_scale=1.0)
    check_alike(tmp_path, lambda: tiny_pipeline("unipc"), (4, 16), config=config, **embeddings(2))


@pytest.mark.parametrize("solver", ["euler", "unipc", "dpm++"])
def test_a_solver_that_replaces_the_scheduler(tmp_path, solver):
    config = hs.HSAConfig(compute=0.6, solver=solver)
    check_alike(tmp_path, lambda: tiny_pipeline("unipc"), (4, 9), config=config)


def test_a_pipeline_that_does_not_say_its_step(tmp_path):
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    config = hs.HSAConfig(compute=0.6, policy="tokens")
    check_alike(tmp_path, tiny_image_pipeline, (4, 12), config=config, image=image)


def test_half_precision(tmp_path):
    def build():
        pipe = tiny_pipeline()
        pipe.transformer.to(torch.bfloat16)
        return pipe

    check_alike(tmp_path, build, (4, 12), config=hs.HSAConfig(compute=0.6, policy="tokens", kv_dtype="bfloat16"))


def test_random_numbers_of_the_sampler(tmp_path):
    def run(seed, **arguments):
        pipe = tiny_pipeline()
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
        torch.manual_seed(seed)
        return drive(pipe, tmp_path, config=hs.HSAConfig(compute=1.0), **arguments)

    want, states, *_ = run(1, saves=(8,))
    assert not torch.equal(run(2)[0], want)
    assert torch.equal(run(2, state=states[8])[0], want)


@pytest.mark.parametrize("kind", ["euler", "unipc", "wan22"])
@pytest.mark.parametrize("at", [3, 10])
def test_between_checkpoints_one_full_step_rebuilds_what_is_not_saved(tmp_path, kind, at):
    """It equals an unbroken run of the same plan in which that step is full."""
    config = hs.HSAConfig(compute=0.6, policy="tokens")
    first, second = Recorder(config), Recorder(config)
    _, states, whole, _ = drive(tiny_pipeline(kind), tmp_path, config=config, planner=first, saves=(at,))
    got, _, resumed, _ = drive(tiny_pipeline(kind), tmp_path, config=config, planner=second, state=states[at])
    assert whole.report.steps[at].reason == "partial"
    assert resumed.report.steps[at].reason == "resume" and resumed.report.steps[at].active == 48
    plans = {step: plan for step, plan in first.plans.items() if step < at}
    plans |= {step: plan for step, plan in second.plans.items() if step > at}
    want, *_ = drive(tiny_pipeline(kind), tmp_path, config=config, planner=Fixed(plans), every=None)
    assert torch.equal(got, want)


def test_a_resumed_run_is_saved_and_resumed_again(tmp_path):
    config = hs.HSAConfig(compute=0.6, policy="tokens")
    _, states, *_ = drive(tiny_pipeline(), tmp_path, config=config, saves=(9,))
    want, later, once, _ = drive(tiny_pipeline(), tmp_path, config=config, state=states[9], saves=(10, 12, 16))
    assert once.report.steps[9].reason == "resume"
    for at in (12, 16):
        got, _, twice, _ = drive(tiny_pipeline(), tmp_path, config=config, state=later[at])
        assert torch.equal(got, want)
        assert steps_of(twice) == steps_of(once)
    # Saved once more between two checkpoints: another full step, and then the same plan.
    _, _, twice, _ = drive(tiny_pipeline(), tmp_path, config=config, state=later[10])
    assert [r.reason for r in twice.report.steps[9:11]] == ["resume", "resume"]
    assert [r.active for r in twice.report.steps[11:]] == [r.active for r in once.report.steps[11:]]


def test_another_rhythm_keeps_the_plan(tmp_path):
    config = hs.HSAConfig(compute=0.6, policy="tokens")
    want, states, *_ = drive(tiny_pipeline(), tmp_path, config=config, saves=(8,))
    got, *_ = drive(tiny_pipeline(), tmp_path, config=config, state=states[8], every=7)
    assert torch.equal(got, want)


def test_a_users_planner_must_be_resumable(tmp_path):
    class Forgetful:
        def plan(self, step, num_steps, sigma, num_tokens):
            return None

    with pytest.raises(hs.ConfigError, match=r"Forgetful has no methods state\(\) and restore\(state, device\)"):
        drive(tiny_pipeline(), tmp_path, planner=Forgetful())
    session = hs.apply(tiny_pipeline(), planner=Forgetful())
    with pytest.raises(hs.ConfigError, match="Forgetful"):
        session.resume({"run": {}, "pipeline": {}})
    plans = {i: torch.arange(5 + i) for i in range(1, T)}
    records = check_alike(tmp_path, tiny_pipeline, (4, 12), planner=Fixed(plans))
    # What it will do is not known beforehand, so that all steps after a checkpoint are full.
    assert [r.step for r in records if r.reason == "checkpoint"] == [4, 8, 12, 16]


def test_only_steps_that_need_it_are_forced(tmp_path):
    """A checkpoint before a skipped or full step costs nothing; K/V of before would not be read."""
    none = torch.empty(0, dtype=torch.int64)
    plans = {i: None if i % 6 == 0 else none for i in range(T)} | {15: torch.arange(20)}
    planner = Fixed(plans)
    planner.counts = [48 if plans[i] is None else len(plans[i]) for i in range(T)]
    records = check_alike(tmp_path, tiny_pipeline, (4, 8, 12, 13, 15, 16), planner=planner, every=1)
    assert [r.step for r in records if r.reason == "checkpoint"] == [15]  # the first that reads K/V, not 13


def test_jobs_of_the_default_policy_have_whole_steps_only(tmp_path):
    """A partial step that makes up the last per cent would make checkpoints dear."""
    for steps, compute in ((8, 0.4), (11, 0.33), (16, 0.6)):
        config = hs.HSAConfig(compute=compute)
        plain, kept = hs.apply(tiny_pipeline(), config), hs.apply(tiny_pipeline(), config)
        kept.save_every(1)
        for session in (plain, kept):
            generate(session.pipe, steps=steps)
        assert any(0 < r.active < r.total for r in plain.report.steps)
        assert {r.active for r in kept.report.steps} == {0, 48}
        assert abs(kept.report.compute - compute) <= 0.5 / steps


def test_too_many_checkpoints_for_the_budget(tmp_path):
    with pytest.raises(hs.ConfigError, match="follow a checkpoint, so that a larger checkpoint_every than 1") as caught:
        drive(tiny_pipeline(), tmp_path, config=hs.HSAConfig(compute=0.5, policy="tokens"), every=1)
    assert str(caught.value).count("\n") == 0
    with pytest.raises(hs.ConfigError) as caught:  # not the checkpoints' fault
        drive(tiny_pipeline(), tmp_path, config=hs.HSAConfig(compute=0.01, policy="tokens"), every=10)
    assert "checkpoint" not in str(caught.value)


def test_a_scheduler_that_cannot_be_saved(tmp_path):
    pipe = tiny_pipeline("unipc")
    pipe.scheduler.inner = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(hs.ConfigError, match=r"UniPC\w+ keeps a FlowMatchEulerDiscreteScheduler in inner"):
        drive(pipe, tmp_path, config=hs.HSAConfig(compute=1.0), saves=(3,))


def test_a_state_of_another_run_is_refused(tmp_path):
    config = hs.HSAConfig(compute=0.6, policy="tokens")

    def saved():
        return drive(tiny_pipeline(), tmp_path, config=config, saves=(4,), steps=8)[1][4]

    with pytest.raises(hs.ConfigError, match=r"8 steps of 1 x \[3, 4, 4\] tokens, this one 9"):
        drive(tiny_pipeline(), tmp_path, config=config, state=saved(), steps=9)
    with pytest.raises(hs.ConfigError, match="tokens, this one 8 of 2"):
        drive(tiny_pipeline(), tmp_path, config=config, state=saved(), steps=8, **embeddings(2))
    with pytest.raises(hs.ConfigError, match="planned by another"):
        drive(tiny_pipeline(), tmp_path, config=hs.HSAConfig(compute=0.7, policy="tokens"), state=saved(), steps=8)


@pytest.mark.parametrize("breaks_at", [1, 3, 6])
def test_a_session_starts_clean_after_a_resumed_run(tmp_path, breaks_at):
    """Also if that run broke, while it passed over steps (1, 3) or later (6)."""
    config = hs.HSAConfig(compute=0.6, policy="tokens")
    want, states, *_ = drive(tiny_pipeline(), tmp_path, config=config, saves=(4,))
    pipe = tiny_pipeline()
    session = hs.apply(pipe, config)
    session.save_every(K)
    session.resume(states[4])

    def broken(pipe, step, timestep, tensors):
        if step == breaks_at:
            raise RuntimeError("mine")
        return session.passed(step, tensors["latents"]) or {}

    with pytest.raises(RuntimeError, match="mine"):
        generate(pipe, steps=T, callback_on_step_end=broken)
    assert torch.equal(generate(pipe, steps=T), want)
    assert [r.step for r in session.report.steps] == list(range(T))


def test_a_plain_run_passes_over_nothing(tmp_path):
    session = hs.apply(tiny_pipeline(), hs.HSAConfig(compute=0.5))
    assert session.passed(0, torch.zeros(1)) is None
    generate(session.pipe, steps=8)
    assert session.passed(0, torch.zeros(1)) is None
