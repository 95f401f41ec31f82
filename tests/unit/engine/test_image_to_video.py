"""Image to video: against the stock pipelines bit for bit, against the independent reference to 1e-5."""

import pytest
import torch
from reference import Reference

import heterostep as hs
from heterostep.engine.models import adapter_for
from tiny import IMAGE_KINDS, embeddings, generate, picture, shifted, tiny_image_pipeline, tiny_pipeline

N, GIVEN = 48, 16
SETTINGS = {"wan21 i2v": {"policy": "tokens"}, "wan22 i2v": {"policy": "groups"}, "ti2v5b i2v": {"policy": "tokens"}}


class Fixed:
    """A user's planner: only `plan`, from a list."""

    def __init__(self, plans):
        self.plans = plans

    def plan(self, step, num_steps, sigma, num_tokens):
        return self.plans[step]


def plans_of(steps, seed=0):
    """None, empty, and sets of several sizes in turn, chosen at random."""
    g = torch.Generator().manual_seed(seed)
    sizes = [(N, 11, 0, 20, N, 30, 7)[i % 7] for i in range(steps)]
    return [None if size == N else torch.randperm(N, generator=g)[:size] for size in sizes]


def conditions(pipe, start):
    """What the stock pipeline makes of `picture()`: first frame or further channels, and the encoder's view."""
    image = pipe.video_processor.preprocess(picture(), height=64, width=64)
    made = pipe.prepare_latents(image, 1, 16, 64, 64, 9, torch.float32, "cpu", None, start)
    return made[1], None if pipe.image_encoder is None else pipe.encode_image(picture())


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_full_compute_is_stock_a_target_is_met_and_remove_restores(kind):
    pipe = tiny_image_pipeline(kind)
    stock = generate(pipe, steps=20)
    hs.apply(pipe, hs.HSAConfig(compute=1.0))
    assert torch.equal(generate(pipe, steps=20), stock)
    session = hs.apply(pipe, hs.HSAConfig(compute=0.5, **SETTINGS[kind]))
    first = generate(pipe, steps=20)
    report = session.report
    assert not torch.equal(first, stock)
    assert [record.step for record in report.steps] == list(range(20))
    assert abs(report.compute - 0.5) <= 0.02
    assert int(report.evaluations.sum()) == sum(record.active for record in report.steps)
    assert sum(record.reason == "expert switch" for record in report.steps) == (kind == "wan22 i2v")

    def broken(pipe, step, timestep, tensors):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        generate(pipe, steps=20, callback_on_step_end=broken)
    assert torch.equal(generate(pipe, steps=20), first)
    hs.remove(pipe)
    assert torch.equal(generate(pipe, steps=20), stock)


@pytest.mark.parametrize("forecast", ["hold", "taylor"])
@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_partial_run_equals_the_masked_reference(kind, forecast):
    pipe, plans = tiny_image_pipeline(kind), plans_of(9)
    start = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    reference = Reference(pipe, forecast, correct=forecast != "hold")
    condition, seen = conditions(pipe, start)
    session = hs.apply(pipe, hs.HSAConfig(forecast=forecast), planner=Fixed(plans))
    got = generate(pipe, steps=9, latents=start)
    for record in session.report.steps:  # what the hook forces is full in the reference too
        if record.reason in ("first step", "expert switch"):
            plans[record.step] = None
    text = embeddings(length=16 if seen is None else 512)
    want = reference.run(
        start, plans, text["prompt_embeds"], text["negative_prompt_embeds"], 3.0, condition=condition, seen=seen
    )
    assert ((got - want).norm() / want.norm()).item() < 1e-5
    assert [r.active for r in session.report.steps] == [N if p is None else p.shape[-1] for p in plans]


@pytest.mark.parametrize("policy", ["tokens", "groups"])
@pytest.mark.parametrize("compute", [0.3, 0.5])
def test_partial_steps_leave_out_conditioned_tokens(policy, compute):
    pipe = tiny_image_pipeline("ti2v5b i2v")
    session = hs.apply(pipe, hs.HSAConfig(compute=compute, policy=policy, kv_forecast=0.5))
    generate(pipe, steps=20)
    report = session.report
    full = sum(record.active == N for record in report.steps)
    assert report.conditioned == GIVEN
    assert (report.evaluations[0] == full).all()
    assert int(report.evaluations[1:].min()) >= full and report.evaluations[1:].float().mean() > full
    assert abs(report.compute - compute) <= 0.02
    assert max(record.active for record in report.steps if record.active != N) < N - GIVEN


