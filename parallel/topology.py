"""What NVML says of this machine's GPUs: which share NVLink, and how much memory is free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from ..errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Topology:
    """GPUs of one machine, numbered as CUDA numbers the visible ones.

    Attributes:
        islands: GPUs that reach each other over NVLink (or NVSwitch), ascending; a GPU without is an island.
        free_bytes: free memory of each GPU.
    """

    islands: tuple[tuple[int, ...], ...]
    free_bytes: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """Order in which local ranks should take the GPUs: islands are consecutive, as ulysses groups are."""
        return tuple(gpu for island in self.islands for gpu in island)

    def split(self, group_size: int) -> bool:
        """Whether, in this order, a group of that many consecutive ranks spans two islands."""
        ranks = [i for i, island in enumerate(self.islands) for _ in island]
        groups = (ranks[i : i + group_size] for i in range(0, len(ranks), group_size))
        return any(len(set(group)) > 1 for group in groups)


def read(uuids: Sequence[str] | None = None, nvml: Any = None) -> Topology:
    """Ask NVML.

    Args:
        uuids: of the GPUs, in CUDA's order; by default those visible to this process. NVML knows nothing of
            CUDA_VISIBLE_DEVICES, so numbers would not do.
        nvml: the module ``pynvml`` of nvidia-ml-py; imported when needed.

    Raises:
        ConfigError: nvidia-ml-py is not installed, or there is no NVIDIA driver or GPU.
    """
    if nvml is None:
        try:
            nvml = import_module("pynvml")
        except ImportError as error:
            raise ConfigError("The topology of GPUs is read with nvidia-ml-py: install heterostep[gpu].") from error
    if uuids is None:
        uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    if not uuids:
        raise ConfigError("The topology of GPUs was asked for, but no NVIDIA GPU is visible to this process.")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise ConfigError(f"The topology of GPUs was asked for, but the NVIDIA driver says: {error}.") from error
    try:
        handles = [nvml.nvmlDeviceGetHandleByUUID(u if u.startswith("GPU-") else f"GPU-{u}") for u in uuids]
        free = tuple(int(nvml.nvmlDeviceGetMemoryInfo(handle).free) for handle in handles)
        return Topology(islands=_islands(handles, nvml), free_bytes=free)
    finally:
        nvml.nvmlShutdown()


def _islands(handles: Sequence[Any], nvml: Any) -> tuple[tuple[int, ...], ...]:
    """Join GPUs between which NVLink works; through a switch too."""
    islands: list[list[int]] = []
    for gpu in range(len(handles)):
        joined = [island for island in islands if any(_linked(handles[gpu], handles[other], nvml) for other in island)]
        islands = [island for island in islands if island not in joined]
        islands.append(sorted([gpu, *(other for island in joined for other in island)]))
    return tuple(tuple(island) for island in sorted(islands))


def _linked(one: Any, other: Any, nvml: Any) -> bool:
    try:
        status = nvml.nvmlDeviceGetP2PStatus(one, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
    except nvml.NVMLError:  # a GPU that knows no NVLink at all
        return False
    return bool(status == nvml.NVML_P2P_STATUS_OK)
