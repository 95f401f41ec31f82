"""What is refused before a run: what does not go with HSA on a transformer, and requests that no plan can meet."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import diffusers
from diffusers.hooks.context_parallel import ContextParallelGatherHook, ContextParallelSplitHook
from torch import nn

from ...errors import ConfigError
from ...hsa.config import HSAConfig
from ...hsa.policies import JointPolicy
from ..facts import ModelFacts, first_line, read_scheduler
from ..models import Adapter, adapter_named
from ..models.base import CachedAttention, Grid
from ..models.hook_registry import HOOK_NAME
from ..request import ResolvedRequest
from .long_video import windows_for
from .run import Run
from .schedulers import scheduler_for, shifted
from .windows import Windows

TRANSFORMERS = ("transformer", "transformer_2")
"""Attributes in which pipelines keep their transformers."""


def refuse_compiled(pipe: Any) -> None:
    """Refuse a pipeline with a transformer that is compiled as a whole.

    To be called before the transformer is: once the compiler traces our hook, it is too late for a sentence.

    Raises:
        ConfigError: `torch.compile` wraps the transformer, its call or its forward.
    """
    for name in TRANSFORMERS:
        transformer = getattr(pipe, name, None)
        if transformer is not None and _compiled(transformer):
            raise ConfigError(
                f"{type(pipe).__name__}.{name} is compiled as a whole, which leaves HSA no place to choose a step's "
                "tokens: give the pipeline the uncompiled model (torch.compile keeps it as _orig_mod, or reload it) "
                f"and compile its blocks instead, pipe.{name}.compile_repeated_blocks()."
            )


def check_distinct(pipe: Any) -> list[Any]:
    """Return the transformers of a pipeline.

    Raises:
        ConfigError: two of them are one model, which can only have one hook.
    """
    models = [model for name in TRANSFORMERS if (model := getattr(pipe, name, None)) is not None]
    if len(set(map(id, models))) < len(models):
        raise ConfigError(
            f"{' and '.join(TRANSFORMERS)} of {type(pipe).__name__} are one and the same model: load each of them, or "
            "make the pipeline without transformer_2."
        )
    return models


def check_transformer(transformer: Any, adapter: Adapter, *, applied: bool = False) -> None:
    """Refuse a transformer that another cache works on, or whose attention or layers are not the stock ones.

    Our hooks may be on it, our processors where HSA is `applied`. Hooks that keep nothing from call to call, such as
    offloading, go with HSA; LoRA, quantization and blocks that are compiled one by one do too.

    Raises:
        ConfigError: with the reason.
    """
    if getattr(transformer, "is_cache_enabled", False):
        raise ConfigError(
            "Another cache is enabled on the transformer, and two caches would skip each other's work: call its "
            "disable_cache(), or hs.remove(pipe) to go without HSA."
        )
    if getattr(transformer, "_parallel_config", None) is not None:
        raise ConfigError(
            "diffusers' enable_parallelism was called on the transformer, which splits tokens that HSA counts: load "
            "the model without it and share the work by hs.apply(pipe, parallel=hs.ParallelConfig(...))."
        )
    _check_hooks(transformer)
    check_forward("The transformer", transformer)
    known = getattr(transformer, "_repeated_blocks", None) or ()
    for number, block in enumerate(map(_uncompiled, adapter.blocks(transformer))):
        if not any(kind.__name__ in known for kind in type(block).__mro__):
            raise ConfigError(
                f"{type(block).__name__} stands in place of the transformer's block {number}, as other caches do it: "
                f"HSA needs the stock {' or '.join(known)}, so take the other off first."
            )
        check_forward(f"Block {number}", block)
    _check_attention(transformer, adapter, applied)


def _check_attention(transformer: Any, adapter: Adapter, applied: bool) -> None:
    """Refuse processors that are neither stock nor ours, and attention that something else stands around."""
    for number, site in enumerate(adapter.sites(transformer)):
        check_forward(f"Attention {number}", site.attention)
        kind, processor = type(site.attention.processor), site.attention.processor
        if kind not in adapter.stock_processors and not (applied and isinstance(processor, CachedAttention)):
            stock = " or ".join(kind.__name__ for kind in adapter.stock_processors)
            raise ConfigError(f"{kind.__name__} is set as attention processor: HSA needs the stock one, {stock}.")


def _check_hooks(transformer: Any) -> None:
    """Refuse diffusers' hooks of other caches and of its context parallelism, also where no setting tells of them."""
    for path, name, hook in _hooks(transformer):
        if name == HOOK_NAME:
            continue
        if isinstance(hook, (ContextParallelSplitHook, ContextParallelGatherHook)):
            raise ConfigError(
                f"diffusers' context parallelism splits the tokens at {path}: load the model without it and share the "
                "work by hs.apply(pipe, parallel=hs.ParallelConfig(...))."
            )
        if hook._is_stateful:
            raise ConfigError(
                f"{type(hook).__name__} is on {path} and keeps state from call to call, as caches do: two caches would "
                f"skip each other's work, so remove the hook {name!r}, or call hs.remove(pipe) to go without HSA."
            )


