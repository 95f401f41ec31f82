"""`apply` and `remove`: HSA on a stock diffusers pipeline, and off again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...hsa.config import HSAConfig
from ...hsa.planner import check_resumable
from ...parallel.config import ParallelConfig
from ...parallel.mesh import ParallelMesh
from ..models import adapter_for
from ..models import hook_registry as registry
from ..models.base import AttentionCall
from ..report import HSAReport, StepRecord, plain_step, step_from
from .branch import CHANGED, Step
from .checks import (
    TRANSFORMERS,
    check_distinct,
    check_forward,
    check_text_alone,
    check_transformer,
    cut_into,
    refuse_compiled,
)
from .hook import HSAHook
from .plan import take_counts
from .run import Run
from .schedulers import check_noise, kind_of, restore_scheduler, scheduler_for, scheduler_state
from .windows import Windows
from .work_split import Sharding, random_state


class HSASession(registry.Uncopied):
    """HSA on one pipeline, from `apply` to `remove`; every run of the pipeline starts clean.

    Attributes:
        pipe: the pipeline.
        config: its settings.
        planner: who decides what is active.
        on_step: callables that get each `StepRecord` as its step completes; what they raise ends the run.
    """

    def __init__(
        self,
        pipe: Any,
        config: HSAConfig,
        planner: Any,
        sharding: Sharding | None = None,
        windows: Windows | None = None,
    ) -> None:
        """Hook the pipeline's transformers; `apply` is the public way."""
        adapter = adapter_for(pipe)
        self.pipe, self.config = pipe, config
        for transformer in check_distinct(pipe):
            check_transformer(transformer, adapter)
        self._stock_scheduler = self._own_scheduler = None
        scheduler = scheduler_for(config, pipe.scheduler, adapter.solvers, type(pipe).__name__)
        if scheduler is not pipe.scheduler:
            self._stock_scheduler, self._own_scheduler = pipe.scheduler, scheduler
        if planner is not None:  # whatever its plans are
            check_noise(scheduler)
        self._run = Run(pipe, adapter, config, planner, sharding, self._check_run)
        if windows is not None:
            check_text_alone(pipe, adapter)
            cut_into(self._run, windows)
        self.planner = self._run.planner
        self._saved: Mapping[str, Any] | None = None
        # Modules with a hook of ours, and (attention, its stock processor, ours) wherever we set one.
        self._attached: list[tuple[list[Any], list[tuple[Any, Any, Any]]]] = []
        self._models = [getattr(pipe, name, None) for name in TRANSFORMERS]
        self._callback_inputs = vars(pipe).get("_callback_tensor_inputs")
        try:
            for expert, transformer in adapter.transformers(pipe):
                self._attach(expert, transformer)
            if self._own_scheduler is not None:
                pipe.scheduler = self._own_scheduler
            if adapter.step_tensors:  # a callback may ask for them too
                pipe._callback_tensor_inputs = [*pipe._callback_tensor_inputs, *adapter.step_tensors]
            pipe._heterostep_session = self
        except BaseException:
            self.detach()
            raise

    @property
    def report(self) -> HSAReport:
        """What the current or last run did; grows during a run.

        Raises:
            ConfigError: the pipeline has another transformer since, of whose runs nothing is known.
        """
        if self._attached:
            self._check_models()
        return self._run.report()

    @property
    def step_tensors(self) -> tuple[str, ...]:
        """Names of what the pipeline carries from step to step besides latents; `state` and `passed` need it."""
        return self._run.adapter.step_tensors

    @property
    def ahead(self) -> int | None:
        """Tokens that the steps to come will evaluate, as far as planned, where a promised quality makes the plan."""
        run = self._run
        if self.config.quality is None or run.counts is None or not run.records:
            return None
        return sum(run.counts[run.records[-1].step + 1 :])

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
            branch: its name, where several are stacked in one call that of the guidance unit.
            text: the embeddings that the transformer gets as ``encoder_hidden_states``.
            rest: other inputs that differ between branches, by the name of the transformer's argument.
        """
        self._run.told_ahead[branch] = {"encoder_hidden_states": text, "attention_kwargs": None, **rest}

    def save_every(self, every: int) -> None:
        """Plan runs for being saved by `state` after every `every`-th step, and resumed there bit for bit.

        Keys and values are not saved. A partial step that would read those of before is a full one, in every run alike;
        policies of whole steps (``joint``, ``steps``) have none. A run can be saved after any step; if it has partial
        steps, one more of them is then a full one.

        Raises:
            ConfigError: the planner has no `state` and `restore`.
        """
        self._run.save_every(every)

    def state(self, latents: Tensor, **others: Tensor) -> dict[str, Any]:
        """Return what `resume` needs; to be called in the pipeline's `callback_on_step_end`, with its latents.

        `others` are the `step_tensors`, which the callback is given where it asks for them. The state has dicts,
        lists, numbers, strings, None and tensors, and is good until the callback returns.

        Raises:
            ConfigError: one of the `step_tensors` is not given, or their scheduler has a history out of reach.
        """
        self._check_others(others)
        return {"run": run_state(self._run), "pipeline": pipeline_state(self._run.pipe, latents, others)}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Let the next run resume where `state` was taken; the pipeline is called as it was then.

        It passes over the steps that are done without calling the model, and its callback must return what `passed`
        does. `state` is used up by it.

        Raises:
            ConfigError: the planner has no `state` and `restore`.
        """
        self._run.resume(state["run"], restore_run)
        self._saved = state["pipeline"]

    def passed(self, step: int, latents: Tensor, **others: Tensor) -> dict[str, Tensor] | None:
        """Return None for a step that was computed, for one that a resumed run passed over what its callback returns.

        To be called in `callback_on_step_end`, with its step and tensors, as for `state`; the last step that is passed
        over gets the saved latents, and `others` their saved values in place.
        """
        if step >= self._run.resumed_at or self._saved is None:
            return None
        if step + 1 < self._run.resumed_at:
            return {}
        self._check_others(others)
        saved, self._saved = self._saved, None
        return {"latents": restore_pipeline(self._run.pipe, saved, latents.device, others)}

    def release(self) -> None:
        """Free the caches; the next run allocates new ones."""
        self._run.release()

    def detach(self) -> None:
        """Restore processors, hooks and scheduler, but nothing that the user set since; what `remove` does."""
        for modules, processors in self._attached:
            for attention, stock, ours in processors:
                if attention.processor is not ours:  # the user has set another since
                    continue
                for name in ("_attention_backend", "_parallel_config"):  # what was chosen since `apply` stays chosen
                    if getattr(stock, name) is not getattr(ours, name):
                        setattr(stock, name, getattr(ours, name))
                attention.set_processor(stock)
            for module in modules:
                if isinstance(hook := registry.registered(module), HSAHook):
                    hook.contexts.reset()
                registry.remove(module)
        self._attached.clear()
        if self._own_scheduler is not None and self.pipe.scheduler is self._own_scheduler:
            self.pipe.scheduler = self._stock_scheduler
        self._own_scheduler = None
        if vars(self.pipe).get("_heterostep_session") is self:
            del self.pipe._heterostep_session
            if self.step_tensors:
                vars(self.pipe).pop("_callback_tensor_inputs", None)
                if self._callback_inputs is not None:
                    self.pipe._callback_tensor_inputs = self._callback_inputs
        try:
            self._run.end()
        finally:
            self._run.release()

    def _check_models(self) -> None:
        """Refuse a pipeline whose transformers were replaced, are compiled, or do not call our hooks."""
        refuse_compiled(self.pipe)
        models = [getattr(self.pipe, name, None) for name in TRANSFORMERS]
        found = [model for model in models if model is not None]
        replaced = any(now is not then for now, then in zip(models, self._models, strict=True))
        if replaced or not all(isinstance(registry.registered(model), HSAHook) for model in found):
            raise ConfigError(
                f"A transformer of {type(self.pipe).__name__} was replaced after hs.apply, or its hook was removed, "
                "so HSA is not on it any more: call hs.apply(pipe) again, or hs.remove(pipe) to run without HSA."
            )
        for model in found:
            check_forward("The transformer", model)

    def _check_run(self) -> None:
        """Check again what `apply` checked: users may have changed the pipeline since."""
        self._check_models()
        adapter = self._run.adapter
        models = [model for model in self._models if model is not None]
        for transformer, (modules, processors) in zip(models, self._attached, strict=True):
            check_transformer(transformer, adapter, applied=True)
            present, ours = set(transformer.modules()), {attention for attention, _, _ in processors}
            hooked = all(module in present and registry.registered(module) for module in modules)
            if not hooked or not all(site.attention in ours for site in adapter.sites(transformer)) or ours - present:
                raise ConfigError(
                    f"Hooks or layers of the {type(transformer).__name__} were removed or replaced after hs.apply, "
                    "so HSA is not on the new ones: call hs.apply(pipe) again."
                )

    def _check_others(self, others: Mapping[str, Tensor]) -> None:
        """Refuse what would be saved, or put back, in part only."""
        absent = [name for name in self.step_tensors if name not in others]
        if absent:
            raise ConfigError(
                f"{', '.join(absent)} of {type(self.pipe).__name__} must be saved too: ask for it in "
                "callback_on_step_end_tensor_inputs, and pass on what the callback gets."
            )
        pipe = self._run.pipe
        if others and kind_of(pipe.scheduler) != "euler":
            raise ConfigError(
                f"{type(pipe).__name__} steps {', '.join(others)} by a copy of its scheduler, and a history there "
                "cannot be saved: run without checkpoints, or with FlowMatchEulerDiscreteScheduler."
            )

    def _attach(self, expert: int, transformer: Any) -> None:
        """Install processors and hooks on one transformer."""
        adapter, call = self._run.adapter, AttentionCall()
        sites, processors = adapter.sites(transformer), []
        for site in sites:
            stock = site.attention.processor
            processors.append((site.attention, stock, adapter.processor(call, stock, everywhere=site.everywhere)))
        for attention in adapter.text_attentions(transformer):
            processors.append((attention, attention.processor, adapter.text_processor(attention.processor)))
        modules: list[Any] = []
        self._attached.append((modules, processors))  # first, so that what fails from here on is undone
        for attention, _, ours in processors:
            attention.set_processor(ours)
        texts = [ours for _, _, ours in processors[len(sites) :]]
        hook = HSAHook(self._run, expert, sites, texts, call)
        hook.session, hook.contexts.check = self, self._check_models
        for module, its_hook in [*adapter.hooks(transformer, call), (transformer, hook)]:
            registry.register(module, its_hook)
            modules.insert(0, module)


