"""`ParallelMesh`: this rank's place on the axes windows x cfg x ring x ulysses, and the process group of each axis.

Also what heterostep takes from a running xfuser (xDiT) job. This is the one file that imports xfuser, and only when
asked: `import xfuser` probes for a GPU and fails without one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from ..errors import ConfigError
from .config import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The ranks that share one kind of work with this one.

    Attributes:
        size: how many they are.
        rank: this rank's place among them.
        group: their process group; None where size is 1.
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Axis:
        """Describe a process group; None is an axis of one rank."""
        if group is None or group.size() == 1:
            return cls()
        return cls(size=group.size(), rank=group.rank(), group=group)


@dataclass(frozen=True, kw_only=True)
class ParallelMesh:
    """One rank's view of the job that makes one video.

    A rank's number is ((windows * cfg_size + cfg) * ring_size + ring) * ulysses_size + ulysses: ulysses is innermost,
    so that its ranks have the fastest links.

    Attributes:
        windows: ranks with other windows of a long video.
        cfg: ranks with the same tokens and heads, but other guidance branches.
        ring: ranks with other tokens of the same heads.
        ulysses: ranks with other heads.
        sequence: all ranks of one branch, ring x ulysses, ring-major: rank = ring.rank * ulysses.size + ulysses.rank.
        group: all ranks of the same windows, cfg x ring x ulysses, cfg-major.
        world: all ranks of the video, windows-major.
        device: where this rank's tensors live; with NCCL one device for each rank.
    """

    windows: Axis = Axis()
    cfg: Axis
    ring: Axis
    ulysses: Axis
    sequence: Axis
    group: Axis
    world: Axis
    device: torch.device

    @classmethod
    def create(cls, config: ParallelConfig, device: torch.device | str = "cpu") -> ParallelMesh:
        """Make the groups of all axes; every rank of the job must call it, with the same `config`.

        With one rank no process group is needed or made. Otherwise ``torch.distributed`` is initialised already,
        with gloo for CPU and NCCL for CUDA devices. A CUDA device becomes the current one: NCCL wants each rank to
        have its own.

        Raises:
            ConfigError: the job has another number of ranks than `config`, or none was initialised.
        """
        device = torch.device(device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        if config.world_size == 1 and not dist.is_initialized():
            alone = Axis()
            return cls(cfg=alone, ring=alone, ulysses=alone, sequence=alone, group=alone, world=alone, device=device)
        if not dist.is_initialized():
            raise ConfigError(
                f"A mesh of {config.world_size} ranks needs torch.distributed: "
                "start the job with torchrun or --nproc, which initialise it."
            )
        if dist.get_world_size() != config.world_size:
            raise ConfigError(
                f"{config.product} makes {config.world_size} rank(s), "
                f"but the job has {dist.get_world_size()}: the product must be equal to it."
            )
        # Axes of one rank need no group; a mesh of one axis is the world's group, made already.
        degrees = {name: getattr(config, name) for name in ("windows", "cfg", "ring", "ulysses")}
        groups = _groups(device.type, {name: size for name, size in degrees.items() if size > 1})
        sequence = _innermost(device.type, degrees, ("ring", "ulysses"), groups)
        return cls(
            **{name: Axis.of(groups.get(name)) for name in degrees},
            sequence=Axis.of(sequence),
            group=Axis.of(_innermost(device.type, degrees, ("cfg", "ring", "ulysses"), groups)),
            world=Axis.of(dist.group.WORLD),
            device=device,
        )

    @classmethod
    def from_xfuser(cls) -> ParallelMesh:
        """Adopt the process groups of an xfuser (xDiT) job that runs in this process.

        Raises:
            ConfigError: xfuser is not installed, not initialised, or uses other axes.
        """
        groups = job_groups()
        names = ("cfg", "ring", "ulysses", "sequence", "world")
        axes = {name: Axis.of(getattr(groups, name)) for name in names}
        mesh = cls(device=groups.device, group=axes["world"], **axes)
        _check_numbering(mesh)
        return mesh


def _check_numbering(mesh: ParallelMesh) -> None:
    """Refuse groups that do not form the product cfg x ring x ulysses in heterostep's order."""
    sequence = mesh.ring.rank * mesh.ulysses.size + mesh.ulysses.rank
    world = mesh.cfg.rank * mesh.sequence.size + mesh.sequence.rank
    sizes = mesh.ring.size * mesh.ulysses.size, mesh.cfg.size * mesh.sequence.size
    if sizes != (mesh.sequence.size, mesh.world.size) or (sequence, world) != (mesh.sequence.rank, mesh.world.rank):
        raise ConfigError(
            f"from_xfuser: cfg {mesh.cfg.size} x ring {mesh.ring.size} x ulysses {mesh.ulysses.size} are not the "
            f"{mesh.world.size} rank(s) of the job, ulysses innermost; initialise xfuser with these three degrees "
            "alone, and with yunchang installed."
        )


def _groups(device_type: str, degrees: dict[str, int]) -> dict[str, dist.ProcessGroup]:
    """Make one process group for each axis of a mesh over all ranks, the last axis innermost."""
    if not degrees:
        return {}
    mesh = init_device_mesh(device_type, tuple(degrees.values()), mesh_dim_names=tuple(degrees))
    return {name: mesh.get_group(name) for name in degrees}


