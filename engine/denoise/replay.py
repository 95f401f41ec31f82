"""Replay: skipped steps are taken again by the stock scheduler, with the velocities that they should have moved by.

A skipped step moves by a forecast, which goes into the latents and into the history of a multistep scheduler. When the
next evaluation is there (`hsa.hindsight`), the scheduler is put back to where it was, its own `step` runs over the gap
again, and then takes the new step from there. No call of the model is added. With Euler, whose whole state is the
latents, that is the displacement by which the forecasts were wrong.

The pipeline steps its scheduler itself, so the scheduler object's `step` is ours while such a run goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from ...hsa.hindsight import Hindsight
from .branch import Step
from .inputs import Noted
from .schedulers import restore_scheduler, scheduler_state

Fresh = Callable[[Step, Tensor], Tensor | None]
"""Says which elements of a velocity were evaluated at a step: bool in its shape, None for all."""


class Replay:
    """Stands around the `step` of one scheduler, from the first call of the transformer to the end of the run."""

    def __init__(self, scheduler: Any, hindsight: Hindsight, now: Callable[[], Step | None], fresh: Fresh) -> None:
        """Stand around ``scheduler.step``.

        Args:
            scheduler: a stock scheduler that has its timesteps.
            hindsight: what it will know of the velocities.
            now: returns the step that the run is at.
            fresh: see `Fresh`.
        """
        self.scheduler, self.hindsight, self._now, self._fresh = scheduler, hindsight, now, fresh
        self._seen: Step | None = None
        # The scheduler and the latents before the oldest step that may be taken again.
        self._before: tuple[Mapping[str, Any], Tensor] | None = None
        # From that step on: the timestep, and what a callback had added to the latents before the step.
        self._calls: list[tuple[Any, Tensor | None]] = []
        self._left: tuple[Noted, Tensor] | None = None
        self._replaced = vars(scheduler).get("step")
        self._stock = scheduler.step
        scheduler.step = MethodType(Replay.step, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Replay:
        """Belong to no run: for a copy of the scheduler."""
        copied = object.__new__(type(self))
        copied._now, copied._stock = lambda: None, MethodType(type(self.scheduler).step, memo[id(self.scheduler)])
        return copied

    def remove(self) -> None:
        """Give the scheduler its own `step` back, unless somebody has set another since."""
        if getattr(vars(self.scheduler).get("step"), "__self__", None) is self:
            del self.scheduler.step
            if self._replaced is not None:
                self.scheduler.step = self._replaced

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Step as the stock scheduler does, from where the latents should be by now; arguments and result are its."""
        step = self._now()
        # Others may use the scheduler, also after an error broke off the run.
        if step is None or step is self._seen or step.reason == "passed" or args or step.index != self._index:
            return self._stock(model_output, timestep, sample, *args, **kwargs)
        self._seen, edit = step, self._edit(sample)
        # After a change of inputs one branch may be fresh and the other a forecast: that is where hindsight begins anew.
        if step.count or step.whole:
            if self.hindsight.evaluate(step.index, model_output, self._fresh(step, model_output)):
                sample = self._replayed(edit, {**kwargs, "return_dict": False})
            if self.hindsight.oldest() == step.index:
                self._remember(len(self._calls), sample)
        self.hindsight.moves(step.index, model_output)
        self._calls.append((timestep, edit))
        out = self._stock(model_output, timestep, sample, **kwargs)
        self._left = Noted(out[0]), out[0].clone()
        return out

    @property
    def _index(self) -> int:
        """The scheduler's step; it has none before its first."""
        return self.scheduler.step_index or 0

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
        """Return what `restore` needs, between two steps; the tensors are not copies."""
        return {
            "hindsight": self.hindsight.state(),
            "before": None if self._before is None else list(self._before),
            "calls": [list(call) for call in self._calls],
            "left": None if self._left is None else self._left[1],
        }

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on where another one of the same run was when it gave its `state`."""
        self.hindsight.restore(state["hindsight"], device)
        if state["before"] is not None:
            self._before = state["before"][0], state["before"][1].to(device)
        # Timesteps stay where the scheduler has them.
        self._calls = [(timestep, None if edit is None else edit.to(device)) for timestep, edit in state["calls"]]
        if state["left"] is not None:
            left = state["left"].to(device)
            self._left = Noted(left), left


class Replays:
    """The replays of one run: of the video's scheduler, and of those that step sound beside it."""

    def __init__(self) -> None:
        """Stand around nothing yet."""
        self._replays: list[Replay] = []

    def begin(
        self,
        schedulers: Sequence[Any],
        sigmas: Sequence[float],
        forecast: str,
        now: Callable[[], Step | None],
        fresh: Fresh,
    ) -> None:
        """Stand around the `schedulers` of a run, the video's first; whatever else they step is always evaluated whole.

        Args:
            schedulers: they have their timesteps.
            sigmas: T + 1 noise levels.
            forecast: that skipped steps move by.
            now: returns the step that the run is at.
            fresh: of the video.
        """
        self.end()
        for number, scheduler in enumerate(schedulers):
            which = fresh if number == 0 else lambda step, velocity: None
            self._replays.append(Replay(scheduler, Hindsight(sigmas, forecast), now, which))

    def forget(self) -> None:
        """Forget all evaluations: they say nothing of what comes now."""
        for replay in self._replays:
            replay.hindsight.forget()

    def end(self) -> None:
        """Give all schedulers their own `step` back."""
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