def test_work_that_the_others_cannot_take_goes_to_conditioned_tokens():
    pipe = tiny_image_pipeline("ti2v5b i2v")
    session = hs.apply(pipe, hs.HSAConfig(compute=0.9, policy="tokens"))
    generate(pipe, steps=20)
    assert abs(session.report.compute - 0.9) <= 0.02
    assert (session.report.evaluations[1:] == 20).all()
    assert min(record.active for record in session.report.steps) == N - GIVEN


@pytest.mark.parametrize("policy", ["joint", "steps"])
def test_whole_steps_keep_nothing_for_conditioned_tokens(policy):
    pipe = tiny_image_pipeline("ti2v5b i2v")
    session = hs.apply(pipe, hs.HSAConfig(compute=0.5, policy=policy))
    generate(pipe, steps=20)
    assert {record.active for record in session.report.steps} == {0, N}
    assert session.report.kv_bytes == 0 and session.report.conditioned == GIVEN


def test_text_to_video_of_the_same_model_has_no_conditioned_tokens():
    pipe = tiny_pipeline("ti2v5b")
    session = hs.apply(pipe, hs.HSAConfig(policy="tokens"))
    generate(pipe, steps=10)
    assert session.report.conditioned == 0
    assert adapter_for(pipe).conditioned(torch.tensor([5.0])) is None


@pytest.mark.parametrize("policy", ["tokens", "groups", "joint"])
def test_a_planner_that_knows_of_conditioned_tokens(policy):
    sigmas, given = shifted(20), torch.arange(5, 45, 4)
    planner = hs.StepPlanner(hs.HSAConfig(policy=policy, compute=0.47))
    planner.begin(sigmas, 320, 2, frozenset({0, 10}), None, given)
    g = torch.Generator().manual_seed(0)
    for i in range(20):
        active = planner.plan(i, 20, sigmas[i], 320)
        if active is not None and active.numel():
            assert active.shape == (2, planner.counts[i])
            assert torch.equal(active, active.sort(-1).values) and bool((active.diff(dim=-1) > 0).all())
            if policy != "joint":
                assert not torch.isin(active, given).any()
        planner.observe(i, sigmas[i], torch.randn(2, 320, 4, generator=g), active)
    assert planner.counts[0] == planner.counts[10] == 320
    assert abs(sum(planner.counts) / (20 * 320) - 0.47) <= 0.02
    # Nothing is left of them in a run without any.
    planner.begin(sigmas, 320, 2, frozenset({0, 10}))
    assert planner.counts == _fresh(policy, sigmas)


@pytest.mark.parametrize("policy", ["tokens", "groups"])
@pytest.mark.parametrize(("num_tokens", "conditioned"), [(24, 12), (48, 16), (36, 4), (320, 10)])
def test_the_target_is_met_however_many_tokens_are_given(policy, num_tokens, conditioned):
    for steps in (6, 20):
        for compute in (0.4, 0.5, 0.75, 0.9, 0.97):
            config = hs.HSAConfig(policy=policy, compute=compute)
            plain, planner = hs.StepPlanner(config), hs.StepPlanner(config)
            plain.begin(shifted(steps), num_tokens)
            planner.begin(shifted(steps), num_tokens, conditioned=torch.arange(conditioned))
            share, without = (sum(p.counts) / (steps * num_tokens) for p in (planner, plain))
            assert compute - max(0.02, compute - without) - 1e-9 <= share <= compute + 1e-6


def _fresh(policy, sigmas):
    planner = hs.StepPlanner(hs.HSAConfig(policy=policy, compute=0.47))
    planner.begin(sigmas, 320, 2, frozenset({0, 10}))
    return planner.counts


def test_too_little_work_is_said_in_the_terms_of_the_request():
    pipe = tiny_image_pipeline("ti2v5b i2v")
    hs.apply(pipe, hs.HSAConfig(compute=0.1, policy="tokens"))
    with pytest.raises(hs.ConfigError, match=r"compute=0\.1 cannot be met with 5 steps.*at least compute=0\.2"):
        generate(pipe, steps=5)
