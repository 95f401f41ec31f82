"""The settings that acted in a run: every one that was left out, with the value that was deduced for it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from ..hsa.planner import StepPlanner
from ..hsa.policies import TokensPolicy, policy_for
from .models import adapter_named
from .solvers import correct_for, forecast_for, kind_of, scheduler_for

if TYPE_CHECKING:
    from ..hsa.config import HSAConfig
    from .engine import Engine
    from .report import HSAReport
    from .request import VideoOutput


def acting_request(output: VideoOutput, experts: int) -> dict[str, Any]:
    """The request with the share and the guidance of each expert that acted."""
    request = dataclasses.asdict(output.request)
    if request["compute"] is None:
        request["compute"] = 1.0 if output.hsa is None else output.hsa.compute
    if experts > 1 and request["guidance_scale_2"] is None:
        request["guidance_scale_2"] = request["guidance_scale"]
    return request


def acting_hsa(engine: Engine, output: VideoOutput) -> dict[str, Any] | None:
    """The allocation with its deduced values; None where the stock pipeline ran alone.

    What a policy does not have stays None: a profile, a limit of age, a type of keys and values.
    """
    hsa = output.hsa
    if hsa is None:
        return None
    scheduler, policy = _scheduler(engine, hsa), policy_for(hsa)
    first, last = _windows(output.report)
    values = {
        "warmup": first,
        "cooldown": last,
        "profile": policy.exponent if isinstance(policy, TokensPolicy) else None,
        "solver": kind_of(scheduler),
        "forecast": forecast_for(hsa, scheduler),
        "correct": correct_for(hsa, scheduler),
        "kv_forecast": 0.0,
        "max_age": None if hsa.policy == "groups" else StepPlanner(hsa).max_age,
        "kv_dtype": _name(engine.dtype) if output.report.kv_bytes else None,
    }
    given = dataclasses.asdict(hsa)
    return {name: values.get(name) if value is None else value for name, value in given.items()}


def acting(engine: Engine, output: VideoOutput) -> dict[str, Any]:
    """What else acted: scheduler, guidance of each expert, attention kernel, degrees, and the types of all parts."""
    request, facts = output.request, engine.facts
    guidance = facts.guidance_for(request.guidance_scale)
    scales = [request.guidance_scale, request.guidance_scale_2 or request.guidance_scale][: facts.experts]
    sharding = engine.sharding
    degrees = {"cfg": 1, "ring": 1, "ulysses": 1}
    types = {name: getattr(part, "dtype", None) for name, part in engine.pipeline.components.items()}
    return {
        "policy": "dense" if output.hsa is None else output.hsa.policy,
        "scheduler": type(_scheduler(engine, output.hsa)).__name__,
        "guidance": scales,
        "more_guidance": None if guidance is None else guidance._asdict(),
        "guidance_passes": facts.passes(request.guidance_scale),
        "kernel": "diffusers" if sharding is None else sharding.placement.name.rpartition(", ")[2],
        "degrees": degrees if sharding is None else {name: getattr(sharding.config, name) for name in degrees},
        "dtypes": {name: _name(dtype) for name, dtype in types.items() if isinstance(dtype, torch.dtype)},
    }


def _scheduler(engine: Engine, hsa: HSAConfig | None) -> Any:
    """The scheduler of a run."""
    stock = engine.pipeline.scheduler
    if hsa is None:
        return stock
    return scheduler_for(hsa, stock, adapter_named(engine.facts.pipeline).solvers, engine.facts.pipeline)


def _windows(report: HSAReport) -> tuple[int, int]:
    """Number of first and of last steps that evaluated every token."""
    full = [step.active == step.total for step in report.steps]
    return _leading(full), _leading(full[::-1])


def _leading(full: list[bool]) -> int:
    return ([*full, False]).index(False)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
