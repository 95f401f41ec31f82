"""What may happen to a pipeline between `apply` and `remove`: it goes with HSA, or a sentence refuses it; never both at
once without a word."""

import copy
import pickle
import types

import diffusers
import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook, apply_first_block_cache, apply_taylorseer_cache
from diffusers.hooks.context_parallel import ContextParallelSplitHook
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

import heterostep as hs
from tiny import embeddings, generate, tiny_pipeline, tiny_transformer

BLOCKS = [r"blocks\.\d+\.attn[12]", r"blocks\.\d+\.ffn"]
CONFIGS = {
    "FirstBlockCache": lambda pipe: diffusers.FirstBlockCacheConfig(threshold=0.2),
    "TaylorSeer": lambda pipe: diffusers.TaylorSeerCacheConfig(cache_interval=3, cache_identifiers=BLOCKS),
    "PyramidAttentionBroadcast": lambda pipe: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipe._current_timestep
    ),
    "MagCache": lambda pipe: diffusers.MagCacheConfig(num_inference_steps=8, mag_ratios=torch.ones(8)),
    "FasterCache": lambda pipe: diffusers.FasterCacheConfig(
        current_timestep_callback=lambda: pipe._current_timestep, is_guidance_distilled=True
    ),
    "SeaCache": lambda pipe: diffusers.hooks.SeaCacheConfig(),
}


class Stateful(ModelHook):
    """A cache that nobody knows."""

    _is_stateful = True

    def reset_state(self, module):
        return module


class Wrapped(torch.nn.Module):
    """Stands in place of blocks and runs them if it likes."""

    def __init__(self, blocks):
        super().__init__()
        self.inner = blocks

    def forward(self, hidden_states, *args):
        for block in self.inner:
            hidden_states = block(hidden_states, *args)
        return hidden_states


class Foreign(WanAttnProcessor):
    pass


def foreign_forward(self, *args, **kwargs):
    return type(self).forward(self, *args, **kwargs)


def put(pipe, name, hook):
    HookRegistry.check_if_exists_or_initialize(pipe.transformer.get_submodule(name)).register_hook(hook, "other")


def wrap_blocks(pipe):
    pipe.transformer.blocks = torch.nn.ModuleList([Wrapped(pipe.transformer.blocks)])


def patch(pipe, name):
    module = pipe.transformer.get_submodule(name)
    module.forward = types.MethodType(foreign_forward, module)


OTHER_CACHES = {
    **{name: lambda pipe, make=make: pipe.transformer.enable_cache(make(pipe)) for name, make in CONFIGS.items()},
    "hooks of a cache, no setting": lambda pipe: apply_first_block_cache(
        pipe.transformer, diffusers.FirstBlockCacheConfig(threshold=0.2)
    ),
    "hooks of another": lambda pipe: apply_taylorseer_cache(
        pipe.transformer, diffusers.TaylorSeerCacheConfig(cache_interval=3, cache_identifiers=BLOCKS)
    ),
    "a stateful hook above": lambda pipe: put(pipe, "", Stateful()),
    "a stateful hook on a layer": lambda pipe: put(pipe, "blocks.1.ffn", Stateful()),
    "wrapped blocks": wrap_blocks,
    "the transformer's forward": lambda pipe: patch(pipe, ""),
    "a block's forward": lambda pipe: patch(pipe, "blocks.1"),
    "an attention's forward": lambda pipe: patch(pipe, "blocks.0.attn1"),
    "context parallelism": lambda pipe: setattr(pipe.transformer, "_parallel_config", object()),
    "hooks of context parallelism": lambda pipe: put(pipe, "", ContextParallelSplitHook({}, None)),
    "a foreign processor": lambda pipe: pipe.transformer.blocks[1].attn1.set_processor(Foreign()),
}


@pytest.mark.parametrize("policy", ["steps", "tokens"])
@pytest.mark.parametrize("name", OTHER_CACHES)
def test_another_cache_is_refused_in_either_order(name, policy):
    config = hs.HSAConfig(compute=0.5, policy=policy)
    pipe = tiny_pipeline(layers=3)
    OTHER_CACHES[name](pipe)
    with pytest.raises(hs.ConfigError) as before:
        hs.apply(pipe, config)
    pipe = tiny_pipeline(layers=3)
    hs.apply(pipe, config)
    generate(pipe, steps=5)
    OTHER_CACHES[name](pipe)
    with pytest.raises(hs.ConfigError) as after:
        generate(pipe, steps=5)
    assert str(after.value) == str(before.value)


