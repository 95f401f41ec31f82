"""Whether a video fits into memory, known before a model is loaded; and which offload is the fastest that fits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from ..errors import ConfigError, RequestError
from ..hsa.config import HSAConfig
from ..parallel.config import ParallelConfig
from .config import EngineConfig
from .devices import DEVICES, GIB, known_device
from .estimate import (
    DECODE_PIXEL_BYTES,
    ITEM_BYTES,
    RESERVE,
    TILE,
    Case,
    Links,
    Sizes,
    Video,
    estimate,
    memory,
    read_sizes,
)
from .facts import ModelFacts
from .request import GenerateRequest, ResolvedRequest, allocation, resolve

ORDER = ("none", "model", "group")
"""Offloads, the fastest first."""
_QUANTIZED = 0.55
"""Of 16-bit weights: 8 bits, scales, and the layers that stay as they are."""
_PREFETCHED = 3
"""Blocks that are on the GPU at once: one computes, one comes, one goes."""
_DRIVER = Path("/dev/nvidiactl")
_MEMINFO = Path("/proc/meminfo")


class Need(NamedTuple):
    """Bytes of one rank by part.

    Attributes:
        transformers: weights of all of them.
        largest: of one of them.
        layers: blocks of one.
        text: weights of the text encoder.
        vae: likewise.
        kv: keys and values.
        step: activations of a step, and what is kept from step to step.
        decode: of decoding, which takes the place of `kv` and `step`.
        reserve: what the device's own software needs.
    """

    transformers: int
    largest: int
    layers: int
    text: int
    vae: int
    kv: int
    step: int
    decode: int
    reserve: int

    def peak(self, offload: str) -> int:
        """Bytes that are needed at most."""
        working = self.kv + self.step
        if offload == "none":
            most = self.transformers + self.text + self.vae + max(working, self.decode)
        elif offload == "model":
            most = max(self.text, self.largest + working, self.vae + self.decode)
        else:
            blocks = _PREFETCHED * self.largest // self.layers
            most = max(self.text // 4, blocks + working, self.vae + self.decode)
        return most + self.reserve

    @property
    def words(self) -> str:
        """The parts, the largest first."""
        parts = {
            "transformer": self.transformers, "text encoder": self.text, "VAE": self.vae, "keys and values": self.kv,
            "activations": self.step, "decoding": self.decode,
        }  # fmt: skip
        shown = sorted(((size, name) for name, size in parts.items() if size >= GIB / 100), reverse=True)
        return ", ".join(f"{name} {_gib(size)}" for size, name in shown)


@dataclass(frozen=True)
class Room:
    """Memory that a video may take.

    Attributes:
        device: "cuda" or "cpu", where offloading saves nothing.
        free: bytes that are free before the model is loaded; None: nobody knows, and nothing is refused.
    """

    device: str
    free: int | None

    @classmethod
    def here(cls, device: str, shares: int = 1) -> Room:
        """What this machine has for an engine's setting `device`, its own memory divided by `shares`.

        It needs no PyTorch, which would take memory of a GPU to look at it.
        """
        free = None if device == "cpu" else gpu_bytes()
        if free is not None or device.startswith("cuda") or (device == "auto" and _DRIVER.exists()):
            return cls("cuda", free)
        free = host_bytes()
        return cls("cpu", None if free is None else free // shares)

    def usual(self, config: EngineConfig, facts: ModelFacts) -> str:
        """The offload with which to load a model: the one that is set, or the fastest for a video of its own size."""
        if config.offload != "auto":
            return config.offload
        try:
            usual = resolve(GenerateRequest(prompt="-"), replace(facts, image="none"))
            ranks = 1 if config.parallel is None else config.parallel.world_size
            return self.settle(config, facts, usual, ranks=ranks, shard_weights=config.shard_weights)
        except RequestError:  # each request is asked for itself, and a smaller one may fit
            return ORDER[-1]

    def settle(
        self,
        config: EngineConfig,
        facts: ModelFacts,
        request: ResolvedRequest,
        *,
        ranks: int = 1,
        shard_weights: bool = False,
    ) -> str:
        """The offload for a video: the one that is set, or the fastest that fits.

        Args:
            config: of the engine.
            facts: of the model.
            request: the video.
            ranks: that share it.
            shard_weights: as in `EngineConfig`, which takes it only together with degrees.

        Raises:
            RequestError: nothing that may be chosen fits; the sentence says what would.
        """

        def peak(config: EngineConfig, offload: str) -> float:
            found = need_of(config, facts, request, device=self.device, ranks=ranks, shard_weights=shard_weights)
            return 0.0 if found is None else found.peak(offload if self.device == "cuda" else "none")

        movable = self.device == "cuda" and not shard_weights
        choices = [config.offload] if config.offload != "auto" else list(ORDER) if movable else ["none"]
        if self.free is None:
            return choices[0]
        peaks = {offload: peak(config, offload) for offload in choices}
        fitting = [offload for offload in choices if peaks[offload] <= self.free]
        if fitting:
            return fitting[0]
        parts = need_of(config, facts, request, device=self.device, ranks=ranks, shard_weights=shard_weights)
        assert parts is not None, "what is not known is not refused"
        tries = _cheaper(config, movable)
        enough = [name for name, changed, offload in tries if peak(changed, offload) <= self.free]
        named = " or ".join(enough) + " would do" if enough else "take a smaller size, fewer frames or more ranks"
        least = _gib(min(peaks.values()))
        raise RequestError(
            f"the video needs about {least} of memory, and {_gib(self.free)} are free ({parts.words}); {named}"
        )


def _cheaper(config: EngineConfig, movable: bool) -> list[tuple[str, EngineConfig, str]]:
    """Settings that need less, by their flags: those that change nothing first."""
    offload = "group" if movable else "none"
    tries = [("--offload auto", config, offload)] if movable and config.offload not in ("auto", "group") else []
    if not config.vae_tiling:
        tries.append(("--vae-tiling", replace(config, vae_tiling=True), offload))
    if config.hsa is not None and config.hsa.policy in ("tokens", "groups"):
        tries.append(("--policy joint", replace(config, hsa=replace(config.hsa, policy="joint")), offload))
    if config.quantize == "none":
        tries.append(("--quantize int8", replace(config, quantize="int8"), offload))
    return tries


def gpu_bytes() -> int | None:
    """Bytes that are free on the emptiest GPU of this machine, by NVML; None without one, or without nvidia-ml-py."""
    try:
        nvml = import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # it has an error type of its own for each thing that can be missing
        return None
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        return max((int(nvml.nvmlDeviceGetMemoryInfo(handle).free) for handle in handles), default=None)
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()


def host_bytes() -> int | None:
    """Bytes of this machine's memory that are free; None: nobody says so."""
    try:
        lines = _MEMINFO.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None


