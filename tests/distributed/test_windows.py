"""A long video whose windows are dealt to ranks is the one that one rank makes, and what travels is what is counted."""

import functools
import math
from dataclasses import replace

import pytest
import torch

import ranks
import tiny
import tiny_ltx2
from heterostep import ConfigError, HSAConfig, ParallelConfig, apply
from heterostep.engine.denoise.windows import Text, Windows

TOLERANCE = 1e-4
WINDOWS = Windows(length=4, overlap=2)  # at 0, 2 and 3
LAYOUTS = {
    "windows 2": {"windows": 2},
    "windows 3": {"windows": 3},
    "windows 2 x ulysses 2": {"windows": 2, "ulysses": 2},
    "windows 2 x ring 2": {"windows": 2, "ring": 2, "ring_cache": "sharded"},
    "windows 2 x cfg 2": {"windows": 2, "cfg": 2},
    "ulysses 2": {"ulysses": 2},
    "cfg 2": {"cfg": 2},
}


class Corner:
    """A planner with steps at which single windows, or none but the last, have active tokens."""

    def plan(self, step, num_steps, sigma, num_tokens):
        few = {1: [0, 5, 17], 2: [], 3: [110, 111], 5: list(range(40, 90, 3)), 6: [33]}
        return torch.tensor(few[step], dtype=torch.int64) if step in few else None


def make(kind, config, corner, layout, changes):
    """Latents, tokens of each step, and how each step was shared."""
    pipe = tiny.build(kind, heads=4)
    parallel = ParallelConfig(**layout) if layout else None
    session = apply(pipe, config, Corner() if corner else None, parallel=parallel, windows=WINDOWS)
    latents = tiny.generate(pipe, **{"num_frames": 25, **changes})
    steps = session.report.steps
    return latents, [step.active for step in steps], [step.parallel for step in steps]


@functools.cache
def make_alone(kind, config, corner, changes):
    return make(kind, config, corner, None, dict(changes))


def assert_same(kind, config, layout, corner=False, **changes):
    alone, counts, _ = make_alone(kind, config, corner, tuple(changes.items()))
    size = math.prod(layout.get(axis, 1) for axis in ("windows", "cfg", "ring", "ulysses"))
    everyone = ranks.run_ranks(size, make, kind, config, corner, layout, changes)
    for latents, shared_counts, _ in everyone:
        assert shared_counts == counts
        assert torch.equal(latents, everyone[0][0])
        assert (latents - alone).abs().max() < TOLERANCE
    return [parallel for _, _, parallel in everyone]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("policy", ["joint", "tokens"])
def test_layouts_agree_with_one_rank(layout, policy):
    assert_same("euler", HSAConfig(compute=0.5, policy=policy), layout, steps=10)


@pytest.mark.parametrize("layout", [LAYOUTS["windows 2"], LAYOUTS["windows 2 x ulysses 2"]], ids=str)
def test_groups_without_active_tokens(layout):
    records = assert_same("euler", None, layout, corner=True)
    # The first group has the windows 0-4 and 2-6, the other one 3-7.
    inside = len(records[0][1].tokens) // 2
    shared = [(sum(step.tokens[:inside]), sum(step.tokens[inside:])) for step in records[0]]
    assert shared[:4] == [(128, 64), (3, 0), (0, 0), (0, 2)]
    assert all([step.tokens for step in steps] == [step.tokens for step in records[0]] for steps in records)


@pytest.mark.parametrize("kind", ["wan22", "ti2v5b"])
def test_every_kind(kind):
    assert_same(kind, HSAConfig(compute=0.5, policy="tokens"), LAYOUTS["windows 2 x cfg 2"], steps=10)


def make_sound(layout, version):
    pipe = tiny_ltx2.tiny_ltx2(version, heads=4)
    parallel = ParallelConfig(**layout) if layout else None
    apply(pipe, HSAConfig(compute=0.5, policy="tokens"), parallel=parallel, windows=WINDOWS)
    return tiny_ltx2.generate(pipe, version, steps=8, num_frames=13)


