"""What heterostep takes from a running xfuser (xDiT) job; the one file that imports xfuser, and only when asked.

`import xfuser` probes for a GPU and fails without one.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError

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
