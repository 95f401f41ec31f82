"""LTX-2 on many ranks: the video and the sound of one rank."""

import functools
import math

import pytest
import torch

import ranks
from folders_ltx2 import complete_ltx2
from heterostep import ConfigError, Engine, EngineConfig, GenerateRequest, HSAConfig, ParallelConfig, apply
from tiny_ltx2 import FAMILIES, generate, tiny_ltx2

TOLERANCE = 1e-4

LAYOUTS = {
    "ulysses 2": {"ulysses": 2},
    "ring 2 gathered": {"ring": 2, "ring_cache": "gathered"},
    "ring 2 sharded": {"ring": 2, "ring_cache": "sharded"},
    "cfg 2": {"cfg": 2},
    "cfg 2 x ulysses 2": {"cfg": 2, "ulysses": 2},
    "ulysses 2 x ring 2 sharded": {"ulysses": 2, "ring": 2, "ring_cache": "sharded"},
    "cfg 4": {"cfg": 4},
}


class Odd:
    """A planner with counts that divide nothing: all, 35, 1, none, 5, all ..., one set for each of two samples."""

    def __init__(self, prompts):
        self.prompts = prompts

    def plan(self, step, num_steps, sigma, num_tokens):
        count = (None, 35, 1, 0, 5, None, 2, 61)[step % 8]
        if count is None:
            return None
        g = torch.Generator().manual_seed(step)
        sets = [torch.randperm(num_tokens, generator=g)[:count].sort().values for _ in range(self.prompts)]
        return sets[0] if self.prompts == 1 or not count else torch.stack(sets)


def make(version, image, config, odd, layout, changes):
    """Latents of video and sound, and the tokens of each step."""
    pipe = tiny_ltx2(version, image=image)
    parallel = ParallelConfig(**layout) if layout else None
    planner = Odd(changes.get("prompts", 1)) if odd else None
    session = apply(pipe, config, planner, parallel=parallel)
    return generate(pipe, version, **changes), [step.active for step in session.report.steps]


@functools.cache
def make_alone(version, image, config, odd, changes):
    """What one rank makes, for all layouts."""
    return make(version, image, config, odd, None, dict(changes))


def assert_same(version, image, config, odd, layout, **changes):
    size = math.prod(layout.get(axis, 1) for axis in ("cfg", "ring", "ulysses"))
    alone, counts = make_alone(version, image, config, odd, tuple(changes.items()))
    everyone = ranks.run_ranks(size, make, version, image, config, odd, layout, changes)
    for results, shared_counts in everyone:
        assert shared_counts == counts
        for result, first, one in zip(results, everyone[0][0], alone, strict=True):
            assert torch.equal(result, first)
            assert torch.isfinite(result).all()
            assert (result - one).abs().max() < TOLERANCE * max(1.0, one.abs().max())


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_number_of_active_tokens(layout):
    assert_same("2.3", False, None, True, layout)


@pytest.mark.parametrize("layout", list(LAYOUTS.values())[:4], ids=list(LAYOUTS)[:4])
def test_two_videos_from_images_with_forecast_keys(layout):
    assert_same("2.5", True, HSAConfig(kv_forecast=0.5), True, layout, prompts=2)


@pytest.mark.feature("2 ranks: ulysses, ring, cfg")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", [{"ulysses": 2}, {"ring": 2}, {"cfg": 2}], ids=str)
def test_every_family(family, layout):
    # Plans are the same as long as no score lies on the edge of a level, as one does with seed 1.
    assert_same(*FAMILIES[family], HSAConfig(compute=0.5, policy="tokens"), False, layout, steps=12, seed=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a tiny model."""
    folder = tmp_path_factory.mktemp("ltx2") / "tiny"
    complete_ltx2("2.3").save_pretrained(folder)
    return str(folder)


@functools.cache
def film_alone(model):
    return film(model, None, False)


def film(model, layout, shard_weights):
    """Frames and samples of a video with sound, by the engine."""
    parallel = ParallelConfig(**layout) if layout else None
    config = EngineConfig(
        model=model, device="cpu", parallel=parallel, hsa=HSAConfig(policy="tokens"), shard_weights=shard_weights
    )
    asked = GenerateRequest(prompt="x", width=64, height=32, num_frames=5, fps=8, num_inference_steps=10)
    output = Engine(config).generate(asked)
    return output.latents, output.audio_latents, output.frames, output.audio.samples


@pytest.mark.parametrize(("layout", "shard_weights"), [({"ulysses": 2}, True), ({"cfg": 2}, False)], ids=str)
def test_the_engine(model, layout, shard_weights):
    alone = film_alone(model)
    one, other = ranks.run_ranks(2, film, model, layout, shard_weights)
    for mine, theirs, expected in zip(one, other, alone, strict=True):
        mine, theirs, expected = (torch.as_tensor(t).float() for t in (mine, theirs, expected))
        assert torch.equal(mine, theirs)
        # A value of a pixel may be rounded the other way.
        close = 1.0 if expected.max() > 100 else TOLERANCE * max(1.0, expected.abs().max())
        assert (mine - expected).abs().max() <= close


def refused(layout, changes):
    pipe = tiny_ltx2("2.3")
    apply(pipe, HSAConfig(compute=0.5), parallel=ParallelConfig(**layout))
    try:
        generate(pipe, "2.3", **changes)
    except ConfigError as error:
        return str(error)
    return None


def test_guidance_units_limit_the_degree():
    changes = {"stg_scale": 0.0, "audio_stg_scale": 0.0}
    for message in ranks.run_ranks(2, refused, {"cfg": 2}, changes):
        assert "cfg=2 with 3 guidance branch" in message