def need_of(
    config: EngineConfig,
    facts: ModelFacts,
    request: ResolvedRequest,
    *,
    device: str,
    ranks: int = 1,
    shard_weights: bool = False,
) -> Need | None:
    """Estimate what a video needs; None where the sizes of the model are not known.

    Args:
        config: of the engine.
        facts: of the model.
        request: the video.
        device: "cuda" or "cpu".
        ranks: that share the video.
        shard_weights: whether they also share the weights.
    """
    item_bytes = ITEM_BYTES.get(config.dtype, 2 if device == "cuda" else 4)
    try:
        sizes = read_sizes(config.model)
    except ConfigError:
        return None
    hsa = allocation(config, request) or HSAConfig(compute=1.0)

    def parts(frames: int) -> dict[str, int]:
        case = _case(sizes, hsa, request, frames, item_bytes, ranks, shard_weights)
        return memory(case, ParallelConfig(ulysses=ranks))

    try:
        whole = parts(request.num_frames)
        # Of a long video one window is computed at a time.
        window = parts(min(request.window or request.num_frames, request.num_frames))
    except ConfigError:  # a share that cannot be met is refused elsewhere, with reasons
        return None
    vae = sizes.vae_parameters * 4
    transformers = (whole["weights"] - vae) * (_QUANTIZED * 2 / item_bytes if config.quantize != "none" else 1)
    decode = whole["decode"]
    if config.vae_tiling:
        plane = request.width * request.height
        decode -= round(DECODE_PIXEL_BYTES * sizes.vae_width * max(plane - TILE * TILE, 0))
    return Need(
        transformers=round(transformers),
        largest=round(transformers / facts.experts),
        layers=facts.num_layers,
        text=_file_bytes(facts, "text_encoder", item_bytes),
        vae=vae,
        kv=whole["kv"],
        step=window["activations"],
        decode=max(decode, 0),
        reserve=RESERVE if device == "cuda" else 0,
    )


def expected_seconds(config: EngineConfig, request: ResolvedRequest, gpu: str, item_bytes: int) -> float | None:
    """Estimate how long denoising takes; None for a device or a model that the planner does not know.

    Args:
        config: of the engine.
        request: the video.
        gpu: what the device calls itself.
        item_bytes: of a weight.
    """
    known = known_device(gpu)
    if known is None or request.window is not None:
        return None
    device, parallel = DEVICES[known], config.parallel or ParallelConfig()
    hsa = allocation(config, request) or HSAConfig(compute=1.0)
    try:
        sizes = read_sizes(config.model)
        made = _case(sizes, hsa, request, request.num_frames, item_bytes, parallel.world_size, config.shard_weights)
        links = Links(machine=8, inside=device.nvlink, outside=device.network)
        return estimate(replace(made, device=device, links=links), parallel).denoise
    except ConfigError:
        return None


def _case(
    sizes: Sizes,
    hsa: HSAConfig,
    request: ResolvedRequest,
    frames: int,
    item_bytes: int,
    ranks: int,
    shard_weights: bool,
) -> Case:
    """What the planner is asked of a video of so many frames, without a device's speed."""
    facts = sizes.facts
    video = Video(
        width=request.width,
        height=request.height,
        num_frames=frames,
        steps=request.num_inference_steps,
        branches=facts.passes(request.guidance_scale),
        tokens=math.prod(facts.grid(request.width, request.height, frames)),
    )
    return Case(
        sizes=sizes,
        video=video,
        hsa=hsa,
        device=next(iter(DEVICES.values())),
        links=Links(machine=ranks, inside=1.0, outside=1.0),
        item_bytes=item_bytes,
        shard_weights=shard_weights,
    )


def _file_bytes(facts: ModelFacts, part: str, item_bytes: int) -> int:
    """Bytes of a part's weights in memory, by its files, which mostly hold 16 bits; 0 where they are not here."""
    folder = Path(facts.location) / part
    if not folder.is_dir():
        return 0
    return round(sum(path.stat().st_size for path in folder.glob("*.safetensors")) * item_bytes / 2)


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
