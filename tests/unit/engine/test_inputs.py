"""What guides a run may change in the middle of it, by a pipeline's callback: prompts, guidance, LoRA, weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import heterostep as hs
import tiny_ltx2
from heterostep.engine.checkpoint import Saved, read_saved, write_saved
from tiny import Fixed, build, embeddings, generate, tiny_pipeline

OTHER = embeddings(seed=99)
EMPTY = torch.empty(0, dtype=torch.int64)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def count_calls(pipe):
    """A list that grows by the tokens of each call of the model."""
    calls = []
    pipe.transformer.blocks[0].ffn.register_forward_hook(lambda m, a, o: calls.append(a[0].shape[1]))
    return calls


def at(step, change):
    """A callback that makes the change after a step, for `generate`."""

    def callback(pipe, index, timestep, tensors):
        return (change(pipe, tensors) or {}) if index == step else {}

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}


def prompt(pipe, tensors):
    return {"prompt_embeds": OTHER["prompt_embeds"]}


def negative_prompt(pipe, tensors):
    return {"negative_prompt_embeds": OTHER["negative_prompt_embeds"]}


def prompt_in_place(pipe, tensors):
    tensors["prompt_embeds"].mul_(-1.0)


def equal_prompt(pipe, tensors):
    return {"prompt_embeds": tensors["prompt_embeds"].clone()}


def no_guidance(pipe, tensors):
    pipe._guidance_scale = 1.0


def weights_in_place(pipe, tensors):
    pipe.transformer.blocks[0].attn2.to_v.weight.mul_(-1.0)


def other_weights(pipe, tensors):
    layer = pipe.transformer.blocks[0].attn2.to_v
    layer.weight = torch.nn.Parameter(layer.weight * -1.0, requires_grad=False)


def loaded_weights(pipe, tensors):
    model = pipe.transformer
    model.load_state_dict({name: 0.9 * value for name, value in model.state_dict().items()})


def other_projection(pipe, tensors):
    model = pipe.transformer
    model.fuse_qkv_projections()
    model.blocks[0].attn2.to_kv.weight.mul_(-1.0)


CHANGES = [
    prompt, negative_prompt, prompt_in_place, equal_prompt, no_guidance, weights_in_place, other_weights,
    loaded_weights, other_projection,
]  # fmt: skip


def fresh(kind, change, compute=None, **arguments):
    """A run of a new pipeline with a change after step 3, and its session."""
    pipe = build(kind)
    session = hs.apply(pipe, hs.HSAConfig(compute=compute)) if compute is not None else None
    return generate(pipe, **at(3, change), **arguments), session


@pytest.mark.parametrize("change", CHANGES)
def test_full_compute_is_the_stock_pipeline_bit_for_bit(change):
    want, _ = fresh("euler", change)
    got, session = fresh("euler", change, compute=1.0)
    assert torch.equal(got, want)
    assert session.report.compute == 1.0
    assert (change is equal_prompt) == torch.equal(got, generate(build("euler")))


@pytest.mark.parametrize("kind", ["unipc", "wan22", "ti2v5b", "wan21 i2v", "wan22 i2v"])
def test_every_family_follows(kind):
    text = {"length": 512} if kind == "wan21 i2v" else {}
    other = embeddings(seed=99, **text)["prompt_embeds"]
    change = lambda pipe, tensors: {"prompt_embeds": other}  # noqa: E731
    want, _ = fresh(kind, change)
    assert torch.equal(fresh(kind, change, compute=1.0)[0], want)
    assert not torch.equal(generate(build(kind)), want)
    want, _ = fresh(kind, change, steps=24)
    assert relative(fresh(kind, change, compute=0.7, steps=24)[0], want) < 0.05


@pytest.mark.parametrize("change", [change for change in CHANGES if change is not equal_prompt])
@pytest.mark.parametrize("policy", ["joint", "tokens"])
def test_a_run_that_skips_follows_too(policy, change):
    want, without = generate(tiny_pipeline(), steps=24, **at(9, change)), generate(tiny_pipeline(), steps=24)
    pipe = tiny_pipeline()
    hs.apply(pipe, hs.HSAConfig(compute=0.7, policy=policy))
    plain = relative(generate(pipe, steps=24), without)
    got = generate(pipe, steps=24, **at(9, change)) if change in (prompt, negative_prompt, no_guidance) else None
    if got is None:  # the weights of another pipeline
        hs.apply(pipe := tiny_pipeline(), hs.HSAConfig(compute=0.7, policy=policy))
        got = generate(pipe, steps=24, **at(9, change))
    assert relative(got, want) < 1.3 * plain < relative(want, without)


def test_a_step_that_was_to_be_skipped_is_full_and_counted():
    calls = count_calls(pipe := tiny_pipeline())
    session = hs.apply(pipe, hs.HSAConfig(compute=0.5))
    generate(pipe, steps=20)
    planned = session.report.steps
    skipped = next(r.step for r in planned if r.active == 0)
    calls.clear()
    generate(pipe, steps=20, **at(skipped - 1, prompt))
    report = session.report
    assert (report.steps[skipped].active, report.steps[skipped].reason) == (48, "inputs changed")
    assert [r.active for r in report.steps if r.step != skipped] == [r.active for r in planned if r.step != skipped]
    assert report.compute == pytest.approx(sum(r.active for r in planned) / (20 * 48) + 1 / 20)
    assert sum(calls) == 2 * sum(r.active for r in report.steps)
    generate(pipe, steps=20)  # the next run is planned as ever
    assert [r.active for r in session.report.steps] == [r.active for r in planned]


@pytest.mark.parametrize("planned", [EMPTY, torch.arange(8)], ids=["none", "eight"])
def test_a_branch_that_comes_late_is_evaluated_alone(planned):
    """The conditional branch has its answer already when the unconditional one turns out to be another."""
    calls = count_calls(pipe := tiny_pipeline())
    session = hs.apply(pipe, planner=Fixed({4: planned}))
    got = generate(pipe, **at(3, negative_prompt))
    report, count = session.report, planned.numel()
    assert calls == [48] * 8 + ([count] if count else []) + [48] * 7
    assert (report.steps[4].active, report.steps[4].reason) == ((48 + count) // 2, "inputs changed")
    assert int(report.evaluations.sum()) == 8 * 48
    want = generate(tiny_pipeline(), **at(3, negative_prompt))
    # A forecast's errors in both branches cancel but for 1 part in 3, which is the guidance scale; and hindsight, which
    # is of the guided velocity, begins anew.
    skipping = relative(generate(pipe), generate(tiny_pipeline()))
    assert relative(got, want) < 4.0 * skipping


@pytest.mark.parametrize("change", [prompt, weights_in_place])
def test_forecasts_know_nothing_of_before(change):
    """Two skipped steps after a change have one evaluation to go by, so that Taylor's forecast holds it."""
    found = []
    for forecast in ("hold", "taylor"):
        pipe = tiny_pipeline()
        hs.apply(pipe, hs.HSAConfig(forecast=forecast, correct=False), Fixed({6: EMPTY, 7: EMPTY}))
        found.append([generate(pipe, guidance_scale=1.0, **changes) for changes in ({}, at(4, change))])
    assert not torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_every_step_is_full_where_the_prompt_always_changes():
    pipe, stock = tiny_pipeline(), tiny_pipeline()

    def callback(pipe, index, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] * 0.9}

    arguments = at(0, prompt) | {"callback_on_step_end": callback}
    session = hs.apply(pipe, hs.HSAConfig(compute=0.5))
    assert torch.equal(generate(pipe, steps=12, **arguments), generate(stock, steps=12, **arguments))
    assert session.report.compute == 1.0


