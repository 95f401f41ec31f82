"""Jobs of the engine: broken off, gone on with, finished, and everything that can be wrong with their folder."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import re
import resource
import shutil
import signal

import pytest
import torch

import heterostep as hs
from folders import complete_pipeline
from heterostep.engine.checkpoint import differences, identity_of
from heterostep.engine.decoding import find_finished
from heterostep.engine.denoise import inputs
from heterostep.engine.engine import Decoding, Started, StepDone
from heterostep.engine.record import run_record
from heterostep.engine.request import VideoOutput, resolve
from heterostep.errors import Cancelled, Interrupted

STEPS = 12


@pytest.fixture(scope="module")
def engine(tiny_model):
    return hs.Engine(hs.EngineConfig(model=str(tiny_model), device="cpu"))


def request(**changes):
    values = {"prompt": "a red disc", "width": 64, "height": 48, "num_frames": 9, "seed": 3, "compute": 0.6}
    return hs.GenerateRequest(**{**values, "num_inference_steps": STEPS, **changes})


def job(folder, **changes):
    return hs.JobConfig(**{"folder": folder, "checkpoint_every": 4, **changes})


@pytest.fixture(scope="module")
def unbroken(engine):
    """The video, made without a job."""
    return engine.generate(request())


class Crash(BaseException):
    """What breaks a run off in the middle of a step, with no chance to save anything."""


@contextlib.contextmanager
def during(engine, step, do):
    """Do something in the middle of a step, in the pipeline's own thread."""
    scheduler = engine.pipeline.scheduler

    def wrapped(*arguments, **options):
        if (scheduler.step_index or 0) == step:
            do()
        return type(scheduler).step(scheduler, *arguments, **options)

    scheduler.step = wrapped
    try:
        yield
    finally:
        del scheduler.step


def crash(engine, folder, step, asked=None, **changes):
    """Work on a job until its step `step`, and lose that."""

    def lose():
        raise Crash

    with during(engine, step, lose), pytest.raises(Crash):
        engine.generate(asked or request(), job(folder, **changes))


def interrupt(engine, folder, step, asked=None, **changes):
    """Work on a job until its step `step` is done, and stop as a signal would; returns what was raised."""
    with during(engine, step, engine.save_and_stop), pytest.raises(Interrupted) as caught:
        engine.generate(asked or request(), job(folder, **changes))
    return caught.value


def events_of(engine, folder, asked=None, **changes):
    return list(engine.stream(asked or request(), job(folder, **changes)))


def lines(folder):
    return [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()]


def names(folder):
    """The names in a job's folder, without the hashes."""
    found = (path.name for path in folder.iterdir() if path.name != ".lock")
    return sorted(re.sub(r"-[0-9a-f]{8}\.", ".", name) for name in found)


def same(output, want):
    def plain(report):
        return [dataclasses.replace(step, seconds=0.0) for step in report.steps], report.compute

    assert torch.equal(output.latents, want.latents)
    assert (output.frames == want.frames).all()
    assert torch.equal(output.report.evaluations, want.report.evaluations)
    assert plain(output.report) == plain(want.report)
    assert (output.fps, output.hsa, output.request) == (want.fps, want.hsa, want.request)


def test_a_job_that_is_not_broken_off(engine, unbroken, tmp_path):
    started, *steps, decoding, output = events_of(engine, tmp_path / "made" / "for it")
    assert isinstance(started, Started) and started.resumed_at is None and isinstance(decoding, Decoding)
    assert [step.step for step in steps] == list(range(1, STEPS + 1))
    same(output, unbroken)
    seconds = output.seconds
    assert seconds["checkpoint"] > 0
    assert seconds["total"] == pytest.approx(sum(value for stage, value in seconds.items() if stage != "total"))
    assert names(tmp_path / "made" / "for it") == [
        "frames.json",
        "frames.safetensors",
        "progress.jsonl",
        "result.json",
        "result.safetensors",
    ]


