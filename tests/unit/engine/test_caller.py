"""Several pipelines share a transformer: what belongs to a call is its caller's, or the call is refused."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanPipeline
from diffusers.pipelines.ltx2 import LTX2ImageToVideoPipeline, LTX2InContextPipeline

import heterostep as hs
import tiny_ltx2
from tiny import generate, tiny_image_pipeline, tiny_pipeline, tiny_scheduler, tiny_transformer


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def twin(pipe, **changes):
    return quiet(WanPipeline(**{**pipe.components, **changes}, boundary_ratio=pipe.config.boundary_ratio))


def image_twin(text):
    return quiet(WanImageToVideoPipeline(**text.components, expand_timesteps=True))


def steps_of(session):
    return [(r.sigma, r.active, r.reason) for r in session.report.steps]


def alone(make, **arguments):
    """What HSA on a pipeline of its own makes, and its steps."""
    pipe = make()
    session = hs.apply(pipe, hs.HSAConfig(compute=0.5))
    return generate(pipe, **arguments), steps_of(session)


def test_image_pipeline_around_the_transformer_of_a_text_pipeline():
    want, steps = alone(lambda: image_twin(tiny_pipeline("ti2v5b")))
    text = tiny_pipeline("ti2v5b")
    session = hs.apply(text, hs.HSAConfig(compute=0.5))
    image = image_twin(text)
    for _ in range(2):
        assert torch.equal(generate(image), want)
        assert steps_of(session) == steps
        assert session.report.conditioned == 16
        generate(text)
        assert session.report.conditioned == 0


@pytest.mark.parametrize("first", [None, 40, 8])
def test_another_scheduler_and_number_of_steps(first):
    other = {"scheduler": FlowMatchEulerDiscreteScheduler(shift=8.0)}
    want, steps = alone(lambda: twin(tiny_pipeline(), **other), steps=20)
    pipe = tiny_pipeline()
    session = hs.apply(pipe, hs.HSAConfig(compute=0.5))
    if first:
        generate(pipe, steps=first)
    assert torch.equal(generate(twin(pipe, **other), steps=20), want)
    assert steps_of(session) == steps
    assert session.report.num_steps == 20


def test_another_kind_of_scheduler_forecasts_as_it_must():
    want, steps = alone(lambda: tiny_pipeline("unipc"), steps=20)
    pipe = tiny_pipeline("euler")
    session = hs.apply(pipe, hs.HSAConfig(compute=0.5))
    assert torch.equal(generate(twin(pipe, scheduler=tiny_scheduler("unipc")), steps=20), want)
    assert steps_of(session) == steps


def test_guidance_is_the_callers():
    want, steps = alone(tiny_pipeline, guidance_scale=1.0)
    pipe = tiny_pipeline()
    session = hs.apply(pipe, hs.HSAConfig(compute=0.5))
    generate(pipe)
    assert torch.equal(generate(twin(pipe), guidance_scale=1.0), want)
    assert steps_of(session) == steps


def test_experts_are_the_callers():
    """One pipeline's only transformer is the low-noise expert of another."""
    pipe = tiny_pipeline("wan22")
    stock = generate(tiny_pipeline("unipc", seed=1))
    hs.apply(pipe, hs.HSAConfig(compute=1.0))
    generate(pipe)
    single = quiet(WanPipeline(**{**pipe.components, "transformer": pipe.transformer_2, "transformer_2": None}))
    assert torch.equal(generate(single), stock)
    generate(pipe)


def test_a_call_between_two_steps_of_another():
    """The run that goes on has nothing to forecast from, and its next step is full."""
    pipe = tiny_pipeline()
    hs.apply(pipe, hs.HSAConfig(compute=1.0))
    for inner in (pipe, twin(pipe, scheduler=tiny_scheduler("unipc"))):

        def callback(caller, step, timestep, tensors, inner=inner):
            if step == 3:
                scheduler = caller.scheduler
                caller.scheduler, held = tiny_scheduler("euler"), scheduler
                generate(inner, steps=5)
                caller.scheduler = held
            return {}

        assert torch.equal(generate(pipe, callback_on_step_end=callback), generate(tiny_pipeline()))


