"""The schedulers HSA works with, and what each implies for the velocity forecast."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from ...errors import ConfigError
from ...hsa.config import HSAConfig

# Settings of a diffusers scheduler: they come with the model, and never change.
_SETTINGS = ("_internal_dict",)
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
    # FlowMatchEulerDiscreteScheduler's may have been set since, by set_shift.
    shift = config.get("flow_shift", getattr(like, "shift", 1.0))
    steps = config.num_train_timesteps
    if kind == "euler":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=steps, shift=shift)
    return _KINDS[kind](
        num_train_timesteps=steps, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


@contextlib.contextmanager
def shifted(pipe: Any, shift: float | None) -> Iterator[None]:
    """Give a pipeline a scheduler like its own, with noise levels shifted by `shift`, for a while; None: leave it.

    Raises:
        ConfigError: its noise levels follow from the video's size, or are not a flow's.
    """
    if shift is None:
        yield
        return
    scheduler = pipe.scheduler
    config = scheduler.config
    name = "flow_shift" if "flow_shift" in config else "shift"
    if name not in config or config.get("use_dynamic_shifting"):
        raise ConfigError(
            f"flow_shift cannot be set: the noise levels of {type(scheduler).__name__} have no fixed shift here"
        )
    pipe.scheduler = type(scheduler).from_config(config, **{name: shift})
    try:
        yield
    finally:
        pipe.scheduler = scheduler


def scheduler_for(config: HSAConfig, stock: Any, known: Collection[str], pipeline: str) -> Any:
    """Return the scheduler of a run: a new one of the wanted solver, or `stock` where that is none or of that kind.

    Args:
        config: the settings; what it says of the forecast must fit the scheduler.
        stock: the pipeline's own scheduler.
        known: solvers that work with the pipeline.
        pipeline: its class name, for messages.

    Raises:
        ConfigError: the solver does not work with the pipeline, or what is to be forecast not with the scheduler.
    """
    scheduler, solver = stock, solver_of(config)
    if solver is not None:
        if solver not in known:
            raise ConfigError(
                f"solver={solver!r} with {pipeline}: one of {', '.join(known)} is needed, or None for the "
                "pipeline's own scheduler."
            )
        if _kind_or_none(stock) != solver:
            scheduler = build_scheduler(solver, stock)
    # Every run asks again; a scheduler that does not fit is better refused now.
    if config.compute < 1.0:
        check_noise(scheduler)
    forecast_for(config, scheduler)
    return scheduler


def solver_of(config: HSAConfig) -> str | None:
    """The scheduler that the settings ask for: ab2 brings Euler's, which it is made for."""
    return config.solver or ("euler" if config.forecast == "ab2" else None)


def _kind_or_none(scheduler: Any) -> str | None:
    """Return the scheduler's kind, None for one that HSA cannot work with (and the config replaces)."""
    try:
        return kind_of(scheduler)
    except ConfigError:
        return None


def adds_noise(scheduler: Any) -> bool:
    """Whether a scheduler's step adds fresh random noise."""
    config = scheduler.config
    return bool(config.get("stochastic_sampling")) or str(config.get("algorithm_type")).startswith("sde-")


def check_noise(scheduler: Any) -> None:
    """Refuse a scheduler whose steps add noise, for runs that leave out tokens.

    A token's velocity depends on its noise, so that none can be forecast over a step that replaces it.

    Raises:
        ConfigError: the scheduler adds noise.
    """
    if not adds_noise(scheduler):
        return
    config = scheduler.config
    setting, instead = (
        ("stochastic_sampling=True", "stochastic_sampling=False")
        if config.get("stochastic_sampling")
        else (f"algorithm_type={config.algorithm_type!r}", 'algorithm_type="dpmsolver++"')
    )
    raise ConfigError(
        f"{type(scheduler).__name__} with {setting} adds fresh noise at each step, which no forecast of a skipped "
        f"token can know: use {instead}, or compute=1.0."
    )


