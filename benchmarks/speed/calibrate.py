"""The constants by which `heterostep plan` sees a device, measured: from parts of a step, a decoding, and a link."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan

from ...engine.devices import ELEMENTWISE_BYTES, Device
from ...engine.memory import host_bytes
from .settings import CalibrateSettings, StepSettings
from .step import SHAPES, Shape, StepBench, clock_for, meet, on_ranks

PARTIAL = 0.25
FEW_TOKENS = 16
"""So few that a layer's time is that of starting its kernels."""
_TEXT = 64
_MESSAGE = 1 << 22
_MOST = 1e15
"""A bandwidth that no step notices."""


def calibrate(
    settings: CalibrateSettings, device: str, like: Device, name: str, say: Callable[[str], None]
) -> tuple[Device, dict[str, float]]:
    """Measure a device.

    Args:
        settings: with which model, how often, between how many ranks.
        device: "cpu" or a CUDA device.
        like: gives the figures that are not measured.
        name: of the device, for people.
        say: shows what is done.

    Returns:
        The device, and the figures that were measured by their fields.

    Raises:
        HeterostepError: a rank failed.
    """
    shape = SHAPES[settings.shape]
    say("steps of a random model")
    found = of_steps(settings, device, shape)
    say("decoding")
    found["decode"] = decode_seconds(device, settings.rounds)
    memory = host_bytes() if device == "cpu" else torch.cuda.mem_get_info(device)[1]
    if memory is not None:
        found["memory"] = float(memory)
    if settings.nproc > 1:
        say(f"the link between {settings.nproc} ranks")
        found |= of_link(settings, device)
    here = f"measured: heterostep bench calibrate --shape {settings.shape}"
    others = {key: f"estimate: that of {like.name}" for key in _fields() if key not in found}
    values = {key: getattr(like, key) for key in _fields()} | found
    sources = {**others, **dict.fromkeys(found, here)}
    return Device(name=name, **values, sources=sources), found


def _fields() -> list[str]:
    return [item.name for item in dataclasses.fields(Device) if item.name not in ("name", "sources")]


def of_steps(settings: CalibrateSettings, device: str, shape: Shape) -> dict[str, float]:
    """Speeds of attention and matrices, bandwidth, and what a layer takes besides."""
    tokens, layers = math.prod(shape.grid), shape.layers
    shares = f"1,{PARTIAL},{FEW_TOKENS / tokens}"
    bench = StepBench(StepSettings(shape=settings.shape, shares=shares, rounds=settings.rounds), device)
    bench.steps()
    figures = {str(row["what"]["step"]): row["metrics"] for row in bench.rows()}
    full, partial, few = (
        {name: figure["value"] for name, figure in figures[f"{float(share):g} active"].items()}
        for share in shares.split(",")
    )
    d, f = shape.heads * shape.head_dim, shape.ffn_dim
    linear = tokens * (12 * d * d + 4 * d * f) * layers
    attention = 4 * tokens * d * (tokens + _TEXT) * layers
    moved = tokens * d * layers * ELEMENTWISE_BYTES * shape.dtype.itemsize / 2
    besides = full["seconds"] - full["linear"] - full["attention"]
    return {
        "linear": linear / full["linear"],
        "attention": attention / full["attention"],
        "bandwidth": min(moved / besides, _MOST) if besides > 0 else _MOST,
        "layer_floor": few["seconds"] / layers,
        "partial_layer": max(partial["seconds"] - PARTIAL * full["seconds"], 0.0) / layers,
    }


@torch.no_grad()
def decode_seconds(device: str, rounds: int) -> float:
    """Seconds for each pixel of all frames, by a VAE of Wan 2.1's size with random weights, in float32."""
    torch.manual_seed(0)
    with torch.device(device):
        vae = AutoencoderKLWan().eval()
    size = (2, 8, 8) if device == "cpu" else (6, 60, 104)
    latents = torch.randn(1, vae.config.z_dim, *size, device=device)
    clock = clock_for(device, 1)

    def once() -> float:
        began = clock()
        vae.decode(latents)
        if device != "cpu":
            torch.cuda.synchronize(device)
        return clock() - began

    once()
    pixels = (4 * (size[0] - 1) + 1) * 64 * size[1] * size[2]
    return statistics.median(once() for _ in range(rounds)) / pixels


def of_link(settings: CalibrateSettings, device: str) -> dict[str, float]:
    """What a rank sends to the others of this machine, in bytes per second, and the time of the shortest message.

    Raises:
        HeterostepError: a rank failed.
    """
    with tempfile.TemporaryDirectory(prefix="heterostep-link-") as folder:
        on_ranks(_rank, (settings, device, folder), settings.nproc)
        found: dict[str, float] = json.loads((Path(folder) / "link.json").read_text())
        return found


def _rank(rank: int, settings: CalibrateSettings, device: str, folder: str) -> None:
    """Life of one rank."""
    torch.set_num_threads(1)
    device = meet(rank, settings.nproc, device, folder)

    def seconds(count: int) -> float:
        rows: Any = torch.zeros(count, device=device)
        took = torch.empty_like(rows)
        times = []
        for _ in range(settings.rounds + 1):
            dist.barrier()
            began = time.perf_counter()
            dist.all_to_all_single(took, rows)
            if device != "cpu":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])

    count = _MESSAGE // settings.nproc * settings.nproc
    latency, long = seconds(settings.nproc), seconds(count)
    if rank == 0:
        sent = 4 * count * (settings.nproc - 1) / settings.nproc
        link = {"nvlink": sent / max(long - latency, 1e-9), "latency": latency}
        (Path(folder) / "link.json").write_text(json.dumps(link))
    dist.destroy_process_group()