def test_a_cache_that_is_disabled_again_leaves_hsa_as_it_was():
    pipe = tiny_pipeline()
    session = hs.apply(pipe)
    want = generate(pipe)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.2))
    with pytest.raises(hs.ConfigError, match="disable_cache"):
        generate(pipe)
    pipe.transformer.disable_cache()
    assert torch.equal(generate(pipe), want)
    assert len(session.report.steps) == 8


def test_a_forward_of_another_on_the_class_is_refused_in_either_order(monkeypatch):
    """As some caches are installed."""
    pipe, other = tiny_pipeline(), tiny_pipeline()
    hs.apply(pipe)
    stock = type(pipe.transformer).forward
    monkeypatch.setattr(type(pipe.transformer), "forward", lambda self, *args, **kwargs: stock(self, *args, **kwargs))
    with pytest.raises(hs.ConfigError, match="in place of its own forward"):
        generate(pipe)
    with pytest.raises(hs.ConfigError, match="in place of its own forward"):
        hs.apply(other)


@pytest.mark.parametrize("how", [copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("what", ["pipe", "transformer", "session"])
def test_a_pipeline_with_hsa_is_not_copied(what, how):
    """A copy would run the weights of its original."""
    pipe = tiny_pipeline()
    session = hs.apply(pipe)
    generate(pipe)
    thing = {"pipe": pipe, "transformer": pipe.transformer, "session": session}[what]
    with pytest.raises(hs.ConfigError, match=r"cannot be copied.*hs\.remove"):
        how(thing)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_copy_after_remove_is_a_pipeline_of_its_own(how):
    pipe = tiny_pipeline()
    stock = generate(pipe)
    hs.apply(pipe)
    want = generate(pipe)
    hs.remove(pipe)
    other = how(pipe)
    assert torch.equal(generate(other), stock)
    hs.apply(pipe)
    session = hs.apply(other)
    assert torch.equal(generate(other), want)
    other.transformer.proj_out.weight.data.mul_(0.5)
    assert not torch.equal(generate(other), want)
    assert len(session.report.steps) == 8
    assert torch.equal(generate(pipe), want)


def whole(pipe):
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def whole_forward(pipe):
    pipe.transformer.forward = torch.compile(pipe.transformer.forward, backend="eager")


WHOLE = [whole, lambda pipe: pipe.transformer.compile(backend="eager"), whole_forward]


@pytest.mark.parametrize("compiled", WHOLE, ids=["torch.compile", "compile()", "forward"])
def test_a_transformer_compiled_as_a_whole_is_refused_in_either_order(compiled):
    pipe = tiny_pipeline()
    stock = generate(pipe, steps=2)
    hs.apply(pipe)
    compiled(pipe)
    for _ in range(2):
        with pytest.raises(hs.ConfigError, match=r"compiled as a whole.*compile_repeated_blocks"):
            generate(pipe, steps=2)
    with pytest.raises(hs.ConfigError, match="compiled as a whole"):
        hs.apply(pipe)
    hs.remove(pipe)
    assert torch.allclose(generate(pipe, steps=2), stock, atol=1e-5)


def test_a_compiled_transformer_called_outside_a_pipeline_is_the_stock_one():
    pipe = tiny_pipeline()
    arguments = torch.randn(1, 16, 3, 8, 8), torch.tensor([500.0]), torch.randn(1, 16, 32)
    want = pipe.transformer(*arguments).sample
    hs.apply(pipe)
    compiled = torch.compile(pipe.transformer, backend="eager")
    assert torch.allclose(compiled(*arguments).sample, want, atol=1e-5)
    assert generate(pipe).isfinite().all()


def prompt(dtype):
    return {name: value.to(dtype) for name, value in embeddings().items()}


def lora(model, rank=2):
    g, state = torch.Generator().manual_seed(1), {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.endswith(("to_q", "to_k", "to_v", "net.2")):
            for part, shape in (("A", (rank, layer.in_features)), ("B", (layer.out_features, rank))):
                state[f"transformer.{name}.lora_{part}.weight"] = 0.3 * torch.randn(shape, generator=g)
    return state


CPU = torch.device("cpu")
CHANGES = {
    "lora": lambda pipe: pipe.load_lora_weights(lora(pipe.transformer), adapter_name="style"),
    "fused lora": lambda pipe: (
        pipe.load_lora_weights(lora(pipe.transformer), adapter_name="style"),
        pipe.fuse_lora(components=["transformer"]),
    ),
    "another type": lambda pipe: pipe.to(torch.bfloat16),
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "group offload": lambda pipe: pipe.transformer.enable_group_offload(CPU, CPU, offload_type="leaf_level"),
    "casting": lambda pipe: pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
    "fused projections": lambda pipe: pipe.transformer.fuse_qkv_projections(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_goes_with_hsa_does_so_in_either_order(name):
    if "lora" in name:
        pytest.importorskip("peft", reason="the extra 'dev' is not installed")
    inputs = prompt(torch.bfloat16 if name == "another type" else torch.float32)
    config, results = hs.HSAConfig(compute=0.5, policy="tokens"), []
    for after in (False, True):
        pipe = tiny_pipeline()
        if after:
            hs.apply(pipe, config)
            generate(pipe)
            CHANGES[name](pipe)
        else:
            CHANGES[name](pipe)
            hs.apply(pipe, config)
        results.append(generate(pipe, **inputs))
        hs.remove(pipe)
        results.append(generate(pipe, **inputs))
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])
    assert not torch.equal(results[0], results[1])


@pytest.mark.parametrize("kind", ["unipc", "wan22"])
@pytest.mark.parametrize("config", [hs.HSAConfig(), hs.HSAConfig(policy="tokens", compute=0.4)])
def test_saved_weights_and_settings_are_the_stock_ones(tmp_path, kind, config):
    pipe = tiny_pipeline(kind)
    pipe.save_pretrained(tmp_path / "stock")
    hs.apply(pipe, config)
    generate(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    files = [path.relative_to(tmp_path / "stock") for path in (tmp_path / "stock").rglob("*") if path.is_file()]
    assert len(files) > 5
    for file in files:
        assert (tmp_path / "saved" / file).read_bytes() == (tmp_path / "stock" / file).read_bytes()


@pytest.mark.parametrize("name", ["transformer", "transformer_2"])
def test_a_replaced_transformer_is_said_and_apply_works_on_the_new_one(name):
    pipe = tiny_pipeline("wan22")
    session, old = hs.apply(pipe), getattr(pipe, name)
    generate(pipe)
    setattr(pipe, name, tiny_transformer(7))
    for ask in (lambda: generate(pipe), lambda: session.report):
        with pytest.raises(hs.ConfigError, match=r"replaced after hs\.apply"):
            ask()
    again = hs.apply(pipe)
    assert "forward" not in vars(old)  # not left behind with the first session on it
    got = generate(pipe)
    assert len(again.report.steps) == 8
    fresh = tiny_pipeline("wan22")
    setattr(fresh, name, tiny_transformer(7))
    hs.apply(fresh)
    assert torch.equal(got, generate(fresh))


def test_the_report_of_a_pipeline_with_another_transformer_does_not_claim_its_runs():
    pipe = tiny_pipeline()
    session = hs.apply(pipe)
    pipe.transformer = tiny_transformer(7)
    generate(pipe)  # never comes to HSA
    with pytest.raises(hs.ConfigError, match="so HSA is not on it any more"):
        session.report  # noqa: B018
    hs.remove(pipe)
    assert session.report.steps == []


def test_the_report_does_not_claim_runs_without_our_hook():
    pipe = tiny_pipeline()
    stock = generate(pipe)
    session = hs.apply(pipe)
    pipe.transformer._diffusers_hook.remove_hook("heterostep")
    assert torch.equal(generate(pipe), stock)
    with pytest.raises(hs.ConfigError, match="its hook was removed"):
        session.report  # noqa: B018


def test_one_model_as_both_experts_is_refused():
    pipe = tiny_pipeline("wan22")
    pipe.transformer_2 = pipe.transformer
    with pytest.raises(hs.ConfigError, match="one and the same model"):
        hs.apply(pipe)
    assert "forward" not in vars(pipe.transformer)


def test_a_session_on_a_shared_transformer_ends_the_one_before():
    first, second = tiny_pipeline(), tiny_pipeline()
    second.transformer = first.transformer
    stock = generate(first)
    one = hs.apply(first, hs.HSAConfig(solver="unipc"))
    assert first.scheduler is not second.scheduler
    two = hs.apply(second, hs.HSAConfig(compute=0.4))
    assert type(first.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    generate(second)
    assert len(two.report.steps) == 8 and one.report.steps == []
    hs.remove(second)
    assert torch.equal(generate(first), stock) and torch.equal(generate(second), stock)
