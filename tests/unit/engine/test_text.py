"""The prompt's keys and values are computed once a run, and change nothing."""

import pytest
import torch

import tiny
import tiny_ltx2
from heterostep import HSAConfig, apply, remove


def counted(*attentions):
    """Count calls of the key projections, and of the value projections."""
    keys, values = [], []
    for attention in attentions:
        attention.to_k.register_forward_hook(lambda *_: keys.append(1))
        attention.to_v.register_forward_hook(lambda *_: values.append(1))
    return keys, values


@pytest.mark.parametrize(("kind", "branches"), [("euler", 2), ("wan22", 4), ("ti2v5b", 2)])
def test_once_a_run(kind, branches):
    pipe = tiny.tiny_pipeline(kind)
    layers = len(pipe.transformer.blocks)
    models = [model for model in (pipe.transformer, pipe.transformer_2) if model is not None]
    keys, values = counted(*(block.attn2 for model in models for block in model.blocks))
    stock = tiny.generate(pipe)
    assert len(keys) == len(values) == 8 * 2 * layers
    apply(pipe, HSAConfig(compute=1.0))
    for _ in range(2):  # a second run asks anew: its prompt may be another
        keys.clear(), values.clear()
        assert torch.equal(tiny.generate(pipe), stock)
        assert len(keys) == len(values) == branches * layers
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


def texts_of(pipe):
    """Where video and sound of LTX-2 look at the prompt."""
    return [a for block in pipe.transformer.transformer_blocks for a in (block.attn2, block.audio_attn2)]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("version", "image", "branches"), [("2.0", False, 1), ("2.5", True, 3)])
def test_once_a_run_with_sound(version, image, branches):
    pipe = tiny_ltx2.tiny_ltx2(version, image=image)
    counts = counted(*texts_of(pipe))
    stock = tiny_ltx2.generate(pipe, version, steps=4, prompts=2)
    assert [len(calls) for calls in counts] == [4 * branches * len(texts_of(pipe))] * 2
    apply(pipe, HSAConfig(compute=1.0))
    for _ in range(2):
        for calls in counts:
            calls.clear()
        assert equal(tiny_ltx2.generate(pipe, version, steps=4, prompts=2), stock)
        assert [len(calls) for calls in counts] == [branches * len(texts_of(pipe))] * 2
    other = {**tiny_ltx2.embeddings(2, seed=6), "steps": 4, "prompts": 2}
    changed = tiny_ltx2.generate(pipe, version, **other)
    remove(pipe)
    assert equal(tiny_ltx2.generate(pipe, version, **other), changed) and not equal(changed, stock)


def test_ltx_2_3_scales_its_prompt_by_the_noise():
    """So that its keys are others at each step, and nothing may be kept."""
    pipe, seen = tiny_ltx2.tiny_ltx2("2.3"), []
    for attention in texts_of(pipe):
        attention.to_k.register_forward_hook(lambda m, args, out: seen.append((m, out)))
    apply(pipe, HSAConfig(compute=1.0))
    tiny_ltx2.generate(pipe, "2.3", steps=4)
    assert len(seen) == 4 * 3 * len(texts_of(pipe))
    for attention in texts_of(pipe):
        first, _, _, next_step, *_ = (key for module, key in seen if module is attention.to_k)
        assert not torch.allclose(first, next_step)
