"""Parity is the specification: against the stock pipeline bit for bit, against an independent reference to
1e-5. It is what engine/denoise/hook.py, run.py and branch.py do together."""

import operator

import pytest
import torch
from diffusers import WanPipeline
from diffusers.hooks import HookRegistry, ModelHook
from reference import Reference

import heterostep as hs
from heterostep.engine.report import plain_step
from tiny import KINDS, embeddings, generate, tiny_pipeline

N = 48


class FixedPlanner:
    """A user's planner: only `plan`, from a list."""

    def __init__(self, plans):
        self.plans = plans

    def plan(self, step, num_steps, sigma, num_tokens):
        assert (num_steps, num_tokens) == (len(self.plans), N)
        return self.plans[step]


def random_plans(steps, batch=1, per_sample=False, seed=0):
    """None, empty, and sets of several sizes in turn, chosen at random."""
    g = torch.Generator().manual_seed(seed)
    plans = []
    for i in range(steps):
        size = [N, 11, 0, 20, N, 0, 30, 7][i % 8]
        rows = [torch.randperm(N, generator=g)[:size] for _ in range(batch)]
        plans.append(None if size == N else torch.stack(rows) if per_sample and size else rows[0])
    return plans


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def calls_of(pipe):
    """Count the passes through each layer's feed-forward: one per model call that really ran."""
    counts = []
    for model in (pipe.transformer, pipe.transformer_2):
        if model is not None:
            model.blocks[0].ffn.register_forward_hook(lambda m, a, o: counts.append(a[0].shape[1]))
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_full_compute_is_the_stock_pipeline_bit_for_bit(kind):
    pipe = tiny_pipeline(kind)
    stock = generate(pipe)
    session = hs.apply(pipe, hs.HSAConfig(compute=1.0))
    assert torch.equal(generate(pipe), stock)
    assert session.report.compute == 1.0
    assert session.report.kv_bytes == 0
    assert all(branch.velocity.last is None for branch in session._run.branches.values())


@pytest.mark.parametrize("kind", KINDS)
def test_remove_restores_bit_for_bit(kind):
    pipe = tiny_pipeline(kind)
    stock = generate(pipe)
    processors = [b.attn1.processor for b in pipe.transformer.blocks]
    scheduler = pipe.scheduler
    hs.apply(pipe, hs.HSAConfig(compute=0.5, solver="unipc" if kind == "euler" else "euler"))
    assert not torch.equal(generate(pipe), stock)
    hs.remove(pipe)
    hs.remove(pipe)  # harmless when nothing is left
    assert [b.attn1.processor for b in pipe.transformer.blocks] == processors
    assert pipe.scheduler is scheduler
    assert torch.equal(generate(pipe), stock)


@pytest.mark.parametrize("forecast", ["hold", "taylor", "ab2"])
@pytest.mark.parametrize("kind", ["euler", "unipc", "dpm++", "wan22", "ti2v5b"])
def test_partial_run_equals_the_masked_reference(kind, forecast):
    if forecast == "ab2" and kind != "euler":
        pytest.skip("refused: double second order")
    pipe, plans = tiny_pipeline(kind), random_plans(12)
    text = embeddings()
    start = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    correct = forecast != "hold"
    reference = Reference(pipe, forecast, correct=correct)
    session = hs.apply(pipe, hs.HSAConfig(forecast=forecast), planner=FixedPlanner(plans))
    got = generate(pipe, steps=12, latents=start)
    for record in session.report.steps:  # what the hook forces is full in the reference too
        if record.reason in ("first step", "expert switch"):
            plans[record.step] = None
    want = reference.run(start, plans, text["prompt_embeds"], text["negative_prompt_embeds"], 3.0)
    assert relative(got, want) < 1e-5
    assert [r.active for r in session.report.steps] == [N if p is None else p.shape[-1] for p in plans]


