"""`heterostep bench step` and `bench calibrate`: a random model's steps on this machine."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from typing import Any

import torch

from ..benchmarks.results import result as results
from ..benchmarks.speed.calibrate import calibrate
from ..benchmarks.speed.settings import CalibrateSettings, ResultFiles, StepSettings
from ..benchmarks.speed.step import SHAPES, clock_for, measure
from ..engine.devices import device_of, known_device
from ..engine.loading import pick_device
from ..engine.progress import Progress
from ..engine.record import device_name
from ..errors import ConfigError
from .bench_speed import Measurement
from .logs import silence_libraries


def bench_step(settings: StepSettings, files: ResultFiles, said: Sequence[str], progress: Progress) -> int:
    """Run the command; returns the exit code.

    Args:
        settings: what to measure.
        files: where the result goes.
        said: the command's arguments.
        progress: shows how far it is.

    Raises:
        HeterostepError: a setting is wrong, or a rank failed.
    """
    device = _ready(settings.device, settings.nproc, settings.shape)
    result = _result("step", said, settings, device, "a dense run of two steps before all others")
    shape = SHAPES[settings.shape]
    result["notes"].append(
        f"Random Wan transformer, {settings.shape}: width {shape.heads * shape.head_dim}, {shape.layers} layers, "
        f"{' x '.join(map(str, shape.grid))} tokens, {str(shape.dtype).removeprefix('torch.')}, no guidance. Steps "
        "alternate with dense ones; a ratio is of neighbours. The parts of a step are shares of a profiled one. "
        "Ratios, not seconds, are worth reading on a busy machine."
        + " Seconds are of the processor's time for this process."
        * (clock_for(device, settings.nproc) is time.process_time)
    )
    measurement = Measurement(files, result, progress)

    def keep(rows: list[dict[str, Any]]) -> None:
        result["rows"] = []
        measurement.add(*rows)

    with measurement.finishing():
        progress.stage("steps and loops of a random model")
        measure(settings, device, keep)
    return 0


def bench_calibrate(settings: CalibrateSettings, files: ResultFiles, said: Sequence[str], progress: Progress) -> int:
    """Run the command; returns the exit code.

    Args:
        settings: how to measure.
        files: where the result goes, which `plan --gpu` reads.
        said: the command's arguments.
        progress: shows how far it is.

    Raises:
        HeterostepError: a setting is wrong, or a rank failed.
    """
    device = _ready(settings.device, settings.nproc, None)
    result = _result("calibrate", said, settings, device, "one run of each kind")
    name = result["environment"]["device"]
    nearest = "cpu" if device == "cpu" else known_device(name) or "h100"
    like = device_of(settings.like or nearest)
    measurement = Measurement(files, result, progress)
    with measurement.finishing():
        found, measured = calibrate(settings, device, like, name, progress.stage)
        result["device"] = dataclasses.asdict(found)
        for field, value in measured.items():
            beside = getattr(like, field)
            metrics = {"measured": value, "over_like": value / beside if beside else None}
            measurement.add(results.row({"constant": field}, metrics))
        result["notes"].append(
            f"Figures that are not listed are those of {like.name}. `heterostep plan --gpu FILE` reads the JSON file."
        )
    return 0


def _ready(device: str, nproc: int, shape: str | None) -> str:
    """The device, where the ranks fit it.

    Raises:
        ConfigError: it is not there, or there are too many ranks.
    """
    silence_libraries()
    # What PyTorch's profiler says of itself.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    found = pick_device(device)
    if found.type == "cuda" and nproc > torch.cuda.device_count():
        raise ConfigError(f"--nproc {nproc} needs as many GPUs, but this machine has {torch.cuda.device_count()}")
    if shape is not None and SHAPES[shape].heads % nproc:
        heads = SHAPES[shape].heads
        raise ConfigError(f"--nproc {nproc}: the {heads} heads of shape {shape!r} must be a multiple of the ranks")
    return str(found)


def _result(
    verb: str, said: Sequence[str], settings: StepSettings | CalibrateSettings, device: str, warmup: str
) -> dict[str, Any]:
    name = results.processor() if device == "cpu" else device_name(torch.device(device))
    name = f"{name} ({torch.get_num_threads()} threads)" if device == "cpu" else name
    return results.new(verb, said, dataclasses.asdict(settings), warmup=warmup, seeds=[0], device=name)
