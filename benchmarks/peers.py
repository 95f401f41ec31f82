"""Sequence parallelism of diffusers and xfuser on a Wan transformer, also on ranks without a GPU."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, WanTransformer3DModel
from diffusers.models._modeling_parallel import ParallelConfig

_BLOCK_MASK = "xfuser.core.sparge_attention.block_mask"


def diffusers_ulysses(transformer: Any, degree: int) -> Any:
    """A copy of a transformer, sharded by diffusers' own `enable_parallelism`."""
    model = _copy(transformer, WanTransformer3DModel)

    def resolve(config: Any) -> Any:
        # The stock method asks PyTorch for an accelerator, and fails without; all else is stock.
        config = ParallelConfig(context_parallel_config=config)
        parts = config.context_parallel_config
        mesh = dist.device_mesh.init_device_mesh("cpu", parts.mesh_shape, mesh_dim_names=parts.mesh_dim_names)
        config.setup(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), mesh=mesh)
        model._parallel_config = config
        return config

    model._resolve_parallel_config = resolve
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=degree))
    return model


def xfuser_usp(transformer: Any, degree: int) -> Any:
    """A copy of a transformer as xfuser's wrapper class, with USP over `degree` ranks.

    Raises:
        ModuleNotFoundError: xfuser or yunchang is not installed.
    """
    for name in ("xfuser", "yunchang"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"{name} is not installed")
    if not torch.cuda.is_available():
        _import_without_gpu()
    from xfuser.core.distributed import parallel_state, runtime_state
    from xfuser.core.distributed.attention_backend import AttentionBackendType
    from xfuser.model_executor.layers import usp
    from xfuser.model_executor.models.transformers.transformer_wan import xFuserWanTransformer3DWrapper
    from yunchang.globals import PROCESS_GROUP

    usp.PROCESS_GROUP = PROCESS_GROUP  # left out by xfuser without a GPU
    parallel_state.init_distributed_environment(backend="gloo")
    parallel_state.initialize_model_parallel(backend="gloo", ulysses_degree=degree)
    # What the wrapper and USP read of it; xfuser's own wants its command line.
    runtime_state._RUNTIME = types.SimpleNamespace(
        attention_backend=AttentionBackendType.SDPA,
        get_cross_attention_backend=lambda: AttentionBackendType.SDPA,
        increment_step_counter=lambda: None,
        fp8_comms=None,
        runtime_config=types.SimpleNamespace(use_spargeattn_head_balance=False),
    )
    return _copy(transformer, xFuserWanTransformer3DWrapper)


def _import_without_gpu() -> None:
    """Import xfuser where its `__init__` would ask for a GPU or for triton, which it then does not use."""
    spec = importlib.util.find_spec("xfuser")
    assert spec is not None and spec.submodule_search_locations is not None
    shell = types.ModuleType("xfuser")
    shell.__path__, shell.__spec__ = list(spec.submodule_search_locations), spec
    sys.modules["xfuser"] = shell
    envs = importlib.import_module("xfuser.envs")
    envs.get_device_version = lambda: "0.0"
    envs.get_torch_distributed_backend = lambda: "gloo"
    # Without this its groups pretend to have one rank.
    envs.PACKAGES_CHECKER.packages_info["has_long_ctx_attn"] = True
    if importlib.util.find_spec("triton") is None:
        kernel = types.ModuleType(_BLOCK_MASK)
        kernel.get_block_map_meansim = None
        sys.modules[_BLOCK_MASK] = kernel
    del sys.modules["xfuser"]
    importlib.import_module("xfuser").envs = envs


def _copy(transformer: Any, cls: Any) -> Any:
    """The same weights in a model of another class."""
    model = cls(**{key: value for key, value in transformer.config.items() if not key.startswith("_")})
    model.load_state_dict(transformer.state_dict())
    return model.eval().requires_grad_(False)