def test_guidance_for_some_steps_only():
    """A branch that comes back has no forecast, and its step is full."""

    def callback(pipe, index, timestep, tensors):
        pipe._guidance_scale = 1.0 if 2 <= index < 5 else 3.0
        return {}

    want = generate(tiny_pipeline(), callback_on_step_end=callback)
    for plans, full in ({}, True), ({6: EMPTY}, False), ({3: EMPTY, 4: torch.arange(9), 6: EMPTY}, False):
        pipe = tiny_pipeline()
        session = hs.apply(pipe, planner=Fixed(plans))
        got = generate(pipe, callback_on_step_end=callback)
        assert torch.equal(got, want) if full else relative(got, want) < 0.1
        assert session.report.steps[6].active == 48


def test_scale_of_lora_in_a_dict_that_is_changed_in_place():
    pytest.importorskip("peft", reason="the extra 'dev' is not installed")

    def made(compute):
        pipe, kwargs = with_lora(tiny_pipeline()), {"scale": 1.0}
        if compute:
            hs.apply(pipe, hs.HSAConfig(compute=compute))
        return generate(pipe, attention_kwargs=kwargs, **at(3, lambda pipe, tensors: kwargs.update(scale=0.25)))

    assert torch.equal(made(1.0), made(None))


def with_lora(pipe, rank=2):
    generator, state = torch.Generator().manual_seed(1), {}
    for name, layer in pipe.transformer.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.endswith(("to_k", "to_v")):
            for part, shape in (("A", (rank, layer.in_features)), ("B", (layer.out_features, rank))):
                state[f"transformer.{name}.lora_{part}.weight"] = 0.3 * torch.randn(shape, generator=generator)
    pipe.load_lora_weights(state, adapter_name="style")
    return pipe


