"""The schedulers HSA works with, and what each implies for the velocity forecast."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from ..errors import ConfigError
from ..hsa.config import HSAConfig

_KINDS: dict[str, Any] = {
    "euler": FlowMatchEulerDiscreteScheduler,
    "unipc": UniPCMultistepScheduler,
    "dpm++": DPMSolverMultistepScheduler,
}


def kind_of(scheduler: Any) -> str:
    """Return "euler", "unipc" or "dpm++".

    Raises:
        ConfigError: another scheduler, or one that does not integrate flow velocities.
    """
    for kind, cls in _KINDS.items():
        if isinstance(scheduler, cls):
            if kind != "euler" and (
                scheduler.config.prediction_type != "flow_prediction" or not scheduler.config.use_flow_sigmas
            ):
                raise ConfigError(
                    f"{type(scheduler).__name__} predicts {scheduler.config.prediction_type}: HSA needs "
                    'prediction_type="flow_prediction" with use_flow_sigmas=True, or solver="euler".'
                )
            return kind
    names = ", ".join(cls.__name__ for cls in _KINDS.values())
    raise ConfigError(
        f"{type(scheduler).__name__} is not supported: HSA needs one model call per step, as with {names}."
    )


def build_scheduler(kind: str, like: Any) -> Any:
    """Make a scheduler of `kind` with the training steps and the shift of the scheduler `like`."""
    config = like.config
    shift = config.get("flow_shift", config.get("shift", 1.0))
    steps = config.num_train_timesteps
    if kind == "euler":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=steps, shift=shift)
    return _KINDS[kind](
        num_train_timesteps=steps, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


def scheduler_for(config: HSAConfig, stock: Any, known: Collection[str], pipeline: str) -> Any:
    """Return the scheduler of a run: a new one of ``config.solver``, or `stock` where that is none or of that kind.

    Args:
        config: the settings; what it says of the forecast must fit the scheduler.
        stock: the pipeline's own scheduler.
        known: solvers that work with the pipeline.
        pipeline: its class name, for messages.

    Raises:
        ConfigError: the solver does not work with the pipeline, or the forecast not with the scheduler.
    """
    scheduler = stock
    if config.solver is not None:
        if config.solver not in known:
            raise ConfigError(
                f"solver={config.solver!r} with {pipeline}: one of {', '.join(known)} is needed, or None for the "
                "pipeline's own scheduler."
            )
        if _kind_or_none(stock) != config.solver:
            scheduler = build_scheduler(config.solver, stock)
    # Every run deduces both anew; what does not fit is better refused now.
    forecast_for(config, scheduler)
    correct_for(config, scheduler)
    return scheduler


def _kind_or_none(scheduler: Any) -> str | None:
    """Return the scheduler's kind, None for one that HSA cannot work with (and the config replaces)."""
    try:
        return kind_of(scheduler)
    except ConfigError:
        return None


def forecast_for(config: HSAConfig, scheduler: Any) -> str:
    """Return the forecast: the configured one, or Taylor's.

    Taylor's forecasts what the model would have returned, so that it suits one-step and multistep schedulers
    alike; on a flow between Gaussian mixtures it came nearer to the true solution than holding.

    Raises:
        ConfigError: ``forecast="ab2"`` with a multistep scheduler, which adds its own second order.
    """
    kind = kind_of(scheduler)
    if config.forecast == "ab2" and kind != "euler" and scheduler.config.solver_order > 1:
        raise ConfigError(
            f'forecast="ab2" with {type(scheduler).__name__} would apply the second order twice: '
            'use forecast="taylor", or solver="euler".'
        )
    return config.forecast or "taylor"


def correct_for(config: HSAConfig, scheduler: Any) -> bool:
    """Return whether forecasts are corrected in hindsight.

    Raises:
        ConfigError: ``correct=True`` with a multistep scheduler, whose history would not know of the correction.
    """
    euler = kind_of(scheduler) == "euler"
    if config.correct and not euler:
        raise ConfigError(
            f"correct=True with {type(scheduler).__name__}: a multistep history cannot be corrected afterwards; "
            'use solver="euler", or leave correct out.'
        )
    if config.correct is not None:
        return config.correct
    # Beside stale keys and values a token's velocity jumps with theirs, and the correction multiplies the jump.
    whole = config.policy in ("joint", "steps")
    return euler and whole and forecast_for(config, scheduler) != "hold"
