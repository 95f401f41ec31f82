"""A pipeline on many ranks makes the video that it makes on one."""

import functools
import math
import time

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import ranks
import tiny
from heterostep import ConfigError, HSAConfig, ParallelConfig, apply

TOLERANCE = 1e-4

LAYOUTS = {
    "ulysses 2": {"ulysses": 2},
    "ring 2 gathered": {"ring": 2, "ring_cache": "gathered"},
    "ring 2 sharded": {"ring": 2, "ring_cache": "sharded"},
    "cfg 2": {"cfg": 2},
    "ring 3 sharded": {"ring": 3, "ring_cache": "sharded"},
    "ulysses 2 x ring 2 gathered": {"ulysses": 2, "ring": 2, "ring_cache": "gathered"},
    "ulysses 2 x ring 2 sharded": {"ulysses": 2, "ring": 2, "ring_cache": "sharded"},
    "cfg 2 x ulysses 2": {"cfg": 2, "ulysses": 2},
}


class Odd:
    """A planner with counts that divide nothing: all, 17, 1, none, 5, all ..."""

    def plan(self, step, num_steps, sigma, num_tokens):
        count = (None, 17, 1, 0, 5, None, 2, 31)[step % 8]
        if count is None:
            return None
        return torch.randperm(num_tokens, generator=torch.Generator().manual_seed(step))[:count].sort().values


class PerSample:
    """A planner with a set for each of two samples."""

    def plan(self, step, num_steps, sigma, num_tokens):
        if step % 4 == 0:
            return None
        generator = torch.Generator().manual_seed(step)
        return torch.stack([torch.randperm(num_tokens, generator=generator)[:13].sort().values for _ in range(2)])


PLANNERS = {None: lambda: None, "odd": Odd, "per sample": PerSample}


def make(kind, config, planner, layout, changes):
    """Latents, tokens of each step, and how each step was shared."""
    pipe = tiny.build(kind, heads=4)
    parallel = ParallelConfig(**layout) if layout else None
    session = apply(pipe, config, PLANNERS[planner](), parallel=parallel)
    latents = tiny.generate(pipe, **changes)
    steps = session.report.steps
    return latents, [step.active for step in steps], [step.parallel for step in steps]


@functools.cache
def make_alone(kind, config, planner, changes):
    """What one rank makes, for all layouts."""
    return make(kind, config, planner, None, dict(changes))


def assert_same(kind, config, planner, layout, **changes):
    size = math.prod(layout.get(axis, 1) for axis in ("cfg", "ring", "ulysses"))
    alone, counts, _ = make_alone(kind, config, planner, tuple(changes.items()))
    everyone = ranks.run_ranks(size, make, kind, config, planner, layout, changes)
    for latents, shared_counts, _ in everyone:
        assert shared_counts == counts
        assert torch.equal(latents, everyone[0][0])
        assert torch.isfinite(latents).all()
        assert (latents - alone).abs().max() < TOLERANCE
    return [parallel for _, _, parallel in everyone]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("policy", ["joint", "tokens"])
def test_layouts_agree_with_one_rank(layout, policy):
    assert_same("euler", HSAConfig(compute=0.5, policy=policy), None, layout, steps=12)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_number_of_active_tokens(layout):
    records = assert_same("euler", None, "odd", layout)
    for steps in records:
        for step, count in zip(steps, (48, 17, 1, 0, 5, 48, 2, 31), strict=True):
            assert sum(step.tokens) == count
            if count:
                assert max(step.tokens) - min(step.tokens) <= 1


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_set_for_each_sample(layout):
    assert_same("euler", None, "per sample", layout, prompts=2)


@pytest.mark.feature("2 ranks: ulysses, ring, cfg")
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("layout", [{"ulysses": 2}, {"ring": 2}, {"cfg": 2}], ids=str)
def test_every_family(family, layout):
    assert_same(tiny.FAMILIES[family], HSAConfig(compute=0.5, policy="tokens"), None, layout, steps=12)


@pytest.mark.parametrize("layout", [{"ulysses": 2}, {"ring": 2}, {"cfg": 2}], ids=str)
def test_another_scheduler(layout):
    assert_same("dpm++", HSAConfig(compute=0.5, policy="tokens"), None, layout, steps=12)


def test_a_promised_quality():
    """The estimates of ranks may differ in their last bits: rank 0 plans for all."""
    assert_same("unipc", HSAConfig(quality=40), None, {"cfg": 2}, steps=12)


@pytest.mark.parametrize("layout", [{"ulysses": 2}, {"ring": 2}, {"cfg": 2}], ids=str)
def test_dense(layout):
    assert_same("euler", HSAConfig(compute=1.0), None, layout)


@pytest.mark.parametrize("forecast", ["hold", "ab2"])
def test_forecasts_of_keys_and_velocities(forecast):
    config = HSAConfig(compute=0.4, policy="tokens", forecast=forecast, kv_forecast=0.5)
    assert_same("euler", config, None, {"ulysses": 2, "ring": 2, "ring_cache": "sharded"}, steps=12)


def slowed(layout, changes):
    """Sizes of each step when rank 1 takes longer for a pass."""
    pipe = tiny.tiny_pipeline("euler", heads=4)
    session = apply(pipe, HSAConfig(compute=1.0), parallel=ParallelConfig(**layout))
    if torch.distributed.get_rank() == 1:
        pipe.transformer.blocks[0].ffn.register_forward_hook(lambda *_: time.sleep(0.1))
    tiny.generate(pipe, **changes)
    return [step.parallel.tokens for step in session.report.steps]


