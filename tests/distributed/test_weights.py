"""Weights that are sharded over the ranks give the video of whole ones, from a fraction of the memory."""

import math
from pathlib import Path

import pytest
import torch

import ranks
import tiny
from heterostep import ConfigError, Engine, EngineConfig, GenerateRequest, HSAConfig, ParallelConfig, apply, remove
from heterostep.engine.facts import read_facts
from heterostep.engine.loading import load_pipeline
from heterostep.parallel.mesh import ParallelMesh, shard_weights

LAYERS = 8  # so that what is not in a block weighs little


class Few:
    """A planner that leaves ranks without a token, and steps without any."""

    def plan(self, step, num_steps, sigma, num_tokens):
        count = (None, 1, 0, 2)[step % 4]
        return None if count is None else torch.arange(count)


def pipeline_on(layout, kind, sharded, dtype):
    pipe = tiny.tiny_pipeline(kind, heads=4, layers=LAYERS)
    mesh = ParallelMesh.create(ParallelConfig(**layout))
    for model in (pipe.transformer, pipe.transformer_2):
        if model is None:
            continue
        model.requires_grad_(True)  # as from_pretrained leaves it
        for name, parameter in model.named_parameters():
            # As from_pretrained leaves a model in half precision: some weights are kept in float32.
            kept = "time_embedder" in name or "scale_shift_table" in name
            parameter.data = parameter.data.to(torch.float32 if kept else dtype)
        if sharded:
            shard_weights(model, model.blocks, mesh)
    return pipe


def make(layout, kind, sharded, few, dtype=torch.float32):
    """Latents of two runs, and bytes of weights on each rank."""
    pipe = pipeline_on(layout, kind, sharded, dtype)
    config = HSAConfig(compute=0.5, policy="tokens")
    session = apply(pipe, config, Few() if few else None, parallel=ParallelConfig(**layout))
    embeddings = {name: text.to(dtype) for name, text in tiny.embeddings().items()}
    runs = [tiny.generate(pipe, steps=8, seed=seed, **embeddings) for seed in (1, 2)]
    weights = [rank.weight_bytes for rank in session.full_report().ranks]
    remove(pipe)
    return runs, weights


@pytest.mark.parametrize(
    ("layout", "kind", "few", "dtype"),
    [
        ({"ulysses": 2}, "euler", False, torch.float32),
        ({"ulysses": 2}, "euler", False, torch.bfloat16),
        ({"cfg": 2}, "wan22", False, torch.float32),
        ({"ring": 3, "ring_cache": "sharded"}, "euler", True, torch.float32),
        ({"ulysses": 2, "cfg": 2}, "euler", True, torch.float32),
    ],
)
def test_sharded_weights_make_the_same_video(layout, kind, few, dtype):
    size = math.prod(value for value in layout.values() if isinstance(value, int))
    whole = ranks.run_ranks(size, make, layout, kind, False, few, dtype)
    sharded = ranks.run_ranks(size, make, layout, kind, True, few, dtype)
    for (runs, _), (want, _) in zip(sharded, whole, strict=True):
        assert all(torch.isfinite(run).all() for run in runs)
        assert all((run - latents).abs().max() <= 1e-5 for run, latents in zip(runs, want, strict=True))
    model = tiny.tiny_pipeline(kind, heads=4, layers=LAYERS).transformer
    outside = 1 - sum(p.numel() for p in model.blocks.parameters()) / sum(p.numel() for p in model.parameters())
    for bytes_sharded, bytes_whole in zip(sharded[0][1], whole[0][1], strict=True):
        # In half precision what is kept in float32 weighs double.
        assert bytes_sharded / bytes_whole < 1 / size + 2 * outside + 0.02


def interrupted(layout):
    """The same run after one that an exception broke off inside the model."""
    pipe = pipeline_on(layout, "euler", True, torch.float32)
    apply(pipe, HSAConfig(compute=0.5), parallel=ParallelConfig(**layout))
    block = pipe.transformer.blocks[3]

    def fail(*_):
        raise ArithmeticError("planned")

    handle = block.attn2.register_forward_hook(fail)
    with pytest.raises(ArithmeticError):
        tiny.generate(pipe, steps=4)
    handle.remove()
    return tiny.generate(pipe, steps=4)


def undisturbed(layout):
    pipe = pipeline_on(layout, "euler", False, torch.float32)
    apply(pipe, HSAConfig(compute=0.5), parallel=ParallelConfig(**layout))
    return tiny.generate(pipe, steps=4)


def test_a_run_after_one_that_failed():
    layout = {"ulysses": 2}
    for again, want in zip(
        ranks.run_ranks(2, interrupted, layout), ranks.run_ranks(2, undisturbed, layout), strict=True
    ):
        assert (again - want).abs().max() <= 1e-5


def engine_video(model, sharded):
    config = EngineConfig(model=model, parallel=ParallelConfig(ulysses=2), shard_weights=sharded)
    engine = Engine(config)
    if not sharded:
        # Weights are read in place, and their place in the file decides the last bits of matrix products.
        for parameter in engine.pipeline.transformer.parameters():
            parameter.data = parameter.data.clone()
    request = GenerateRequest(prompt="a red disc", num_inference_steps=4, num_frames=5, width=64, height=64)
    latents = [engine.generate(request).latents for _ in range(2)]
    return latents, engine.generate(request).report.ranks[0].weight_bytes


def test_the_engine_shards_weights():
    whole = ranks.run_ranks(2, engine_video, "demo", False)
    sharded = ranks.run_ranks(2, engine_video, "demo", True)
    for (runs, _), (want, _) in zip(sharded, whole, strict=True):
        assert all((run - latents).abs().max() <= 1e-5 for run, latents in zip(runs, want, strict=True))
    assert sharded[0][1] < 0.7 * whole[0][1]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"shard_weights": True}, "several ranks"),
        ({"shard_weights": True, "parallel": ParallelConfig()}, "several ranks"),
        ({"shard_weights": True, "parallel": ParallelConfig(ulysses=2, cut="measured")}, "cut='equal'"),
        ({"shard_weights": 1, "parallel": ParallelConfig(ulysses=2)}, "True or False"),
    ],
)
def test_what_cannot_be_is_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        EngineConfig(**settings)


def test_one_rank_keeps_its_weights():
    model = tiny.tiny_transformer()
    shard_weights(model, model.blocks, ParallelMesh.create(ParallelConfig()))
    assert type(model).__name__ == "WanTransformer3DModel"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_weights_are_read_in_place():
    pipe = load_pipeline(read_facts("demo"), EngineConfig(), torch.device("cpu"), torch.float32, text=False)
    mapped = Path("/proc/self/maps").read_text()
    assert "transformer/diffusion_pytorch_model.safetensors" in mapped
    # The pages belong to the file, so that all ranks of a machine share them.
    address = pipe.transformer.blocks[0].ffn.net[2].weight.data_ptr()
    for line in mapped.splitlines():
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        if start <= address < end:
            assert line.endswith("diffusion_pytorch_model.safetensors")
            break
    else:
        raise AssertionError("the weight is in no mapping")
