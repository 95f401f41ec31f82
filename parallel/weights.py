"""Weights sharded over the ranks of a video: each keeps a part, and a layer is whole only while it computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from .mesh import ParallelMesh


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
