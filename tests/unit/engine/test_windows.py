"""Long videos in windows: cutting, blending and shared noise; each path against an independent reference."""

from __future__ import annotations

import itertools
import types
from types import SimpleNamespace

import pytest
import torch
from reference import History, Reference

import heterostep as hs
from heterostep.engine.denoise.windows import Text, Windows, ramps, shared_noise
from heterostep.engine.models.ltx2 import LTX2Adapter
from tiny import Fixed, embeddings, generate, tiny_image_pipeline, tiny_pipeline
from tiny_ltx2 import generate as generate_ltx2
from tiny_ltx2 import tiny_ltx2

LONG = {"num_frames": 25}  # 7 latent frames of 16 tokens
WINDOWS = Windows(length=4, overlap=2)
CUT = [(0, 4), (2, 6), (3, 7)]  # that many windows, as evenly spread as whole frames let them be


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


def weights(cut, frames, anchor=True):
    """Pyramids over windows, normalised: counted one by one."""
    raw = torch.zeros(len(cut), frames)
    for number, (start, stop) in enumerate(cut):
        for place in range(stop - start):
            rising = place if anchor and start else place + 1
            raw[number, start + place] = min(rising, stop - start - place)
    return raw / raw.sum(0)


class WindowedReference(Reference):
    """Every window is a video of its own, with keys and values of its own; velocities are blended."""

    cut, stale = CUT, None

    def velocity(self, name, model, noisy, step, embeds, seen):
        self.stale = {} if self.stale is None else self.stale
        whole, mask, out = self.history, self.mask, torch.zeros_like(noisy)
        per = noisy.shape[-1] * noisy.shape[-2] // 4
        for number, ((start, stop), weight) in enumerate(zip(self.cut, weights(self.cut, noisy.shape[2]), strict=True)):
            own = slice(start * per, stop * per)
            self.history, self.mask = self.stale.setdefault((name, number), History()), mask[:, own]
            when = step[:, own] if step.ndim == 2 else step
            v = super().velocity(name, model, noisy[:, :, start:stop], when, embeds, seen)
            out[:, :, start:stop] += v * weight[start:stop].view(1, 1, -1, 1, 1)
        self.history, self.mask = whole, mask
        return out


@pytest.mark.parametrize("roll", [False, True])
@pytest.mark.parametrize(("length", "overlap", "frames"), [(4, 2, 7), (9, 3, 33), (21, 8, 100), (5, 1, 6), (6, 5, 17)])
def test_windows_cover_the_video_and_their_weights_sum_to_one(length, overlap, frames, roll):
    windows = Windows(length=length, overlap=overlap, roll=roll)
    for step in range(20):
        found = windows.of(frames, step)
        assert [window.number for window in found] == list(range(len(found)))
        assert found[0].start == 0 and found[-1].stop == frames
        assert all(window.stop - window.start == length for window in found)
        assert all(b.start < a.stop and b.start > a.start for a, b in itertools.pairwise(found))
        assert all(a.stop - b.start >= overlap for a, b in itertools.pairwise(found)) or roll
        spans = [(window.start, window.stop) for window in found]
        for anchor in (True, False):
            total = torch.zeros(frames)
            for (start, stop), ramp in zip(spans, ramps(spans, frames, anchor=anchor), strict=True):
                assert bool((ramp >= 0).all())
                total[start:stop] += ramp
            assert torch.allclose(total, torch.ones(frames))
    assert windows.of(length) == windows.of(length, 7) and len(windows.of(length)) == 1


def test_rolled_windows_move_from_step_to_step_and_others_stand_still():
    starts = {tuple(w.start for w in Windows(length=9, overlap=3, roll=True).of(40, step)) for step in range(12)}
    assert len(starts) >= 5
    assert len({tuple(WINDOWS.of(25, step)) for step in range(12)}) == 1


def test_all_windows_begin_with_the_same_noise():
    windows = Windows(length=9, overlap=4)
    noise = torch.randn(1, 2, 33, 4, 4, generator=torch.Generator().manual_seed(0))
    shared = shared_noise(noise, windows, torch.Generator().manual_seed(1))
    sums = [sorted(shared[:, :, w.start : w.stop].sum((0, 1, 3, 4)).tolist()) for w in windows.of(33)]
    assert len(sums) == 6 and all(found == sums[0] for found in sums)
    assert torch.equal(shared[:, :, :9], noise[:, :, :9])
    again = shared_noise(noise, windows, torch.Generator().manual_seed(2))
    assert not torch.equal(again, shared), "the order is drawn"
    pairs = shared_noise(noise[:, :, :18], Windows(length=5, overlap=2), torch.Generator().manual_seed(1), patch=2)
    found = [tuple(pair.flatten().tolist()) for pair in pairs.unflatten(2, (-1, 2)).unbind(2)]
    assert len(set(found[:5])) == 5 and set(found[5:]) < set(found[:5]), "frames of a token stay together"