@pytest.mark.parametrize("kind", ["euler", "ti2v5b"])
@pytest.mark.parametrize("damp", [0.0, 0.5])
def test_per_sample_sets_and_kv_forecast_equal_the_reference(kind, damp):
    pipe, plans = tiny_pipeline(kind), random_plans(10, batch=2, per_sample=True)
    text = embeddings(2)
    start = torch.randn(2, 16, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    reference = Reference(pipe, "taylor", damp, correct=True)
    session = hs.apply(pipe, hs.HSAConfig(kv_forecast=damp), planner=FixedPlanner(plans))
    got = generate(pipe, steps=10, prompts=2, latents=start)
    want = reference.run(start, plans, text["prompt_embeds"], text["negative_prompt_embeds"], 3.0)
    assert relative(got, want) < 1e-5
    assert session.report.evaluations.shape == (2, 3, 4, 4)
    assert session.report.kv_bytes == (2 if damp else 1) * 2 * 73728


@pytest.mark.parametrize("forecast", ["hold", "taylor", "ab2"])
@pytest.mark.parametrize("correct", [False, True])
def test_correction_across_two_experts_equals_the_reference(forecast, correct):
    pipe, plans = tiny_pipeline("wan22"), random_plans(12)
    pipe.scheduler = tiny_pipeline("euler").scheduler
    start = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    reference = Reference(pipe, forecast, correct=correct)
    session = hs.apply(pipe, hs.HSAConfig(forecast=forecast, correct=correct), planner=FixedPlanner(plans))
    got = generate(pipe, steps=12, latents=start)
    for record in session.report.steps:
        if record.reason in ("first step", "expert switch"):
            plans[record.step] = None
    text = embeddings()
    want = reference.run(start, plans, text["prompt_embeds"], text["negative_prompt_embeds"], 3.0)
    assert relative(got, want) < 1e-5


def test_shared_set_with_several_videos_and_without_guidance():
    pipe, plans = tiny_pipeline(), random_plans(9)
    start = torch.randn(2, 16, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    reference = Reference(pipe, "taylor", correct=True)
    hs.apply(pipe, planner=FixedPlanner(plans))
    got = generate(pipe, steps=9, num_videos_per_prompt=2, guidance_scale=1.0, latents=start)
    text = embeddings()["prompt_embeds"].expand(2, -1, -1)
    assert relative(got, reference.run(start, plans, text, None, 1.0)) < 1e-5


def test_fused_projections_change_nothing():
    pipe, plans = tiny_pipeline(), random_plans(8)
    hs.apply(pipe, planner=FixedPlanner(plans))
    want = generate(pipe)
    pipe.transformer.fuse_qkv_projections()
    assert relative(generate(pipe), want) < 1e-5


@pytest.mark.parametrize("policy", ["joint", "tokens", "groups", "steps"])
def test_second_run_starts_clean(policy):
    pipe = tiny_pipeline("unipc")
    session = hs.apply(pipe, hs.HSAConfig(compute=0.4, policy=policy))
    first = generate(pipe, steps=20)
    report = session.report
    generate(pipe, steps=9, seed=4, num_frames=5)
    assert torch.equal(generate(pipe, steps=20), first)
    again = session.report
    assert [(r.active, r.reason) for r in again.steps] == [(r.active, r.reason) for r in report.steps]
    assert torch.equal(again.evaluations, report.evaluations)


def test_type_of_the_model_may_change_between_runs():
    pipe = tiny_pipeline()
    hs.apply(pipe, hs.HSAConfig(policy="tokens"))
    generate(pipe, steps=10)
    pipe.transformer.to(torch.bfloat16)
    again = generate(pipe, steps=10)
    hs.apply(pipe, hs.HSAConfig(policy="tokens"))
    assert torch.equal(generate(pipe, steps=10), again)


def test_inference_mode_may_come_and_go():
    pipe = tiny_pipeline()
    hs.apply(pipe, hs.HSAConfig(policy="tokens", correct=True, kv_forecast=0.5))
    videos = []
    for inference in (True, False, True, False):
        with torch.inference_mode(inference):
            videos.append(generate(pipe, steps=10))
    assert all(torch.equal(video, videos[0]) for video in videos)


@pytest.mark.parametrize("offloaded", ["before", "after"])
def test_offloading_and_hsa_in_either_order(offloaded):
    """The pipeline sets its offloading up anew at the end of every call: nothing of ours may be lost by that."""
    pipe = tiny_pipeline()
    stock = generate(pipe, steps=10)
    hs.apply(pipe)
    want = generate(pipe, steps=10)
    hs.remove(pipe)
    if offloaded == "before":
        pipe.enable_model_cpu_offload(device="cpu")
    session = hs.apply(pipe)
    if offloaded == "after":
        pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(3):
        assert torch.equal(generate(pipe, steps=10), want)
        assert len(session.report.steps) == 10
    hs.remove(pipe)
    moved = []
    hook = pipe.transformer._hf_hook
    hook.pre_forward = lambda *args, pre=hook.pre_forward, **kwargs: moved.append(1) or pre(*args, **kwargs)
    assert torch.equal(generate(pipe, steps=10), stock)
    assert len(moved) == 20
    pipe.remove_all_hooks()
    assert torch.equal(generate(pipe, steps=10), stock)


@pytest.mark.parametrize("at", [0, 1, 5])
def test_exception_in_a_callback_leaves_the_pipeline_usable(at):
    pipe = tiny_pipeline()
    hs.apply(pipe, hs.HSAConfig(compute=0.5))
    want = generate(pipe, steps=10)

    def broken(pipe, step, timestep, tensors):
        if step == at:
            raise RuntimeError("stop")
        return tensors

    with pytest.raises(RuntimeError, match="stop"):
        generate(pipe, steps=10, callback_on_step_end=broken)
    assert torch.equal(generate(pipe, steps=10), want)


@pytest.mark.parametrize("nth", [1, 2, 6, 7])
def test_exception_inside_the_model_leaves_the_pipeline_usable(nth):
    pipe = tiny_pipeline()
    hs.apply(pipe, hs.HSAConfig(compute=0.8))
    want = generate(pipe, steps=10)
    calls = []

    def broken(module, args):
        calls.append(1)
        if len(calls) == nth:
            raise RuntimeError("out of memory")

    handle = pipe.transformer.blocks[1].register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(pipe, steps=10)
    handle.remove()
    assert torch.equal(generate(pipe, steps=10), want)
    hs.remove(pipe)


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_remove_works_right_after_an_exception_inside_the_model(nth):
    pipe = tiny_pipeline()
    stock, calls = generate(pipe, steps=10), []
    hs.apply(pipe, hs.HSAConfig(compute=0.8))

    def broken(module, args):
        calls.append(1)
        if len(calls) == nth:
            raise RuntimeError("out of memory")

    handle = pipe.transformer.blocks[1].register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(pipe, steps=10)
    handle.remove()
    hs.remove(pipe)
    assert torch.equal(generate(pipe, steps=10), stock)


def test_callback_on_step_end_sees_the_report_grow_and_may_change_latents():
    pipe, seen = tiny_pipeline(), []
    session = hs.apply(pipe, hs.HSAConfig(compute=0.5))
    records = []
    session.on_step.append(records.append)

    def callback(pipe, step, timestep, tensors):
        seen.append([r.step for r in session.report.steps])
        return {"latents": tensors["latents"] * 1.0}

    want = generate(pipe, steps=10)
    assert torch.equal(generate(pipe, steps=10, callback_on_step_end=callback), want)
    assert seen == [list(range(i + 1)) for i in range(10)]
    assert [r.step for r in records] == [*range(10), *range(10)]


@pytest.mark.parametrize("settings", [{}, {"policy": "tokens", "kv_forecast": 0.5, "warmup": 1}, {"forecast": "ab2"}])
def test_a_run_that_ended_in_nan_leaves_nothing_behind(settings):
    config = hs.HSAConfig(compute=0.5, solver="euler", **settings)
    pipe = tiny_pipeline()
    hs.apply(pipe, config)
    fresh = generate(pipe)
    broken = {name: torch.full_like(t, torch.nan) for name, t in embeddings().items()}
    hs.apply(pipe, config)
    assert generate(pipe, **broken).isnan().all()
    assert torch.equal(generate(pipe), fresh)


def test_known_counts_save_work_but_change_nothing():
    """The evaluation that ends a gap corrects it, also where every step from there on is known to be full."""
    none = torch.empty(0, dtype=torch.int64)
    plans = [None, None, none, None, torch.arange(0, N, 2), none, None, None]
    results = []
    for counts in (None, [N if p is None else len(p) for p in plans]):
        pipe, planner = tiny_pipeline("euler"), FixedPlanner(plans)
        if counts:
            planner.counts = counts
        hs.apply(pipe, hs.HSAConfig(), planner=planner)
        results.append(generate(pipe))
    assert torch.equal(*results)


class Bystander(ModelHook):
    """Another's hook, which counts calls; with a `new_forward` as caches have it, or without."""

    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


class ForwardBystander(Bystander):
    def new_forward(self, module, *args, **kwargs):
        return self.fn_ref.original_forward(*args, **kwargs)


@pytest.mark.parametrize("kind", [Bystander, ForwardBystander])
@pytest.mark.parametrize("name", ["transformer", "transformer.rope"])
def test_a_hook_beneath_may_go_away(kind, name):
    """Group offloading with streams takes one of its hooks off after the first pass."""
    pipe, plans = tiny_pipeline(), random_plans(8)
    hs.apply(pipe, planner=FixedPlanner(plans))
    want = generate(pipe)
    hs.remove(pipe)
    registry = HookRegistry.check_if_exists_or_initialize(operator.attrgetter(name)(pipe))
    registry.register_hook(kind(), "bystander")
    hs.apply(pipe, planner=FixedPlanner(plans))

    def callback(pipe, step, timestep, tensors):
        if step == 1:
            registry.remove_hook("bystander")
        return tensors

    assert torch.equal(generate(pipe, callback_on_step_end=callback), want)
    assert torch.equal(generate(pipe), want)


@pytest.mark.parametrize("kind", [Bystander, ForwardBystander])
def test_remove_leaves_a_hook_above_in_force(kind):
    pipe = tiny_pipeline()
    stock = generate(pipe)
    hs.apply(pipe)
    bystander = kind()
    HookRegistry.check_if_exists_or_initialize(pipe.transformer).register_hook(bystander, "bystander")
    if kind is ForwardBystander:
        bystander.fn_ref.forward = lambda *args, forward=bystander.fn_ref.forward, **kwargs: tuple(
            2 * t for t in forward(*args, **kwargs)
        )
    hs.remove(pipe)
    assert torch.equal(generate(pipe), stock) is (kind is Bystander)
    assert bystander.calls == 16


def test_applying_twice_replaces_cleanly():
    pipe = tiny_pipeline()
    stock = generate(pipe)
    hs.apply(pipe, hs.HSAConfig(compute=0.3))
    generate(pipe, steps=10)
    session = hs.apply(pipe, hs.HSAConfig(compute=1.0))
    assert torch.equal(generate(pipe), stock)
    assert len(session.report.steps) == 8
    hs.remove(pipe)
    assert torch.equal(generate(pipe), stock)


def test_empty_steps_run_no_transformer():
    pipe = tiny_pipeline()
    session = hs.apply(pipe, hs.HSAConfig(compute=0.3, policy="steps"))
    calls = calls_of(pipe)
    generate(pipe, steps=20)
    full = sum(r.active == N for r in session.report.steps)
    assert full == 6
    assert calls == [N] * (2 * full)  # two guidance branches
    assert session.report.kv_bytes == 0


@pytest.mark.parametrize("policy", ["joint", "tokens", "groups"])
def test_every_call_computes_the_active_tokens_only(policy):
    pipe = tiny_pipeline()
    session = hs.apply(pipe, hs.HSAConfig(compute=0.5, policy=policy))
    calls = calls_of(pipe)
    generate(pipe, steps=20)
    report = session.report
    assert calls == [r.active for r in report.steps if r.active for _ in range(2)]
    assert abs(report.compute - 0.5) <= 0.02
    assert int(report.evaluations.sum()) == sum(r.active for r in report.steps)
    assert report.evaluations.shape == (3, 4, 4)


def test_batches_get_a_set_per_sample_of_equal_size():
    pipe = tiny_pipeline()
    session = hs.apply(pipe, hs.HSAConfig(compute=0.5, policy="tokens"))
    generate(pipe, steps=20, prompts=2)
    evaluations = session.report.evaluations
    assert evaluations.shape == (2, 3, 4, 4)
    assert int(evaluations[0].sum()) == int(evaluations[1].sum())
    assert not torch.equal(evaluations[0], evaluations[1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_cache_halves_the_memory(dtype):
    pipe = tiny_pipeline()
    session = hs.apply(pipe, hs.HSAConfig(compute=0.5, policy="tokens"))
    want = generate(pipe, steps=10)
    size = session.report.kv_bytes
    session = hs.apply(pipe, hs.HSAConfig(compute=0.5, policy="tokens", kv_dtype=dtype))
    got = generate(pipe, steps=10)
    assert session.report.kv_bytes * 2 == size
    assert 0 < relative(got, want) < 0.05
    session.release()
    assert session.report.kv_bytes == 0


def test_bfloat16_pipeline_runs():
    pipe = tiny_pipeline()
    pipe.transformer.to(torch.bfloat16)
    stock = generate(pipe)
    hs.apply(pipe, hs.HSAConfig(compute=1.0))
    assert torch.equal(generate(pipe), stock)
    hs.apply(pipe, hs.HSAConfig(compute=0.5))
    assert generate(pipe, steps=12).isfinite().all()


def test_report_is_json():
    import json

    pipe = tiny_pipeline()
    session = hs.apply(pipe)
    assert session.report.evaluations is None
    generate(pipe, steps=5)
    steps = json.loads(json.dumps([plain_step(step) for step in session.report.steps]))
    assert len(steps) == session.report.num_steps == 5
    assert set(steps[0]) == {"step", "sigma", "active", "total", "reason", "seconds"}


def test_stale_keys_matter_in_these_tests():
    """The reference would notice a cache that is not synchronised: another plan gives another video."""
    pipe, plans = tiny_pipeline(), random_plans(12)
    start = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    hs.apply(pipe, planner=FixedPlanner(plans))
    a = generate(pipe, steps=12, latents=start)
    hs.apply(pipe, hs.HSAConfig(kv_forecast=0.5), planner=FixedPlanner(plans))
    assert relative(generate(pipe, steps=12, latents=start), a) > 1e-4
    hs.remove(pipe)
    assert relative(generate(pipe, steps=12, latents=start), a) > 1e-2


class Loop(WanPipeline):
    """A pipeline whose scheduler is left out: it would read the sigmas."""

    def loop(self, prompts):
        latents = torch.empty(prompts, 16, 3, 8, 8, device="meta")
        text = torch.empty(prompts, 16, 32, device="meta")
        for i in range(10):
            for branch in ("cond", "uncond"):
                with self.transformer.cache_context(branch, step_index=i):
                    velocity = self.transformer(latents, torch.empty(prompts, device="meta"), text).sample
                assert velocity.shape == latents.shape


@pytest.mark.parametrize(
    ("policy", "prompts"), [("joint", 1), ("tokens", 1), ("tokens", 2), ("groups", 1), ("steps", 1)]
)
def test_no_step_waits_for_the_device(policy, prompts):
    """The meta device has shapes but no values: whoever reads one, and so would stall a GPU's queue, fails."""
    pipe = tiny_pipeline()
    pipe.__class__ = Loop
    pipe.transformer.to("meta")
    pipe.scheduler.set_timesteps(10)
    pipe._guidance_scale = 3.0
    session = hs.apply(pipe, hs.HSAConfig(compute=0.47, policy=policy, correct=True, kv_forecast=0.5))
    pipe.loop(prompts)
    records = session._run.records
    assert len(records) == 10
    assert policy == "steps" or any(0 < r.active < r.total for r in records)