def apply(
    pipe: Any,
    config: HSAConfig | None = None,
    planner: Any = None,
    *,
    parallel: ParallelConfig | None = None,
    mesh: ParallelMesh | None = None,
    sharding: Sharding | None = None,
    windows: Windows | None = None,
) -> HSASession:
    """Make a diffusers pipeline evaluate only the tokens that need it; the pipeline is used as before.

    A scheduler that is set later counts from the next run on: what is deduced, is deduced at the start of each.

    Args:
        pipe: a supported pipeline (docs/models.md lists them); a session it already has is replaced.
        config: how much to compute; half of the dense work by default.
        planner: an object of yours with ``plan(step, num_steps, sigma, num_tokens)`` that returns None for
            all tokens, an empty int64 tensor for none, or int64 indices [A] or [B, A]; instead of
            `StepPlanner`.
        parallel: share the work of every step among the ranks of a torch.distributed job: each rank applies the
            same settings to the same pipeline, calls it alike, with a generator of the same seed, and gets the
            same video.
        mesh: process groups for `parallel` that exist already (`ParallelMesh.from_xfuser()`); None creates new ones.
        sharding: mesh and attention of earlier sessions, used again; instead of `parallel`.
        windows: how videos longer than a window are cut; None: the model sees them whole.

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
    refuse_compiled(pipe)
    if sharding is None and parallel is not None and (parallel.world_size > 1 or mesh is not None):
        device = adapter_for(pipe).transformers(pipe)[0][1].device
        sharding = Sharding(mesh or ParallelMesh.create(parallel, device), parallel)
    remove(pipe)
    return HSASession(pipe, config, planner, sharding, windows)


def remove(pipe: Any) -> None:
    """Take HSA off a pipeline, which is then the stock one bit for bit; does nothing to one without it.

    Whatever happened since `apply`: what others have put on the pipeline stays, models that it had then are stock too.
    """
    hooks = [registry.registered(getattr(pipe, name, None)) for name in TRANSFORMERS]
    sessions = [hook.session for hook in hooks if isinstance(hook, HSAHook)]
    for session in (getattr(pipe, "_heterostep_session", None), *sessions):
        if session is not None:
            session.detach()


# The state of a run, apart from keys and values, is plain data: dicts with string keys, lists, numbers, strings, None
# and tensors, so that it can be written down (`checkpoint`). Its tensors are those of the run, not copies: it is good
# until the next step begins. On many ranks all of it is alike on each of them.


def run_state(run: Run) -> dict[str, Any]:
    """Return the state of a run whose last step is done.

    Raises:
        ConfigError: the planner has no `state` and `restore`.
    """
    check_resumable(run.planner)
    assert run.step is not None and run.step.recorded, "a step is going on"
    step = run.step.index + 1
    return {
        "step": step,
        "sigmas": run.sigmas,
        "grid": list(run.grid),
        "batch_size": run.batch_size,
        # What made the plan. Full steps that only resuming took, or a change of inputs, were not in it.
        "forced": [[i, reason] for i, reason in run.forced.items() if reason not in ("resume", CHANGED)],
        "restarts": [i for i in sorted(run.restarts) if i >= step],
        "counts": run.counts,
        "records": [plain_step(record) for record in run.records],
        "evaluations": run.evaluations,
        "branches": {name: branch.velocity.state() for name, branch in run.branches.items()},
        "others": {name: [other.state() for other in branch.others] for name, branch in run.branches.items()},
        "planner": run.planner.state(),
        "replays": run.replays.state(),
    }


def restore_run(run: Run, state: Mapping[str, Any], num_sites: int, device: torch.device) -> Step:
    """Put a state back into a run that has begun; the first step that would read K/V of before becomes a full one.

    Args:
        run: begun with the plan of the state.
        state: from `run_state`.
        num_sites: of the transformer.
        device: of the latents.

    Returns:
        The step that the run stands at, done: the first of those that are passed over.

    Raises:
        ConfigError: the run is of another size, or plans other steps.
    """
    size = [state["sigmas"], state["grid"], state["batch_size"]]
    if size != [run.sigmas, list(run.grid), run.batch_size]:
        raise ConfigError(
            f"the saved run has {len(state['sigmas']) - 1} steps of {state['batch_size']} x {state['grid']} tokens, "
            f"this one {run.num_steps} of {run.batch_size} x {list(run.grid)}, or other noise levels: resume with the "
            "settings it was started with"
        )
    if run.own_planner is not None and run.own_planner.adapts:
        take_counts(run, state["counts"])
    if run.counts != state["counts"]:
        raise ConfigError("the saved run was planned by another version or planner: start it from the beginning")
    run.branches.clear()
    for name, velocity in state["branches"].items():
        branch, others = run.branch(name, num_sites), state["others"][name]
        for cache, content in zip(branch.velocities(len(others)), (velocity, *others), strict=True):
            cache.restore(content, device)
        branch.begun = branch.velocity.last is not None
    run.planner.restore(state["planner"], device)
    run.replays.restore(state["replays"], device)
    run.records = [step_from(record) for record in state["records"]]
    run.evaluations = state["evaluations"].to(device)
    run.resumed_at = at = state["step"]
    reads = run.reads_kv(at)
    if reads is not None:
        run.forced[reads] = "resume"
    run.restarts |= {at}
    return Step(
        index=0, sigma=run.sigmas[0], sigma_next=run.sigmas[1], expert=0, active=None, count=0, reason="passed",
        started=0.0, recorded=True,
    )  # fmt: skip


def pipeline_state(pipe: Any, latents: Tensor, others: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what a pipeline carries from step to step: latents, `others`, the scheduler's history, random numbers."""
    rng = {"cpu": random_state(torch.device("cpu"))}
    if latents.device.type == "cuda":
        rng["cuda"] = random_state(latents.device)
    scheduler = scheduler_state(pipe.scheduler)
    return {"latents": latents, "others": dict(others), "scheduler": scheduler, "rng": rng}


def restore_pipeline(pipe: Any, state: Mapping[str, Any], device: torch.device, others: Mapping[str, Tensor]) -> Tensor:
    """Put a `pipeline_state` back, and return the latents, which go into the pipeline by its callback.

    Pipelines take nothing else from a callback, so that `others` are overwritten in place.
    """
    restore_scheduler(pipe.scheduler, state["scheduler"], device)
    torch.set_rng_state(state["rng"]["cpu"])
    if device.type == "cuda" and "cuda" in state["rng"]:
        torch.cuda.set_rng_state(state["rng"]["cuda"], device)
    for name, tensor in others.items():
        tensor.copy_(state["others"][name])
    latents: Tensor = state["latents"].to(device)
    return latents