@pytest.mark.parametrize("policy", ["joint", "tokens"])
def test_another_pipeline_called_between_two_steps(policy):
    pipe = tiny_pipeline()
    session = hs.apply(pipe, hs.HSAConfig(compute=0.5, policy=policy))
    inner, seen = twin(pipe, scheduler=tiny_scheduler("unipc")), []

    def callback(caller, step, timestep, tensors):
        if step == 9:
            seen.append(generate(inner, steps=12))
        return {}

    got = generate(pipe, steps=20, callback_on_step_end=callback)
    want = generate(tiny_pipeline(), steps=20)
    assert torch.equal(seen[0], generate(twin(pipe, scheduler=tiny_scheduler("unipc")), steps=12))
    assert ((got - want).norm() / want.norm()).item() < 0.1
    assert session.report.num_steps in (12, 20)


def test_state_is_the_callers():
    pipe = tiny_pipeline()
    other = twin(pipe, scheduler=tiny_scheduler("unipc"))

    def drive(state=None):
        session, states = hs.apply(pipe, hs.HSAConfig(compute=0.5)), {}
        session.save_every(4)
        if state is not None:
            session.resume(state)

        def callback(caller, step, timestep, tensors):
            passed = session.passed(step, tensors["latents"])
            if passed is None and step == 7:
                states.update(torch_copy(session.state(tensors["latents"])))
            return passed or {}

        return generate(other, steps=16, callback_on_step_end=callback), states

    want, state = drive()
    assert torch.equal(drive(state)[0], want)


def torch_copy(value):
    """A deep copy of plain data."""
    if isinstance(value, dict):
        return {name: torch_copy(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [torch_copy(item) for item in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


def test_ltx2_image_pipeline_around_the_transformer_of_a_text_pipeline():
    text = tiny_ltx2.tiny_ltx2()
    image = quiet(LTX2ImageToVideoPipeline(**text.components))
    hs.apply(image, hs.HSAConfig(compute=0.5))
    want = tiny_ltx2.generate(image)
    session = hs.apply(text, hs.HSAConfig(compute=0.5))
    for got, expected in zip(tiny_ltx2.generate(image), want, strict=True):
        assert torch.equal(got, expected)
    assert session.report.compute == pytest.approx(0.5, abs=0.02)


def test_unsupported_caller_is_refused():
    pipe = tiny_ltx2.tiny_ltx2()
    unknown = ("processor", "prompt_enhancer", "duration_head")
    parts = {name: part for name, part in pipe.components.items() if name not in unknown}
    other = quiet(LTX2InContextPipeline(**parts))
    hs.apply(pipe, hs.HSAConfig(compute=0.5))
    with pytest.raises(hs.ConfigError, match="LTX2InContextPipeline called the transformer of a pipeline with HSA"):
        other(
            **tiny_ltx2.embeddings(), **tiny_ltx2.SIZE, num_inference_steps=4, guidance_scale=3.0, output_type="latent"
        )
    assert tiny_ltx2.generate(pipe)[0].isfinite().all()


def test_caller_with_a_transformer_of_its_own_besides_is_refused():
    pipe = tiny_pipeline("wan22")
    other = twin(pipe, transformer_2=tiny_transformer(7))
    hs.apply(pipe, hs.HSAConfig(compute=0.5))
    with pytest.raises(hs.ConfigError, match="shares only some of its transformers"):
        generate(other)


def test_caller_whose_scheduler_was_not_replaced_is_refused():
    pipe = tiny_pipeline("unipc")
    other = twin(pipe)
    hs.apply(pipe, hs.HSAConfig(solver="euler"))
    with pytest.raises(hs.ConfigError, match=r"UniPCMultistepScheduler: hs\.apply to this WanPipeline itself"):
        generate(other)
    assert torch.equal(generate(twin(pipe)), generate(pipe))  # made since, with the replaced one


def test_loop_outside_of_a_pipeline_is_refused():
    pipe = tiny_pipeline()
    hs.apply(pipe)
    with (
        pipe.transformer.cache_context("cond", step_index=0),
        pytest.raises(hs.ConfigError, match="outside of a pipeline's call"),
    ):
        pipe.transformer(torch.zeros(1, 16, 3, 8, 8), torch.ones(1), torch.zeros(1, 16, 32))


def test_class_of_ones_own():
    class Mine(WanImageToVideoPipeline):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    pipe = tiny_image_pipeline("wan21 i2v")
    want = generate(pipe)
    pipe.__class__ = Mine
    hs.apply(pipe, hs.HSAConfig(compute=1.0))
    assert torch.equal(generate(pipe), want)
