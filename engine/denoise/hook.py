"""The hook that makes a stock diffusers pipeline run HSA: it stands around the transformer's forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.hooks.hooks import StateManager
from torch import Tensor

from ...errors import ConfigError
from ..models import Site
from ..models import hook_registry as registry
from ..models.base import AttentionCall, TextKV
from .branch import Branch, Call, Step, fresh_weight, tiled
from .inputs import calling_pipeline, loop_values
from .run import Run
from .schedulers import kind_of, solver_of
from .windows import Blend, Windows


def named(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a module's forward, by name."""
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    return dict(list(bound.arguments.items())[1:])  # without self


class _Contexts(StateManager):
    """Receives what a pipeline says by ``transformer.cache_context(...)``; holds no state.

    Attributes:
        check: raises if the call that is about to come cannot be answered. The compiler has not begun by then.
    """

    def __init__(self) -> None:
        super().__init__(None)
        self.check: Callable[[], None] = lambda: None

    def set_context(self, context: Any) -> None:
        """Note the context of the next call, None after it."""
        if context is not None:
            self.check()
        super().set_context(context)

    @property
    def current(self) -> Any:
        """The running call's context, or None outside of one."""
        return self._context


Answer = tuple[Tensor, tuple[Tensor, ...]]
"""Velocity rows [batch, A, D] of video tokens, and whatever else a transformer returns."""


