"""The plain alternative: fewer denoising steps, with Euler or with UniPC."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from .baseline import Baseline


class FewerSteps(Baseline):
    """`evaluated` dense steps, first-order (``euler``) or second-order (``unipc``, Wan's own default)."""

    def __init__(self, dense_steps: int, *, evaluated: int, solver: str = "euler") -> None:
        if solver not in ("euler", "unipc"):
            raise ValueError(f"solver={solver!r}: euler or unipc.")
        super().__init__(dense_steps, evaluated=evaluated, solver=solver)
        self.name, self.steps = solver, evaluated

    @contextmanager
    def _attached(self, pipe: Any) -> Iterator[None]:
        stock = pipe.scheduler
        config = stock.config
        shift, training = config.get("flow_shift", config.get("shift", 1.0)), config.num_train_timesteps
        if self.settings["solver"] == "euler":
            pipe.scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=training, shift=shift)
        else:
            pipe.scheduler = UniPCMultistepScheduler(
                num_train_timesteps=training,
                prediction_type="flow_prediction",
                use_flow_sigmas=True,
                flow_shift=shift,
            )
        try:
            yield
        finally:
            pipe.scheduler = stock
