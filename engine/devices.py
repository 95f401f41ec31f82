"""What a GPU takes for the work of a step: constants that were measured, or are marked as estimates.

docs/planning.md derives them. `benchmarks/plan.py` computes them again from the reports and compares.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..settings import check, setting

GIB = 2**30
ELEMENTWISE_BYTES = 302
"""Bytes that norms, gates, rotary embedding and casts move for each channel of a token in a layer: derived from the
step of Wan 1.3B on an H200 (benchmarks/reports/step-wan-1.3b.json)."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A type of GPU, as a plan sees it.

    Attributes:
        name: for people.
        sources: field name -> where its figure comes from; one that begins with "estimate" was not measured.

    Raises:
        ConfigError: a figure is missing, not a number, or not above 0.
    """

    name: str
    memory: float = setting(above=0, unit="bytes", help="memory that a process can use")
    attention: float = setting(above=0, unit="FLOP/s", help="speed of the attention kernel")
    linear: float = setting(above=0, unit="FLOP/s", help="speed of matrix multiplications")
    bandwidth: float = setting(above=0, unit="bytes/s", help="memory bandwidth for elementwise kernels")
    layer_floor: float = setting(
        least=0, unit="seconds", help="least time of a layer: its kernels cannot be launched faster"
    )
    partial_layer: float = setting(least=0, unit="seconds", help="what a layer of a partial step takes besides")
    decode: float = setting(least=0, unit="seconds", help="decoding, for each pixel of the video")
    text: float = setting(least=0, unit="seconds", help="encoding of the prompts")
    nvlink: float = setting(above=0, unit="bytes/s", help="what a GPU sends to others of its machine over NVLink")
    pcie: float = setting(above=0, unit="bytes/s", help="what a GPU sends to others of its machine over PCIe")
    network: float = setting(above=0, unit="bytes/s", help="what a GPU sends to other machines")
    latency: float = setting(least=0, unit="seconds", help="start of a collective inside a machine")
    network_latency: float = setting(least=0, unit="seconds", help="start of a collective between machines")
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self)

    @property
    def estimates(self) -> list[str]:
        """Names of the figures that were not measured."""
        names = [item.name for item in dataclasses.fields(self) if item.name not in ("name", "sources")]
        return [name for name in names if self.sources.get(name, "estimate").startswith("estimate")]


_SDPA = "published: Wan 2.1 14B on one H100 with PyTorch's attention, 3.75 s at 32,760 and 13.30 s at 75,600 tokens"
_STEP = "measured: benchmarks/reports/step-wan-1.3b.json on an H200"
_H200_RUN = "measured: a run with Wan 2.1 1.3B's sizes on an H200, 832x480, 81 frames"
_NOMINAL = "estimate: three quarters of the nominal"
_HOPPER: dict[str, Any] = {
    "attention": 571e12,
    "linear": 495e12,
    "layer_floor": 0.5e-3,
    "partial_layer": 0.35e-3,
    "decode": 1.08e-7,
    "text": 0.5,
    "nvlink": 340e9,
    "pcie": 45e9,
    "network": 37e9,
    "latency": 30e-6,
    "network_latency": 60e-6,
}
_HOPPER_SOURCES = {
    "memory": "measured: what a process sees",
    "attention": _SDPA,
    "linear": f"{_SDPA}; without the elementwise kernels",
    "bandwidth": "nominal; what the elementwise kernels move is fitted to it",
    "layer_floor": "estimate: 60 kernels of 8 microseconds",
    "partial_layer": _STEP,
    "decode": _H200_RUN,
    "text": _H200_RUN,
    "nvlink": f"{_NOMINAL} 450 GB/s",
    "pcie": f"{_NOMINAL} 64 GB/s of PCIe 5",
    "network": f"{_NOMINAL} 400 Gbit/s for each GPU",
    "latency": "estimate",
    "network_latency": "estimate",
}
_CPU = "measured: benchmarks/reports/parallel.json, one core for each rank"

DEVICES: Mapping[str, Device] = {
    "h100": Device(
        name="NVIDIA H100 SXM 80 GB",
        memory=78 * GIB,
        bandwidth=3.35e12,
        **_HOPPER,
        sources={
            **_HOPPER_SOURCES,
            "partial_layer": "estimate: as on an H200",
            "decode": "estimate: as on an H200",
            "text": "estimate: as on an H200",
        },
    ),
    "h200": Device(
        name="NVIDIA H200 141 GB",
        memory=139 * GIB,
        bandwidth=4.8e12,
        **_HOPPER,
        sources={**_HOPPER_SOURCES, "attention": f"{_SDPA}; the same cores", "linear": f"{_SDPA}; the same cores"},
    ),
    "cpu": Device(
        name="CPU, one core for each rank",
        memory=8 * GIB,
        attention=88e9,
        linear=88e9,
        bandwidth=1e15,
        layer_floor=0.0,
        partial_layer=0.0,
        decode=3e-5,
        text=0.5,
        nvlink=0.2e9,
        pcie=0.2e9,
        network=0.1e9,
        latency=0.0,
        network_latency=0.0,
        sources={"attention": _CPU, "linear": _CPU, "bandwidth": f"{_CPU}; inside the other two", "nvlink": _CPU},
    ),
}


def known_device(name: str) -> str | None:
    """The key in `DEVICES` of a GPU that calls itself so, such as "NVIDIA H100 80GB HBM3"; None: it is not there."""
    return next((key for key in DEVICES if key != "cpu" and key.upper() in name.upper()), None)


def device_of(name: str) -> Device:
    """A device by its name in `DEVICES`, or from a JSON file: of `bench calibrate`, or with the fields of `Device`.

    Raises:
        ConfigError: it is neither, or the file's figures are wrong.
    """
    if name.lower() in DEVICES:
        return DEVICES[name.lower()]
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"gpu {name!r} must be one of {', '.join(DEVICES)}, or a JSON file with a GPU's constants")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and isinstance(values.get("device"), dict):
            values = values["device"]
        return Device(**values)
    except (OSError, ValueError) as error:
        raise ConfigError(f"gpu {name!r}: {error}") from error
    except TypeError as error:
        fields = ", ".join(item.name for item in dataclasses.fields(Device))
        raise ConfigError(f"gpu {name!r} must be a JSON object with exactly the fields {fields}") from error