class HSAHook(registry.LastingHook):
    """Returns the velocity of all tokens while the model runs on the active ones: fresh rows over cached.

    The stock scheduler's step on that velocity is then the cached Euler update. A step at which everything is
    active calls the model on its untouched input; a step at which nothing is active does not call it at all.
    """

    _is_stateful = True

    def __init__(self, run: Run, expert: int, sites: Sequence[Site], texts: Sequence[Any], call: AttentionCall) -> None:
        """Serve one transformer.

        Args:
            run: shared by the hooks of all experts.
            expert: number of this transformer.
            sites: where tokens meet, with our processors set.
            texts: our processors of the cross-attention to the prompt.
            call: shared by processors and by the hooks inside the model.
        """
        super().__init__()
        self.run, self.expert = run, expert
        self.sites, self.processors = sites, [site.attention.processor for site in sites]
        self.texts, self.call = texts, call
        self.contexts = _Contexts()

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        """Diffusers calls this at the end of a pipeline call."""
        self.contexts.reset()
        self.run.end()
        return module

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Take and return what the transformer's forward does, without a context as the stock one does it."""
        context, arguments = self.contexts.current, named(module, args, kwargs)
        name = self._unsaid(arguments) if context is None else context.name
        if name is None:  # not a denoising call of a pipeline
            return self.fn_ref.original_forward(*args, **kwargs)
        run, adapter = self.run, self.run.adapter
        expert = self._follow_caller(module)
        return_dict = arguments.pop("return_dict", True)
        units, grid = adapter.units(run.pipe, name), adapter.grid(module, arguments)
        call = Call(module=module, name=name, expert=expert, arguments=arguments, units=units, grid=grid)
        index, first = run.index_of(None if context is None else context.step_index), call.unit(0)
        latents, run.timestep = first["hidden_states"], first["timestep"]
        if run.passed(call, index, latents, len(self.processors)):
            out = adapter.nothing(module, arguments)
        else:
            out = self._evaluate(run.enter(call, index, latents), call)
            run.leave()
        return adapter.output(*out) if return_dict else out

    def _unsaid(self, arguments: Mapping[str, Any]) -> str | None:
        """The branch of a call by a pipeline that names none, told by its prompt; None: it is not by such a one."""
        adapter, caller = self.run.adapter, calling_pipeline()
        if not any(kind.__name__ in adapter.silent for kind in type(caller).__mro__):
            return None
        text, step = arguments["encoder_hidden_states"].data_ptr(), self.run.step
        own = zip(adapter.branches(caller), loop_values(caller, adapter.embeds), strict=False)
        names = [name for name, value in own if value.data_ptr() == text] or adapter.branches(caller)
        # One prompt may be given for several branches, which then come in their order.
        entered = set() if step is None else step.entered
        return next((name for name in names if name not in entered), names[0])

    def _follow_caller(self, module: Any) -> int:
        """Let the run follow the pipeline that calls, and return which expert `module` is there.

        Raises:
            ConfigError: another pipeline than HSA was applied to, for which it would not do the same.
        """
        run, caller = self.run, calling_pipeline()
        if caller is None:
            raise ConfigError(
                "The transformer was called under cache_context outside of a pipeline's call, so that noise levels and "
                "guidance are unknown: call the pipeline, or hs.remove it first."
            )
        if caller is run.own:
            run.follow(caller)
            return self.expert
        name, known = type(caller).__name__, run.adapter.recognises(caller)
        experts = {id(model): expert for expert, model in run.adapter.transformers(caller)} if known else {}
        if caller is not run.pipe:
            if not known:
                raise ConfigError(
                    f"{name} called the transformer of a pipeline with HSA, and is not supported: HSA works with "
                    f"{', '.join(run.adapter.pipelines)}. hs.remove that pipeline first, or give {name} a transformer "
                    "of its own."
                )
            hooks = [registry.registered(model) for _, model in run.adapter.transformers(caller)]
            if id(module) not in experts or any(getattr(hook, "run", None) is not run for hook in hooks):
                raise ConfigError(
                    f"{name} shares only some of its transformers with the pipeline that has HSA: hs.apply to this "
                    f"{name} itself."
                )
            solver = solver_of(run.config)
            if solver is not None and kind_of(caller.scheduler) != solver:
                raise ConfigError(
                    f"solver={solver!r} was applied to another pipeline with the same transformer, and this "
                    f"{name} has {type(caller.scheduler).__name__}: hs.apply to this {name} itself."
                )
            run.follow(caller)
        return experts[id(module)]

    def _evaluate(self, step: Step, call: Call) -> tuple[Tensor, ...]:
        """What the transformer is to answer to a call."""
        windows = self.run.windows
        try:
            if step.count == 0:
                return self._merged(step, call)
            if windows is not None and windows.cut(call.grid.frames):
                return self._kept(step, call, self._blended(step, call, windows))
            if self.run.sharding is not None:
                self.run.sharding.deal(1)
            if self.run.sharding is None and step.active is None:
                return self._full(step, call)
            return self._kept(step, call, self._answer(step, call))
        finally:
            self._unbind()

    def _answer(self, step: Step, call: Call) -> Answer:
        """Evaluate the active tokens, alone or together with other ranks."""
        return self._alone(step, call) if self.run.sharding is None else self._shared(step, call)

    def _blended(self, step: Step, call: Call, windows: Windows) -> Answer:
        """The same for a long video: each window by itself; what they answer is blended."""
        adapter, module, sharding = self.run.adapter, call.module, self.run.sharding
        tokens, parts = call.grid.height * call.grid.width, windows.of(call.grid.frames, step.index)
        beside = [adapter.beside(module, call.arguments, window.start, window.stop) for window in parts]
        blend = Blend(parts, (call.grid.frames, tokens), step.active, beside, anchor=windows.anchor)
        dealt = [range(len(parts))] if sharding is None else sharding.deal(len(parts))
        for number in dealt[0 if sharding is None else sharding.mesh.windows.rank]:
            window, active = parts[number], blend.active(parts[number])
            if active is not None and not len(active):
                if not beside[number]:
                    continue
                active = active.new_zeros(1)  # what goes with the video is evaluated at every step: it needs a token
            self._unbind()
            part = step.inside(window, active, (window.stop - window.start) * tokens)
            blend.add(window, *self._answer(part, call.inside(window, windows, adapter)))
        if blend.rows is None:  # the windows of this group of ranks have no active tokens
            blend.start(*adapter.rows(module, adapter.nothing(module, call.arguments)))
        if sharding is not None:
            step.sizes = sharding.sizes([high - low for low, high in blend.places], dealt)
            sharding.join(blend, dealt)
        assert blend.rows is not None
        return blend.rows.to(call.dtype), tuple(other.to(call.dtype) for other in blend.others)

    def _full(self, step: Step, call: Call) -> tuple[Tensor, ...]:
        """All tokens: the stock pass, of which only what later steps need is kept."""
        branch = self._branch(call.name)
        self._bind_text(branch, call)
        if self.run.needs_kv(step.index):
            self._bind(branch, step, call, None, len(call.units))
        out: tuple[Tensor, ...] = self.fn_ref.original_forward(**call.arguments, return_dict=False)
        if not self.run.needs_velocity(step.index):
            return out
        self._write(step, call, self.run.adapter.rows(call.module, out))
        if self.run.forecast == "ab2":
            return self._merged(step, call)
        return out

    def _alone(self, step: Step, call: Call) -> Answer:
        """On one rank: the stock pass over the active tokens alone."""
        adapter, active, arguments = self.run.adapter, tiled(step.active, len(call.units)), call.arguments
        branch = self._branch(call.name)
        self._bind_text(branch, call)
        if active is not None or self.run.needs_kv(step.index):
            self._bind(branch, step, call, active, len(call.units))
        if active is not None:
            arguments = adapter.subset(call.module, arguments, active)
        return adapter.rows(call.module, self.fn_ref.original_forward(**arguments, return_dict=False))

    def _shared(self, step: Step, call: Call) -> Answer:
        """On many ranks: each evaluates its tokens, and its guidance units where these are shared too."""
        run, sharding = self.run, self.run.sharding
        assert sharding is not None
        if sharding.mesh.cfg.size == 1:
            rows, others = self._pass(step, call.name, call, call.arguments, keep=True)
            gathered = sharding.gather(rows, self._share(step, call, len(call.units)))
            return gathered, sharding.same(others)
        for i, unit in enumerate(call.units):
            run.told[unit] = {k: v for k, v in call.unit(i).items() if k not in run.adapter.moving}
        if not all(unit in step.answers for unit in call.units):
            self._share_units(step, call)
        answers = [step.answers.pop(unit) for unit in call.units]
        others = tuple(torch.cat(parts) for parts in zip(*(others for _, others in answers), strict=True))
        return torch.cat([rows for rows, _ in answers]), others

    def _share_units(self, step: Step, call: Call) -> None:
        """Evaluate the guidance units of a call, and those of later ones where it is known what they will ask."""
        run, sharding = self.run, self.run.sharding
        assert sharding is not None
        order = [unit for name in run.adapter.branches(run.pipe) for unit in run.adapter.units(run.pipe, name)]
        ahead = not step.alone and all(unit in run.told for unit in order)
        todo = order if ahead else list(call.units)
        groups, share = sharding.mesh.cfg.size, self._share(step, call, 1)
        moving = {name: value for name, value in call.unit(0).items() if name in run.adapter.moving}
        for start in range(0, len(todo), groups):
            turn = todo[start : start + groups]
            if len(turn) == groups and order.index(turn[0]) % groups == 0:
                own = sharding.own(turn)
                rows, others = self._pass(step, own, call, run.told[own] | moving, keep=True)
                gathered = sharding.gather_branches(rows, share), sharding.same_branches(others)
                step.answers |= dict(zip(turn, zip(*gathered, strict=True), strict=True))
                continue
            # The run's first step, unless the engine told what another branch will be asked: all ranks evaluate it.
            for unit in turn:
                keep = order.index(unit) % groups == sharding.mesh.cfg.rank
                rows, others = self._pass(step, unit, call, run.told[unit] | moving, keep=keep)
                step.answers[unit] = sharding.gather(rows, share), sharding.same(others)

    def _share(self, step: Step, call: Call, units: int) -> Any:
        """This rank's part of a step, for passes with so many units in the batch."""
        sharding = self.run.sharding
        assert sharding is not None
        if units not in step.shares:
            active = tiled(step.active, units)
            step.shares[units] = sharding.share(active, call.grid, units * self.run.batch_size)
        return step.shares[units]

    def _pass(self, step: Step, name: str, call: Call, arguments: Mapping[str, Any], *, keep: bool) -> Answer:
        """Evaluate this rank's tokens: rows [batch, n or 1, D] and all else; `keep` K/V if later steps need them."""
        run, sharding, branch = self.run, self.run.sharding, self._branch(name)
        assert sharding is not None
        units = arguments["hidden_states"].shape[0] // run.batch_size
        share = self._share(step, call, units)
        self._bind(branch, step, call, share.tokens, units)
        if not keep or (step.active is None and not run.needs_kv(step.index)):
            for processor in self.processors:
                processor.cache = None
        weight = self.call.weight
        self.call.attend = lambda q, k, v, cache, everywhere: sharding.attend(share, q, k, v, cache, weight, everywhere)
        if run.windows is not None and call.window is not None:  # others may have told of another window's prompt
            arguments = run.windows.worded(arguments, [name] if units == 1 else call.units, call.window)
        arguments = run.adapter.subset(call.module, arguments, share.tokens)
        try:
            with sharding.timed():
                out = self.fn_ref.original_forward(**arguments, return_dict=False)
        finally:
            self._unbind()
        return run.adapter.rows(call.module, out)

    def _kept(self, step: Step, call: Call, answer: Answer) -> tuple[Tensor, ...]:
        """Store the gathered rows [batch, A, D] of a branch; return the velocity of all its tokens."""
        run = self.run
        if step.active is None and not run.needs_velocity(step.index):
            return run.adapter.answer(call.module, call.grid, *answer)
        self._write(step, call, answer)
        if step.active is None and run.forecast != "ab2":
            return run.adapter.answer(call.module, call.grid, *answer)
        return self._merged(step, call)

    def _merged(self, step: Step, call: Call) -> tuple[Tensor, ...]:
        """Velocity of all tokens, fresh or remembered, as the transformer would return it."""
        branch = self._branch(call.name)
        rows, *others = (
            cache.merged(step.sigma, step.sigma_next).to(call.dtype) for cache in (branch.velocity, *branch.others)
        )
        return self.run.adapter.answer(call.module, call.grid, rows, tuple(others))

    def _write(self, step: Step, call: Call, answer: Answer) -> None:
        """Store fresh rows [batch, A, D] and all else; a branch's first ones fix the shapes."""
        branch, (rows, others) = self._branch(call.name), answer
        caches = branch.velocities(len(others))
        if not branch.begun:
            branch.begun = True
            sizes = (call.grid.num_tokens, *(other.shape[1] for other in others))
            for cache, values, size in zip(caches, (rows, *others), sizes, strict=True):
                cache.start(values.shape[0], size, values.shape[2], values.dtype, values.device)
        branch.velocity.write(tiled(step.active, len(call.units)), rows, step.sigma)
        for cache, values in zip(branch.others, others, strict=True):
            cache.write(None, values, step.sigma)

    def _branch(self, name: str) -> Branch:
        return self.run.branch(name, len(self.processors))

    def _bind(self, branch: Branch, step: Step, call: Call, active: Tensor | None, units: int) -> None:
        """Point the processors to the branch's caches for one pass over the tokens `active`, None for all.

        Raises:
            ConfigError: another processor was set since: it would see the active tokens alone.
        """
        caches = branch.caches(0 if call.window is None else call.window.number)
        for site, processor, cache in zip(self.sites, self.processors, caches, strict=True):
            if site.attention.processor is not processor:
                stock = " or ".join(kind.__name__ for kind in self.run.adapter.stock_processors)
                raise ConfigError(
                    f"{type(site.attention.processor).__name__} was set as attention processor after hs.apply, and a "
                    f"step that leaves out tokens needs ours: set the stock {stock} and call hs.apply again, or use "
                    'policy="steps".'
                )
            processor.cache = cache
        self._bind_text(branch, call)
        self.call.cached, self.call.active, self.call.grid = True, active, call.grid
        if step.active is not None:
            # Tokens were evaluated at the same times in all units, of this and of every other branch.
            clock, run, whole = self._branch(call.name).velocity.clock, self.run, step.part_of or step
            rows = tiled(whole.active, units), units * run.batch_size
            weight = fresh_weight(clock, step.sigma, *rows, run.kv_damping, run.kv_since, run.conditioned)
            if weight is not None and call.window is not None:
                tokens = call.grid.height * call.grid.width
                weight = weight[:, call.window.start * tokens : call.window.stop * tokens]
            self.call.weight = weight

    def _bind_text(self, branch: Branch, call: Call) -> None:
        """Point the processors of the cross-attention to what the branch knows of its prompt."""
        windows, window = self.run.windows, call.window
        number = None if windows is None or window is None else windows.text(window)
        stores = branch.text.setdefault((call.expert, number), [TextKV() for _ in self.texts])
        for processor, store in zip(self.texts, stores, strict=True):
            processor.store = store

    def _unbind(self) -> None:
        """Make the processors stock again, also after an exception."""
        self.call.clear()
        for processor in self.texts:
            processor.store = None
        for processor in self.processors:
            processor.cache = None
