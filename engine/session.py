"""`apply` and `remove`: HSA on a stock diffusers pipeline, and off again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from diffusers.hooks import HookRegistry
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor

from ..errors import ConfigError
from ..hsa.config import HSAConfig
from ..parallel.config import ParallelConfig
from ..parallel.mesh import ParallelMesh
from .attention import AttentionCall
from .hook import HOOK_NAME, HSAHook
from .models import adapter_for
from .report import HSAReport, StepRecord
from .run import Run
from .sharding import Sharding
from .solvers import build_scheduler, correct_for, forecast_for, kind_of
from .state import pipeline_state, restore_pipeline, run_state


class HSASession:
    """HSA on one pipeline, from `apply` to `remove`; every run of the pipeline starts clean.

    Attributes:
        pipe: the pipeline.
        config: its settings.
        planner: who decides what is active.
        on_step: callables that get each `StepRecord` as its step completes; what they raise ends the run.
    """

    def __init__(self, pipe: Any, config: HSAConfig, planner: Any, sharding: Sharding | None = None) -> None:
        """Hook the pipeline's transformers; `apply` is the public way."""
        adapter = adapter_for(pipe)
        self.pipe, self.config = pipe, config
        for _, transformer in adapter.transformers(pipe):
            _check_transformer(transformer, adapter.attentions(transformer))
        self._stock_scheduler = self._own_scheduler = None
        scheduler = pipe.scheduler
        if config.solver is not None and _kind_or_none(scheduler) != config.solver:
            self._stock_scheduler, scheduler = scheduler, build_scheduler(config.solver, scheduler)
            self._own_scheduler = scheduler
        # Every run deduces both anew; what does not fit is better refused now.
        forecast_for(config, scheduler)
        correct_for(config, scheduler)
        if self._own_scheduler is not None:
            pipe.scheduler = self._own_scheduler
        self._run = Run(pipe, adapter, config, planner, sharding)
        self.planner = self._run.planner
        # Transformer, its rotary embedding, and (attention, its stock processor, ours) wherever we set one.
        self._saved: Mapping[str, Any] | None = None
        self._attached: list[tuple[Any, Any, list[tuple[Any, Any, Any]]]] = []
        for expert, transformer in adapter.transformers(pipe):
            self._attach(expert, transformer)

    @property
    def report(self) -> HSAReport:
        """What the current or last run did; grows while a run goes on."""
        return self._run.report()

    def full_report(self) -> HSAReport:
        """The report with what each rank did; every rank must ask for it."""
        return self._run.full_report()

    @property
    def on_step(self) -> list[Callable[[StepRecord], None]]:
        """Callables that get each step's record; append to it."""
        return self._run.on_step

    def tell(self, branch: str, text: Tensor, **rest: Any) -> None:
        """Say beforehand what the pipeline will ask the transformer in a guidance branch ("cond", "uncond").

        With a cfg degree above 1 each group of ranks can then evaluate its own branch from the first step on; without
        it, all groups evaluate all branches once, and learn it.

        Args:
            branch: its name.
            text: the embeddings that the transformer gets as ``encoder_hidden_states``.
            rest: other inputs that differ between branches, by the name of the transformer's argument.
        """
        self._run.told_ahead[branch] = (text, {"attention_kwargs": None} | rest)

    def save_every(self, every: int) -> None:
        """Plan runs for being saved by `state` after every `every`-th step, and resumed there bit for bit.

        Keys and values are not saved. A partial step that would read those of before is a full one, in every run alike;
        policies of whole steps (``joint``, ``steps``) have none. A run can be saved after any step; if it has partial
        steps, one more of them is then a full one.

        Raises:
            ConfigError: the planner has no `state` and `restore`.
        """
        self._run.save_every(every)

    def state(self, latents: Tensor) -> dict[str, Any]:
        """Return what `resume` needs; to be called in the pipeline's `callback_on_step_end`, with its latents.

        It consists of dicts, lists, numbers, strings, None and tensors, and is good until the callback returns.
        """
        return {"run": run_state(self._run), "pipeline": pipeline_state(self.pipe, latents)}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Let the next run go on where `state` was taken; the pipeline is called as it was then.

        It passes over the steps that are done without calling the model, and its callback must return what `passed`
        does. `state` is used up by it.

        Raises:
            ConfigError: the planner has no `state` and `restore`.
        """
        self._run.resume(state["run"])
        self._saved = state["pipeline"]

    def passed(self, step: int, latents: Tensor) -> dict[str, Tensor] | None:
        """Return None for a step that was computed, for one that a resumed run passed over what its callback returns.

        To be called in `callback_on_step_end`, with its step and latents; the last step that is passed over gets the
        saved latents.
        """
        if step >= self._run.resumed_at or self._saved is None:
            return None
        if step + 1 < self._run.resumed_at:
            return {}
        saved, self._saved = self._saved, None
        return {"latents": restore_pipeline(self.pipe, saved, latents.device)}

    def release(self) -> None:
        """Free the caches; the next run allocates them anew."""
        self._run.release()

    def detach(self) -> None:
        """Restore processors, hooks and scheduler, but nothing that the user set since; what `remove` does."""
        for transformer, rope, processors in self._attached:
            for attention, stock, ours in processors:
                if attention.processor is not ours:  # the user has set another since
                    continue
                # A kernel chosen since `apply` stays chosen.
                stock._attention_backend = ours._attention_backend
                attention.set_processor(stock)
            for module in (transformer, rope):
                registry = HookRegistry.check_if_exists_or_initialize(module)
                with _beneath_offloading(module):
                    registry.remove_hook(HOOK_NAME, recurse=False)
                registry.invalidate_child_registries_cache()
        self._attached.clear()
        if self._own_scheduler is not None and self.pipe.scheduler is self._own_scheduler:
            self.pipe.scheduler = self._stock_scheduler
        self._own_scheduler = None
        self._run.end()
        self._run.release()

    def _attach(self, expert: int, transformer: Any) -> None:
        """Install processors and hooks on one transformer."""
        adapter, call = self._run.adapter, AttentionCall()
        processors: list[tuple[Any, Any, Any]] = []
        for attention in adapter.attentions(transformer):
            stock = attention.processor
            ours = adapter.processor(call, stock)
            attention.set_processor(ours)
            processors.append((attention, stock, ours))
        layers = [attention for attention, _, _ in processors]
        texts = []
        for attention in adapter.text_attentions(transformer):
            stock = attention.processor
            texts.append(adapter.text_processor(stock))
            attention.set_processor(texts[-1])
            processors.append((attention, stock, texts[-1]))
        rope, rope_hook = adapter.rope(transformer)
        rope_hook.call = call
        hook = HSAHook(self._run, expert, layers, texts, rope_hook, call)
        hook.session = self
        for module, its_hook in ((rope, rope_hook), (transformer, hook)):
            registry = HookRegistry.check_if_exists_or_initialize(module)
            with _beneath_offloading(module):
                registry.register_hook(its_hook, HOOK_NAME)
            registry.invalidate_child_registries_cache()
        self._attached.append((transformer, rope, processors))


def apply(
    pipe: Any,
    config: HSAConfig | None = None,
    planner: Any = None,
    *,
    parallel: ParallelConfig | None = None,
    mesh: ParallelMesh | None = None,
    sharding: Sharding | None = None,
) -> HSASession:
    """Make a diffusers pipeline evaluate only the tokens that need it; the pipeline is used as before.

    A scheduler that is set later counts from the next run on: what is deduced, is deduced at the start of each.

    Args:
        pipe: a supported pipeline (`WanPipeline`, `WanImageToVideoPipeline`); a session it already has is
            replaced.
        config: how much to compute; half of the dense work by default.
        planner: an object of yours with ``plan(step, num_steps, sigma, num_tokens)`` that returns None for
            all tokens, an empty int64 tensor for none, or int64 indices [A] or [B, A]; instead of
            `StepPlanner`.
        parallel: share the work of every step among the ranks of a torch.distributed job: each rank applies the
            same settings to the same pipeline, calls it alike, with a generator of the same seed, and gets the
            same video.
        mesh: process groups for `parallel` that are there already (`ParallelMesh.from_xfuser()`); made anew without.
        sharding: mesh and attention of earlier sessions, used again; instead of `parallel`.

    Returns:
        The session, whose `report` says what was done.

    Raises:
        ConfigError: pipeline, scheduler, attention processors or settings do not fit.
    """
    config = config if config is not None else HSAConfig()
    if not isinstance(config, HSAConfig):
        raise ConfigError(f"config={config!r}: an HSAConfig is needed, e.g. HSAConfig(compute=0.5).")
    if planner is not None and not callable(getattr(planner, "plan", None)):
        raise ConfigError(f"{type(planner).__name__} has no method plan(step, num_steps, sigma, num_tokens).")
    if mesh is not None and parallel is None:
        raise ConfigError("A mesh without parallel=ParallelConfig(...): give the degrees that it was made for.")
    if sharding is None and parallel is not None and (parallel.world_size > 1 or mesh is not None):
        device = adapter_for(pipe).transformers(pipe)[0][1].device
        sharding = Sharding(mesh or ParallelMesh.create(parallel, device), parallel)
    remove(pipe)
    return HSASession(pipe, config, planner, sharding)


def remove(pipe: Any) -> None:
    """Take HSA off a pipeline, which is then the stock one bit for bit; does nothing to one without it."""
    for name in ("transformer", "transformer_2"):
        registry = getattr(getattr(pipe, name, None), "_diffusers_hook", None)
        hook = registry.get_hook(HOOK_NAME) if registry is not None else None
        if isinstance(hook, HSAHook):
            hook.session.detach()


@contextlib.contextmanager
def _beneath_offloading(module: Any) -> Iterator[None]:
    """Lay bare the forward that accelerate's offloading wraps, for hooks to be put there or taken away.

    A pipeline sets its offloading up anew at the end of every call. Whatever stood around it would be lost then.
    """
    around = module.forward if hasattr(module, "_hf_hook") else None
    if around is not None:
        module.forward = module._old_forward
    yield
    if around is not None:
        module._old_forward, module.forward = module.forward, around


def _check_transformer(transformer: Any, attentions: list[Any]) -> None:
    """Refuse a transformer whose self-attention is not stock, or which another cache already works on."""
    for attention in attentions:
        if type(attention.processor) is not WanAttnProcessor:
            raise ConfigError(
                f"{type(attention.processor).__name__} is set as attention processor: HSA needs "
                "the stock one, WanAttnProcessor."
            )
    if getattr(transformer, "is_cache_enabled", False):
        raise ConfigError(
            "Another cache is enabled on the transformer: call its disable_cache() before HSA is applied."
        )


def _kind_or_none(scheduler: Any) -> str | None:
    """Return the scheduler's kind, None for one that HSA cannot work with (and the config replaces)."""
    try:
        return kind_of(scheduler)
    except ConfigError:
        return None
