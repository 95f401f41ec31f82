"""Replay: skipped steps are taken again by the stock scheduler, with the velocities that they should have moved by.

A skipped step moves by a forecast, which goes into the latents and into the history of a multistep scheduler. When the
next evaluation is there (`hsa.hindsight`), the scheduler is put back to where it was, its own `step` runs over the gap
again, and then takes the new step from there. No call of the model is added. With Euler, whose whole state is the
latents, that is the displacement by which the forecasts were wrong.

The pipeline steps its scheduler itself, so the scheduler object's `step` is ours while such a run goes on.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from ...hsa.hindsight import Hindsight, Residual
from .branch import Step
from .inputs import Noted
from .schedulers import FEW, kind_of, restore_scheduler, scheduler_state

_LOG = logging.getLogger("heterostep")

Fresh = Callable[[Step, Tensor], Tensor | None]
"""Says which elements of a velocity were evaluated at a step: bool in its shape, None for all."""


class Around:
    """Stands around the `step` of one scheduler, from the first call of the transformer to the end of the run.

    Attributes:
        hindsight: what evaluations show.
        span: largest less least value of the clean latents, as the last evaluation has them; None before the first.
    """

    def __init__(self, scheduler: Any, hindsight: Hindsight, now: Callable[[], Step | None], first: int) -> None:
        """Stand around ``scheduler.step`` of a stock scheduler.

        Args:
            scheduler: it has its timesteps.
            hindsight: of the run.
            now: returns the step that the run is at.
            first: step of the scheduler that is the run's step 0.
        """
        self.scheduler, self.hindsight, self._now, self._first = scheduler, hindsight, now, first
        self.span: Tensor | None = None
        self._seen: Step | None = None
        self._replaced = vars(scheduler).get("step")
        self._stock = scheduler.step
        scheduler.step = MethodType(Around.step, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Around:
        """Belong to no run: for a copy of the scheduler."""
        copied = object.__new__(type(self))
        copied._now, copied._stock = lambda: None, MethodType(type(self.scheduler).step, memo[id(self.scheduler)])
        copied._first = self._first
        return copied

    def remove(self) -> None:
        """Give the scheduler its own `step` back, unless somebody has set another since."""
        if getattr(vars(self.scheduler).get("step"), "__self__", None) is self:
            del self.scheduler.step
            if self._replaced is not None:
                self.scheduler.step = self._replaced

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take a step of the run; arguments and result are those of the stock scheduler's step."""
        step = self._now()
        if step is None or args or not self._is_due(step):
            return self._stock(model_output, timestep, sample, *args, **kwargs)
        self._seen = step
        return self.take(step, model_output, timestep, sample, **kwargs)

    def _is_due(self, step: Step) -> bool:
        """Whether the run's step comes now. Others may use the scheduler, also after an error broke off the run."""
        # An error in the model leaves a branch that was entered, and never left.
        evaluated = step.left == len(step.entered)
        due = step.index == step_of(self.scheduler, self._first)
        return evaluated and step is not self._seen and step.reason != "passed" and due

    def take(self, step: Step, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        """Take a step of the run."""
        raise NotImplementedError

    def look(self, step: Step, velocity: Tensor, sample: Tensor) -> None:
        """Note how far the latents of an evaluated step will reach."""
        clean = sample - step.sigma * velocity
        self.span = clean.max() - clean.min()

    def forget(self) -> None:
        """Forget all evaluations: they say nothing of what comes now."""
        self.hindsight.forget()

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, between two steps; the tensors are not copies."""
        return {"hindsight": self.hindsight.state(), "span": self.span}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on where another one of the same run was when it gave its `state`."""
        self.hindsight.restore(state["hindsight"], device)
        self.span = None if state["span"] is None else state["span"].to(device)


class Replay(Around):
    """Takes skipped steps again in hindsight."""

    def __init__(
        self, scheduler: Any, hindsight: Hindsight, now: Callable[[], Step | None], fresh: Fresh, first: int
    ) -> None:
        """Stand around the `step` of a scheduler, with what will be known of velocities; the rest as in `Around`."""
        super().__init__(scheduler, hindsight, now, first)
        self._fresh = fresh
        # The scheduler and the latents before the oldest step that may be taken again.
        self._before: tuple[Mapping[str, Any], Tensor] | None = None
        # From that step on: the timestep, and what a callback had added to the latents before the step.
        self._calls: list[tuple[Any, Tensor | None]] = []
        self._left: tuple[Noted, Tensor] | None = None

    def take(self, step: Step, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        """Step as the stock scheduler does, from where the latents should be by now."""
        edit = self._edit(sample)
        # After a change of inputs one branch may be fresh and the other a forecast: there hindsight begins anew.
        if step.count or step.whole:
            if self.hindsight.evaluate(step.index, model_output, self._fresh(step, model_output)):
                sample = self._replayed(edit, {**kwargs, "return_dict": False})
            if self.hindsight.oldest() == step.index:
                self._remember(len(self._calls), sample)
            self.look(step, model_output, sample)
        self.hindsight.moves(step.index, model_output)
        self._calls.append((timestep, edit))
        out = self._stock(model_output, timestep, sample, **kwargs)
        self._left = Noted(out[0]), out[0].clone()
        return out

    def _replayed(self, edit: Tensor | None, options: Mapping[str, Any]) -> Tensor:
        """Take all remembered steps again, and return the latents before the running one."""
        assert self._before is not None
        (state, sample), calls, moves = self._before, list(self._calls), list(self.hindsight.used)
        first, oldest = self.hindsight.first, self.hindsight.oldest()
        restore_scheduler(self.scheduler, state, sample.device)
        for place, ((timestep, added), velocity) in enumerate(zip(calls, moves, strict=True)):
            if place:
                sample = _edited(sample, added)
                if first + place == oldest:
                    self._remember(place, sample)
            sample = self._stock(velocity, timestep, sample, **options)[0]
        return _edited(sample, edit)

    def _remember(self, place: int, sample: Tensor) -> None:
        """Begin later replays `place` remembered steps further on, where scheduler and `sample` are now."""
        self._before = scheduler_state(self.scheduler), sample
        del self._calls[:place]
        self.hindsight.drop(place)

    def _edit(self, sample: Tensor) -> Tensor | None:
        """What the latents were changed by between two steps, as by a callback of the user."""
        if self._left is None:
            return None
        noted, left = self._left
        return None if noted.same(sample) else sample - left

    def state(self) -> dict[str, Any]:
        """See `Around`."""
        return {
            **super().state(),
            "before": None if self._before is None else list(self._before),
            "calls": [list(call) for call in self._calls],
            "left": None if self._left is None else self._left[1],
        }

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """See `Around`."""
        super().restore(state, device)
        if state["before"] is not None:
            self._before = state["before"][0], state["before"][1].to(device)
        # Timesteps stay where the scheduler has them.
        self._calls = [(timestep, None if edit is None else edit.to(device)) for timestep, edit in state["calls"]]
        if state["left"] is not None:
            left = state["left"].to(device)
            self._left = Noted(left), left


class Fewer(Around):
    """Leaves skipped steps out altogether: the solver takes fewer, longer steps between the evaluated ones."""

    def __init__(
        self,
        scheduler: Any,
        hindsight: Hindsight,
        now: Callable[[], Step | None],
        evaluated: Sequence[int],
        first: int,
    ) -> None:
        """Stand around the `step` of a scheduler, with the run's `evaluated` steps alone; the rest as in `Around`."""
        places = [first + step for step in evaluated]
        self._solver = copy.deepcopy(scheduler)
        vars(self._solver).pop("step", None)  # one that somebody set would step the original
        self._solver.sigmas = scheduler.sigmas[[*places, -1]]
        self._solver.timesteps = scheduler.timesteps[places]
        self._solver.num_inference_steps = len(evaluated)
        self._evaluated = frozenset(evaluated)
        super().__init__(scheduler, hindsight, now, first)

    def level(self, step: int) -> float:
        """Noise level of the latents before a step of the scheduler: that of the next evaluated one."""
        places = [self._first + i for i in self._evaluated]
        return float(self.scheduler.sigmas[min((i for i in places if i >= step), default=-1)])

    def take(self, step: Step, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        """Move at evaluated steps, up to the next of them."""
        out = self._stock(model_output, timestep, sample, **kwargs)  # counts steps
        moved = sample
        if step.index in self._evaluated:
            self.hindsight.evaluate(step.index, model_output, None)
            self.look(step, model_output, sample)
            moved = self._solver.step(model_output, timestep, sample, **{**kwargs, "return_dict": False})[0]
        return (moved,) if isinstance(out, tuple) else type(out)(prev_sample=moved)

    def state(self) -> dict[str, Any]:
        """See `Around`."""
        return {**super().state(), "solver": scheduler_state(self._solver)}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """See `Around`."""
        super().restore(state, device)
        restore_scheduler(self._solver, state["solver"], device)


class Replays:
    """What stands around the schedulers of one run: the video's, and those that step sound beside it."""

    def __init__(self) -> None:
        """Stand around nothing yet."""
        self._replays: list[Around] = []
        self._seen: tuple[list[Residual], Tensor | None] = [], None

    @property
    def seen(self) -> tuple[list[Residual], Tensor | None]:
        """Residuals of the video's velocities, and its `Around.span`, of a run that goes on or has ended."""
        if self._replays:
            self._seen = self._replays[0].hindsight.measured, self._replays[0].span
        return self._seen

    def begin(
        self,
        schedulers: Sequence[Any],
        sigmas: Sequence[float],
        forecast: str,
        evaluated: Sequence[int],
        now: Callable[[], Step | None],
        fresh: Fresh,
        first: int,
    ) -> None:
        """Correct in hindsight what the `schedulers` move, or leave out skipped steps if there is no forecast.

        Args:
            schedulers: they have their timesteps; the video's is the first, all else is always evaluated whole.
            sigmas: T + 1 noise levels.
            forecast: that skipped steps move by.
            evaluated: steps that are, where no step leaves out some tokens only.
            now: returns the step that the run is at.
            fresh: of the video.
            first: step of the schedulers that is the run's step 0.
        """
        self.end()
        self._say(forecast, evaluated, len(sigmas) - 1, multistep=kind_of(schedulers[0]) != "euler")
        for number, scheduler in enumerate(schedulers):
            which, hindsight = fresh if number == 0 else lambda step, velocity: None, Hindsight(sigmas, forecast)
            if forecast == "none":
                self._replays.append(Fewer(scheduler, hindsight, now, evaluated, first))
            else:
                self._replays.append(Replay(scheduler, hindsight, now, which, first))

    @staticmethod
    def _say(forecast: str, evaluated: Sequence[int], steps: int, *, multistep: bool) -> None:
        """Say in the log what would serve better, or what was chosen."""
        few = f"only {len(evaluated)} of {steps} steps are evaluated"
        if forecast == "none":
            _LOG.info("heterostep: %s, and the solver takes these alone", few)
        elif multistep and 0 < len(evaluated) <= FEW:
            _LOG.warning(
                "heterostep: %s, too few for forecast=%r to span the gaps: leave the forecast out, "
                "and the solver takes %d longer steps of its own",
                few,
                forecast,
                len(evaluated),
            )

    def forget(self) -> None:
        """Forget all evaluations: they say nothing of what comes now."""
        for replay in self._replays:
            replay.forget()

    def end(self) -> None:
        """Give all schedulers their own `step` back; what was `seen` is kept."""
        self._seen = self.seen
        for replay in self._replays:
            replay.remove()
        self._replays.clear()

    def state(self) -> list[dict[str, Any]]:
        """Return what `restore` needs, between two steps."""
        return [replay.state() for replay in self._replays]

    def restore(self, states: Sequence[Mapping[str, Any]], device: torch.device) -> None:
        """Go on where those of another run were when they gave their `state`; `begin` comes first."""
        for replay, state in zip(self._replays, states, strict=True):
            replay.restore(state, device)


def _edited(sample: Tensor, edit: Tensor | None) -> Tensor:
    return sample if edit is None else sample + edit


def step_of(scheduler: Any, first: int) -> int:
    """The step of a run at which its scheduler is, whose step `first` is the run's first; it has none before that."""
    index: int | None = scheduler.step_index
    return 0 if index is None else index - first


def level_of(scheduler: Any, step: int) -> float:
    """Noise level of the latents before a step of the scheduler, also where skipped steps are left out."""
    around = getattr(vars(scheduler).get("step"), "__self__", None)
    return around.level(step) if isinstance(around, Fewer) else float(scheduler.sigmas[step])
