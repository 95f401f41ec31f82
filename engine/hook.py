"""The hook that makes a stock diffusers pipeline run HSA: it stands around the transformer's forward."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import StateManager
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from ..errors import ConfigError
from .attention import AttentionCall, TextKV
from .run import Branch, Run, Step, fresh_weight
from .tokens import Grid, Patch, gather_rows, pack, patchify, unpack, unpatchify

HOOK_NAME = "heterostep"
"""Name under which the hooks are registered with diffusers."""


class _Contexts(StateManager):
    """Receives what a pipeline says by ``transformer.cache_context(...)``; holds no state."""

    def __init__(self) -> None:
        super().__init__(None)

    @property
    def current(self) -> Any:
        """The running call's context, or None outside of one."""
        return self._context


class HSAHook(ModelHook):
    """Returns the velocity of all tokens while the model runs on the active ones: fresh rows over cached.

    The stock scheduler's step on that velocity is then the cached Euler update. A step at which everything is
    active calls the model on its untouched input; a step at which nothing is active does not call it at all.
    """

    _is_stateful = True

    def __init__(
        self, run: Run, expert: int, attentions: list[Any], texts: list[Any], rope: Any, call: AttentionCall
    ) -> None:
        """Serve one transformer.

        Args:
            run: shared by the hooks of all experts.
            expert: number of this transformer.
            attentions: the self-attention of every layer, with our processor set.
            texts: our processors of the cross-attention to the prompt.
            rope: the hook on the model's rotary embedding.
            call: shared by processors and `rope`.
        """
        super().__init__()
        self.run, self.expert = run, expert
        self.attentions, self.processors = attentions, [attention.processor for attention in attentions]
        self.texts, self.rope, self.call = texts, rope, call
        self.contexts = _Contexts()

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        """Diffusers calls this at the end of a pipeline call."""
        self.contexts.reset()
        self.run.end()
        return module

    def new_forward(
        self,
        module: Any,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Take and return what WanTransformer3DModel.forward does."""
        rest = {"attention_kwargs": attention_kwargs}
        if encoder_hidden_states_image is not None:
            rest["encoder_hidden_states_image"] = encoder_hidden_states_image  # type: ignore[assignment]
        context = self.contexts.current
        if context is None:  # not a denoising call of a pipeline
            return self.fn_ref.original_forward(
                hidden_states, timestep, encoder_hidden_states, return_dict=return_dict, **rest
            )
        run, patch = self.run, self.run.adapter.patch(module)
        grid = patch.grid_of(hidden_states)
        index, run.timestep = run.index_of(context.step_index), timestep
        if run.passed(context.name, index, hidden_states, grid, len(self.processors)):
            shape = (hidden_states.shape[0], module.config.out_channels, *hidden_states.shape[2:])
            velocity = hidden_states.new_zeros(()).expand(shape)  # costs no memory
            return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)
        step = run.enter(self.expert, context.name, index, hidden_states, grid)
        branch = run.branch(context.name, len(self.processors))
        args = (hidden_states, timestep, encoder_hidden_states, rest)
        try:
            if run.sharding is not None and step.count:
                velocity = self._shared(step, context.name, patch, grid, args)
            elif step.active is None:
                velocity = self._full(step, branch, patch, grid, args)
            elif step.count == 0:
                velocity = self._merged(step, branch, patch, grid, hidden_states)
            else:
                velocity = self._partial(step, branch, patch, grid, args)
        finally:
            self._unbind()
        run.leave(step)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def _full(self, step: Step, branch: Branch, patch: Patch, grid: Grid, args: tuple[Any, ...]) -> Tensor:
        """All tokens: the stock pass, of which only what later steps need is kept."""
        latents, timestep, text, rest = args
        self._bind_text(branch)
        if self.run.needs_kv(step.index):
            self._bind(branch, step)
        velocity = self.fn_ref.original_forward(latents, timestep, text, return_dict=False, **rest)[0]
        if not self.run.needs_velocity(step.index):
            return velocity
        self._write(step, branch, patchify(velocity, patch), grid)
        if self.run.forecast == "ab2" or self.run.correct:
            return unpatchify(branch.velocity.merged(step.sigma, step.sigma_next).to(velocity.dtype), patch, grid)
        return velocity

    def _partial(self, step: Step, branch: Branch, patch: Patch, grid: Grid, args: tuple[Any, ...]) -> Tensor:
        """Some tokens: the stock pass over a video that consists of the active ones."""
        latents, timestep, text, rest = args
        assert step.active is not None
        rows = gather_rows(patchify(latents, patch), step.active)
        packed = pack(rows, patch)
        if timestep.ndim == 2:
            timestep = gather_rows(timestep, step.active)
        self._bind(branch, step)
        self.rope.grid = grid
        out = self.fn_ref.original_forward(packed, timestep, text, return_dict=False, **rest)[0]
        self._write(step, branch, unpack(out, patch), grid)
        return self._merged(step, branch, patch, grid, out)

    def _shared(self, step: Step, name: str, patch: Patch, grid: Grid, args: tuple[Any, ...]) -> Tensor:
        """On many ranks: each evaluates its tokens, and its branch where the branches are shared too."""
        run, sharding = self.run, self.run.sharding
        assert sharding is not None
        latents, timestep, *told = args
        run.told[name] = tuple(told)
        if step.share is None:
            step.share = sharding.share(step.active, grid, run.batch_size)
        names, groups = run.adapter.branches(run.pipe), sharding.mesh.cfg.size
        ready = not step.velocities and all(other in run.told for other in names)
        if name not in step.velocities and groups > 1 and ready:
            for start in range(0, len(names), groups):
                turn = names[start : start + groups]
                own = sharding.own(turn)
                rows = self._pass(step, own, patch, grid, (latents, timestep, *run.told[own]), keep=True)
                for branch, gathered in zip(turn, sharding.gather_branches(rows, step.share), strict=True):
                    step.velocities[branch] = self._kept(step, branch, gathered, patch, grid)
        elif name not in step.velocities:
            # The run's first step, unless the engine told what the other branch will be asked: all ranks evaluate both.
            keep = name in names[sharding.mesh.cfg.rank :: groups]
            rows = self._pass(step, name, patch, grid, args, keep=keep)
            step.velocities[name] = self._kept(step, name, sharding.gather(rows, step.share), patch, grid)
        return step.velocities[name]

    def _pass(self, step: Step, name: str, patch: Patch, grid: Grid, args: tuple[Any, ...], *, keep: bool) -> Tensor:
        """Evaluate this rank's tokens: velocity rows [B, n or 1, D]; `keep` K/V if later steps need them."""
        latents, timestep, text, rest = args
        share, branch = step.share, self.run.branch(name, len(self.processors))
        assert share is not None
        rows = gather_rows(patchify(latents, patch), share.tokens)
        if timestep.ndim == 2:
            timestep = gather_rows(timestep, share.tokens)
        self._bind(branch, step)
        if not keep or (step.active is None and not self.run.needs_kv(step.index)):
            for processor in self.processors:
                processor.cache = None
        weight, self.call.active = self.call.weight, share.tokens
        self.call.attend = lambda q, k, v, cache: self.run.sharding.attend(share, q, k, v, cache, weight)  # type: ignore[union-attr]
        self.rope.grid = grid
        try:
            with self.run.sharding.timed():  # type: ignore[union-attr]
                out = self.fn_ref.original_forward(pack(rows, patch), timestep, text, return_dict=False, **rest)[0]
        finally:
            self._unbind()
        return unpack(out, patch)

    def _kept(self, step: Step, name: str, rows: Tensor, patch: Patch, grid: Grid) -> Tensor:
        """Store the gathered rows [B, A, D] of a branch; return the velocity [B, C, F, Y, X] of all its tokens."""
        run, branch = self.run, self.run.branch(name, len(self.processors))
        if step.active is None and not run.needs_velocity(step.index):
            return unpatchify(rows, patch, grid)
        self._write(step, branch, rows, grid)
        if step.active is None and run.forecast != "ab2" and not run.correct:
            return unpatchify(rows, patch, grid)
        return self._merged(step, branch, patch, grid, rows)

    def _merged(self, step: Step, branch: Branch, patch: Patch, grid: Grid, like: Tensor) -> Tensor:
        """Velocity [B, C, F, Y, X] of all tokens, of the type of `like`."""
        return unpatchify(branch.velocity.merged(step.sigma, step.sigma_next).to(like.dtype), patch, grid)

    def _write(self, step: Step, branch: Branch, rows: Tensor, grid: Grid) -> None:
        """Store fresh velocity rows [B, A, D]; the run's first ones fix the shape."""
        velocity = branch.velocity
        if step.index == self.run.first:
            velocity.start(rows.shape[0], grid.num_tokens, rows.shape[2], rows.dtype, rows.device)
        velocity.write(step.active, rows, step.sigma)

    def _bind(self, branch: Branch, step: Step) -> None:
        """Point the processors to the branch's caches for one pass.

        Raises:
            ConfigError: another processor was set since: it would see the active tokens alone.
        """
        for attention, processor, cache in zip(self.attentions, self.processors, branch.layers, strict=True):
            if attention.processor is not processor:
                raise ConfigError(
                    f"{type(attention.processor).__name__} was set as attention processor after hs.apply, and a step "
                    "that leaves out tokens needs ours: set the stock WanAttnProcessor and call hs.apply again, or "
                    'use policy="steps".'
                )
            processor.cache = cache
        self._bind_text(branch)
        self.call.cached, self.call.active = True, step.active
        if step.active is not None:
            run = self.run
            self.call.weight = fresh_weight(branch, step, run.kv_damping, run.kv_since, run.conditioned)

    def _bind_text(self, branch: Branch) -> None:
        """Point the processors of the cross-attention to what the branch knows of its prompt."""
        stores = branch.text.setdefault(self.expert, [TextKV() for _ in self.texts])
        for processor, store in zip(self.texts, stores, strict=True):
            processor.store = store

    def _unbind(self) -> None:
        """Make the processors stock again, also after an exception."""
        self.call.clear()
        for processor in self.texts:
            processor.store = None
        for processor in self.processors:
            processor.cache = None