def _innermost(
    device_type: str, degrees: dict[str, int], axes: Sequence[str], groups: dict[str, dist.ProcessGroup]
) -> dist.ProcessGroup | None:
    """The group of this rank over the last `axes` of `degrees` together; `groups` are those of single axes."""
    wide = [axis for axis in axes if degrees[axis] > 1]
    size, world = math.prod(degrees[axis] for axis in axes), math.prod(degrees.values())
    if size == world:
        return dist.group.WORLD
    if len(wide) <= 1:
        return groups[wide[0]] if wide else None
    return _groups(device_type, {"outer": world // size, "inner": size})["inner"]


def shard_weights(model: torch.nn.Module, blocks: Sequence[torch.nn.Module], mesh: ParallelMesh) -> None:
    """Shard the weights of a model's blocks over all ranks of `mesh`, in place, by PyTorch's FSDP2.

    A block is gathered before its forward pass and freed after it. What is not in a block is small: it is gathered at
    the first pass, and stays. Every rank must run the same number of passes from then on, as the hook lets them do.

    Args:
        model: for inference only, it takes no gradients afterwards. Weights that are not on the device of `mesh` yet
            are moved there block by block, so that the device never holds all of them.
        blocks: its layers, in the order in which they run.
        mesh: the ranks; with one nothing is done.
    """
    if mesh.world.group is None:
        return
    model.requires_grad_(False)  # FSDP wants weights that are trained to be of one type; Wan keeps some in float32
    ranks = DeviceMesh.from_group(mesh.world.group, mesh.device.type)
    for block in blocks:
        fully_shard(block, mesh=ranks, reshard_after_forward=True)
    fully_shard(model, mesh=ranks, reshard_after_forward=False)


Attention = Callable[[Tensor, Tensor, Tensor], Any]


class JobGroups(NamedTuple):
    """The process groups of an xfuser job; None where a degree is 1."""

    cfg: Any
    ring: Any
    ulysses: Any
    sequence: Any
    world: Any
    device: torch.device


def job_groups() -> JobGroups:
    """Return the process groups that xfuser has initialised in this process.

    xfuser numbers its ranks as `ParallelMesh` does (ulysses, then ring, then cfg), and its data-parallel replicas
    make one video each: the groups are those of this rank's replica.

    Raises:
        ConfigError: xfuser is not installed, not initialised, or uses axes that heterostep does not have.
    """
    try:
        state = import_module("xfuser.core.distributed.parallel_state")
    except (ImportError, NotImplementedError) as error:  # the latter where it finds no GPU
        raise ConfigError(f"from_xfuser: xfuser cannot be imported ({error}); install it or use create().") from error
    if not state.model_parallel_is_initialized():
        raise ConfigError("from_xfuser: xfuser has no groups yet; call its initialize_model_parallel() before.")
    for name, size in (
        ("pipeline", state.get_pipeline_parallel_world_size()),
        ("tensor", state.get_tensor_model_parallel_world_size()),
    ):
        if size > 1:
            raise ConfigError(f"from_xfuser: a {name} parallel degree of {size} was set; heterostep needs it to be 1.")
    shards, replica, cfg = state.get_sp_group(), state.get_model_replica_group(), state.get_cfg_group()
    return JobGroups(
        cfg=cfg.device_group,
        ring=getattr(shards, "ring_group", None),
        ulysses=getattr(shards, "ulysses_group", None),
        sequence=shards.device_group,
        world=replica.device_group,
        device=torch.device(shards.device),
    )


def registry_attention() -> tuple[str, Attention, Attention]:
    """Return an attention of xfuser's registry: the job's choice, else flash-attn 3 or cuDNN.

    Returns:
        Its name; the attention that returns output and logsumexp; the one that returns the output alone.

    Raises:
        ImportError: xfuser is not installed.
    """
    registry = import_module("xfuser.core.distributed.attention_backend")
    key = _backend(registry.AttentionBackendType)
    call = registry.ATTENTION_FUNCTION_REGISTRY[key]

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        # The registry's layout is [B, H, S, D].
        out, lse = call(*(t.transpose(1, 2) for t in (q, k, v)), dropout_p=0.0, is_causal=False)
        return out.transpose(1, 2), lse

    def with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = run(q, k, v)
        if lse is None:
            raise ConfigError(
                f"kernel='xfuser' is {key.name} here, which returns no logsumexp, and ring_cache='sharded' merges by "
                "it; choose FLASH, FLASH_3 or CUDNN in xfuser, or ring_cache='gathered'."
            )
        return out, lse[..., : q.shape[1]].transpose(1, 2).float()

    return f"xfuser {key.name}", with_lse, lambda q, k, v: run(q, k, v)[0]


def _backend(backends: Any) -> Any:
    """Return what the running job uses, else the best that returns a logsumexp."""
    runtime = import_module("xfuser.core.distributed.runtime_state")
    if runtime.runtime_state_is_initialized():
        chosen = getattr(runtime.get_runtime_state(), "attention_backend", None)
        if chosen is not None:
            return chosen
    installed = import_module("xfuser.envs").PACKAGES_CHECKER.packages_info
    return backends.FLASH_3 if installed.get("has_flash_attn_3") else backends.CUDNN
