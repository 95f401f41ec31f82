"""An engine on many ranks starts from an image as an engine on one rank does."""

import pytest
import torch

import ranks
import tiny
from folders import complete_pipeline
from heterostep import Engine, EngineConfig, GenerateRequest, HSAConfig, ParallelConfig


def make(folder, layout, policy):
    """Final latents, and whether each step after the first was shared by guidance branch too."""
    parallel = ParallelConfig(**layout) if layout else None
    engine = Engine(EngineConfig(model=folder, device="cpu", hsa=HSAConfig(policy=policy), parallel=parallel))
    request = GenerateRequest(
        prompt="it jumps", image=tiny.picture(), num_frames=9, num_inference_steps=8, guidance_scale=3.0
    )
    passes = []
    engine.pipeline.transformer.blocks[0].ffn.register_forward_hook(lambda *_: passes.append(1))
    output = engine.generate(request)
    return output.latents, output.frames, output.report.conditioned, len(passes)


@pytest.mark.parametrize(("kind", "layout"), [("wan21 i2v", {"cfg": 2}), ("ti2v5b", {"ulysses": 2})], ids=str)
def test_two_ranks_make_the_video_of_one(tmp_path, kind, layout):
    complete_pipeline(kind).save_pretrained(tmp_path)
    latents, frames, conditioned, passes = make(str(tmp_path), None, "tokens")
    for got in ranks.run_ranks(2, make, str(tmp_path), layout, "tokens"):
        assert (got[0] - latents).abs().max() < 1e-4
        assert abs(got[1].astype(int) - frames).max() <= 1
        assert got[2] == conditioned
        # The engine tells what each branch will ask, so that every group does its own from the first step on.
        assert got[3] == (passes // 2 if "cfg" in layout else passes)
    assert torch.isfinite(latents).all()
