"""Stock schedulers for the schedule that a pipeline has: another solver, the same noise levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

SOLVERS = ("euler", "unipc")
_SCHEDULE = ("num_train_timesteps", "use_dynamic_shifting", "shift_terminal", "time_shift_type")
_SHIFT = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")


def scheduler_like(stock: Any, solver: str, cls: Any = None, shift: float | None = None) -> Any:
    """A scheduler with the solver `solver`, "euler" or "unipc", and the noise levels of the pipeline's own.

    Args:
        stock: the pipeline's scheduler.
        solver: first order, or Wan's own.
        cls: a subclass of the solver's class to make instead.
        shift: of the noise levels, instead of the pipeline's.

    Raises:
        ValueError: there is no such solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r}: {' or '.join(SOLVERS)}.")
    config = stock.config
    shift = config.get("flow_shift", config.get("shift", 1.0)) if shift is None else shift
    # LTX-2's shift depends on the size of the video, and its steps end above zero.
    same = {name: config[name] for name in _SCHEDULE if name in config}
    if solver == "euler":
        made = (cls or FlowMatchEulerDiscreteScheduler)(shift=shift, **same)
    else:
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
        made = (cls or UniPCMultistepScheduler)(**flow, **same)
    # The pipelines read from the scheduler how the shift depends on the size.
    made.register_to_config(**{name: config[name] for name in _SHIFT if name in config})
    return made


def on_levels(stock: Any, solver: str, dense_steps: int, chosen: Sequence[int]) -> Any:
    """A scheduler that makes one step from each of the `chosen` noise levels of `dense_steps` to the next."""

    solver_class: Any = {"euler": FlowMatchEulerDiscreteScheduler, "unipc": UniPCMultistepScheduler}[solver]

    class OnLevels(solver_class):
        """The solver's own, with most of its noise levels left out."""

        sigmas: torch.Tensor
        timesteps: torch.Tensor

        def set_timesteps(
            self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, mu: Any = None
        ) -> None:
            """Start a run on the chosen levels, however many steps the pipeline asks for."""
            if sigmas is not None:  # of LTX-2, for the steps that it was asked for
                sigmas = np.linspace(1.0, 1 / dense_steps, dense_steps)
            super().set_timesteps(None if sigmas is not None else dense_steps, device=device, sigmas=sigmas, mu=mu)
            kept = list(chosen)
            self.sigmas = torch.cat([self.sigmas[:-1][kept], self.sigmas[-1:]])
            self.timesteps = self.timesteps[kept]
            self.num_inference_steps = len(kept)

    return scheduler_like(stock, solver, OnLevels)
