"""Pictures on the way: what they show, what they cost, and that they change nothing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import heterostep as hs
from heterostep.engine.denoise.preview import LinearDecoder, Preview
from heterostep.engine.engine import Engine, EngineConfig, GenerateRequest
from heterostep.engine.facts import DEMO_MODEL
from heterostep.engine.record import psnr
from heterostep.engine.request import StepDone
from tiny import generate, tiny_pipeline

pytestmark = pytest.mark.skipif(
    not (DEMO_MODEL / "model_index.json").is_file(), reason="no demo model in this checkout"
)


@pytest.fixture(scope="module")
def engine():
    return Engine(EngineConfig(model="demo"))


def follow(engine, preview, prompt="a red disc moves right", steps=12, **options):
    """Pictures of a run with their steps, and the video."""
    pictures = []
    for event in engine.stream(GenerateRequest(prompt=prompt, num_inference_steps=steps, **options)):
        picture = preview.take()
        if picture is not None and isinstance(event, StepDone):
            pictures.append((event.step, picture))
    return pictures, event


def test_pictures_come_nearer_to_the_video_and_cost_next_to_nothing(engine):
    preview = Preview(engine.pipeline)
    for seed, prompt in enumerate(("a blue square moves up", "a red disc moves down")):
        _, video = follow(engine, preview, prompt, seed=seed, steps=8)
        preview.learn(video.latents, video.frames)
    pictures, video = follow(engine, preview, seed=9, steps=12, compute=1.0)
    preview.remove()
    assert len(pictures) >= 6 and preview.seconds < 0.02 * video.seconds["denoise"]
    middle = video.frames[8]
    quality = [psnr(picture[None], middle[None]) for _, picture in pictures]
    assert all(picture.shape == (64, 64, 3) for _, picture in pictures)
    assert quality[-1] > 22 and quality[-1] > quality[0] + 3


def test_without_a_video_to_learn_from_the_vae_is_asked(engine):
    preview = Preview(engine.pipeline, budget=10.0)
    pictures, video = follow(engine, preview, seed=3, steps=8, compute=1.0)
    preview.remove()
    assert len(pictures) >= 6 and pictures[-1][1].shape == (64, 64, 3)
    # One frame alone, without what the causal VAE remembers of the frames before it.
    assert psnr(pictures[-1][1][None], video.frames[8][None]) > 18


def test_the_budget_is_kept(engine):
    preview = Preview(engine.pipeline, budget=0.0)
    pictures, _ = follow(engine, preview)
    preview.remove()
    assert pictures == [] and preview.seconds == 0.0


def test_the_video_is_the_same_with_and_without(engine):
    request = GenerateRequest(prompt="a red disc moves right", num_inference_steps=10, num_frames=5, seed=1)
    before = engine.generate(request)
    preview = Preview(engine.pipeline, budget=10.0)
    during = engine.generate(request)
    preview.remove()
    assert torch.equal(before.latents, during.latents) and preview.take() is not None
    engine.generate(request)
    assert preview.take() is None  # detached


def test_the_linear_map_is_exact_where_the_video_is_linear():
    generator = torch.Generator().manual_seed(0)
    latents = torch.rand(1, 4, 3, 6, 8, generator=generator)
    weights = torch.rand(4, 3, generator=generator) / 4
    pixels = torch.einsum("cfyx,cd->fyxd", latents[0], weights).repeat_interleave(4, 1).repeat_interleave(4, 2)
    frames = np.zeros((5, 24, 32, 3), np.uint8)
    frames[[0, 2, 4]] = (pixels * 255).round().byte().numpy()  # a latent frame ends a run of two video frames
    decoder = LinearDecoder()
    assert not decoder.ready
    decoder.learn(latents, frames)
    decoded = decoder.decode(latents[:, :, 1])
    assert decoded.shape == (3, 24, 32)
    assert torch.allclose(decoded.permute(1, 2, 0), pixels[1], atol=0.01)
    # A model of another size begins anew instead of mixing both.
    decoder.learn(torch.rand(1, 6, 3, 6, 8), frames)
    assert decoder.decode(torch.rand(1, 6, 6, 8)).shape == (3, 24, 32)


def test_where_skipped_steps_are_left_out_pictures_are_of_the_longer_steps():
    pipe = tiny_pipeline("euler")
    session, preview = hs.apply(pipe, hs.HSAConfig(compute=0.4, forecast="none")), Preview(pipe, budget=1e9)
    guesses, latents = [], []
    preview._decode = guesses.append

    def keep(pipe, step, timestep, tensors):
        latents.append(tensors["latents"][:, :, 1].clone())
        return {}

    generate(pipe, num_frames=9, steps=10, callback_on_step_end=keep)
    preview.remove()
    levels, evaluated = pipe.scheduler.sigmas, [step.step for step in session.report.steps if step.active]
    assert len(evaluated) == 4
    want = []
    for at, after in itertools.pairwise(evaluated[1:]):  # the first latents were there before any callback
        level, moved = levels[after], latents[at] - latents[at - 1]
        want.append(latents[at] - level * moved / (level - levels[at]))
    assert len(guesses) == sum(step < 9 for step in evaluated) and len(want) == 2
    assert all(torch.allclose(*pair, atol=1e-4) for pair in zip(guesses[1:], want, strict=False))
