"""The life of a request through engine/engine.py and decoding.py: results, events, cancelling, errors."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import shutil
import threading
import warnings

import numpy as np
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file

import heterostep as hs
from folders import complete_pipeline
from heterostep.engine.defaults import DEFAULTS
from heterostep.engine.denoise.checks import rehearse
from heterostep.engine.denoise.preview import Preview
from heterostep.engine.engine import Decoding, Started, StepDone
from heterostep.engine.facts import read_facts
from heterostep.engine.models.base import check_finite
from heterostep.engine.record import Quality, compare, psnr, run_record, ssim
from heterostep.engine.request import allocation, resolve
from heterostep.errors import Cancelled
from heterostep.launch.cli import main
from tiny import TEXT_WIDTH
from waiting import until

PROMPT = "a red disc moves right"
SMALL = {"prompt": PROMPT, "negative_prompt": "blurry", "width": 64, "height": 48, "num_frames": 9, "seed": 3}


@pytest.fixture(scope="module")
def engine(tiny_model):
    return hs.Engine(hs.EngineConfig(model=str(tiny_model), device="cpu"))


def request(**changes):
    return hs.GenerateRequest(**{**SMALL, "num_inference_steps": 6, **changes})


def stock(folder, **changes):
    """What diffusers alone makes of the same request, uint8 [F, H, W, 3], and its latents."""
    pipe = WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    arguments = {k: v for k, v in {**SMALL, "num_inference_steps": 6, **changes}.items() if k != "seed"}
    arguments.setdefault("guidance_scale", DEFAULTS["Wan small"].guidance_scale)

    def run(output_type):
        generator = torch.Generator("cpu").manual_seed(SMALL["seed"])
        return pipe(**arguments, generator=generator, output_type=output_type).frames

    return (run("np")[0] * 255).round().astype(np.uint8), run("latent")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("unipc", {}),
        ("euler", {"guidance_scale": 1.0}),
        ("wan22", {"guidance_scale": 4.0, "guidance_scale_2": 3.0}),
        ("ti2v5b", {"num_frames": 5}),
    ],
)
def test_dense_is_the_stock_pipeline(tmp_path, kind, changes):
    complete_pipeline(kind).save_pretrained(tmp_path)
    frames, latents = stock(tmp_path, **changes)
    engine = hs.Engine(hs.EngineConfig(model=str(tmp_path), device="cpu"))
    output = engine.generate(request(compute=1.0, **changes))
    assert torch.equal(output.latents, latents)
    assert (output.frames == frames).all()
    assert output.frames.dtype == np.uint8
    assert output.report.compute == 1.0
    assert output.report.evaluations.unique().tolist() == [6]
    assert output.hsa is None


def test_hsa_is_apply_on_the_stock_pipeline(engine, tiny_model):
    pipe = WanPipeline.from_pretrained(tiny_model)
    session = hs.apply(pipe, hs.HSAConfig(compute=0.5))
    generator = torch.Generator("cpu").manual_seed(3)
    arguments = {k: v for k, v in SMALL.items() if k != "seed"}
    latents = pipe(
        **arguments,
        num_inference_steps=20,
        guidance_scale=DEFAULTS["Wan small"].guidance_scale,
        generator=generator,
        output_type="latent",
    ).frames
    output = engine.generate(request(num_inference_steps=20, compute=0.5))
    assert torch.equal(output.latents, latents)
    assert output.report.compute == session.report.compute == pytest.approx(0.5, abs=0.02)
    assert torch.equal(output.report.evaluations, session.report.evaluations)
    assert output.hsa.compute == 0.5
    # The engine's pipeline is the stock one again.
    assert torch.equal(engine.generate(request(compute=1.0)).latents, stock(tiny_model)[1])


def test_events_tell_the_story(engine):
    events = list(engine.stream(request(num_inference_steps=20, compute=0.4)))
    started, *steps, decoding, output = events
    assert isinstance(started, Started) and started.num_tokens == 3 * 3 * 4
    assert started.request.guidance_scale == DEFAULTS["Wan small"].guidance_scale
    assert isinstance(decoding, Decoding) and isinstance(output, hs.VideoOutput)
    assert all(isinstance(step, StepDone) for step in steps)
    assert [step.step for step in steps] == list(range(1, 21))
    assert [step.active for step in steps] == [record.active for record in output.report.steps]
    assert [step.sigma for step in steps] == sorted((step.sigma for step in steps), reverse=True)
    assert all(step.total == 36 and step.num_steps == 20 and step.seconds > 0 for step in steps)
    assert all(step.eta_seconds >= 0 for step in steps) and steps[-1].eta_seconds == 0
    stages = output.seconds
    assert stages["total"] == pytest.approx(sum(stages[s] for s in ("encode_text", "denoise", "decode")))
    assert decoding.seconds == stages["denoise"] > 0
    assert output.frames.shape == (9, 48, 64, 3)
    assert output.latents.shape == (1, 16, 3, 6, 8)


def test_steps_come_out_while_the_pipeline_runs(engine):
    stream = engine.stream(request(num_inference_steps=50))
    assert isinstance(next(stream), Started)
    first = next(stream)
    assert isinstance(first, StepDone)
    assert any(thread.name == "heterostep-engine" for thread in threading.enumerate())
    stream.close()
    assert not any(thread.name == "heterostep-engine" for thread in threading.enumerate())


@pytest.mark.parametrize("how", ["close", "drop", "exception"])
def test_an_abandoned_stream_stops_the_run(engine, how):
    decoded = []
    original = engine.pipeline.vae.decode
    engine.pipeline.vae.decode = lambda *args, **kwargs: decoded.append(1) or original(*args, **kwargs)
    try:
        stream = engine.stream(request(num_inference_steps=200))
        next(stream), next(stream)
        if how == "close":
            stream.close()
        elif how == "drop":
            del stream
            gc.collect()
        else:
            with pytest.raises(RuntimeError, match="mine"):
                stream.throw(RuntimeError("mine"))
    finally:
        del engine.pipeline.vae.decode
    assert not decoded
    assert engine.generate(request()).frames.shape[0] == 9


def test_a_stream_may_be_collected_by_its_own_worker(engine, monkeypatch):
    """The garbage collector runs in whatever thread makes the garbage that sets it off."""
    stream, started, closed = engine.stream(request()), threading.Event(), threading.Event()
    original = engine.pipeline.scheduler.step

    def step(*args, **kwargs):
        if not closed.is_set():
            assert started.wait(60)
            stream.close()
            closed.set()
        return original(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(engine.pipeline.scheduler, "step", step)
        assert isinstance(next(stream), Started)
        started.set()
        assert closed.wait(60)
    until(lambda: not engine._busy.locked(), 60)
    assert engine.generate(request()).frames.shape[0] == 9


def test_cancel_between_steps(engine):
    engine.cancel()  # nothing runs: no effect on the next request
    with pytest.raises(Cancelled, match=r"cancelled after step \d+ of 300"):
        for event in engine.stream(request(num_inference_steps=300)):
            if isinstance(event, StepDone) and event.step == 3:
                engine.cancel()
    assert isinstance(engine.generate(request()), hs.VideoOutput)


def test_one_video_at_a_time(engine):
    stream = engine.stream(request(num_inference_steps=100))
    next(stream)
    with pytest.raises(hs.RequestError, match="already"):
        engine.generate(request())
    stream.close()
    engine.generate(request())


def test_an_error_inside_the_pipeline_reaches_the_caller(engine):
    engine.pipeline.scheduler.step, original = None, engine.pipeline.scheduler.step
    try:
        with pytest.raises(TypeError):
            engine.generate(request(compute=0.5))
    finally:
        engine.pipeline.scheduler.step = original
    first = engine.generate(request(num_inference_steps=20, compute=0.5))
    assert torch.equal(first.latents, engine.generate(request(num_inference_steps=20, compute=0.5)).latents)


def test_seeds(engine):
    same = [engine.generate(request(seed=7)).frames for _ in range(2)]
    assert (same[0] == same[1]).all()
    assert (same[0] != engine.generate(request(seed=8)).frames).any()


def test_engine_without_hsa(tiny_model):
    engine = hs.Engine(hs.EngineConfig(model=str(tiny_model), hsa=None, device="cpu"))
    assert engine.generate(request()).report.compute == 1.0
    assert engine.generate(request(num_inference_steps=20, compute=0.5)).report.compute == pytest.approx(0.5, abs=0.02)


def test_dtypes(tiny_model):
    engine = hs.Engine(hs.EngineConfig(model=str(tiny_model), dtype="bfloat16", device="cpu"))
    assert engine.pipeline.transformer.patch_embedding.weight.dtype == torch.bfloat16
    assert engine.pipeline.vae.dtype == torch.float32
    assert engine.generate(request(compute=0.5, num_inference_steps=20)).frames.shape == (9, 48, 64, 3)


def test_record_and_comparison(engine):
    dense = engine.generate(request(num_inference_steps=20, compute=1.0))
    output = engine.generate(request(num_inference_steps=20, compute=0.5))
    quality = Quality()
    for pair in zip(output.frames, dense.frames, strict=True):
        quality.add(*pair)
    record = {**run_record(engine, output), "against_dense": compare(output, dense, quality)}
    record = json.loads(json.dumps(record, allow_nan=False))
    assert record["compute"] == pytest.approx(0.5, abs=0.02)
    assert {"load", "encode_text", "denoise", "decode", "total"} <= record["seconds"].keys()
    assert len(record["steps"]) == 20 and {"sigma", "active", "reason", "seconds"} <= record["steps"][3].keys()
    assert sum(record["evaluations"]["histogram"].values()) == math.prod(record["evaluations"]["grid"]) == 36
    assert record["versions"]["torch"] == torch.__version__
    assert record["request"]["seed"] == 3 and record["hsa"]["compute"] == 0.5
    assert record["request"]["compute"] == 0.5 and run_record(engine, dense)["hsa"] is None
    against = record["against_dense"]
    assert against["psnr"] > 10 and 0 < against["ssim"] <= 1 and against["speedup"] > 0
    assert quality.psnr == pytest.approx(psnr(output.frames, dense.frames))
    assert quality.ssim == pytest.approx(ssim(output.frames, dense.frames))
    same = Quality()
    same.add(dense.frames[0], dense.frames[0])
    assert compare(dense, dense, same)["psnr"] is None
    broken = dataclasses.replace(output, latents=output.latents * math.nan)
    assert compare(broken, dense, quality)["latents_relative_l2"] is None


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt": None}, "prompt is empty"),
        ({"negative_prompt": 3}, "must be a text"),
        ({"compute": 0}, "above 0 and at most 1"),
        ({"compute": 1.5}, "above 0 and at most 1"),
        ({"compute": math.nan}, "above 0 and at most 1"),
        ({"compute": "half"}, "above 0 and at most 1"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"num_frames": 0}, "at least 1"),
        ({"num_frames": 4.5}, "whole number"),
        ({"width": -16}, "from 1 to 16384"),
        ({"fps": True}, "whole number"),
        ({"guidance_scale": math.inf}, "finite"),
        ({"guidance_scale": 1e39}, "from 0 to 1000"),
        ({"guidance_scale_2": -1.0}, "from 0"),
        ({"fps": 10**11}, "from 1 to 1000"),
        ({"seed": -1}, "from 0"),
        ({"seed": 2**63}, "from 0"),
    ],
)
def test_requests_that_no_model_can_honour(changes, rule):
    with pytest.raises(hs.RequestError, match=rule):
        request(**changes)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"width": 17, "height": 13}, "nearest size is 16x16"),
        ({"width": 40, "height": 48}, "nearest size is 48x48"),
        ({"num_frames": 8}, "nearest is 9"),
        ({"num_frames": 2}, "nearest is 1"),
        ({"width": 2048}, "at most 64 along each axis"),
        ({"guidance_scale_2": 3.0}, "has one"),
    ],
)
def test_requests_that_this_model_cannot_honour(engine, changes, rule):
    with pytest.raises(hs.RequestError, match=rule):
        engine.stream(request(**changes))


def test_defaults_come_from_the_model(engine):
    resolved = resolve(hs.GenerateRequest(prompt=PROMPT, fps=5), engine.facts)
    defaults = DEFAULTS["Wan small"]
    assert resolved == dataclasses.replace(
        resolved,
        width=defaults.width,
        num_frames=defaults.num_frames,
        fps=5,
        guidance_scale=defaults.guidance_scale,
    )


def folder_of(tmp_path, transformer, vae=None, **index):
    for name, content in (
        ("model_index.json", {"_class_name": "WanPipeline", **index}),
        ("transformer/config.json", transformer),
        ("vae/config.json", vae or {}),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "vae", "index", "family", "gibibytes"),
    [
        ((12, 128, 30), {}, {}, "Wan 1.3B", 5.6),
        ((40, 128, 40), {}, {}, "Wan 14B", 25.0),
        (
            (40, 128, 40),
            {},
            {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875},
            "Wan 2.2 A14B",
            57.7,
        ),
        ((24, 128, 30), {"scale_factor_spatial": 16}, {"expand_timesteps": True}, "Wan 2.2 TI2V 5B", 9.4),
    ],
)
def test_published_models_are_known_by_their_configs(tmp_path, sizes, vae, index, family, gibibytes):
    heads, head_dim, layers = sizes
    transformer = {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "num_layers": layers,
        "patch_size": [1, 2, 2],
    }
    facts = read_facts(folder_of(tmp_path, transformer, vae, **index))
    assert facts.family == family
    resolved = resolve(hs.GenerateRequest(prompt=PROMPT), facts)  # the defaults fit the model
    tokens = math.prod(facts.grid(resolved.width, resolved.height, resolved.num_frames))
    assert facts.cache_bytes(tokens) / 2**30 == pytest.approx(gibibytes, abs=0.05)


@pytest.mark.parametrize(
    ("width", "transformer", "index", "family", "guidance"),
    [
        (40, {"in_channels": 36, "image_dim": 1280}, {}, "Wan 14B I2V", (5.0, None)),
        (12, {"in_channels": 36, "image_dim": 1280}, {}, "Wan 1.3B I2V", (5.0, None)),
        (40, {"in_channels": 36}, {"transformer_2": ["diffusers", "X"]}, "Wan 2.2 A14B I2V", (3.5, 3.5)),
        (24, {"in_channels": 16}, {"expand_timesteps": True}, "Wan 2.2 TI2V 5B", (5.0, None)),
    ],
)
def test_published_image_models_are_known_by_their_configs(tmp_path, width, transformer, index, family, guidance):
    sizes = {"num_attention_heads": width, "attention_head_dim": 128, "num_layers": 2, "patch_size": [1, 2, 2]}
    folder = folder_of(tmp_path, {**sizes, **transformer}, _class_name="WanImageToVideoPipeline", **index)
    facts = read_facts(folder)
    assert facts.family == family
    assert (facts.defaults.guidance_scale, facts.defaults.guidance_scale_2) == guidance
    assert facts.sees_image == ("image_dim" in transformer)
    assert facts.pipeline_for(True) == "WanImageToVideoPipeline"
    assert facts.pipeline_for(False) == ("WanPipeline" if facts.image == "optional" else "WanImageToVideoPipeline")


def test_configs_that_lack_something(tmp_path):
    with pytest.raises(hs.ConfigError, match="num_attention_heads"):
        read_facts(folder_of(tmp_path, {}))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"device": "tpu"}, "device must be"),
        ({"device": "mps"}, "device must be"),
        ({"device": "cuda:99"}, "does not exist"),
        ({"device": ""}, "device must be"),
        ({"model": ""}, "empty name"),
        ({"hsa": 0.5}, "an HSAConfig"),
    ],
)
def test_wrong_settings(tiny_model, changes, rule):
    with pytest.raises(hs.ConfigError, match=rule):
        hs.Engine(hs.EngineConfig(**{"model": str(tiny_model), **changes}))


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("truncated weights", "cannot be loaded"),
        ("truncated json", "model_index.json cannot be read"),
        ("no vae", "vae/config.json"),
        ("foreign", "FluxPipeline"),
        ("no index", "no model_index.json"),
        ("bad sizes", "cannot be loaded"),
        ("no weights", "cannot be loaded"),
        ("no text encoder", "has no folder text_encoder"),
        (
            "lacking a weight",
            r"transformer files are missing 1 of 69 tensors \(blocks.0.attn1.to_q.weight\); download or copy",
        ),
        (
            "lacking a text weight",
            r"text_encoder files are missing 1 of 23 tensors \(encoder.final_layer_norm.weight\)",
        ),
        ("lacking text embeddings", r"missing 2 of 23 tensors \(encoder.embed_tokens.weight, shared.weight\)"),
        ("lacking a VAE weight", r"vae files are missing 1 of \d+ tensors \(decoder.conv_in.weight\)"),
        ("lacking much", r"transformer files are missing \d+ of 69 tensors \(blocks.1.attn1.\S+, \S+, \S+, ...\)"),
        ("torn shards", r"transformer files are missing 1 of 69 tensors \(proj_out.weight\)"),
        ("zero patch", "patch_size to 0"),
        ("endless layers", "missing or invalid"),
        ("odd expert", "missing or invalid"),
        ("wrong channels", "its transformer takes 36 channels, but WanPipeline passes 16"),
    ],
)
def test_models_that_cannot_be_loaded(broken_models, name, rule):
    with pytest.raises(hs.ConfigError, match=rule) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hs.Engine(hs.EngineConfig(model=str(broken_models[name]), device="cpu"))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("keys", [("shared",), ("encoder.embed_tokens",), ("shared", "encoder.embed_tokens")])
def test_tied_embeddings_may_have_either_name(tiny_model, tmp_path, keys):
    """Of the text encoder's one table of embeddings every copy will do; and shards are a whole model too."""
    shutil.copytree(tiny_model, tmp_path / "model")
    weights = tmp_path / "model" / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    table = tensors.pop("shared.weight")
    save_file({**tensors, **{f"{key}.weight": table.clone() for key in keys}}, weights, metadata={"format": "pt"})
    shards = tmp_path / "model" / "transformer"
    whole = WanTransformer3DModel.from_pretrained(shards)
    (shards / "diffusion_pytorch_model.safetensors").unlink()
    whole.save_pretrained(shards, max_shard_size="100KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    pipe = hs.Engine(hs.EngineConfig(model=str(tmp_path / "model"), device="cpu")).pipeline
    assert torch.equal(pipe.text_encoder.encoder.embed_tokens.weight, table)
    assert torch.equal(pipe.transformer.proj_out.weight, whole.proj_out.weight)


@pytest.mark.parametrize("name", ["./absent", "absent", "/absent/folder", "a/b/c", "no.such/", "~/absent-model"])
def test_models_that_are_not_there(name):
    with pytest.raises(hs.ConfigError, match="neither 'demo', nor an existing folder"):
        read_facts(name)


@pytest.mark.parametrize("name", ["~nobody-of-this-name/model", "a" * 300])
def test_models_whose_name_no_folder_can_have(name):
    with pytest.raises(hs.ConfigError, match="cannot be used as a folder name"):
        read_facts(name)


def test_a_thread_that_cannot_start_leaves_the_engine_free(engine, monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            engine.generate(request())
    assert engine.generate(request(num_inference_steps=2, compute=1.0)).frames.dtype == np.uint8


def test_latents_that_are_not_finite_are_said_not_drawn(engine, monkeypatch):
    embeds = torch.full((1, 512, TEXT_WIDTH), torch.nan)
    with monkeypatch.context() as patched:
        patched.setattr(engine.pipeline, "encode_prompt", lambda *args, **kwargs: (embeds, embeds))
        with pytest.raises(hs.RequestError, match=r"transformer .*NaN or infinity\) in float32; use a lower"):
            engine.generate(request(num_inference_steps=2))
    assert engine.generate(request(num_inference_steps=2)).frames.dtype == np.uint8


def test_a_vae_whose_values_are_not_finite_makes_no_black_video(engine, tmp_path):
    bias = engine.pipeline.vae.decoder.conv_in.bias
    kept = bias.data.clone()
    preview = Preview(engine.pipeline, budget=10.0)
    try:
        bias.data.fill_(math.nan)
        for job in (None, hs.JobConfig(folder=tmp_path)):
            with pytest.raises(hs.RequestError, match=r"^the VAE produced .* in float32; its weights"):
                engine.generate(request(), job)
        assert preview.take() is None and preview.seconds > 0
    finally:
        preview.remove()
        bias.data.copy_(kept)
    # What was denoised is in the job; only the VAE works again.
    events = list(engine.stream(request(), hs.JobConfig(folder=tmp_path)))
    assert events[0].resumed_at == 6 and (events[-1].frames == engine.generate(request()).frames).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [(torch.float16, "bfloat16 or float32"), (torch.bfloat16, "--dtype float32"), (torch.float32, "damaged")],
)
def test_one_value_that_is_not_finite_is_found(dtype, bad, remedy):
    values = torch.zeros(2, 3, 5, dtype=dtype)
    check_finite(values, "it", dtype)
    values[1, 2, 0] = bad
    with pytest.raises(hs.RequestError, match=remedy):
        check_finite(values, "it", dtype)


@pytest.mark.parametrize(
    ("pipeline", "transformer", "vae", "rule"),
    [
        ("WanPipeline", {"_class_name": "WanVACETransformer3DModel"}, {}, "its transformer is a WanVACETransformer3D"),
        ("WanPipeline", {}, {"_class_name": "AutoencoderKLHunyuanVideo"}, "its vae is a AutoencoderKLHunyuanVideo"),
        ("WanPipeline", {"motion_dim": 5, "odd": True}, {}, "transformer sets motion_dim=5, odd=True, which WanTransf"),
        ("WanVACEPipeline", {}, {"_class_name": "AutoencoderKLHunyuanVideo"}, "its vae is a AutoencoderKLHunyuanVideo"),
        ("WanAnimatePipeline", {}, {}, "is a WanAnimatePipeline, but heterostep runs"),
        ("LTX2ConditionPipeline", {}, {}, "is a LTX2ConditionPipeline, but heterostep runs"),
    ],
)
def test_variants_that_are_not_supported_are_told_by_their_configs(tmp_path, capsys, pipeline, transformer, vae, rule):
    sizes = {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 2, "patch_size": [1, 2, 2]}
    folder = folder_of(tmp_path, {**sizes, **transformer}, vae, _class_name=pipeline)
    with pytest.raises(hs.ConfigError, match=rule):
        read_facts(folder)
    for command in (["info"], ["generate", "--prompt", "x"], ["serve", "--no-ray", "--data-dir", str(tmp_path / "d")]):
        assert main([*command, "--model", folder]) == 2
        said = capsys.readouterr().err
        assert rule in said and said.count("\n") == 1


def test_settings_that_are_off_may_be_unknown(tmp_path):
    sizes = {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 2, "patch_size": [1, 2, 2]}
    off = {"pos_embed_seq_len": None, "new": None, "newer": False, "_diffusers_version": "9.0", "_name_or_path": "x"}
    assert read_facts(folder_of(tmp_path, {**sizes, **off})).family == "Wan 1.3B"


@pytest.mark.parametrize("kind", ["unipc", "euler", "wan22"])
@pytest.mark.parametrize("policy", ["joint", "tokens", "groups", "steps"])
@pytest.mark.parametrize(("compute", "every"), [(0.5, None), (0.3, 2), (0.12, None), (0.05, 5)])
def test_a_rehearsal_says_what_the_run_would_say(tmp_path_factory, kind, policy, compute, every):
    """Refused without the model in the words of the planner, or not refused at all: the plan is the run's."""
    pipe = complete_pipeline(kind)
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    config = hs.EngineConfig(model=str(folder), device="cpu", hsa=hs.HSAConfig(policy=policy))
    wanted = request(num_inference_steps=10, compute=compute, num_frames=5)
    facts = read_facts(config.model)
    resolved = resolve(wanted, facts)
    said = attempt(lambda: rehearse(facts, allocation(config, resolved), resolved, every))
    engine = hs.Engine(config)
    job = None if every is None else hs.JobConfig(folder=folder / "job", checkpoint_every=every)
    assert said == attempt(lambda: engine.generate(wanted, job))


def attempt(make):
    """The sentence with which something is refused, None if it is not."""
    try:
        make()
    except hs.ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("settings", "acted"),
    [
        ({}, {"policy": "joint", "solver": "unipc", "forecast": "taylor", "correct": True, "max_age": 8}),
        ({"solver": "euler"}, {"solver": "euler", "forecast": "taylor", "correct": True, "profile": None}),
        ({"policy": "tokens", "max_age": 3}, {"profile": -0.5, "max_age": 3, "cooldown": 1, "kv_dtype": "float32"}),
        ({"policy": "groups"}, {"max_age": None, "kv_forecast": 0.0, "correct": False}),
        (
            {"policy": "tokens", "forecast": "hold", "kv_dtype": "bfloat16"},
            {"forecast": "hold", "kv_dtype": "bfloat16"},
        ),
    ],
)
def test_the_record_has_what_acted(tiny_model, settings, acted):
    hsa = hs.HSAConfig(compute=0.5, **settings)
    engine = hs.Engine(hs.EngineConfig(model=str(tiny_model), device="cpu", hsa=hsa))
    output = engine.generate(request(num_inference_steps=20))  # whose compute is the engine's
    record = json.loads(json.dumps(run_record(engine, output)))
    assert record["request"]["compute"] == 0.5 and output.request.compute is None
    assert acted.items() <= record["hsa"].items()
    assert record["hsa"]["warmup"] >= 1
    unset = {name for name, value in record["hsa"].items() if value is None}
    assert unset <= {"profile", "kv_dtype", "max_age", "quality"}
    more = record["acting"]
    assert more["degrees"] == {"cfg": 1, "ring": 1, "ulysses": 1} and more["kernel"] == "diffusers"
    assert more["guidance"] == [output.request.guidance_scale] and more["dtypes"]["vae"] == "float32"
    scheduler = "FlowMatchEulerDiscreteScheduler" if settings.get("solver") else "UniPCMultistepScheduler"
    assert more["scheduler"] == scheduler and more["policy"] == hsa.policy


def test_the_record_of_two_experts_has_the_guidance_of_each(tmp_path):
    complete_pipeline("wan22").save_pretrained(tmp_path)
    engine = hs.Engine(hs.EngineConfig(model=str(tmp_path), device="cpu"))
    record = run_record(engine, engine.generate(request(compute=1.0, guidance_scale=4.0)))
    assert record["acting"]["guidance"] == [4.0, 4.0] and record["request"]["guidance_scale_2"] == 4.0
    assert record["hsa"] is None and record["request"]["compute"] == 1.0 and record["acting"]["policy"] == "dense"