LORA = {
    "strength": lambda pipe, tensors: pipe.set_adapters("style", 0.3),
    "none": lambda pipe, tensors: pipe.set_adapters("style", 0.0),
    "disabled": lambda pipe, tensors: pipe.transformer.disable_lora(),
    "fused": lambda pipe, tensors: pipe.fuse_lora(components=["transformer"], lora_scale=0.5),
    "unloaded": lambda pipe, tensors: pipe.unload_lora_weights(),
    "deleted": lambda pipe, tensors: pipe.delete_adapters("style"),
    "loaded": lambda pipe, tensors: with_lora(pipe) and None,
}


@pytest.mark.parametrize("change", LORA)
def test_lora_is_followed(change):
    pytest.importorskip("peft", reason="the extra 'dev' is not installed")

    def made(compute, steps):
        pipe = tiny_pipeline()
        if change != "loaded":
            with_lora(pipe)
        session = hs.apply(pipe, hs.HSAConfig(compute=compute)) if compute else None
        return generate(pipe, steps=steps, **at(9, LORA[change])), session

    want, _ = made(None, 24)
    assert torch.equal(made(1.0, 24)[0], want)
    got, session = made(0.7, 24)
    assert relative(got, want) < 0.05
    assert session.report.steps[10].active == 48


def test_scaling_at_each_pass_is_no_change():
    """diffusers multiplies by `scale` before a pass and divides after it, which may turn the last bit."""
    pytest.importorskip("peft", reason="the extra 'dev' is not installed")
    pipe = with_lora(tiny_pipeline())
    session = hs.apply(pipe, hs.HSAConfig(compute=0.5))
    generate(pipe, steps=20, attention_kwargs={"scale": 0.7})
    assert session.report.compute == pytest.approx(0.5, abs=0.03)
    assert not any(r.reason == "inputs changed" for r in session.report.steps)


def test_changes_are_seen_in_inference_mode():
    def made(compute):
        pipe = tiny_pipeline()
        session = hs.apply(pipe, hs.HSAConfig(compute=compute)) if compute else None
        with torch.inference_mode():
            return generate(pipe, **at(3, prompt_in_place)), session

    assert torch.equal(made(1.0)[0], made(None)[0])
    assert made(0.5)[1].report.steps[4].reason == "inputs changed"


