"""`remove` gives the stock pipeline back, whatever happened since `apply`.

That is the work of engine/models/hook_registry.py.
"""

import contextlib
import functools

import diffusers
import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook

import heterostep as hs
import tiny_ltx2
from tiny import generate, tiny_pipeline


def snapshot(pipe):
    """All places where something of ours may stay."""
    found = {
        "pipe": (sorted(vars(pipe)), id(pipe.scheduler), list(pipe._callback_tensor_inputs), dict(pipe.config)),
    }
    for name in ("transformer", "transformer_2"):
        model = getattr(pipe, name, None)
        for path, module in model.named_modules() if model is not None else ():
            hooks, forward = vars(module).get("_diffusers_hook"), vars(module).get("forward")
            # Hooks that diffusers takes off leave the class's forward behind, and an empty registry.
            own = getattr(forward, "__func__", None) is type(module).forward
            found[name, path] = (
                id(module),
                None if own else forward,
                list(hooks.hooks) if hooks is not None else [],
                id(getattr(module, "processor", None)),
                dict(vars(module.processor)) if hasattr(module, "processor") else {},
                len(module._forward_hooks) + len(module._forward_pre_hooks),
            )
    return found


def broken_at(nth, error):
    """Run a pipeline; its model fails at the nth call of a layer."""

    def happen(pipe):
        calls = []

        def broken(module, args):
            calls.append(1)
            if len(calls) == nth:
                raise error("broken")

        block = (getattr(pipe.transformer, "blocks", None) or pipe.transformer.transformer_blocks)[1]
        handle = block.register_forward_pre_hook(broken)
        try:
            make(pipe)
        finally:
            handle.remove()

    return happen


def stopped_at(step, act):
    """Run a pipeline; its callback acts at a step."""

    def happen(pipe):
        def callback(pipe, index, timestep, tensors):
            if index == step:
                act(pipe)
            return tensors

        make(pipe, callback_on_step_end=callback)

    return happen


def interrupt(pipe):
    raise KeyboardInterrupt


def other_processor(pipe):
    """The user's own choice stays: here it is the one from before."""
    attention = next(module for module in pipe.transformer.modules() if hasattr(module, "processor"))
    ours = attention.processor
    hs.remove(pipe)
    stock = attention.processor
    hs.apply(pipe, hs.HSAConfig(compute=0.6, policy="tokens"))
    attention.set_processor(ours)
    with contextlib.suppress(hs.ConfigError):  # refused where that expert leaves out tokens
        make(pipe)
    attention.set_processor(stock)


def hooks_around(pipe):
    """Beneath ours and above it, one of each is taken off before ours is."""
    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    hs.remove(pipe)
    registry.register_hook(ModelHook(), "beneath")
    registry.register_hook(ModelHook(), "also beneath")
    hs.apply(pipe)
    registry.register_hook(ModelHook(), "above")
    registry.register_hook(ModelHook(), "also above")
    for name in ("beneath", "above", "also above", "also beneath"):
        make(pipe)
        registry.remove_hook(name)


def offloaded_for_a_while(pipe):
    pipe.enable_model_cpu_offload(device="cpu")
    make(pipe)
    pipe.remove_all_hooks()
    for name in ("_all_hooks", "_offload_device", "_offload_gpu_id"):
        vars(pipe).pop(name, None)
    for module in pipe.transformer.modules():
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del module.forward


def wrapper_around(pipe):
    """A function around our hook, taken off by what it has kept."""
    kept = pipe.transformer.forward
    pipe.transformer.forward = functools.wraps(kept)(lambda *args, **kwargs: kept(*args, **kwargs))
    make(pipe)
    hs.remove(pipe)
    make(pipe)  # the wrapper is there, and our hook passes on
    del pipe.transformer.forward


def cached_for_a_while(pipe):
    pipe.transformer.enable_cache(
        diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
        )
    )
    with pytest.raises(hs.ConfigError, match="disable_cache"):
        make(pipe)
    pipe.transformer.disable_cache()
    pipe.transformer._cache_config = None


def compiled_for_a_while(pipe):
    compiled = torch.compile(pipe.transformer, backend="eager")
    pipe.transformer = compiled
    with pytest.raises(hs.ConfigError, match="compiled"):
        make(pipe)
    pipe.transformer = compiled._orig_mod


def nothing_taken_off_twice(pipe):
    hs.remove(pipe)
    hs.remove(pipe)


HAPPENINGS = {
    "nothing": lambda pipe: None,
    "a run": lambda pipe: make(pipe),
    "applied again": lambda pipe: (hs.apply(pipe, hs.HSAConfig(compute=0.4)), make(pipe)),
    "taken off twice": nothing_taken_off_twice,
    "settings refused": lambda pipe: hs.apply(pipe, hs.HSAConfig(solver="none")),
    **{f"an error in the model, call {n}": broken_at(n, RuntimeError) for n in (1, 2, 3, 6)},
    "interrupted in the model": broken_at(5, KeyboardInterrupt),
    **{f"interrupted after step {n}": stopped_at(n, interrupt) for n in (0, 3)},
    "taken off during a run": stopped_at(2, hs.remove),
    "applied during a run": stopped_at(2, hs.apply),
    "another processor": other_processor,
    "hooks come and go": hooks_around,
    "offloaded for a while": offloaded_for_a_while,
    "a function around": wrapper_around,
    "another cache for a while": cached_for_a_while,
    "compiled for a while": compiled_for_a_while,
}


def make(pipe, **changes):
    """A short run, which also sets what a pipeline sets at its first run."""
    if hasattr(pipe, "connectors"):
        return tiny_ltx2.generate(pipe, steps=4, **changes)
    return generate(pipe, steps=4, **changes)


@pytest.mark.parametrize("kind", ["wan22", "ltx2"])
@pytest.mark.parametrize("name", HAPPENINGS)
def test_remove_restores_whatever_happened(name, kind):
    pipe = tiny_ltx2.tiny_ltx2("2.0") if kind == "ltx2" else tiny_pipeline(kind)
    stock, before = make(pipe), snapshot(pipe)
    # A run that goes on without the solver that it began with cannot.
    solver = None if kind == "ltx2" or "during" in name else "euler"
    hs.apply(pipe, hs.HSAConfig(compute=0.6, policy="tokens", solver=solver))
    with contextlib.suppress(RuntimeError, KeyboardInterrupt, ValueError):
        HAPPENINGS[name](pipe)
    hs.remove(pipe)
    assert snapshot(pipe) == before
    torch.testing.assert_close(make(pipe), stock, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["wan22", "ltx2"])
def test_nothing_of_ours_is_left_on_any_module(kind):
    pipe = tiny_ltx2.tiny_ltx2("2.0") if kind == "ltx2" else tiny_pipeline(kind)
    hs.apply(pipe, hs.HSAConfig(compute=0.6, policy="tokens"))
    make(pipe)
    hs.remove(pipe)
    for model in (pipe.transformer, getattr(pipe, "transformer_2", None)):
        for path, module in model.named_modules() if model is not None else ():
            assert "forward" not in vars(module)
            assert not path or "_diffusers_hook" not in vars(module)
            assert "heterostep" not in type(getattr(module, "processor", None)).__module__
    assert not [name for name in vars(pipe) if "heterostep" in name or name == "_callback_tensor_inputs"]
