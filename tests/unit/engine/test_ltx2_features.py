"""What users have on their pipelines works with HSA on LTX-2, against the stock pipeline.

A test here is a cell of the table in docs/models.md, as those of test_features.py are. What they go through
first is in ltx2_attention.py.
"""

from __future__ import annotations

import pytest
import torch

import heterostep as hs
from folders_ltx2 import complete_ltx2
from tiny_ltx2 import FAMILIES, embeddings, generate, tiny_ltx2

STEPS, COMPUTE = 4, 0.6
SMALL = {"height": 32, "width": 32, "num_frames": 3, "steps": STEPS}  # 2 x 4 x 4 tokens


def feature(name, *families):
    """A row of the table: the test runs with some families, or all."""
    return lambda test: pytest.mark.feature(name)(pytest.mark.parametrize("family", families or FAMILIES)(test))


def make(family, **transformer):
    version, image = FAMILIES[family]
    return tiny_ltx2(version, image=image, **transformer)


def run(pipe, family, **changes):
    """Final latents of video and sound."""
    return generate(pipe, FAMILIES[family][0], **{**SMALL, **changes})


def near(a, b, tolerance=1e-5):
    return all(((x - y).norm() / y.norm()).item() < tolerance for x, y in zip(a, b, strict=True))


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def partial(pipe, family, **changes):
    """A run that leaves out tokens; it meets its target."""
    session = hs.apply(pipe, hs.HSAConfig(compute=COMPUTE, policy="tokens"))
    latents = run(pipe, family, **changes)
    assert abs(session.report.compute - COMPUTE) <= 0.02
    assert any(0 < record.active < record.total for record in session.report.steps)
    hs.remove(pipe)
    return latents


def dense_is_stock(pipe, family, **changes):
    """With all tokens active the pipeline is what it is without HSA."""
    stock = run(pipe, family, **changes)
    hs.apply(pipe, hs.HSAConfig(compute=1.0))
    assert equal(run(pipe, family, **changes), stock)
    hs.remove(pipe)
    return stock


@feature("compute 1 is the stock pipeline, bit for bit")
def test_dense(family):
    pipe = make(family)
    stock = dense_is_stock(pipe, family)
    assert not near(partial(pipe, family), stock)
    assert equal(run(pipe, family), stock)


@feature("scheduler FlowMatchEuler", "LTX-2.3 image")
def test_own_scheduler(family):
    pipe = make(family)
    assert type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    with pytest.raises(hs.ConfigError, match=r"solver='unipc' .* one of euler is needed"):
        hs.apply(pipe, hs.HSAConfig(solver="unipc"))
    dense_is_stock(pipe, family, sigmas=[1.0, 0.9, 0.6, 0.3])  # as a distilled checkpoint has them
    partial(pipe, family, sigmas=[1.0, 0.9, 0.6, 0.3])


@feature("several prompts", "LTX-2.3 image")
def test_batches(family):
    pipe = make(family)
    dense_is_stock(pipe, family, prompts=2)
    both = partial(pipe, family, prompts=2)
    assert all(len(t) == 2 and not near([t[0]], [t[1]]) for t in both)


@feature("num_videos_per_prompt", "LTX-2 text")
def test_several_videos(family):
    pipe = complete_ltx2(FAMILIES[family][0])
    pipe.set_progress_bar_config(disable=True)
    asked = {**dict.fromkeys(embeddings()), "prompt": "a red disc", "num_videos_per_prompt": 2}
    asked |= {"max_sequence_length": 16}
    dense_is_stock(pipe, family, **asked)
    both = partial(pipe, family, **asked)
    assert all(len(t) == 2 and not near([t[0]], [t[1]]) for t in both)


@feature("callback_on_step_end", "LTX-2 text")
def test_callbacks(family):
    pipe, seen = make(family), []

    def callback(pipe, step, timestep, tensors):
        seen.append(step)
        return {"latents": tensors["latents"] * 1.01}

    changed = dense_is_stock(pipe, family, callback_on_step_end=callback)
    partial(pipe, family, callback_on_step_end=callback)
    assert seen == [*range(STEPS)] * 3
    assert not near(changed, run(pipe, family), 1e-3)


@feature("LoRA: load, fuse, unfuse, unload", "LTX-2 text")
def test_lora(family):
    pytest.importorskip("peft", reason="the extra 'dev' is not installed")
    pipe = make(family)
    before, g, state = partial(pipe, family), torch.Generator().manual_seed(1), {}
    for name, layer in pipe.transformer.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.endswith(("to_q", "to_k", "to_v", "net.2")):
            for part, shape in (("A", (2, layer.in_features)), ("B", (layer.out_features, 2))):
                state[f"transformer.{name}.lora_{part}.weight"] = 0.3 * torch.randn(shape, generator=g)
    pipe.load_lora_weights(state, adapter_name="one")
    stock = dense_is_stock(pipe, family)
    loaded = partial(pipe, family)
    assert not near(loaded, before, 1e-3)
    pipe.fuse_lora(components=["transformer"])
    assert near(dense_is_stock(pipe, family), stock, 1e-4) and near(partial(pipe, family), loaded, 1e-4)
    pipe.unfuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    assert near(partial(pipe, family), before, 1e-4)


@feature("group offload", "LTX-2 text")
def test_group_offload(family):
    pipe = make(family)
    before, cpu = partial(pipe, family), torch.device("cpu")
    pipe.transformer.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
    dense_is_stock(pipe, family)
    assert equal(partial(pipe, family), before)


@feature("model offload", "LTX-2 text")
def test_model_offload(family):
    pipe = make(family)
    before = partial(pipe, family)
    pipe.enable_model_cpu_offload(device="cpu")
    dense_is_stock(pipe, family)
    assert equal(partial(pipe, family), before)


@feature("layerwise casting, fp8 storage", "LTX-2.5 text")
def test_layerwise_casting(family):
    pipe = make(family)
    before = partial(pipe, family)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    dense_is_stock(pipe, family)
    assert pipe.transformer.transformer_blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    assert not near(partial(pipe, family), before)


class Fixed:
    """A planner: all tokens at the first step, then sizes that nothing else in the model has by chance."""

    def plan(self, step, num_steps, sigma, num_tokens):
        return torch.arange(num_tokens)[: (None, 11, 5, 7)[step]]


@feature("compile_repeated_blocks", "LTX-2 text")
def test_compiled_blocks(family):
    pipe = make(family)
    hs.apply(pipe, planner=Fixed())
    before = run(pipe, family)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True, backend="eager")
    try:
        assert near(run(pipe, family), before)
        # All tokens, and any smaller number of them. The first block is compiled like the others, which it is not in
        # the stock pipeline: that needs two graphs for all tokens alone.
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    finally:
        torch._dynamo.reset()


@feature("VAE tiling and slicing", "LTX-2 text")
def test_vae_tiling_and_slicing(family):
    pipe = make(family)
    pipe.vae.enable_tiling(
        tile_sample_min_height=32, tile_sample_min_width=32, tile_sample_stride_height=16, tile_sample_stride_width=16
    )
    pipe.vae.enable_slicing()
    video, audio = dense_is_stock(pipe, family, prompts=2, output_type="pt", height=64, width=64, num_frames=1)
    assert video.shape == (2, 1, 3, 64, 64) and len(audio) == 2