def test_weights_that_were_made_in_inference_mode():
    def made(compute):
        pipe = tiny_pipeline()
        session = hs.apply(pipe, hs.HSAConfig(compute=compute)) if compute else None
        with torch.inference_mode():
            return generate(pipe, **at(3, other_weights)), session

    assert torch.equal(made(1.0)[0], made(None)[0])
    assert made(0.5)[1].report.steps[4].reason == "inputs changed"


@pytest.mark.parametrize("change", ["strength", "disabled"])
def test_ltx2_follows_lora(change):
    pytest.importorskip("peft", reason="the extra 'dev' is not installed")

    def made(compute):
        pipe = with_lora(tiny_ltx2.tiny_ltx2())
        session = hs.apply(pipe, hs.HSAConfig(compute=compute)) if compute else None
        callback = at(3, LORA[change])["callback_on_step_end"]
        return tiny_ltx2.generate(pipe, callback_on_step_end=callback, guidance_scale=3.0), session

    for got, want in zip(made(1.0)[0], made(None)[0], strict=True):
        assert torch.equal(got, want)
    assert made(0.5)[1].report.steps[4].active == made(0.5)[1].report.steps[4].total


def test_ltx2_goes_on_without_one_kind_of_guidance():
    def callback(pipe, index, timestep, tensors):
        if index == 3:
            pipe._stg_scale = pipe._audio_stg_scale = 0.0
        return {}

    want = tiny_ltx2.generate(tiny_ltx2.tiny_ltx2("2.3"), "2.3", callback_on_step_end=callback)
    pipe = tiny_ltx2.tiny_ltx2("2.3")
    session = hs.apply(pipe, planner=Fixed({5: EMPTY}))
    got = tiny_ltx2.generate(pipe, "2.3", callback_on_step_end=callback)
    assert relative(got[0], want[0]) < 0.1
    assert session.report.compute == pytest.approx(7 / 8)


def test_latents_of_another_size():
    def callback(pipe, index, timestep, tensors):
        return {"latents": tensors["latents"][..., :6]} if index == 3 else {}

    want = generate(tiny_pipeline(), callback_on_step_end=callback)
    pipe = tiny_pipeline()
    hs.apply(pipe, hs.HSAConfig(compute=1.0))
    assert torch.equal(generate(pipe, callback_on_step_end=callback), want)
    hs.apply(pipe, hs.HSAConfig(compute=0.5))
    with pytest.raises(hs.ConfigError, match=r"changed from 1 x \[3, 4, 4\] tokens to 1 x \[3, 4, 3\]"):
        generate(pipe, callback_on_step_end=callback)


@pytest.mark.parametrize("change", [prompt, negative_prompt, weights_in_place])
@pytest.mark.parametrize("policy", ["joint", "tokens"])
@pytest.mark.parametrize("moment", [3, 7, 8, 13])
def test_resumed_runs_follow(tmp_path, policy, change, moment):
    """A change before the checkpoint, just at it, and after it: the bits of the unbroken run."""

    def drive(state=None):
        pipe, states = tiny_pipeline(), {}
        session = hs.apply(pipe, hs.HSAConfig(compute=0.6, policy=policy))
        session.save_every(4)
        if state is not None:
            session.resume(state)

        def callback(pipe, step, timestep, tensors):
            passed = session.passed(step, tensors["latents"])
            if passed is None and step == 7:
                saved = Saved(kind="result", step=1, sigma=0.5, job={}, content=session.state(tensors["latents"]))
                write_saved(tmp_path, "result", saved)
                states[8] = dict(read_saved(tmp_path, "result", "result").content)
            changed = at(moment, change)["callback_on_step_end"](pipe, step, timestep, tensors)
            return {**(passed or {}), **changed}

        names = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds", "negative_prompt_embeds"]}
        latents = generate(pipe, steps=20, callback_on_step_end=callback, **names)
        return latents, [dataclasses.replace(r, seconds=0.0) for r in session.report.steps], states

    want, records, states = drive()
    got, again, _ = drive(states[8])
    assert torch.equal(got, want)
    assert again == records
    assert records[moment + 1].active == 48 or change is negative_prompt