def test_a_crash_costs_the_steps_since_the_checkpoint(engine, unbroken, tmp_path):
    crash(engine, tmp_path, 9)
    kept = [f"checkpoint-00000{step}.{end}" for step in (4, 8) for end in ("json", "safetensors")]
    assert names(tmp_path) == [*kept, "progress.jsonl"]
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 10))
    started, *steps, _, output = events_of(engine, tmp_path)
    assert started.resumed_at == 8
    assert [step.step for step in steps] == [9, 10, 11, 12]
    assert all(step.eta_seconds >= 0 for step in steps) and steps[-1].eta_seconds == 0
    same(output, unbroken)
    assert output.seconds["denoise"] >= sum(step.seconds for step in output.report.steps[:8])  # before the crash too


def test_progress_is_one_line_a_step(engine, tmp_path):
    crash(engine, tmp_path, 7)
    with open(tmp_path / "progress.jsonl", "a") as file:
        file.write('{"step": 8, "num_st')  # torn by the crash
    events_of(engine, tmp_path)
    found = lines(tmp_path)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    assert [line["time"] for line in found] == sorted(line["time"] for line in found)
    assert [line["sigma"] for line in found] == sorted((line["sigma"] for line in found), reverse=True)
    assert {line["num_steps"] for line in found} == {STEPS} and found[0]["active"] == 1.0
    assert all(line["eta_seconds"] >= 0 and line["seconds"] > 0 for line in found)


@pytest.mark.parametrize("step", [0, 3, 5, STEPS - 1])
def test_save_and_stop(engine, unbroken, tmp_path, step):
    said = interrupt(engine, tmp_path, step)
    assert f"stopped after step {step + 1} of 12; step {step + 1} is saved in" in str(said)
    assert said.step == step + 1 and "\n" not in str(said)
    started, *_, output = events_of(engine, tmp_path)
    assert started.resumed_at == step + 1
    same(output, unbroken)


def test_stop_when_saved_keeps_the_plan(engine, unbroken, tmp_path):
    with during(engine, 4, engine.stop_when_saved), pytest.raises(Interrupted, match="step 8 is saved") as caught:
        engine.generate(request(), job(tmp_path))
    assert caught.value.step == 8
    with during(engine, 8, engine.stop_when_saved):  # the next such step is the last one
        started, *_, output = events_of(engine, tmp_path)
    assert started.resumed_at == 8
    same(output, unbroken)


def test_an_abandoned_stream_is_saved_a_cancelled_run_is_not(engine, unbroken, tmp_path):
    stream = engine.stream(request(), job(tmp_path))
    for event in stream:
        if isinstance(event, StepDone) and event.step == 5:
            break
    stream.close()
    started = next(stream := engine.stream(request(), job(tmp_path)))
    assert started.resumed_at >= 5
    stream.close()
    shutil.rmtree(tmp_path)
    with during(engine, 5, engine.cancel), pytest.raises(Cancelled, match="cancelled after step 6 of 12") as caught:
        engine.generate(request(), job(tmp_path))
    assert not isinstance(caught.value, Interrupted)
    started, *_, output = events_of(engine, tmp_path)
    assert started.resumed_at == 4
    same(output, unbroken)


def test_save_and_stop_without_a_job_is_cancel(engine):
    engine.save_and_stop()  # nothing runs: no effect on the next request
    with during(engine, 2, engine.save_and_stop), pytest.raises(Cancelled, match="after step 3 of 12") as caught:
        engine.generate(request())
    assert not isinstance(caught.value, Interrupted)


