"""Requests for videos beyond the model's own length: what is deduced, what is refused, and what the engine makes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import heterostep as hs
from folders_ltx2 import complete_ltx2
from heterostep.engine.denoise.long_video import opening, windows_for
from heterostep.engine.facts import DEMO_MODEL, read_facts
from heterostep.engine.models import adapter_named
from heterostep.engine.request import resolve
from heterostep.engine.windows import own_frames, read_scenes
from heterostep.launch.cli import build_parser, main
from heterostep.launch.options import commands_of

PROMPT = "a red disc moves right"
SETTINGS = ("window", "overlap", "roll_windows", "shared_noise", "prompt_schedule")


@pytest.fixture(scope="module")
def engine(tiny_model):
    return hs.Engine(hs.EngineConfig(model=str(tiny_model), device="cpu"))


@pytest.fixture(scope="module")
def ltx2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ltx2") / "2.3"
    complete_ltx2("2.3").save_pretrained(folder)
    return hs.Engine(hs.EngineConfig(model=str(folder), device="cpu"))


def request(**changes):
    values = {"prompt": PROMPT, "width": 64, "height": 48, "num_frames": 25, "window": 9, "seed": 3, "compute": 0.5}
    return hs.GenerateRequest(**{**values, "num_inference_steps": 8, **changes})


def settings(resolved):
    return tuple(getattr(resolved, name) for name in SETTINGS)


@pytest.mark.parametrize(
    ("family", "fps", "window", "latents"),
    [
        ("Wan 14B", None, (81, 30), (21, 8)),
        ("Wan 2.2 TI2V 5B", None, (121, 45), (31, 12)),
        ("Wan small", 4, (17, 6), (5, 2)),
    ],
)
def test_windows_are_deduced_from_the_model(engine, family, fps, window, latents):
    facts = dataclasses.replace(engine.facts, family=family)
    resolved = resolve(hs.GenerateRequest(prompt=PROMPT, num_frames=401, fps=fps, width=64, height=64), facts)
    assert settings(resolved) == (*window, False, True, None)
    windows = windows_for(facts, resolved)
    assert (windows.length, windows.overlap, windows.anchor) == (*latents, True)
    own = resolve(hs.GenerateRequest(prompt=PROMPT, num_frames=window[0], width=64, height=64), facts)
    assert settings(own) == (None,) * 5 and windows_for(facts, own) is None


def test_the_demo_model_and_ltx2_have_lengths_of_their_own(ltx2):
    demo = read_facts("demo")
    resolved = resolve(hs.GenerateRequest(prompt=PROMPT, num_frames=65), demo)
    windows = windows_for(demo, resolved)
    assert (resolved.window, windows.length, windows.overlap) == (17, 9, 3) and DEMO_MODEL.is_dir()
    # LTX-2's positions are times, of 20 seconds in the published models and 2 in this one.
    assert own_frames(dataclasses.replace(ltx2.facts, longest_seconds=20.0, vae_temporal=8), 24) == 473
    assert own_frames(ltx2.facts, 24) == 47 and own_frames(ltx2.facts, 8) == 17


def test_seconds_are_a_number_of_frames(engine):
    assert resolve(hs.GenerateRequest(prompt=PROMPT, seconds=3.1), engine.facts).num_frames == 25
    assert resolve(hs.GenerateRequest(prompt=PROMPT, seconds=3.1, fps=16), engine.facts).num_frames == 49
    assert resolve(hs.GenerateRequest(prompt=PROMPT, seconds=0.01), engine.facts).num_frames == 1
    with pytest.raises(hs.RequestError, match="say the same"):
        resolve(hs.GenerateRequest(prompt=PROMPT, seconds=3, num_frames=9), engine.facts)


@pytest.mark.parametrize(
    "changes",
    [{}, {"window": 33}, {"window": 25, "overlap": 4}, {"roll_windows": True}, {"prompt_schedule": "3-9: a blue disc"},
     {"window": 25, "prompt_schedule": "0-9: a red disc\n10-: a blue disc"}, {"shared_noise": False}],
)  # fmt: skip
def test_a_resolved_request_means_the_same_when_it_is_resolved_again(engine, changes):
    resolved = resolve(request(**changes), engine.facts)
    assert resolve(resolved, engine.facts) == resolved
    assert (windows_for(engine.facts, resolved) is None) == (changes.get("window", 9) >= 25)
    if changes.get("window") == 25 and "prompt_schedule" in changes:
        assert resolved.prompt == "a blue disc" and resolved.prompt_schedule is None


@pytest.mark.parametrize(
    ("changes", "rule"),
    [({"window": 10}, "nearest is 9"), ({"window": 0}, "at least 1"), ({"window": 1}, "smallest window is 5"),
     ({"window": 1, "overlap": 1}, "smallest window"), ({"overlap": 9}, "as long as a window"),
     ({"overlap": 0}, "at least 1"), ({"prompt_schedule": "# nothing"}, "is empty"),
     ({"prompt_schedule": "a red disc"}, "line 1 .*FROM-TO"), ({"prompt_schedule": "9-3: x"}, "before it begins"),
     ({"prompt_schedule": "0-9: x\n5-: y"}, "line 2 .*already"), ({"seconds": 0}, "above 0")],
)  # fmt: skip
def test_requests_that_cannot_be_honoured(engine, changes, rule):
    with pytest.raises(hs.RequestError, match=rule):
        resolve(request(**changes), engine.facts)


def test_windows_are_for_text_alone(image_models):
    facts = read_facts(str(image_models["wan21 i2v"]))
    image = "tests/unit/engine/no.png"
    with pytest.raises(hs.RequestError):
        resolve(request(image=image), facts)
    facts = dataclasses.replace(facts, image="optional")
    from tiny import picture

    for name, value in (("window", 9), ("shared_noise", True), ("prompt_schedule", "0-: x")):
        with pytest.raises(hs.RequestError, match=f"{name} is for videos from text alone"):
            resolve(hs.GenerateRequest(prompt=PROMPT, num_frames=25, image=picture(), **{name: value}), facts)
    long = resolve(hs.GenerateRequest(prompt=PROMPT, num_frames=25, image=picture()), facts)
    assert settings(long) == (None,) * 5, "made in one piece, as before"


def test_a_schedule_is_read_in_frames_and_in_seconds():
    text = "# who moves\n0-7: a red disc\n\n 1s - 2.5s : a blue disc: fast \n20-: a green disc"
    assert read_scenes(text, 8) == [(0, 8, "a red disc"), (8, 20, "a blue disc: fast"), (20, np.inf, "a green disc")]


def test_the_command_reads_a_schedule_from_a_file(tmp_path, capsys):
    file = tmp_path / "scenes.txt"
    file.write_text("0-9: a red disc\n")
    flags = ["generate", "--prompt", "x", "--seconds", "4", "--window", "9", "--roll-windows", "--no-shared-noise"]
    (command,) = commands_of(build_parser().parse_args([*flags, "--prompt-schedule", str(file)]))
    asked = command.request
    assert asked == hs.GenerateRequest(
        prompt="x", seconds=4, window=9, roll_windows=True, shared_noise=False, prompt_schedule="0-9: a red disc\n"
    )
    assert main([*flags, "--prompt-schedule", str(tmp_path / "none.txt")]) == 2
    file.write_bytes(b"\xff\xfe\x00")
    assert main([*flags, "--prompt-schedule", str(file)]) == 2
    said = capsys.readouterr().err
    assert "No such file" in said and "not UTF-8" in said and said.count("\n") == 2


def test_a_long_video_has_all_its_frames_and_its_report_covers_it(engine):
    video = engine.generate(request())
    assert video.frames.shape == (25, 48, 64, 3) and video.report.evaluations.shape == (7, 3, 4)
    assert abs(video.report.compute - 0.5) <= 0.07
    assert settings(video.request) == (9, 3, False, True, None)
    for changes in ({"shared_noise": False}, {"roll_windows": True}, {"overlap": 8}, {"window": 25}):
        other = engine.generate(request(**changes))
        assert other.latents.shape == video.latents.shape and not torch.equal(other.latents, video.latents)
    tokens = hs.Engine(hs.EngineConfig(model=engine.config.model, device="cpu", hsa=hs.HSAConfig(policy="tokens")))
    video = tokens.generate(request(num_inference_steps=20))
    assert abs(video.report.compute - 0.5) <= 0.02 and len(video.report.evaluations.unique()) > 1
    with pytest.raises(hs.ConfigError, match="Windows that roll"):
        tokens.generate(request(roll_windows=True))


def test_dense_long_videos_are_cut_too(engine):
    dense = engine.generate(request(compute=1.0))
    whole = engine.generate(request(compute=1.0, window=25))
    assert dense.hsa is None and not torch.equal(dense.latents, whole.latents)
    assert bool((dense.report.evaluations == 8).all())


@pytest.mark.parametrize("changes", [{}, {"roll_windows": True}, {"prompt_schedule": "13-: a blue disc"}])
def test_a_resumed_long_video_has_the_same_bits(engine, tmp_path, changes):
    asked, want = request(**changes), engine.generate(request(**changes))
    job = hs.JobConfig(folder=tmp_path, checkpoint_every=3)
    for event in engine.stream(asked, job):
        if getattr(event, "step", 0) == 4:
            engine.save_and_stop()
            break
    resumed = engine.generate(asked, job)
    assert torch.equal(resumed.latents, want.latents) and (resumed.frames == want.frames).all()
    with pytest.raises(hs.ConfigError, match="overlap"):
        engine.generate(request(**changes, overlap=5), job)


def test_prompts_over_time_change_their_part_of_the_video(engine):
    plain = engine.generate(request())
    turned = engine.generate(request(prompt_schedule="18-: a blue square falls"))
    # Windows of 3 latent frames begin at 0, 2 and 4: the last one alone has its middle behind frame 18.
    change = (turned.latents - plain.latents).abs().amax((0, 1, 3, 4))
    assert bool((change[-2:] > 1e-3).all()) and bool((change[:4] == 0).all())


def test_ltx2_makes_long_videos_with_sound(ltx2, tmp_path):
    asked = hs.GenerateRequest(
        prompt=PROMPT, width=64, height=32, fps=8, num_frames=25, window=9, num_inference_steps=6, seed=2
    )
    video = ltx2.generate(asked)
    assert video.frames.shape == (25, 32, 64, 3) and video.latents.shape[2] == 13
    assert abs(video.audio.seconds - 25 / 8) < 0.1
    job, scheduled = hs.JobConfig(folder=tmp_path), dataclasses.replace(asked, prompt_schedule="2s-: rain")
    turned = ltx2.generate(scheduled, job)
    assert not torch.equal(turned.audio_latents, video.audio_latents)


def test_noise_levels_of_a_long_ltx2_video_are_those_of_a_window(ltx2):
    def levels(num_frames, window):
        resolved = resolve(
            hs.GenerateRequest(prompt=PROMPT, width=128, height=128, num_frames=num_frames, window=window), ltx2.facts
        )
        adapter, scheduler = adapter_named("LTX2Pipeline"), ltx2.pipeline.scheduler
        given = opening(adapter, ltx2.pipeline, ltx2.facts, resolved)
        adapter.set_timesteps(scheduler, ltx2.facts, resolved)
        rehearsed = scheduler.sigmas.clone()
        ltx2.pipeline(
            prompt=PROMPT, width=128, height=128, num_frames=num_frames, frame_rate=8.0, output_type="latent",
            num_inference_steps=resolved.num_inference_steps, guidance_scale=1.0,
            callback_on_step_end=lambda pipe, *_: setattr(pipe, "_interrupt", True) or {},
            **{name: value for name, value in given.items() if name in ("sigmas", "generator")},
        )  # fmt: skip
        assert torch.allclose(scheduler.sigmas, rehearsed, atol=1e-5)
        return rehearsed

    assert torch.allclose(levels(33, 9), levels(9, 9), atol=1e-5)
    assert not torch.allclose(levels(33, 33), levels(9, 9), atol=1e-3)


def seams_and_drift(engine, video):
    """Largest change between neighbouring frames at the starts of windows over that elsewhere; drift of the colour."""
    pixels = video.frames.astype(np.float32) / 255
    change = np.abs(np.diff(pixels, axis=0)).mean((1, 2, 3))
    starts = [window.start for window in windows_for(engine.facts, video.request).of(33)[1:]]
    seams = sorted({i for start in starts for i in range(2 * start - 2, 2 * start + 1)})  # a latent frame is two frames
    first, last = pixels[[0, -1]].mean((1, 2))
    return change[seams].max() / np.delete(change, seams).max(), np.abs(last - first).max()


@pytest.mark.slow
def test_a_scene_that_stands_still_does_so_over_all_windows():
    """With the demo model's own weights; at the default 40 steps too (benchmarks/reports/long.md)."""
    engine = hs.Engine(hs.EngineConfig(model="demo", device="cpu"))
    still = hs.GenerateRequest(prompt="a blue square stays still", num_frames=65, compute=0.5, num_inference_steps=8)
    video = engine.generate(still)
    ratio, drift = seams_and_drift(engine, video)
    assert len(video.frames) == 65 and ratio <= 1.2 and drift <= 0.05
    _, drift = seams_and_drift(engine, engine.generate(dataclasses.replace(still, shared_noise=False)))
    assert drift > 0.05, "so that this test can fail"
