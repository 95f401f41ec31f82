"""The plain alternative: fewer denoising steps, with Euler or with UniPC."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from .baseline import Baseline

_SCHEDULE = ("num_train_timesteps", "use_dynamic_shifting", "shift_terminal", "time_shift_type")
_SHIFT = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")


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
        shift = config.get("flow_shift", config.get("shift", 1.0))
        # LTX-2's shift depends on the size of the video, and its steps end above zero.
        same = {name: config[name] for name in _SCHEDULE if name in config}
        if self.settings["solver"] == "euler":
            pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, **same)
        else:
            pipe.scheduler = UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, **same
            )
        # The pipelines read from the scheduler how the shift depends on the size.
        pipe.scheduler.register_to_config(**{name: config[name] for name in _SHIFT if name in config})
        try:
            yield
        finally:
            pipe.scheduler = stock