@pytest.mark.parametrize("layout", [{"ulysses": 2}, {"ring": 2, "ring_cache": "sharded"}], ids=str)
def test_a_slow_rank_gets_fewer_tokens(layout):
    one, other = ranks.run_ranks(2, slowed, {**layout, "cut": "measured"}, {"steps": 6})
    assert one == other
    assert one[0] == [24, 24]
    assert all(sum(sizes) == 48 for sizes in one)
    assert one[-1][1] < 20


def test_the_measured_cut_does_not_change_the_video():
    assert_same("euler", None, "odd", {"ulysses": 2, "cut": "measured"})


def test_without_guidance():
    assert_same("euler", HSAConfig(compute=0.5), None, {"ulysses": 2}, guidance_scale=1.0, steps=12)


def refused(layout, changes, seeds):
    pipe = tiny.tiny_pipeline("euler", heads=4)
    apply(pipe, HSAConfig(compute=0.5), parallel=ParallelConfig(**layout))
    try:
        tiny.generate(pipe, seed=seeds[torch.distributed.get_rank()], **changes)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("layout", "changes", "seeds", "says"),
    [
        ({"cfg": 2}, {"guidance_scale": 1.0}, (1, 1), "cfg=2 with 1 guidance branch"),
        ({"ulysses": 3}, {}, (1, 1, 1), "one of 1, 2, 4"),
        ({"ulysses": 2}, {}, (1, 2), "same seed on every rank"),
    ],
)
def test_what_cannot_be_is_refused_by_all_ranks(layout, changes, seeds, says):
    for message in ranks.run_ranks(len(seeds), refused, layout, changes, seeds):
        assert says in message


CHANGED = {"prompt": "prompt_embeds", "negative prompt": "negative_prompt_embeds"}


def changing(kind, config, planner, layout, changes):
    """`make` with a callback that changes what guides the run after some steps."""
    what, moments = changes

    def callback(pipe, step, timestep, tensors):
        if step not in moments:
            return {}
        if what == "weights":
            pipe.transformer.blocks[1].attn2.to_v.weight.mul_(-1.0)
        name = CHANGED.get(what)
        return {name: -tensors[name]} if name else {}

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    changed = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names, "steps": 12}
    return make(kind, config, planner, layout, changed)


@pytest.mark.parametrize("layout", [{"ulysses": 2}, {"ring": 2}, {"cfg": 2}], ids=str)
@pytest.mark.parametrize("what", ["prompt", "negative prompt", "weights"])
@pytest.mark.parametrize("policy", ["joint", "tokens"])
def test_what_guides_a_run_changes(layout, what, policy):
    config, changes = HSAConfig(compute=0.5, policy=policy), (what, (3, 6, 7))
    alone, counts, _ = changing("euler", config, None, None, changes)
    everyone = ranks.run_ranks(2, changing, "euler", config, None, layout, changes)
    assert counts != make_alone("euler", config, None, (("steps", 12),))[1]
    for latents, shared_counts, _ in everyone:
        assert shared_counts == counts
        assert torch.equal(latents, everyone[0][0])
        assert (latents - alone).abs().max() < TOLERANCE


def only_one(layout):
    """A change that one rank alone sees is answered by all, so that none waits for ever."""
    pipe = tiny.build("euler", heads=4)
    session = apply(pipe, HSAConfig(compute=0.5), parallel=ParallelConfig(**layout))

    def callback(pipe, step, timestep, tensors):
        alone = step == 3 and torch.distributed.get_rank() == 1
        return {"prompt_embeds": tensors["prompt_embeds"] * 1.0001} if alone else {}

    names = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    tiny.generate(pipe, callback_on_step_end=callback, steps=12, **names)
    return [(step.active, step.reason) for step in session.report.steps]


@pytest.mark.parametrize("layout", [{"ulysses": 2}, {"cfg": 2}], ids=str)
def test_a_change_on_one_rank_is_one_on_all(layout):
    first, second = ranks.run_ranks(2, only_one, layout)
    assert first == second
    assert first[4] == (48, "inputs changed")


def without_guidance(layout):
    pipe = tiny.build("euler", heads=4)
    apply(pipe, HSAConfig(compute=0.5), parallel=ParallelConfig(**layout))

    def callback(pipe, step, timestep, tensors):
        pipe._guidance_scale = 1.0
        return {}

    with pytest.raises(ConfigError, match="cfg=2"):
        tiny.generate(pipe, callback_on_step_end=callback, steps=12)


def test_guidance_that_ends_leaves_no_work_for_groups_of_ranks():
    ranks.run_ranks(2, without_guidance, {"cfg": 2})


def noisy(seeds):
    pipe = tiny.build("euler", heads=4)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    apply(pipe, HSAConfig(compute=1.0), parallel=ParallelConfig(ulysses=2))
    torch.manual_seed(seeds[torch.distributed.get_rank()])
    if seeds[0] == seeds[1]:
        return tiny.generate(pipe)
    with pytest.raises(ConfigError, match="with one seed"):
        tiny.generate(pipe)
    return None


def test_a_samplers_noise_is_the_same_on_all_ranks():
    first, second = ranks.run_ranks(2, noisy, (3, 3))
    assert torch.equal(first, second)
    ranks.run_ranks(2, noisy, (3, 4))
