"""The plain alternatives: fewer denoising steps, with Euler or with UniPC, and the same on well-placed noise levels."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ...hsa.config import HSAConfig, Schedule
from ...hsa.policies import StepsPolicy
from .baseline import Baseline
from .solvers import SOLVERS, on_levels, scheduler_like


class FewerSteps(Baseline):
    """`evaluated` dense steps, first-order (``euler``) or second-order (``unipc``, Wan's own default)."""

    def __init__(self, dense_steps: int, *, evaluated: int, solver: str = "euler") -> None:
        if solver not in SOLVERS:
            raise ValueError(f"solver={solver!r}: {' or '.join(SOLVERS)}.")
        super().__init__(dense_steps, evaluated=evaluated, solver=solver)
        self.name, self.steps = solver, evaluated

    @contextmanager
    def _attached(self, pipe: Any) -> Iterator[None]:
        with _scheduler(pipe, scheduler_like(pipe.scheduler, self.settings["solver"])):
            yield


class PlacedSteps(Baseline):
    """UniPC over a few of the dense run's noise levels, which our placement chooses: a list of sigmas, nothing else.

    Args:
        dense_steps: as in `Baseline`.
        levels: numbers of the chosen levels, ascending; the first is 0.
        solver: as in `FewerSteps`.
    """

    name = "unipc-placed"

    def __init__(self, dense_steps: int, *, levels: Sequence[int], solver: str = "unipc") -> None:
        super().__init__(dense_steps, levels=list(levels), solver=solver)
        self.steps = len(levels)

    @contextmanager
    def _attached(self, pipe: Any) -> Iterator[None]:
        s = self.settings
        with _scheduler(pipe, on_levels(pipe.scheduler, s["solver"], self.dense_steps, s["levels"])):
            yield

    @classmethod
    def candidates(cls, pipe: Any, dense_steps: int, compute: float) -> list[PlacedSteps]:
        """The levels that are best for each forecast, with and without correction."""
        scheduler = copy.deepcopy(pipe.scheduler)
        scheduler.set_timesteps(dense_steps)
        schedule = Schedule(sigmas=tuple(float(s) for s in scheduler.sigmas), num_tokens=1)
        found = []
        for forecast, correct in (("ab2", True), ("taylor", True), ("taylor", False)):
            config = HSAConfig(compute=compute, forecast=forecast, correct=correct)
            counts = StepsPolicy().counts(schedule, config)
            found.append(cls(dense_steps, levels=[step for step, count in enumerate(counts) if count]))
        return found


@contextmanager
def _scheduler(pipe: Any, scheduler: Any) -> Iterator[None]:
    """Give the pipeline another scheduler for a while."""
    stock = pipe.scheduler
    pipe.scheduler = scheduler
    try:
        yield
    finally:
        pipe.scheduler = stock
