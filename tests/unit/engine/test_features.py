"""What users have on their pipelines works with HSA: each feature with each family, against the stock pipeline.

A test here is a cell of the table in docs/models.md.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

import feature_table
import heterostep as hs
from tiny import FAMILIES, build, generate, lora_weights, tiny_scheduler

STEPS, COMPUTE = 4, 0.6
SMALL = {"height": 32, "width": 48, "num_frames": 5, "steps": STEPS}  # 2 x 2 x 3 tokens


def feature(name):
    """A row of the table: the test runs with each family."""
    return lambda test: pytest.mark.feature(name)(pytest.mark.parametrize("family", FAMILIES)(test))


def make(family, **transformer):
    return build(FAMILIES[family], **transformer)


def models(pipe):
    return [model for model in (pipe.transformer, pipe.transformer_2) if model is not None]


def names(pipe):
    return [name for name in ("transformer", "transformer_2") if getattr(pipe, name) is not None]


def run(pipe, **changes):
    return generate(pipe, **{**SMALL, **changes})


def partial(pipe, compute=COMPUTE, **changes):
    """A run that leaves out tokens; it meets its target."""
    session = hs.apply(pipe, hs.HSAConfig(compute=compute, policy="tokens"))
    latents = run(pipe, **changes)
    assert abs(session.report.compute - compute) <= 0.02
    assert any(0 < record.active < record.total for record in session.report.steps)
    assert torch.isfinite(latents).all()
    hs.remove(pipe)
    return latents


def dense_is_stock(pipe, **changes):
    """With all tokens active the pipeline is what it is without HSA, which it is again afterwards."""
    stock = run(pipe, **changes)
    hs.apply(pipe, hs.HSAConfig(compute=1.0))
    assert torch.equal(run(pipe, **changes), stock)
    hs.remove(pipe)
    return stock


def near(a, b, tolerance=1e-5):
    return ((a - b).norm() / b.norm()).item() < tolerance


@feature("compute 1 is the stock pipeline, bit for bit")
def test_dense(family):
    pipe = make(family)
    stock = dense_is_stock(pipe)
    assert not near(partial(pipe), stock)
    assert torch.equal(run(pipe), stock)


@feature("scheduler FlowMatchEuler")
def test_euler(family):
    _with_scheduler(family, "euler", FlowMatchEulerDiscreteScheduler)


@feature("scheduler UniPC")
def test_unipc(family):
    _with_scheduler(family, "unipc", UniPCMultistepScheduler)


@feature("scheduler DPM++")
def test_dpm(family):
    _with_scheduler(family, "dpm++", DPMSolverMultistepScheduler)


def _with_scheduler(family, kind, cls):
    pipe = make(family)
    pipe.scheduler = tiny_scheduler(kind)
    assert type(pipe.scheduler) is cls
    stock = dense_is_stock(pipe)
    assert not near(partial(pipe), stock)


@feature("several prompts")
def test_batches(family):
    pipe = make(family)
    dense_is_stock(pipe, prompts=2)
    both = partial(pipe, prompts=2)
    assert both.shape[0] == 2 and not near(both[0], both[1])


@feature("num_videos_per_prompt")
def test_several_videos(family):
    pipe = make(family)
    dense_is_stock(pipe, num_videos_per_prompt=2)
    both = partial(pipe, num_videos_per_prompt=2)
    assert both.shape[0] == 2 and not near(both[0], both[1])


@feature("callback_on_step_end")
def test_callbacks(family):
    pipe, seen = make(family), []

    def callback(pipe, step, timestep, tensors):
        seen.append(step)
        return {"latents": tensors["latents"] * 1.01}

    changed = dense_is_stock(pipe, callback_on_step_end=callback)
    partial(pipe, callback_on_step_end=callback)
    assert seen == [*range(STEPS)] * 3
    assert not near(changed, run(pipe), 1e-3)


@feature("prompts changed by a callback")
def test_changed_prompts(family):
    pipe, names = make(family), ["prompt_embeds", "negative_prompt_embeds"]

    def callback(pipe, step, timestep, tensors):
        return {name: -tensors[name] for name in names} if step == 1 else {}

    arguments = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
    changed = dense_is_stock(pipe, **arguments)
    assert not near(changed, run(pipe), 1e-3)
    session = hs.apply(pipe, hs.HSAConfig(compute=COMPUTE, policy="tokens"))
    assert torch.isfinite(run(pipe, **arguments)).all()
    assert session.report.steps[2].active == session.report.steps[2].total


@feature("LoRA: load, fuse, unfuse, unload")
def test_lora(family):
    pytest.importorskip("peft", reason="the extra 'dev' is not installed")
    pipe = make(family)
    before = partial(pipe)
    for name in names(pipe):
        state = lora_weights(getattr(pipe, name))
        pipe.load_lora_weights(state, adapter_name=name, load_into_transformer_2=name == "transformer_2")
    stock = dense_is_stock(pipe)
    loaded = partial(pipe)
    assert not near(loaded, before, 1e-3)
    pipe.fuse_lora(components=names(pipe))
    assert near(dense_is_stock(pipe), stock, 1e-4) and near(partial(pipe), loaded, 1e-4)
    pipe.unfuse_lora(components=names(pipe))
    assert near(partial(pipe), loaded, 1e-4)
    pipe.unload_lora_weights()
    assert near(partial(pipe), before, 1e-4)


@feature("fuse_qkv_projections")
def test_fused_projections(family):
    pipe = make(family)
    before = partial(pipe)
    for model in models(pipe):
        model.fuse_qkv_projections()
    dense_is_stock(pipe)
    assert near(partial(pipe), before)
    for model in models(pipe):
        model.unfuse_qkv_projections()
    assert near(partial(pipe), before)


@feature("group offload")
def test_group_offload(family):
    pipe = make(family)
    before = partial(pipe)
    for model in models(pipe):
        cpu = torch.device("cpu")
        model.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
    dense_is_stock(pipe)
    assert torch.equal(partial(pipe), before)


@feature("model offload")
def test_model_offload(family):
    pipe = make(family)
    before = partial(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    dense_is_stock(pipe)
    assert torch.equal(partial(pipe), before)


@feature("layerwise casting, fp8 storage")
def test_layerwise_casting(family):
    pipe = make(family)
    before = partial(pipe)
    for model in models(pipe):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    dense_is_stock(pipe)
    assert models(pipe)[0].blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    assert not torch.equal(partial(pipe), before)


# No row of the table: where torchao is installed, every process that imports transformers imports it too, for seconds.
@pytest.mark.parametrize("family", FAMILIES)
def test_quantization(family):
    reason = "torchao is not installed, and no part of the extra 'dev'"
    quantization = pytest.importorskip("torchao.quantization", reason=reason)
    pipe = make(family)
    before = partial(pipe)
    for model in models(pipe):
        quantization.quantize_(model.blocks, quantization.Int8WeightOnlyConfig())
    dense_is_stock(pipe)
    quantized = partial(pipe)
    assert not torch.equal(quantized, before) and near(quantized, before, 0.2)


class Fixed:
    """A planner: all tokens at the first step, then 8, 5 and 7 of the 12."""

    def plan(self, step, num_steps, sigma, num_tokens):
        return torch.arange(num_tokens)[: (None, 8, 5, 7)[step]]


# Not each family: to trace a block takes seconds, and these two have all kinds of them.
@pytest.mark.feature("compile_repeated_blocks")
@pytest.mark.parametrize("family", ["Wan 2.1 T2V", "Wan 2.1 I2V"])
def test_compiled_blocks(family):
    pipe = make(family, layers=9)  # a graph for each would be more than the compiler allows
    hs.apply(pipe, planner=Fixed())
    before = run(pipe, steps=4)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True, backend="eager")
    try:
        assert near(run(pipe, steps=4), before)
        # All tokens, and any smaller number of them.
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    finally:
        torch._dynamo.reset()


@feature("VAE tiling and slicing")
def test_vae_tiling_and_slicing(family):
    pipe = make(family)
    pipe.vae.enable_tiling(
        tile_sample_min_height=32, tile_sample_min_width=32, tile_sample_stride_height=16, tile_sample_stride_width=16
    )
    pipe.vae.enable_slicing()
    video = dense_is_stock(pipe, prompts=2, output_type="pt", num_frames=1)
    assert video.shape == (2, 1, 3, 32, 48)


def test_the_committed_table_is_what_ran(request):
    """Last, so that it sees all others of this file."""
    config = request.config
    if config.getoption("--write-feature-table"):
        pytest.skip("the table is being written")
    table = feature_table.committed()
    shown = feature_table.cells_in(table)
    collected, outcomes = config.stash[feature_table.COLLECTED], config.stash[feature_table.OUTCOMES]
    files = {"test_features.py", "test_ltx2_features.py", "test_pipeline.py", "test_ltx2.py"}
    advice = "write the table anew, as the page says"
    assert outcomes.items() <= shown.items(), advice
    assert collected.keys() <= shown.keys(), advice
    if files <= set(collected.values()):
        assert shown.keys() == collected.keys(), advice
