"""The state of one denoising run: where it stands, what is active, and every cache. Owned by the session."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...hsa.cache import gather_rows, write_rows
from ...hsa.config import HSAConfig
from ...hsa.planner import StepPlanner, check_resumable
from ...hsa.policies import JointPolicy
from ..models import Adapter
from ..models.base import Grid
from ..report import HSAReport, StepRecord
from .branch import CHANGED, Branch, Call, Step, checked, fresh_elements, guided_velocity
from .inputs import Change, Inputs, loop_values
from .plan import adapt_plan, estimated_psnr, make_plan
from .replay import Replays, step_of
from .schedulers import check_levels, check_noise, correct_for, forecast_for
from .windows import Windows
from .work_split import Sharding, check_degrees, check_ranks


class Run:
    """Follows the stock pipeline through its steps; every call of a hooked transformer reports here first."""

    def __init__(
        self,
        pipe: Any,
        adapter: Adapter,
        config: HSAConfig,
        planner: Any = None,
        sharding: Sharding | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare for runs of `pipe`, with a planner of our own if none is given; nothing is allocated yet.

        `sharding` shares the work with other ranks, each of which runs the same pipeline. `check` raises, at the start
        of every run, if the pipeline is no longer as it should be.
        """
        self.check = check
        self.own, self.adapter, self.config, self.sharding = pipe, adapter, config, sharding
        self.windows: Windows | None = None
        # The pipeline that runs: others may share the transformers.
        self.pipe, self.inputs, self.replays = pipe, Inputs(), Replays()
        # What each guidance unit asks of the transformer at all steps alike: as far as seen, or told beforehand.
        self.told: dict[str, dict[str, Any]] = {}
        self.told_ahead: dict[str, dict[str, Any]] = {}
        self.own_planner = StepPlanner(config) if planner is None else None
        self.planner: Any = planner if planner is not None else self.own_planner
        self.on_step: list[Callable[[StepRecord], None]] = []
        self.branches: dict[str, Branch] = {}
        self.records: list[StepRecord] = []
        self.sigmas, self.experts = list[float](), list[int]()
        self.first = 0  # step of the scheduler that is the run's step 0
        self.forced: dict[int, str] = {}
        # Resuming: see save_every, resume and passed.
        self.every: int | None = None
        self.restarts: frozenset[int] = frozenset()
        self.kv_since = math.inf
        self.resumed_at = 0
        self._saved: tuple[Mapping[str, Any], Callable[..., Step]] | None = None
        self.grid = Grid(0, 0, 0)
        self.batch_size = 0
        self.step: Step | None = None
        self.counts: list[int] | None = None
        self.forecast, self.correct, self.inference = "hold", False, False
        self.evaluations: Tensor | None = None
        # Of the running call, from which the adapter tells the conditioned tokens of the run.
        self.timestep: Tensor | None = None
        self.conditioned: Tensor | None = None

    @property
    def num_steps(self) -> int:
        """T of the current run."""
        return max(len(self.sigmas) - 1, 0)

    def index_of(self, index: int | None) -> int:
        """Return the step of a call, from what its pipeline says, or None where it does not say it."""
        # Pipelines that do not pass it still step their scheduler, which counts from the first step on.
        return index if index is not None else step_of(self.pipe.scheduler, self.first)

    def save_every(self, every: int) -> None:
        """Plan the next runs so that a run resumed after every `every`-th step takes the steps of an unbroken one.

        Raises:
            ConfigError: the planner has no `state` and `restore`.
        """
        check_resumable(self.planner)
        self.every = every
        if self.own_planner is not None and isinstance(self.own_planner.policy, JointPolicy):
            # A partial step that only makes up the last per cent would cost a full one after every checkpoint.
            self.own_planner.policy = replace(self.own_planner.policy, whole=True)

    def resume(self, saved: Mapping[str, Any], restore: Callable[..., Step]) -> None:
        """Let the next run pass over the steps before `saved`, a `run_state`, which `restore` puts back."""
        check_resumable(self.planner)
        self._saved = saved, restore

    def follow(self, pipe: Any) -> None:
        """Say which pipeline calls; another one than before ends the run that is going on."""
        if pipe is not self.pipe:
            self.end()
            self.pipe = pipe

    def passed(self, call: Call, index: int, latents: Tensor, num_sites: int) -> bool:
        """Whether a branch calls for a step that was done before a break: any answer will do, none is used.

        The first call of a resumed run begins it, and puts back what was saved. Arguments as in `enter`.
        """
        name = call.name
        if self._saved is not None:
            (saved, restore), self._saved = self._saved, None
            self._begin(0, latents, call.grid, saved)
            self.step = restore(self, saved, num_sites, latents.device)
        if index >= self.resumed_at:
            return False
        step = self.step
        if step is not None and index == step.index + 1:
            step.index, step.entered = index, set()
        elif step is None or index != step.index or name in step.entered:
            return False  # another run begins
        # What changed in a step that is passed over was answered then, what changes after the last is answered next.
        self._noticed(call, begins=not step.entered)
        step.entered.add(name)
        return True

    def enter(self, call: Call, index: int, latents: Tensor) -> Step:
        """Say that a branch calls the transformer with the B videos `latents`; its first call begins the step, or run.

        Returns:
            The step; that of this branch alone, if it is given something else than at its call before and others have
            been answered already.

        Raises:
            ConfigError: the latents are of another size than those that the run began with.
        """
        step, name = self.step, call.name
        begins = step is None or name in step.entered or index != step.index
        if begins:
            if step is not None and index == step.index + 1:
                self._finish(step)
            else:
                self._begin(index, latents, call.grid)
        change = self._noticed(call, begins=begins)
        if self.sharding is not None:
            change = Change(self.sharding.agreement.most(change))
        if change:
            self._restart(call, change)
        if begins:
            if change:
                self.forced.setdefault(index, CHANGED)
            step = self.step = self._plan(index, call.expert, latents.device)
        assert step is not None
        if (call.grid, latents.shape[0]) != (self.grid, self.batch_size) and self.needs_velocity(index):
            raise ConfigError(
                f"The latents changed from {self.batch_size} x {list(self.grid)} tokens to {latents.shape[0]} x "
                f"{list(call.grid)} in the middle of a run: that is possible with compute=1.0 only."
            )
        step.entered.add(name)
        step.units.update(call.units)
        if change and not begins:
            assert self.evaluations is not None
            return step.whole_for(call, self.evaluations)
        return step

    def _noticed(self, call: Call, *, begins: bool) -> Change:
        """Look what a call is given that its branch was not given one step ago."""
        # Groups of ranks keep branches by their number: without one the others move up.
        return self.inputs.look(call, self.adapter, self.pipe, begins=begins, fewer=self.sharding is not None)

    def _restart(self, call: Call, change: Change) -> None:
        """Forget what was true before a change: the prompt's keys and values, and evaluations."""
        if change == Change.ALL and self.sharding is not None:
            check_degrees(self.sharding, self.adapter, self.pipe)
        for name, branch in self.branches.items():
            if change == Change.ALL or name in (call.name, *call.units):
                branch.restart()
        self.replays.forget()
        if self.own_planner is not None:
            self.own_planner.jump()

    def leave(self) -> None:
        """Say that a branch's call returned; completes the step when it was the last one expected."""
        step = self.step
        assert step is not None, "enter comes first"
        step.seconds = time.perf_counter() - step.started
        step.left += 1
        if len(step.entered) >= len(self.adapter.branches(self.pipe)):
            self._finish(step)

    def branch(self, name: str, num_sites: int) -> Branch:
        """Return the caches of a branch, made on first use."""
        if name not in self.branches:
            self.branches[name] = Branch(
                num_sites,
                forecast=self.forecast,
                dtype=self.config.kv_dtype,
                history=self.kv_damping > 0.0,
                host=self.config.kv_host,
            )
        return self.branches[name]

    @property
    def leaves_out(self) -> bool:
        """Whether runs may leave out tokens, and so forecast velocities."""
        return self.config.compute < 1.0 or self.own_planner is None

    @property
    def kv_damping(self) -> float:
        """Damping of the K/V forecast; 0 is off."""
        return float(self.config.kv_forecast or 0.0)

    def needs_kv(self, index: int) -> bool:
        """Whether K/V of step `index` will be read: is a partial step ahead, before the next full one?"""
        if self.kv_damping == 0.0:
            return self.reads_kv(index + 1) is not None
        # With a forecast the values before the last full step matter too.
        counts = map(self.count_at, range(index + 1, self.num_steps))
        return any(count is None or 0 < count < self.grid.num_tokens for count in counts)

    def reads_kv(self, index: int) -> int | None:
        """The first step from `index` on that reads K/V of before it: a partial one before any full one; or None."""
        for later in range(index, self.num_steps):
            count = self.count_at(later)
            if count is None or 0 < count < self.grid.num_tokens:
                return later
            if count == self.grid.num_tokens:
                return None
        return None

    def needs_velocity(self, index: int) -> bool:
        """Whether velocities of step `index` matter beyond it: for a step that skips tokens, or may yet, or AB2."""
        if self.config.quality is not None:
            return True
        left = (self.count_at(later) != self.grid.num_tokens for later in range(index, self.num_steps))
        return self.forecast == "ab2" or any(left)

    def rehearse(self, grid: Grid) -> None:
        """Fix the plan of a run whose scheduler has its timesteps, and run nothing; ConfigError if none can be met."""
        self._begin(0, torch.empty(1), grid)

    def end(self) -> None:
        """Complete the last step: diffusers calls this after a pipeline call. Caches keep their memory."""
        step, self.step, self.timestep = self.step, None, None
        self.inputs.begin()
        self.replays.end()
        # A step that an exception broke off has no velocities to show.
        if step is not None and step.left == len(step.entered):
            self._finish(step)
        self.pipe = self.own

    def release(self) -> None:
        """Free all caches."""
        self.branches.clear()

    def report(self) -> HSAReport:
        """Describe the current or last run."""
        evaluations = None
        if self.evaluations is not None:
            shaped = self.evaluations.cpu().view(self.batch_size, *self.grid)
            evaluations = shaped[0] if self.batch_size == 1 else shaped
        work, total = sum(r.active for r in self.records), sum(r.total for r in self.records)
        return HSAReport(
            steps=list(self.records),
            compute=work / total if total else float("nan"),
            evaluations=evaluations,
            kv_bytes=sum(branch.kv_bytes for branch in self.branches.values()),
            num_steps=self.num_steps,
            conditioned=0 if self.conditioned is None else len(self.conditioned),
            estimated_psnr=estimated_psnr(self),
        )

    def full_report(self) -> HSAReport:
        """The report with the traffic and the memory of each rank; every rank must ask for it."""
        report = self.report()
        if self.sharding is None:
            return report
        models = [model for _, model in self.adapter.transformers(self.pipe)]
        steps = [record.parallel for record in self.records if record.parallel is not None]
        own = self.sharding.rank_report(steps, report.kv_bytes, models)
        return replace(report, ranks=tuple(self.sharding.agreement.collect(own)))

    def _begin(self, start: int, latents: Tensor, grid: Grid, saved: Mapping[str, Any] | None = None) -> None:
        """Start a run at step `start`, with the plan of `saved` if that is given.

        Whatever an earlier run left behind is forgotten, buffers are kept.
        """
        self.step, self.resumed_at, self.kv_since = None, 0, math.inf
        self.inputs.begin()
        self.replays.end()
        self.replays = Replays()
        self.check()
        scheduler = self.pipe.scheduler
        if self.leaves_out:
            check_noise(scheduler)
        self.first = first = self.adapter.first_step(self.pipe)
        steps = len(scheduler.timesteps) - first if self.own_planner else None
        self.forecast = forecast_for(self.config, scheduler, steps)
        self.correct = correct_for(self.config, self.forecast)
        if self.own_planner is not None:
            # Where steps are worth most depends on what is done with skipped ones, and the scheduler may be another.
            self.own_planner.config = replace(self.config, forecast=self.forecast, correct=self.correct)
        self.sigmas = scheduler.sigmas.tolist()[first:]
        if not 0 <= start < self.num_steps:
            raise ConfigError(f"step {start} of {self.num_steps}: the scheduler's sigmas do not reach that step.")
        if self.leaves_out:
            check_levels(self.sigmas)
        self.experts = self.adapter.experts(self.pipe)[first:]
        self.grid, self.batch_size = grid, latents.shape[0]
        self.conditioned = None if self.timestep is None else self.adapter.conditioned(self.timestep)
        if self.sharding is not None:
            check_ranks(self.sharding, self.adapter, self.pipe, latents)
        experts = self.experts[: self.num_steps]
        switches = [i for i in range(1, len(experts)) if experts[i] != experts[i - 1]]
        self.forced = {0: "first step", **dict.fromkeys(switches, "expert switch")}
        if start:
            self.forced[start] = "resume"
        if any(branch.velocity.forecast != self.forecast for branch in self.branches.values()):
            self.branches.clear()
        # Buffers that were made in inference mode cannot be written to outside of it.
        if self.inference and not torch.is_inference_mode_enabled():
            self.branches.clear()
        self.inference = torch.is_inference_mode_enabled()
        for branch in self.branches.values():
            branch.begin()
        self.told = dict(self.told_ahead)
        self.records = []
        self.evaluations = torch.zeros(self.batch_size, grid.num_tokens, dtype=torch.int32, device=latents.device)
        self.restarts = frozenset(range(self.every, self.num_steps, self.every) if self.every is not None else ())
        if saved is not None:
            self.restarts, self.forced = frozenset(saved["restarts"]), dict(saved["forced"])
        make_plan(self)
        if self.forecast == "none" or (self.correct and self.needs_velocity(0)):
            schedulers = scheduler, *loop_values(self.pipe, self.adapter.step_schedulers)
            elements = partial(fresh_elements, adapter=self.adapter, pipe=self.pipe, grid=self.grid)
            evaluated = list(filter(self.count_at, range(self.num_steps)))
            self.replays.begin(schedulers, self.sigmas, self.forecast, evaluated, lambda: self.step, elements, first)

    def _plan(self, index: int, expert: int, device: torch.device) -> Step:
        """Decide what is active at step `index`: once, for all branches."""
        n, sigma = self.grid.num_tokens, self.sigmas[index]
        adapt_plan(self, index)
        if index in self.restarts:
            self.kv_since = sigma
        if index in self.forced:
            active, reason = None, self.forced[index]
            if reason == "expert switch":
                for branch in self.branches.values():
                    branch.forget()
                self.replays.forget()
        else:
            active = self._decided(index, sigma, device)
            reason = "full" if active is None else "partial" if active.numel() else "skipped"
            if hasattr(self.planner, "reason") and (self.sharding is None or self.sharding.agreement.leads):
                reason = self.planner.reason(index)
        count = n if active is None else active.shape[-1]
        if self.count_at(index) not in (None, count):
            raise ConfigError(
                f"The planner's counts say {self.count_at(index)} tokens at step {index}, but its plan has {count}: "
                "what is kept for later steps depends on the counts, so make them agree, or have none."
            )
        if count and self.evaluations is not None:
            write_rows(self.evaluations, active, gather_rows(self.evaluations, active) + 1)
        return Step(
            index=index,
            sigma=sigma,
            sigma_next=self.sigmas[index + 1],
            expert=expert,
            active=active,
            count=count,
            reason=reason,
            started=time.perf_counter(),
        )

    def _decided(self, index: int, sigma: float, device: torch.device) -> Tensor | None:
        """Return what the planner says, on many ranks that of rank 0."""
        active, sharding = None, self.sharding
        if sharding is None or sharding.agreement.leads:
            active = self.planner.plan(index, self.num_steps, sigma, self.grid.num_tokens)
            if self.planner is not self.own_planner:
                active = checked(active, self.grid.num_tokens, self.batch_size)
            if active is not None:
                # A copy that blocks would first wait for the device's queue; only CUDA may be trusted with another.
                active = active.to(device, non_blocking=device.type == "cuda")
        return active if sharding is None else sharding.agreement.plan(active, self.batch_size)

    def _finish(self, step: Step) -> None:
        """Let the planner see the guided velocities, and record the step; harmless when repeated."""
        if step.recorded:
            return
        step.recorded = True
        if step.count and self.needs_velocity(step.index) and hasattr(self.planner, "observe"):
            entered = {name: self.branches[name] for name in step.entered}
            guided = guided_velocity(self.adapter, self.pipe, step.expert, entered)
            self.planner.observe(step.index, step.sigma, guided, step.active)
        sizes = step.sizes or next((share.sizes for share in step.shares.values()), [])
        record = StepRecord(
            step=step.index,
            sigma=step.sigma,
            active=step.work(self.grid.num_tokens),
            total=self.grid.num_tokens,
            reason=CHANGED if step.whole else step.reason,
            seconds=step.seconds,
            parallel=self.sharding.record(sizes) if self.sharding is not None else None,
        )
        self.records.append(record)
        for listener in tuple(self.on_step):
            listener(record)

    def count_at(self, index: int) -> int | None:
        """Tokens at a step, where known beforehand."""
        if index in self.forced:
            return self.grid.num_tokens
        return self.counts[index] if self.counts is not None else None