def check_levels(sigmas: Sequence[float]) -> None:
    """Refuse noise levels that no velocity can be forecast over, for runs that leave out tokens.

    The last two may be equal: some schedulers end where their last step begins.

    Raises:
        ConfigError: they do not fall from step to step, or lie outside of 0 to 1, where flows are.
    """
    if max(sigmas) > 1.0 + 1e-6 or min(sigmas) < 0.0:
        raise ConfigError(
            f"The scheduler's sigmas lie between {min(sigmas):.4g} and {max(sigmas):.4g}, and those of a flow between "
            "0 and 1: use the scheduler's flow sigmas (no Karras, exponential, beta or Lu ones), or compute=1.0."
        )
    for step, (sigma, after) in enumerate(pairwise(sigmas)):
        if after > sigma or (after == sigma and step < len(sigmas) - 2):
            raise ConfigError(
                f"The scheduler's sigmas do not fall at step {step}, from {sigma:.4g} to {after:.4g}: a run that "
                "leaves out tokens needs falling noise levels; give others, or use compute=1.0."
            )


FEW = 6
"""With so few evaluations no forecast spans the gaps between them (benchmarks/LOG.md)."""


def forecast_for(config: HSAConfig, scheduler: Any, steps: int | None = None) -> str:
    """Return the forecast: the configured one, Taylor's, or none.

    Taylor's forecasts what the model would have returned, so that it suits one-step and multistep schedulers alike.
    With few evaluations a multistep scheduler does better without any forecast, by fewer steps of its own.

    Args:
        config: the settings.
        scheduler: of the run.
        steps: how many there are, for runs whose plan is of our own.

    Raises:
        ConfigError: ``forecast="ab2"`` with a multistep scheduler, which adds its own second order; ``"none"`` where
            tokens are left out.
    """
    multistep = kind_of(scheduler) != "euler" and scheduler.config.solver_order > 1
    if config.forecast == "ab2" and multistep:
        raise ConfigError(
            f'forecast="ab2" with {type(scheduler).__name__} would apply the second order twice: '
            'use forecast="taylor", or solver="euler".'
        )
    whole = config.policy in ("joint", "steps")
    if config.forecast == "none" and not whole:
        raise ConfigError('forecast="none" leaves out whole steps: policy="joint" or "steps" is needed.')
    few = multistep and whole and steps is not None and few_left(config, steps)
    return config.forecast or ("none" if few else "taylor")


def few_left(config: HSAConfig, steps: int) -> bool:
    """Whether a share of so many steps leaves too few evaluations for a forecast."""
    return config.quality is None and config.compute < 1.0 and config.compute * steps < FEW + 0.5


def correct_for(config: HSAConfig, forecast: str) -> bool:
    """Return whether forecasts are corrected in hindsight (`replay`)."""
    if config.correct is not None:
        return config.correct and forecast != "none"
    # Beside stale keys and values a token's velocity jumps with theirs, and the correction multiplies the jump.
    return config.policy in ("joint", "steps") and forecast in ("taylor", "ab2")


def scheduler_state(scheduler: Any) -> dict[str, Any]:
    """Return everything a scheduler holds beside its settings, whatever it is called: tensors, numbers, lists of them.

    It stays what it is while the scheduler goes on: stock schedulers replace their tensors, and write to their lists
    alone, which are copied.

    Raises:
        ConfigError: it holds something else, such as a second scheduler. (Functions, as of a compiled step, may be.)
    """
    held = vars(scheduler).items()
    state = {name: value for name, value in held if name not in _SETTINGS and not callable(value)}
    for name, value in state.items():
        if not _is_plain(value):
            raise ConfigError(
                f"{type(scheduler).__name__} keeps a {type(value).__name__} in {name}, which cannot be saved: run "
                "without checkpoints, or with another scheduler."
            )
    return {name: list(value) if isinstance(value, list) else value for name, value in state.items()}


def restore_scheduler(scheduler: Any, state: Mapping[str, Any], device: torch.device) -> None:
    """Put a `scheduler_state` back, every tensor on the device of the one that it replaces, new ones on `device`."""
    for name, value in state.items():
        setattr(scheduler, name, _placed(value, getattr(scheduler, name, None), device))


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str | Tensor)


def _placed(value: Any, like: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        beside = like if isinstance(like, list) and len(like) == len(value) else [None] * len(value)
        return [_placed(item, other, device) for item, other in zip(value, beside, strict=True)]
    if isinstance(value, Tensor):
        return value.to(like.device if isinstance(like, Tensor) else device)
    return value
