"""Whole pipelines on a GPU against their CPU twins; skipped where there is none."""

import itertools

import pytest
import torch

import heterostep as hs
import tiny
import tiny_ltx2
from heterostep.engine.engine import StepDone
from heterostep.engine.facts import DEMO_MODEL
from heterostep.engine.record import psnr

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
KINDS = ("euler", "unipc", "wan22", "ti2v5b", "wan21 i2v", "ti2v5b i2v")


@pytest.fixture(autouse=True)
def exact():
    """Matrix products of float32 in float32: the CPU has no TF32."""
    torch.set_float32_matmul_precision("highest")
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


class FixedPlanner:
    """Random sets of several sizes, the same for every pipeline."""

    def plan(self, step, num_steps, sigma, num_tokens):
        size = [num_tokens, 11, 0, 20, num_tokens, 30, 7][step % 7]
        g = torch.Generator().manual_seed(step)
        return None if size == num_tokens else torch.randperm(num_tokens, generator=g)[:size]


def wan(kind, device="cuda", dtype=torch.float32):
    pipe = tiny.build(kind).to(device)
    for transformer in (pipe.transformer, pipe.transformer_2):
        if transformer is not None:
            transformer.to(dtype)
    return pipe


def video(pipe, **changes):
    # Of 512 text tokens where the model counts them from the end.
    length = 16 if pipe.transformer.config.image_dim is None else 512
    text = {name: t.to(pipe.device) for name, t in tiny.embeddings(length=length).items()}
    return tiny.generate(pipe, **{**text, **changes})


def sounding(pipe, **changes):
    text = {name: t.to(pipe.device) for name, t in tiny_ltx2.embeddings().items()}
    return tiny_ltx2.generate(pipe, **text, **changes)


def relative(a, b):
    return ((a.cpu() - b.cpu()).norm() / b.cpu().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_full_compute_is_the_stock_pipeline_bit_for_bit(kind, dtype):
    pipe = wan(kind, dtype=dtype)
    stock = video(pipe)
    assert torch.equal(video(pipe), stock)  # else nothing could be said
    hs.apply(pipe, hs.HSAConfig(compute=1.0))
    assert torch.equal(video(pipe), stock)
    hs.apply(pipe, hs.HSAConfig(compute=0.5))
    assert not torch.equal(video(pipe), stock)
    hs.remove(pipe)
    assert torch.equal(video(pipe), stock)


@pytest.mark.parametrize("kind", KINDS)
def test_partial_steps_are_those_of_the_cpu(kind):
    videos = []
    for device in ("cpu", "cuda"):
        pipe = wan(kind, device)
        hs.apply(pipe, hs.HSAConfig(kv_forecast=0.5), planner=FixedPlanner())
        videos.append(video(pipe, steps=14))
    assert relative(*videos) < 1e-4


@pytest.mark.parametrize("policy", ["joint", "tokens", "groups", "steps"])
def test_policies_meet_their_target_and_repeat_themselves(policy):
    pipe = wan("unipc", dtype=torch.bfloat16)
    session = hs.apply(pipe, hs.HSAConfig(compute=0.5, policy=policy))
    first = video(pipe, steps=20)
    assert first.isfinite().all()
    assert session.report.compute == pytest.approx(0.5, abs=0.025)
    assert torch.equal(video(pipe, steps=20), first)


def test_video_with_sound_is_that_of_the_cpu():
    made = []
    for device in ("cpu", "cuda"):
        pipe = tiny_ltx2.tiny_ltx2().to(device)
        stock = sounding(pipe)
        hs.apply(pipe, hs.HSAConfig(compute=1.0))
        assert all(torch.equal(a, b) for a, b in zip(sounding(pipe), stock, strict=True))
        hs.apply(pipe, planner=FixedPlanner())
        made.append(sounding(pipe, steps=14))
    for ours, theirs in zip(*made, strict=True):
        assert relative(ours, theirs) < 1e-4


def test_compiled_blocks_compute_the_same():
    pipe = wan("euler")
    hs.apply(pipe, planner=FixedPlanner())
    want = video(pipe)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True)
    assert relative(video(pipe), want) < 1e-4


@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_group_offload"])
def test_offloaded_models_compute_the_same(offload):
    pipe = wan("euler")
    hs.apply(pipe, planner=FixedPlanner())
    want = video(pipe)
    pipe = tiny.build("euler")
    if offload == "enable_group_offload":
        pipe.transformer.enable_group_offload(
            onload_device=torch.device("cuda"), offload_type="block_level", num_blocks_per_group=1, use_stream=True
        )
        pipe.vae.to("cuda")
    else:
        pipe.enable_model_cpu_offload()
    hs.apply(pipe, planner=FixedPlanner())
    text = {name: t.to("cuda") for name, t in tiny.embeddings().items()}
    assert torch.equal(tiny.generate(pipe, **text), want)


REQUEST = hs.GenerateRequest(prompt="a red disc moves right", seed=3, num_inference_steps=20, compute=0.5)


def make_engine(device):
    return hs.Engine(hs.EngineConfig(device=device, hsa=hs.HSAConfig(policy="tokens")))


@pytest.fixture(scope="module")
def engine():
    if not (DEMO_MODEL / "model_index.json").is_file():
        pytest.skip("no demo model in this checkout")
    return make_engine("cuda")


def test_engine_makes_the_video_of_the_cpu(engine):
    ours = engine.generate(REQUEST)
    theirs = make_engine("cpu").generate(REQUEST)
    assert psnr(ours.frames, theirs.frames) > 35
    assert ours.report.compute == pytest.approx(0.5, abs=0.02)


def test_resumed_job_has_the_bits_of_an_unbroken_one(engine, tmp_path):
    want = engine.generate(REQUEST, hs.JobConfig(folder=tmp_path / "whole", checkpoint_every=5))
    job = hs.JobConfig(folder=tmp_path / "broken", checkpoint_every=5)
    stream = engine.stream(REQUEST, job)
    steps = (event for event in stream if isinstance(event, StepDone))
    assert len(list(itertools.islice(steps, 8))) == 8
    stream.close()
    assert torch.equal(engine.generate(REQUEST, job).latents, want.latents)
