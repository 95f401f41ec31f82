"""What a run knows between two steps, apart from keys and values: taken out to be saved, and put back to resume.

A state is plain data: dicts with string keys, lists, numbers, strings, None and tensors, so that it can be written down
(`checkpoint`). Its tensors are those of the run, not copies: it is good until the next step begins. On many ranks all
of it is alike on each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...hsa.planner import check_resumable
from ..report import plain_step, step_from
from .branch import CHANGED, Step
from .run import Run
from .schedulers import restore_scheduler, scheduler_state
from .work_split import random_state


def run_state(run: Run) -> dict[str, Any]:
    """Return the state of a run whose last step is done.

    Raises:
        ConfigError: the planner has no `state` and `restore`.
    """
    check_resumable(run.planner)
    assert run.step is not None and run.step.recorded, "a step is going on"
    step = run.step.index + 1
    return {
        "step": step,
        "sigmas": run.sigmas,
        "grid": list(run.grid),
        "batch_size": run.batch_size,
        # What made the plan. Full steps that only resuming took, or a change of inputs, were not in it.
        "forced": [[i, reason] for i, reason in run.forced.items() if reason not in ("resume", CHANGED)],
        "restarts": [i for i in sorted(run.restarts) if i >= step],
        "counts": run.counts,
        "records": [plain_step(record) for record in run.records],
        "evaluations": run.evaluations,
        "branches": {name: branch.velocity.state() for name, branch in run.branches.items()},
        "others": {name: [other.state() for other in branch.others] for name, branch in run.branches.items()},
        "planner": run.planner.state(),
    }


def restore_run(run: Run, state: Mapping[str, Any], num_sites: int, device: torch.device) -> Step:
    """Put a state back into a run that has begun; the first step that would read K/V of before becomes a full one.

    Args:
        run: begun with the plan of the state.
        state: from `run_state`.
        num_sites: of the transformer.
        device: of the latents.

    Returns:
        The step that the run stands at, done: the first of those that are passed over.

    Raises:
        ConfigError: the run is of another size, or plans other steps.
    """
    size = [state["sigmas"], state["grid"], state["batch_size"]]
    if size != [run.sigmas, list(run.grid), run.batch_size]:
        raise ConfigError(
            f"the saved run has {len(state['sigmas']) - 1} steps of {state['batch_size']} x {state['grid']} tokens, "
            f"this one {run.num_steps} of {run.batch_size} x {list(run.grid)}, or other noise levels: resume with the "
            "settings it was started with"
        )
    if run.counts != state["counts"]:
        raise ConfigError("the saved run was planned by another version or planner: start it from the beginning")
    run.branches.clear()
    for name, velocity in state["branches"].items():
        branch, others = run.branch(name, num_sites), state["others"][name]
        for cache, content in zip(branch.velocities(len(others)), (velocity, *others), strict=True):
            cache.restore(content, device)
        branch.begun = branch.velocity.last is not None
    run.planner.restore(state["planner"], device)
    run.records = [step_from(record) for record in state["records"]]
    run.evaluations = state["evaluations"].to(device)
    run.resumed_at = at = state["step"]
    reads = run.reads_kv(at)
    if reads is not None:
        run.forced[reads] = "resume"
    run.restarts |= {at}
    return Step(
        index=0, sigma=run.sigmas[0], sigma_next=run.sigmas[1], expert=0, active=None, count=0, reason="passed",
        started=0.0, recorded=True,
    )  # fmt: skip


def pipeline_state(pipe: Any, latents: Tensor, others: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what a pipeline carries from step to step: latents, `others`, the scheduler's history, random numbers."""
    rng = {"cpu": random_state(torch.device("cpu"))}
    if latents.device.type == "cuda":
        rng["cuda"] = random_state(latents.device)
    scheduler = scheduler_state(pipe.scheduler)
    return {"latents": latents, "others": dict(others), "scheduler": scheduler, "rng": rng}


def restore_pipeline(pipe: Any, state: Mapping[str, Any], device: torch.device, others: Mapping[str, Tensor]) -> Tensor:
    """Put a `pipeline_state` back, and return the latents, which go into the pipeline by its callback.

    Pipelines take nothing else from a callback, so that `others` are overwritten in place.
    """
    restore_scheduler(pipe.scheduler, state["scheduler"], device)
    torch.set_rng_state(state["rng"]["cpu"])
    if device.type == "cuda" and "cuda" in state["rng"]:
        torch.cuda.set_rng_state(state["rng"]["cuda"], device)
    for name, tensor in others.items():
        tensor.copy_(state["others"][name])
    latents: Tensor = state["latents"].to(device)
    return latents
