"""LTX-2 through the engine and the command: what the stock pipeline makes, with sound in the file."""

from __future__ import annotations

import json
import math
import shutil

import av
import numpy as np
import pytest
import torch
from diffusers import LTX2ImageToVideoPipeline, LTX2Pipeline
from safetensors.torch import load_file

import heterostep as hs
from folders_ltx2 import complete_ltx2
from heterostep.engine.denoise.preview import Preview
from heterostep.engine.engine import StepDone
from heterostep.engine.facts import read_facts
from heterostep.engine.media.audio import Audio
from heterostep.engine.media.video import write_mp4
from heterostep.errors import Interrupted
from heterostep.launch.cli import main
from tiny_ltx2 import GUIDANCE, picture

SMALL = {"prompt": "a red disc moves right", "width": 64, "height": 32, "num_frames": 5}
AUDIO_SCALE = {"2.0": None, "2.3": 7.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny models, by version."""
    folder = tmp_path_factory.mktemp("ltx2")
    for version in AUDIO_SCALE:
        complete_ltx2(version).save_pretrained(folder / version)
    return {version: folder / version for version in AUDIO_SCALE}


@pytest.fixture(scope="module")
def engines(models):
    return {version: hs.Engine(hs.EngineConfig(model=str(path), device="cpu")) for version, path in models.items()}


def request(**changes):
    return hs.GenerateRequest(**{**SMALL, "seed": 3, "fps": 8, "num_inference_steps": 6, **changes})


def stock(folder, version, output_type, image=None):
    """What diffusers alone makes of the same request."""
    pipe = (LTX2Pipeline if image is None else LTX2ImageToVideoPipeline).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    out = pipe(
        **SMALL,
        **GUIDANCE[version],
        **({} if image is None else {"image": image}),
        frame_rate=8.0,
        num_inference_steps=3,
        guidance_scale=3.0,
        audio_guidance_scale=AUDIO_SCALE[version],
        generator=torch.Generator("cpu").manual_seed(3),
        output_type=output_type,
    )
    return out.frames, out.audio


@pytest.mark.parametrize(("version", "image"), [("2.0", None), ("2.3", None), ("2.3", picture())])
def test_dense_is_the_stock_pipeline(models, engines, version, image):
    output = engines[version].generate(request(compute=1.0, image=image, num_inference_steps=3))
    latents, audio_latents = stock(models[version], version, "latent", image)
    assert torch.equal(output.latents, latents) and torch.equal(output.audio_latents, audio_latents)
    frames, audio = stock(models[version], version, "np", image)
    assert (output.frames == (frames[0] * 255).round().astype(np.uint8)).all()
    assert (output.audio.samples == audio[0].float().numpy()).all()
    assert output.audio.sample_rate == 16000
    assert output.report.evaluations.unique().tolist() == [3]


def test_half_of_the_work(engines):
    events = list(engines["2.0"].stream(request(compute=0.5, num_inference_steps=12)))
    output = events[-1]
    assert output.report.compute == pytest.approx(0.5, abs=0.02)
    assert [e.active for e in events if isinstance(e, StepDone)] == [r.active for r in output.report.steps]
    assert output.audio.seconds == pytest.approx(5 / 8, abs=0.05)
    assert np.isfinite(output.audio.samples).all() and np.abs(output.audio.samples).max() > 0


def test_tokens_of_the_image_get_few_evaluations(engines):
    engine = engines["2.0"]
    hsa = hs.HSAConfig(compute=0.5, policy="tokens")
    config, engine.config = engine.config, hs.EngineConfig(model=engine.config.model, hsa=hsa)
    report = engine.generate(request(image=picture(), num_inference_steps=12)).report
    engine.config = config
    full = sum(r.active == r.total for r in report.steps)
    assert report.conditioned == 32
    assert report.evaluations[0].unique().tolist() == [full]
    assert report.evaluations[1:].min() > full
    assert report.compute == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("version", "policy"), [("2.0", "joint"), ("2.3", "tokens")])
def test_a_job_goes_on_bit_for_bit(engines, tmp_path, version, policy):
    engine = engines[version]
    config, asked = engine.config, request(num_inference_steps=8)
    engine.config = hs.EngineConfig(model=config.model, hsa=hs.HSAConfig(compute=0.7, policy=policy))
    whole = engine.generate(asked, hs.JobConfig(folder=tmp_path / "whole", checkpoint_every=3))
    job = hs.JobConfig(folder=tmp_path / "broken", checkpoint_every=3)
    with pytest.raises(Interrupted):
        for event in engine.stream(asked, job):
            if isinstance(event, StepDone) and event.step == 5:
                engine.save_and_stop()
    again, finished = engine.generate(asked, job), engine.generate(asked, job)
    engine.config = config
    for output in (again, finished):
        assert torch.equal(output.latents, whole.latents)
        assert torch.equal(output.audio_latents, whole.audio_latents)
        assert (output.audio.samples == whole.audio.samples).all()
        assert [r.active for r in output.report.steps] == [r.active for r in whole.report.steps]


def test_generate_writes_a_file_with_sound(models, tmp_path, capsys):
    flags = ["--size", "64x32", "--frames", "17", "--steps", "12", "--compute", "0.5", "--seed", "3"]
    files = ["--output", tmp_path / "v.mp4", "--latents", tmp_path / "l.safetensors", "--report", tmp_path / "r.json"]
    status = main(["generate", "--prompt", "x", "--model", *map(str, (models["2.3"], *flags, *files))])
    assert status == 0
    assert "17 frames of 64x32, 8 per second, with 2.1 s of sound" in capsys.readouterr().out
    with av.open(str(tmp_path / "v.mp4")) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (audio.codec_context.name, audio.rate, audio.codec_context.layout.name) == ("aac", 16000, "stereo")
        assert float(audio.duration * audio.time_base) == pytest.approx(17 / 8, abs=0.1)
        assert float(video.duration * video.time_base) == pytest.approx(17 / 8, abs=0.01)
        kinds = {type(frame).__name__ for frame in container.decode()}
    assert kinds == {"VideoFrame", "AudioFrame"}
    latents = load_file(tmp_path / "l.safetensors")
    assert latents["latents"].shape == (1, 4, 9, 4, 8) and latents["audio_latents"].shape == (1, 2, 53, 2)
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["family"] == "LTX-2 small" and report["audio"]["channels"] == 2
    assert report["compute"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("channels", [1, 2])
def test_the_sound_of_the_file_is_the_one_given(tmp_path, channels):
    rate, fps = 24000, 10
    time = np.arange(2 * rate) / rate
    tone = np.stack([np.sin(2 * math.pi * (440 + 220 * c) * time) for c in range(channels)]).astype(np.float32) / 2
    frames = np.zeros((15, 32, 32, 3), np.uint8)
    write_mp4(tmp_path / "v.mp4", frames, fps, audio=Audio(samples=tone, sample_rate=rate))
    with av.open(str(tmp_path / "v.mp4")) as container:
        assert len(container.streams.audio) == 1
        back = np.concatenate([f.to_ndarray() for f in container.decode(audio=0)], axis=1)
    assert back.shape[0] == channels
    assert back.shape[1] == pytest.approx(1.5 * rate, abs=2048)  # what is longer than the video is left out
    middle = slice(rate // 4, rate)
    for heard, given in zip(back, tone, strict=True):
        spectra = [np.abs(np.fft.rfft(samples[middle])) for samples in (heard, given)]
        assert spectra[0].argmax() == spectra[1].argmax()
        assert np.std(heard[middle]) == pytest.approx(np.std(given[middle]), rel=0.05)


@pytest.mark.parametrize(
    "samples", [np.zeros(5, np.float32), np.zeros((3, 5), np.float32), np.zeros((2, 5)), np.full((1, 5), np.nan, "f4")]
)
def test_wrong_samples_are_refused(samples):
    with pytest.raises(hs.RequestError, match=r"samples must be float32|not all finite"):
        Audio(samples=samples, sample_rate=16000)


def test_info_says_what_was_recognised(models, capsys):
    assert main(["info", "--model", str(models["2.3"])]) == 0
    said = capsys.readouterr().out
    assert "(LTX-2 small, LTX2Pipeline)" in said
    assert "2 heads of 8, 25 latents per second" in said
    assert "by the prompt 7, by perturbed attention in layer 1 1, by isolated modalities 3" in said
    assert "576 = 9 x 8 x 8" in said
    assert "in bfloat16 for each of 4 guidance branches" in said
    assert "width a multiple of 32" in said


# As published: 48 layers of 32 heads of 128, 32 heads of 64 for sound, a VAE of 8 x 32 x 32.
_PUBLISHED = {"num_layers": 48, "num_attention_heads": 32, "attention_head_dim": 128, "in_channels": 128,
              "audio_num_attention_heads": 32, "audio_attention_head_dim": 64, "patch_size": 1}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "more", "gemma", "passes", "crf"),
    [
        ("LTX-2", {}, "gemma3", 2, 33),
        ("LTX-2.3", {"cross_attn_mod": True}, "gemma3", 4, 33),
        ("LTX-2.5", {"cross_attn_mod": True, "use_prompt_adaln_single": False}, "gemma4_unified", 4, 18),
    ],
)
def test_published_models_are_recognised(tmp_path, family, more, gemma, passes, crf):
    vae = {"latent_channels": 128, "spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
    configs = {"transformer": {**_PUBLISHED, **more}, "vae": vae, "audio_vae": {"sample_rate": 16000},
               "text_encoder": {"model_type": gemma}}  # fmt: skip
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "LTX2Pipeline"}))
    for part, config in configs.items():
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    facts = read_facts(str(tmp_path))
    assert facts.family == family and facts.shared_heads == 32
    assert facts.grid(768, 512, 121) == (16, 16, 24)
    assert facts.cache_bytes(6144) / 2**30 == pytest.approx(6.75, abs=0.01)
    assert (facts.passes(3.0), facts.passes(1.0), facts.image_crf) == (passes, 1, crf)
    assert facts.pipeline_for(True) == "LTX2ImageToVideoPipeline"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--size", "48x32"], "the nearest size is 64x32"),
        (["--frames", "4"], "a multiple of 2, plus 1"),
        (["--frames", "1", "--fps", "100"], "too short for sound"),
        (["--solver", "unipc"], "one of euler is needed"),
    ],
)
def test_what_the_model_cannot_make(models, tmp_path, capsys, flags, says):
    output = ["--output", str(tmp_path / "v.mp4"), "--steps", "4"]
    assert main(["generate", "--prompt", "x", "--model", str(models["2.0"]), *output, *flags]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("part", ["vocoder", "connectors", "audio_vae", "transformer"])
def test_a_missing_part_is_named(models, tmp_path, part):
    shutil.copytree(models["2.0"], tmp_path / "m")
    shutil.rmtree(tmp_path / "m" / part)
    with pytest.raises(hs.ConfigError, match=part):
        hs.Engine(hs.EngineConfig(model=str(tmp_path / "m"), device="cpu"))


def test_previews(engines):
    """Pictures on the way, by the VAE and then by what was learnt, and the same video."""
    engine = engines["2.0"]
    before = engine.generate(request(compute=1.0))
    preview = Preview(engine.pipeline, budget=10.0)
    for _ in range(2):
        pictures = []
        for event in engine.stream(request(compute=1.0)):
            picture = preview.take()
            if picture is not None and isinstance(event, StepDone):
                pictures.append(picture)
        assert torch.equal(before.latents, event.latents)
        last = pictures[-1].astype(float)
        assert len(pictures) >= 4 and last.shape[0] * 2 == last.shape[1]
        preview.learn(event.latents, event.frames)
    preview.remove()
    # The last picture is of the middle frame, whose colours the linear map knows.
    assert abs(last.mean() - event.frames[3].mean()) < 25


@pytest.mark.parametrize(
    ("part", "source"), [("audio_vae", "the audio VAE"), ("vocoder", "the vocoder"), ("vae", "the VAE")]
)
def test_decoders_whose_values_are_not_finite(engines, part, source):
    engine = engines["2.0"]
    module = getattr(engine.pipeline, part)
    weight = next(getattr(module, "decoder", module).parameters())
    kept = weight.data.clone()
    weight.data.fill_(float("nan"))
    try:
        with pytest.raises(hs.RequestError, match=rf"^{source} produced values that are not finite numbers"):
            engine.generate(request())
    finally:
        weight.data.copy_(kept)