@pytest.mark.parametrize("version", ["2.0", "2.3"])
@pytest.mark.parametrize("layout", [{"windows": 2}, {"windows": 2, "ulysses": 2}], ids=str)
def test_sound(version, layout):
    alone = make_sound(None, version)
    for found in ranks.run_ranks(math.prod(layout.values()), make_sound, layout, version):
        assert all((part - want).abs().max() < TOLERANCE for part, want in zip(found, alone, strict=True))


@pytest.mark.parametrize("policy", ["joint", "tokens"])
def test_bytes_are_those_of_the_formula(policy):
    """Of velocities 4 bytes x D for each active token in a group's windows, to each other group, for both branches."""
    groups, width = [range(0, 6), range(3, 7)], 16 * 4  # latent frames of the windows of each group
    config = HSAConfig(compute=0.5, policy=policy)
    everyone = ranks.run_ranks(2, active_by_step, config)
    for rank, (masks, records) in enumerate(everyone):
        for mask, record in zip(masks, records, strict=True):
            rows = sum(int(mask[frame].sum()) for frame in groups[rank])
            assert sum(count.bytes for name, count in record.sent.items() if name == "velocity") == 2 * 4 * width * rows
            assert set(record.sent) <= {"velocity", "plan"}, "windows need no traffic of attention"


def active_by_step(config):
    """Which tokens were active at each step, and what was sent."""
    pipe = tiny.build("euler", heads=4)
    session = apply(pipe, config, parallel=ParallelConfig(windows=2), windows=WINDOWS)
    seen = []
    session.on_step.append(lambda record: seen.append(session.report.evaluations.clone()))
    tiny.generate(pipe, num_frames=25, steps=10)
    masks = [now - before for before, now in zip([torch.zeros_like(seen[0]), *seen], seen, strict=False)]
    return masks, [step.parallel for step in session.report.steps]


def too_many(windows, num_frames):
    pipe = tiny.build("euler", heads=4)
    apply(pipe, HSAConfig(compute=0.5), parallel=ParallelConfig(windows=2), windows=windows)
    try:
        tiny.generate(pipe, num_frames=num_frames)
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize("windows", [None, WINDOWS])
def test_more_groups_than_windows_are_refused(windows):
    said = ranks.run_ranks(2, too_many, windows, 9)
    assert said[0] == said[1] and "at most windows=1" in said[0]


def make_scenes(layout):
    pipe = tiny.build("euler", heads=4)
    parallel = ParallelConfig(**layout) if layout else None
    text, other = tiny.embeddings(), tiny.embeddings(seed=9)["prompt_embeds"]
    scenes = replace(WINDOWS, texts=[Text(4.5, 9.0, {"encoder_hidden_states": other})])
    session = apply(pipe, HSAConfig(compute=0.5, policy="tokens"), parallel=parallel, windows=scenes)
    session.tell("cond", text["prompt_embeds"])
    session.tell("uncond", text["negative_prompt_embeds"])
    return tiny.generate(pipe, num_frames=25)


@pytest.mark.parametrize("layout", [{"cfg": 2}, {"windows": 2}, {"windows": 2, "cfg": 2}], ids=str)
def test_prompts_over_time(layout):
    """Ranks that evaluate a branch for others know what it is asked, but for the prompts of single windows."""
    alone = make_scenes(None)
    for latents in ranks.run_ranks(math.prod(layout.values()), make_scenes, layout):
        assert (latents - alone).abs().max() < TOLERANCE


def make_rolled(layout):
    pipe = tiny.build("euler", heads=4)
    parallel = ParallelConfig(**layout) if layout else None
    apply(pipe, HSAConfig(compute=0.5), parallel=parallel, windows=Windows(length=4, overlap=2, roll=True))
    return tiny.generate(pipe, num_frames=25)


def test_rolled_windows():
    alone = make_rolled(None)
    for latents in ranks.run_ranks(2, make_rolled, {"windows": 2}):
        assert (latents - alone).abs().max() < TOLERANCE