def test_stopped_before_the_first_step_and_while_passing_over(engine, tmp_path, monkeypatch):
    stock = inputs.encode_prompts

    def encode(*arguments):
        engine.save_and_stop()
        return stock(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr("heterostep.engine.engine.encode_prompts", encode)
        with pytest.raises(Interrupted, match="stopped after step 0 of 12; no step is saved") as caught:
            events_of(engine, tmp_path)
    assert caught.value.step == 0
    crash(engine, tmp_path, 9)
    said = interrupt(engine, tmp_path, 2)
    assert said.step == 8 and "stopped after step 8 of 12; step 8 is saved" in str(said)
    assert events_of(engine, tmp_path)[0].resumed_at == 8


def test_a_finished_job_is_found_not_made(engine, tiny_model, tmp_path, monkeypatch):
    want = engine.generate(request(), job(tmp_path))
    asked, config = request(), hs.EngineConfig(model=str(tiny_model), device="cpu")
    record = run_record(engine, want)

    def refuse(*_, **__):
        raise AssertionError("something was computed")

    monkeypatch.setattr("heterostep.engine.engine.encode_prompts", refuse)
    monkeypatch.setattr(engine, "_denoise", refuse)
    started, output = events_of(engine, tmp_path)
    assert started.resumed_at == STEPS
    same(output, want)
    assert output.seconds == want.seconds
    monkeypatch.setattr("heterostep.engine.engine.load_pipeline", refuse)  # found without the model, too
    found = find_finished(config, asked, job(tmp_path))
    same(VideoOutput.of(found.video, found.frames.array()), want)
    assert found.record == json.loads(json.dumps(record))
    assert find_finished(config, asked, job(tmp_path, resume="never")) is None


def test_a_video_lost_in_decoding_is_not_denoised_again(engine, unbroken, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(engine.pipeline.vae.decoder, "forward", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            events_of(engine, tmp_path)
    calls = []
    handle = engine.pipeline.transformer.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    started, decoding, output = events_of(engine, tmp_path)
    handle.remove()
    assert started.resumed_at == STEPS and isinstance(decoding, Decoding) and not calls
    same(output, unbroken)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("euler", {}),
        ("wan22", {"guidance_scale": 4.0, "guidance_scale_2": 3.0}),
        ("ti2v5b", {"num_frames": 5}),
        ("dpm++", {"compute": 1.0}),
        ("unipc", {"compute": 1.0, "guidance_scale": 1.0}),
    ],
)
def test_models_dense_and_not(tmp_path, kind, changes):
    complete_pipeline(kind).save_pretrained(tmp_path / "model")
    engine, asked = hs.Engine(hs.EngineConfig(model=str(tmp_path / "model"), device="cpu")), request(**changes)
    want = engine.generate(asked)
    crash(engine, tmp_path / "job", 3, asked, checkpoint_every=1)
    interrupt(engine, tmp_path / "job", 5, asked)
    started, *_, output = events_of(engine, tmp_path / "job", asked)
    assert started.resumed_at == 6
    assert torch.equal(output.latents, want.latents) and (output.frames == want.frames).all()
    assert torch.equal(output.report.evaluations, want.report.evaluations)
    assert output.report.compute == want.report.compute and output.hsa == want.hsa
    # The pipeline is the stock one again.
    assert torch.equal(engine.generate(asked).latents, want.latents)


def test_partial_steps(tiny_model, tmp_path):
    config = hs.HSAConfig(compute=0.6, policy="tokens")
    engine = hs.Engine(hs.EngineConfig(model=str(tiny_model), device="cpu", hsa=config))
    asked = request(compute=None, num_inference_steps=20)
    want = engine.generate(asked, job(tmp_path / "a"))
    crash(engine, tmp_path / "b", 10, asked)
    *_, output = events_of(engine, tmp_path / "b", asked)
    same(output, want)
    assert "checkpoint" in {step.reason for step in output.report.steps}
    with pytest.raises(hs.ConfigError, match="a larger checkpoint_every than 1"):
        events_of(engine, tmp_path / "c", asked, checkpoint_every=1)


def damage(folder, step):
    (tensors,) = folder.glob(f"checkpoint-{step:06d}-*.safetensors")
    data = bytearray(tensors.read_bytes())
    data[len(data) // 2] ^= 4
    tensors.write_bytes(data)


def test_a_damaged_checkpoint_costs_steps_not_the_job(engine, unbroken, tmp_path, caplog):
    crash(engine, tmp_path, 9)
    shutil.copytree(tmp_path, tmp_path / "copy")
    damage(tmp_path, 8)
    started, *_, output = events_of(engine, tmp_path)
    assert started.resumed_at == 4
    same(output, unbroken)
    assert len(caplog.messages) == 1 and "checkpoint-000008" in caplog.messages[0]
    damage(tmp_path / "copy", 8)
    (tmp_path / "copy" / "checkpoint-000004.json").write_bytes(b"")
    started, *_, output = events_of(engine, tmp_path / "copy")
    assert started.resumed_at is None
    same(output, unbroken)


def test_a_damaged_result_is_made_again(engine, unbroken, tmp_path, caplog):
    events_of(engine, tmp_path)
    manifest = tmp_path / "result.json"
    manifest.write_text(manifest.read_text().replace("0.6", "0.7"))
    started, *_, output = events_of(engine, tmp_path)
    assert started.resumed_at is None and "result in job folder" in caplog.messages[0]
    same(output, unbroken)


def test_a_result_without_its_frames_is_decoded_again(engine, unbroken, tmp_path, caplog):
    events_of(engine, tmp_path)
    (frames,) = tmp_path.glob("frames-*.safetensors")
    content = bytearray(frames.read_bytes())
    content[-1] ^= 1
    frames.write_bytes(content)
    started, decoding, output = events_of(engine, tmp_path)
    assert started.resumed_at == STEPS and isinstance(decoding, Decoding)
    assert "frames in job folder" in caplog.messages[0] and "altered" in caplog.messages[0]
    same(output, unbroken)
    assert len(events_of(engine, tmp_path)) == 2  # found again


def test_a_full_disk_leaves_the_latents_of_a_result_without_its_frames(engine, unbroken, tmp_path, monkeypatch):
    events_of(engine, tmp_path)
    (frames,) = tmp_path.glob("frames-*.safetensors")
    frames.unlink()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("heterostep.engine.job.write_frames", full)
        same(events_of(engine, tmp_path)[-1], unbroken)
    started, decoding, output = events_of(engine, tmp_path)
    assert started.resumed_at == STEPS and isinstance(decoding, Decoding)
    same(output, unbroken)


@pytest.mark.parametrize("state", ["broken off", "finished"])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 4}, r"seed \(3, now 4\)"),
        ({"prompt": "a blue disc"}, r"prompt \('a red disc', now 'a blue disc'\)"),
        ({"compute": 0.75}, r"compute \(0.6, now 0.75\)"),
        ({"compute": 1.0, "width": 48}, r"compute \(0.6, now 1.0\), width \(64, now 48\)"),
        ({"num_inference_steps": 13}, "num_inference_steps"),
    ],
)
def test_another_job_is_refused(engine, tmp_path, changes, says, state):
    crash(engine, tmp_path, 5) if state == "broken off" else engine.generate(request(), job(tmp_path))
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(hs.ConfigError, match=says) as caught:
        events_of(engine, tmp_path, request(**changes))
    assert "--resume never" in str(caught.value) and "--job-dir" in str(caught.value)
    with pytest.raises(hs.ConfigError, match=says):
        find_finished(engine.config, request(**changes), job(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    started, *_, output = events_of(engine, tmp_path, request(**changes), resume="never")
    assert started.resumed_at is None
    assert torch.equal(output.latents, engine.generate(request(**changes)).latents)
    assert len(lines(tmp_path)) == output.request.num_inference_steps


def test_never_forgets_what_is_there_even_if_broken_off_at_once(engine, tmp_path):
    crash(engine, tmp_path, 9)
    crash(engine, tmp_path, 1, resume="never")
    assert events_of(engine, tmp_path)[0].resumed_at is None


def test_other_weights_are_another_job(tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    engine = hs.Engine(hs.EngineConfig(model=str(model), device="cpu"))
    crash(engine, tmp_path / "job", 5)
    with torch.no_grad():  # as a LoRA that is fused would
        engine.pipeline.transformer.blocks[1].ffn.net[2].weight.add_(0.01)
    with pytest.raises(hs.ConfigError, match="differs in the weights in memory"):
        events_of(engine, tmp_path / "job")
    engine.pipeline.save_pretrained(model)
    with pytest.raises(hs.ConfigError, match="the model's files, the weights in memory"):
        events_of(hs.Engine(hs.EngineConfig(model=str(model), device="cpu")), tmp_path / "job")


def with_lora(folder):
    """An engine whose transformer has a LoRA, the same each time."""
    made = hs.Engine(hs.EngineConfig(model=str(folder), device="cpu"))
    generator, state = torch.Generator().manual_seed(1), {}
    for key, layer in made.pipeline.transformer.named_modules():
        if isinstance(layer, torch.nn.Linear) and key.endswith("to_q"):
            for part, shape in (("A", (2, layer.in_features)), ("B", (layer.out_features, 2))):
                name = f"transformer.{key}.lora_{part}.weight"
                state[name] = 0.3 * torch.randn(shape, generator=generator)
    made.pipeline.load_lora_weights(state, adapter_name="style")
    return made


@pytest.mark.parametrize("state", ["broken off", "finished"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda pipe: pipe.set_adapters("style", 0.2), "adapters"),
        (lambda pipe: pipe.disable_lora(), "adapters"),
        (lambda pipe: pipe.fuse_lora(), "adapters .*the weights in memory"),
        (lambda pipe: pipe.vae.decoder.conv_out.weight.data.mul_(0.5), "the weights of the vae"),
        (lambda pipe: pipe.text_encoder.shared.weight.data.mul_(0.5), "the weights of the text_encoder"),
        (lambda pipe: pipe.vae.register_to_config(latents_std=[2.0] * 16), "settings of the pipeline's parts"),
        (lambda pipe: pipe.vae.enable_tiling(), "settings of the pipeline's parts"),
        (lambda pipe: pipe.scheduler.register_to_config(flow_shift=9.0), "the pipeline's scheduler"),
    ],
)
def test_a_changed_pipeline_makes_another_job(tiny_model, tmp_path, change, says, state):
    engine = with_lora(tiny_model)
    crash(engine, tmp_path, 5) if state == "broken off" else engine.generate(request(), job(tmp_path))
    # The same work in another process goes on, or is done.
    again = with_lora(tiny_model)
    assert (
        differences(
            *(identity_of(e.facts, resolve(request(), e.facts), None, e.dtype, e.pipeline) for e in (engine, again))
        )
        == []
    )
    change(again.pipeline)
    if state == "broken off" and says == "the weights of the vae":  # what was denoised is decoded by the VAE of now
        assert again.generate(request(), job(tmp_path)).frames.shape == engine.generate(request()).frames.shape
        return
    with pytest.raises(hs.ConfigError, match=rf"differs in (the |its )?.*{says}"):
        again.generate(request(), job(tmp_path))


def test_a_job_with_a_lora_is_not_that_of_the_model_alone(tiny_model, tmp_path):
    engine = with_lora(tiny_model)
    engine.generate(request(), job(tmp_path))
    with pytest.raises(hs.ConfigError, match="its adapters"):
        find_finished(engine.config, request(), job(tmp_path))  # as the command line does, before it loads the model


def test_a_job_of_an_older_version_goes_on(engine, unbroken, tmp_path, monkeypatch):
    def older(*args):
        known = identity_of(*args)
        del known["versions"]
        if known["pipeline"] is not None:
            known["pipeline"] = {name: known["pipeline"].get(name) for name in ("scheduler", "weights")}
        return known

    with monkeypatch.context() as patched:
        patched.setattr("heterostep.engine.engine.identity_of", older)
        crash(engine, tmp_path, 9)
    started, *_, output = events_of(engine, tmp_path)
    assert started.resumed_at
    same(output, unbroken)


def test_what_a_job_is(engine, tiny_model, tmp_path):
    def identity(model=tiny_model, pipeline=None, dtype=torch.float32, **changes):
        facts = dataclasses.replace(engine.facts, location=str(model))
        return json.loads(json.dumps(identity_of(facts, resolve(request(**changes), facts), None, dtype, pipeline)))

    now = identity(pipeline=engine.pipeline)
    shutil.copytree(tiny_model, tmp_path / "elsewhere")
    assert identity(tmp_path / "elsewhere", engine.pipeline) == now
    assert differences(now, identity()) == differences(identity(), now) == []  # unknown is not different
    assert differences(now, identity(pipeline=engine.pipeline, dtype=torch.float16)) == [
        "dtype ('float32', now 'float16')"
    ]
    pipe = complete_pipeline("euler")
    assert differences(now, identity(pipeline=pipe)) == ["the pipeline's scheduler"]
    weights = tmp_path / "elsewhere" / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert differences(now, identity(tmp_path / "elsewhere", engine.pipeline)) == ["the model's files"]
    pipe.transformer.to("meta")  # offloaded or sharded: what is in memory is not known
    assert identity(pipeline=pipe)["pipeline"]["weights"] is None


def test_a_folder_is_used_by_one_run(engine, unbroken, tiny_model, tmp_path):
    other = hs.Engine(hs.EngineConfig(model=str(tiny_model), device="cpu"))
    stream = engine.stream(request(num_inference_steps=200), job(tmp_path))
    next(stream)
    with pytest.raises(hs.ConfigError, match="in use by another run"):
        other.generate(request(), job(tmp_path))
    with pytest.raises(hs.ConfigError, match="in use by another run"):
        find_finished(engine.config, request(), job(tmp_path))
    stream.close()
    same(other.generate(request(), job(tmp_path, resume="never")), unbroken)


def test_a_file_system_without_locks_is_said(engine, unbroken, tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    same(engine.generate(request(), job(tmp_path)), unbroken)
    assert "has no locks" in caplog.messages[0]


def test_folders_that_cannot_be_used(engine, tmp_path):
    (tmp_path / "file").write_text("")
    for folder, says in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "x", "Not a directory")):
        with pytest.raises(hs.ConfigError, match=rf"cannot be used \({says}\)"):
            engine.generate(request(), job(folder))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"folder": ""}, "must be a path"),
        ({"folder": None}, "must be a path"),
        ({"checkpoint_every": 0}, "at least 1, not 0"),
        ({"checkpoint_every": True}, "at least 1, not True"),
        ({"checkpoint_every": 2.5}, "at least 1, not 2.5"),
        ({"resume": "always"}, "one of auto, never, not 'always'"),
    ],
)
def test_wrong_settings(changes, says):
    with pytest.raises(hs.ConfigError, match=says):
        job(**{"folder": "x", **changes})