def _hooks(transformer: Any) -> Iterator[tuple[str, str, Any]]:
    """(module, name, hook) of all hooks of diffusers in a model."""
    for path, module in transformer.named_modules():
        registry = vars(module).get("_diffusers_hook")
        for name, hook in registry.hooks.items() if registry is not None else ():
            yield path or "the transformer", name, hook


def check_forward(what: str, module: nn.Module) -> None:
    """Refuse a module whose forward is another's function, set on it or on its class; hooks around it do not count."""
    owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    stock = inspect.unwrap(vars(owner)["forward"])
    found = inspect.unwrap(module.forward)
    found = getattr(found, "__func__", found)
    if stock.__qualname__ == f"{owner.__qualname__}.forward" and found is stock:
        return
    name = getattr(stock if found is stock else found, "__qualname__", type(found).__name__)
    raise ConfigError(
        f"{what} has {name} in place of its own forward, as other caches do it: restore the forward of "
        f"{type(module).__name__}, or call hs.remove(pipe) to go without HSA."
    )


def _compiled(transformer: Any) -> bool:
    """Whether `torch.compile` wraps a module, its call, or its forward, beneath hooks too."""
    if any(kind.__module__.startswith("torch._dynamo") for kind in type(transformer).__mro__):
        return True
    if getattr(transformer, "_compiled_call_impl", None) is not None:
        return True
    return hasattr(getattr(transformer, "forward", None), "_torchdynamo_orig_callable")


def _uncompiled(block: Any) -> Any:
    """The module that `torch.compile` wraps, or the module itself."""
    return getattr(block, "_orig_mod", block)


def cut_into(run: Run, windows: Windows) -> None:
    """Let all runs to come cut long videos into windows.

    Raises:
        ConfigError: the windows move under a policy that leaves out tokens.
    """
    planner = run.own_planner
    if windows.roll and (planner is None or planner.policy.leaves_out()):
        policy = "a planner of your own" if planner is None else f"policy={run.config.policy!r}"
        raise ConfigError(
            f"Windows that roll do not work with {policy}: keys and values of skipped tokens belong to the window that "
            'they were computed in. Use windows that stand still, or policy="joint".'
        )
    if windows.roll and planner is not None and isinstance(planner.policy, JointPolicy):
        planner.policy = replace(planner.policy, whole=True)
    run.windows = windows


def check_text_alone(pipe: Any, adapter: Adapter) -> None:
    """Refuse windows for a pipeline that makes videos from an image: only the first of them would begin with it.

    Raises:
        ConfigError: it does.
    """
    kind, text = type(pipe), adapter.pipelines[0]
    if not any(base.__name__ == text for base in kind.__mro__):
        raise ConfigError(
            f"{kind.__name__} makes videos from an image, and windows are for videos from text alone: use {text}, or "
            "no windows."
        )


def rehearse(facts: ModelFacts, hsa: HSAConfig | None, request: ResolvedRequest, every: int | None = None) -> None:
    """Plan a run on the model's scheduler alone, and refuse what the run would refuse.

    Args:
        facts: of the model.
        hsa: the allocation; None, the stock pipeline, needs no plan.
        request: size and steps.
        every: steps between checkpoints, of a job.

    Raises:
        ConfigError: so few steps cannot meet the share, or solver or forecast do not fit the model.
    """
    if hsa is None:
        return
    adapter = adapter_named(facts.pipeline)
    kind, config = read_scheduler(facts)
    try:
        stock = getattr(diffusers, kind).from_config(config)
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"model {facts.name!r}: its scheduler {kind} cannot be made ({first_line(error)})") from error
    pipeline = SimpleNamespace(scheduler=stock, config=SimpleNamespace(boundary_ratio=facts.boundary_ratio))
    if request.strength is not None:  # as of a pipeline that changes a video
        pipeline.get_timesteps, pipeline.num_timesteps = None, request.num_inference_steps
    with shifted(pipeline, request.flow_shift):
        pipeline.scheduler = scheduler_for(hsa, pipeline.scheduler, adapter.solvers, facts.pipeline)
        _rehearse(pipeline, adapter, facts, hsa, request, every)


def _rehearse(
    pipeline: Any, adapter: Adapter, facts: ModelFacts, hsa: HSAConfig, request: ResolvedRequest, every: int | None
) -> None:
    adapter.set_timesteps(pipeline.scheduler, facts, request)
    run = Run(pipeline, adapter, hsa)
    windows = windows_for(facts, request)
    if windows is not None:
        cut_into(run, windows)
    if every is not None:
        run.save_every(every)
    grid = Grid(*facts.grid(request.width, request.height, request.num_frames))
    run.rehearse(grid._replace(frames=grid.frames + adapter.more_frames(request)))