@pytest.mark.parametrize("kind", ["euler", "wan22", "ti2v5b"])
@pytest.mark.parametrize("compute", [1.0, 0.5])
def test_one_window_is_the_video_without_windows_bit_for_bit(kind, compute):
    pipe = tiny_pipeline(kind)
    config = hs.HSAConfig(compute=compute)
    hs.apply(pipe, config)
    want = generate(pipe)
    for windows in (Windows(length=3, overlap=1), Windows(length=21, overlap=8, roll=True)):
        hs.apply(pipe, config, windows=windows)
        assert torch.equal(generate(pipe), want)


@pytest.mark.parametrize("kind", ["euler", "unipc", "wan22", "ti2v5b"])
def test_windows_equal_the_reference(kind):
    pipe, text = tiny_pipeline(kind), embeddings()
    start = torch.randn(1, 16, 7, 8, 8, generator=torch.Generator().manual_seed(2))
    reference = WindowedReference(pipe, "taylor")
    session = hs.apply(pipe, hs.HSAConfig(compute=1.0), windows=WINDOWS)
    got = generate(pipe, **LONG, latents=start)
    want = reference.run(start, [None] * 8, text["prompt_embeds"], text["negative_prompt_embeds"], 3.0)
    assert relative(got, want) < 1e-5
    assert session.report.evaluations.shape == (7, 4, 4) and bool((session.report.evaluations == 8).all())
    assert session.report.kv_bytes == 0


@pytest.mark.parametrize("kind", ["euler", "wan22", "ti2v5b"])
def test_tokens_of_all_windows_equal_the_reference(kind):
    generator, count = torch.Generator().manual_seed(4), 7 * 16
    sizes = [count, 60, 9, 0, count, 30, 3, 100, 112, 50]
    plans = [torch.randperm(count, generator=generator)[:size].sort().values for size in sizes]
    plans[6] = torch.tensor([0, 1, 15])  # in the first window alone
    plans[0] = None
    pipe, text = tiny_pipeline(kind), embeddings()
    start = torch.randn(1, 16, 7, 8, 8, generator=generator)
    reference = WindowedReference(pipe, "taylor", correct=True)
    session = hs.apply(pipe, hs.HSAConfig(), planner=Fixed(dict(enumerate(plans))), windows=WINDOWS)
    got = generate(pipe, steps=10, **LONG, latents=start)
    for record in session.report.steps:
        if record.reason in ("first step", "expert switch"):
            plans[record.step] = None
    want = reference.run(start, plans, text["prompt_embeds"], text["negative_prompt_embeds"], 3.0)
    assert relative(got, want) < 1e-5
    assert session.report.kv_bytes == 2 * 3 * (4 * 16) * 48 * 2 * 2 * 4, (
        "a cache for each window, two layers and branches"
    )


@pytest.mark.parametrize("policy", ["tokens", "groups", "joint", "steps"])
def test_policies_meet_their_share_of_the_whole_video(policy):
    pipe = tiny_pipeline()
    session = hs.apply(pipe, hs.HSAConfig(compute=0.5, policy=policy), windows=WINDOWS)
    assert generate(pipe, steps=20, **LONG).isfinite().all()
    report = session.report
    assert abs(report.compute - 0.5) <= 0.025 and report.evaluations.shape == (7, 4, 4)
    assert int(report.evaluations.sum()) == sum(record.active for record in report.steps)


@pytest.mark.parametrize("version", ["2.0", "2.3", "2.5"])
def test_sound_follows_the_windows(version):
    """Against a forward that is cut and blended by hand; at 8 frames a second a frame of video lasts 3.125 of sound."""
    size = {"num_frames": 13, "generator": torch.Generator().manual_seed(3)}  # 7 latent frames, 41 of sound
    pipe = tiny_ltx2(version)
    stock, sounds = pipe.transformer.forward, [(0, 22), (12, 34), (19, 41)]

    def forward(self, hidden_states, audio_hidden_states, video_coords, audio_coords, **rest):
        video, sound = torch.zeros_like(hidden_states), torch.zeros_like(audio_hidden_states)
        ours, theirs = weights(CUT, 7), weights(sounds, 41, anchor=False)
        for number, ((start, stop), (low, high)) in enumerate(zip(CUT, sounds, strict=True)):
            own = {"num_frames": 4, "audio_num_frames": 22, "return_dict": False}
            v, a = stock(
                hidden_states=hidden_states[:, start * 32 : stop * 32],
                audio_hidden_states=audio_hidden_states[:, low:high],
                video_coords=video_coords[:, :, :128],
                audio_coords=audio_coords[:, :, :22],
                **rest | own,
            )
            video[:, start * 32 : stop * 32] += v * ours[number, start:stop].repeat_interleave(32)[:, None]
            sound[:, low:high] += a * theirs[number, low:high][:, None]
        return video, sound

    pipe.transformer.forward = types.MethodType(forward, pipe.transformer)
    want = generate_ltx2(pipe, version, **size)
    pipe = tiny_ltx2(version)
    hs.apply(pipe, hs.HSAConfig(compute=1.0), windows=WINDOWS)
    size["generator"].manual_seed(3)
    got = generate_ltx2(pipe, version, **size)
    assert all(relative(*pair) < 1e-5 for pair in zip(got, want, strict=True))
    session = hs.apply(pipe, hs.HSAConfig(compute=0.5, policy="tokens"), windows=WINDOWS)
    assert all(part.isfinite().all() for part in generate_ltx2(pipe, version, steps=12, num_frames=13))
    assert abs(session.report.compute - 0.5) <= 0.025