@pytest.fixture
def limit():
    """Set the greatest size of a file: beyond it writes fail, as they do on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_does_not_end_the_run(engine, unbroken, tmp_path, limit, caplog):
    limit(2000)
    *_, output = events_of(engine, tmp_path)
    limit(resource.RLIM_INFINITY)
    same(output, unbroken)
    said = [message for message in caplog.messages if "File too large" in message]
    assert any("checkpoint of step 4 could not be written" in message for message in said)
    assert any("result could not be kept" in message for message in said)
    assert names(tmp_path) == ["progress.jsonl"]


def test_progress_that_cannot_be_written_is_said_once(engine, unbroken, tmp_path, limit, caplog):
    limit(300)
    *_, output = events_of(engine, tmp_path)
    limit(resource.RLIM_INFINITY)
    same(output, unbroken)
    assert sum("progress.jsonl" in message for message in caplog.messages) == 1


def test_a_disk_that_fills_up_leaves_the_older_checkpoint(engine, unbroken, tmp_path, limit):
    def fill_up():
        limit(2000)
        engine.save_and_stop()

    with during(engine, 5, fill_up), pytest.raises(Interrupted, match="after step 6 of 12; step 4 is saved") as found:
        engine.generate(request(), job(tmp_path))
    assert found.value.step == 4
    limit(resource.RLIM_INFINITY)
    started, *_, output = events_of(engine, tmp_path)
    assert started.resumed_at == 4
    same(output, unbroken)
