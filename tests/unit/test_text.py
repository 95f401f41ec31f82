"""The prompt's keys and values are computed once a run, and change nothing."""

import pytest
import torch

import tiny
from heterostep import HSAConfig, apply, remove


def counted(pipe):
    """Count calls of every cross-attention's key projection."""
    calls = []
    for model in (pipe.transformer, pipe.transformer_2):
        for block in model.blocks if model is not None else ():
            block.attn2.to_k.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize(("kind", "branches"), [("euler", 2), ("wan22", 4), ("ti2v5b", 2)])
def test_once_a_run(kind, branches):
    pipe = tiny.tiny_pipeline(kind)
    layers = len(pipe.transformer.blocks)
    calls = counted(pipe)
    stock = tiny.generate(pipe)
    assert len(calls) == 8 * 2 * layers
    apply(pipe, HSAConfig(compute=1.0))
    for _ in range(2):  # a second run asks anew: its prompt may be another
        calls.clear()
        assert torch.equal(tiny.generate(pipe), stock)
        assert len(calls) == branches * layers
    remove(pipe)
    assert torch.equal(tiny.generate(pipe), stock)


def test_fused_projections():
    pipe = tiny.tiny_pipeline("euler")
    pipe.transformer.fuse_qkv_projections()
    stock = tiny.generate(pipe)
    apply(pipe, HSAConfig(compute=1.0))
    assert torch.equal(tiny.generate(pipe), stock)


def test_another_prompt_is_another_video():
    pipe = tiny.tiny_pipeline("euler")
    apply(pipe, HSAConfig(compute=0.5))
    other = {"prompt_embeds": torch.randn(1, 16, tiny.TEXT_WIDTH, generator=torch.Generator().manual_seed(3))}
    first, second = tiny.generate(pipe), tiny.generate(pipe, **other)
    assert not torch.equal(first, second)
    remove(pipe)
    apply(pipe, HSAConfig(compute=0.5))
    assert torch.equal(tiny.generate(pipe, **other), second)