def test_no_sound_is_between_windows():
    """At many frames a second a latent frame is shorter than one of sound, and windows may share a single one."""
    sizes = {
        "rope": SimpleNamespace(scale_factors=(8, 32, 32)),
        "config": SimpleNamespace(patch_size=1, patch_size_t=1),
    }
    module = SimpleNamespace(**sizes, audio_rope=SimpleNamespace(audio_latents_per_second=25.0))
    for fps, length, frames in itertools.product((8, 24, 36, 41, 60), (2, 3, 9), range(10, 30)):
        total = round((8 * (frames - 1) + 1) * 25 / fps)
        call = {"fps": fps, "audio_num_frames": total, "num_frames": frames, "height": 1, "width": 1}
        call["hidden_states"] = torch.empty(1, frames, 1)
        spans = [
            LTX2Adapter.beside(module, call, window.start, window.stop)[0]
            for window in Windows(length=length, overlap=1).of(frames)
        ]
        assert len({high - low for low, high in spans}) == 1 and (spans[0][0], spans[-1][1]) == (0, total)
        assert all(low <= high for (_, high), (low, _) in itertools.pairwise(spans))


def test_a_window_gets_the_prompt_of_its_middle():
    other = embeddings(seed=9)["prompt_embeds"]
    windows = Windows(length=4, overlap=2, texts=[Text(4.0, 9.0, {"encoder_hidden_states": other})])
    assert [windows.text(window) for window in windows.of(7)] == [None, 0, 0]
    pipe, seen = tiny_pipeline(), []
    hs.apply(pipe, hs.HSAConfig(compute=1.0), windows=windows)
    for attention in [pipe.transformer.condition_embedder]:
        attention.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    generate(pipe, steps=1, **LONG)
    prompt, negative = embeddings().values()
    want = [prompt, other, other, negative, negative, negative]
    assert len(seen) == 6 and all(torch.equal(*pair) for pair in zip(seen, want, strict=True))
    all_alike = Windows(length=4, overlap=2, texts=[Text(0.0, 9.0, {"encoder_hidden_states": other})])
    hs.apply(pipe, hs.HSAConfig(compute=0.5), windows=all_alike)
    got = generate(pipe, **LONG)
    hs.apply(pipe, hs.HSAConfig(compute=0.5), windows=WINDOWS)
    assert relative(got, generate(pipe, **LONG, prompt_embeds=other)) < 1e-6


def test_what_windows_do_not_go_with_is_refused():
    with pytest.raises(hs.ConfigError, match="makes videos from an image"):
        hs.apply(tiny_image_pipeline(), windows=WINDOWS)
    rolled = Windows(length=4, overlap=2, roll=True)
    with pytest.raises(hs.ConfigError, match=r"policy='tokens'.*stand still"):
        hs.apply(tiny_pipeline(), hs.HSAConfig(policy="tokens"), windows=rolled)
    with pytest.raises(hs.ConfigError, match="a planner of your own"):
        hs.apply(tiny_pipeline(), planner=Fixed({}), windows=rolled)
    for overlap in (0, 4):
        with pytest.raises(hs.ConfigError, match="from 1 to 3"):
            Windows(length=4, overlap=overlap)
    pipe = tiny_pipeline()
    hs.apply(pipe, hs.HSAConfig(), planner=Fixed({1: torch.tensor([[0, 1], [2, 3]])}), windows=WINDOWS)
    with pytest.raises(hs.ConfigError, match="one video at a time"):
        generate(pipe, prompts=2, **LONG)


def test_rolled_windows_under_whole_steps():
    pipe = tiny_pipeline()
    session = hs.apply(pipe, hs.HSAConfig(compute=0.45), windows=Windows(length=4, overlap=2, roll=True))
    assert generate(pipe, steps=10, **LONG).isfinite().all()
    assert {record.active for record in session.report.steps} == {0, 112} and session.report.kv_bytes == 0
