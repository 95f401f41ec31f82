"""`heterostep plan`: what a model needs and delivers on a number of GPUs, without weights and without a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ..engine.config import EngineConfig
from ..engine.devices import device_of
from ..engine.estimate import ITEM_BYTES, Case, Links, Sizes, Video, read_sizes
from ..engine.request import GenerateRequest, resolve
from ..errors import ConfigError
from ..hsa.config import HSAConfig
from ..settings import check, like, setting
from . import plan_report
from .layouts import advice, layouts, most, sweep, uneven

LINKS = ("nvlink", "pcie")
GIGA = 1e9


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What `plan` is asked.

    Raises:
        ConfigError: a value is out of range or of the wrong type.
    """

    model: str = setting(
        metavar="M",
        help="wan2.1-1.3b, wan2.1-14b, wan2.2-a14b, wan2.2-ti2v-5b or ltx-2, or a folder in diffusers format",
    )
    num_frames: int | None = like(GenerateRequest, "num_frames")
    num_inference_steps: int | None = like(GenerateRequest, "num_inference_steps")
    guidance_scale: float | None = like(GenerateRequest, "guidance_scale")
    fps: int | None = like(GenerateRequest, "fps")
    gpu: str = setting("h100", metavar="TYPE", help="h100, h200, cpu, or a JSON file with a GPU's constants")
    gpus: int = setting(8, least=1, most=65536, help="number of GPUs")
    machine: int = setting(8, least=1, flag="gpus-per-machine", help="GPUs of one machine")
    links: str = setting("nvlink", choices=LINKS, help="links between the GPUs of a machine")
    network: float | None = setting(
        None, above=0, unit="GB/s", help="what each GPU can send to other machines; left out, that of its type"
    )
    dtype: str = like(EngineConfig, "dtype")
    shard_weights: bool = like(EngineConfig, "shard_weights")
    sweep: bool = setting(False, help="also plan for 1 to 1,024 GPUs")
    json: str | None = setting(None, metavar="FILE", help="JSON file of the plan")
    plot: str | None = setting(None, metavar="FILE", help="picture of the sweep (needs matplotlib)")

    def __post_init__(self) -> None:
        check(self)


def plan(settings: PlanSettings, hsa: HSAConfig, degrees: Mapping[str, Any], size: tuple[int, int] | None) -> int:
    """Print what the GPUs would do, and write what was asked for; returns the exit code.

    Args:
        settings: the model, the video and the GPUs.
        hsa: how the work is spread.
        degrees: settings of `ParallelConfig` that were given; all others are tried.
        size: width and height in pixels; None: the model's own.

    Raises:
        ConfigError: something is wrong with the settings.
        RequestError: the model cannot make such a video.
    """
    if settings.plot is not None:
        _need_matplotlib()
    case = case_of(settings, hsa, size)
    found = layouts(case, settings.gpus, degrees)
    notes = [uneven(case, settings.gpus, degrees)]
    if most(found) is None:
        notes.append(advice(case, settings.gpus, degrees))
    notes = [note for note in notes if note]
    swept = sweep(case, degrees) if settings.sweep or settings.plot is not None else []
    print(plan_report.text(case, found, swept, notes))
    if settings.json is not None:
        plan_report.write_json(settings.json, case, found, swept, notes)
    if settings.plot is not None:
        plan_report.plot(settings.plot, case, swept)
    return 0


def case_of(settings: PlanSettings, hsa: HSAConfig, size: tuple[int, int] | None = None) -> Case:
    """Everything but the degrees, from what was asked.

    Raises:
        ConfigError, RequestError: see `plan`.
    """
    sizes, device = read_sizes(settings.model), device_of(settings.gpu)
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "float32" if settings.gpu == "cpu" else "bfloat16"
    network = device.network if settings.network is None else settings.network * GIGA
    return Case(
        sizes=sizes,
        video=_video(settings, sizes, size),
        hsa=hsa,
        device=device,
        links=Links(machine=settings.machine, inside=getattr(device, settings.links), outside=network),
        item_bytes=ITEM_BYTES[dtype],
        shard_weights=settings.shard_weights,
    )


def _video(settings: PlanSettings, sizes: Sizes, size: tuple[int, int] | None) -> Video:
    """The video with the model's defaults, checked as a request is."""
    facts = sizes.facts
    width, height = size or (None, None)
    request = resolve(
        GenerateRequest(
            prompt="-",
            width=width,
            height=height,
            num_frames=settings.num_frames,
            fps=settings.fps,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
        ),
        dataclasses.replace(facts, image="none"),
    )
    grid = facts.grid(request.width, request.height, request.num_frames)
    return Video(
        width=request.width,
        height=request.height,
        num_frames=request.num_frames,
        steps=request.num_inference_steps,
        branches=facts.passes(request.guidance_scale),
        tokens=grid[0] * grid[1] * grid[2],
        audio_tokens=round(facts.audio_rate * request.num_frames / request.fps),
    )


def _need_matplotlib() -> None:
    try:
        import_module("matplotlib")
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: install heterostep[bench], or leave --plot out") from error
