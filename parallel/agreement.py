"""Decisions that every rank takes alike: made on rank 0 and sent, or put to the vote."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import HeterostepError
from .collectives import Traffic, Transport
from .mesh import ParallelMesh

T = TypeVar("T")


class Agreement:
    """What the ranks of a job tell each other besides data.

    Floats may differ in their last bits between machines, and ranks that disagree wait for each other for ever. So a
    plan is made once, by rank 0, and shipped as integers.
    """

    def __init__(self, mesh: ParallelMesh, traffic: Traffic) -> None:
        """Speak to all ranks of `mesh`; plans are counted in `traffic` as "plan"."""
        self.mesh = mesh
        self._world = Transport(mesh.world, traffic)
        # Decisions are read on the host: sent through gloo, where there is one, they do not stall a GPU.
        over_cpu = mesh.world.size == 1 or "cpu:" in dist.get_backend_config()
        self._device = torch.device("cpu") if over_cpu else mesh.device

    @property
    def leads(self) -> bool:
        """Whether this rank decides."""
        return self.mesh.world.rank == 0

    def counts(self, counts: list[int] | None, num_steps: int) -> list[int] | None:
        """Return rank 0's tokens per step, on all ranks; None: not known beforehand."""
        sent = torch.tensor(counts or [-1] * num_steps, dtype=torch.int64, device=self._device)
        received: list[int] = self._world.broadcast(sent, 0, "plan").tolist()
        return None if received[0] < 0 else received

    def plan(self, active: Tensor | None, batch_size: int) -> Tensor | None:
        """Return rank 0's active tokens of a step, on all ranks: None, [0], [A] or [B, A]."""
        if self.mesh.world.size == 1:
            return active
        kind = torch.tensor([-1, 0] if active is None else [active.ndim, active.shape[-1]], dtype=torch.int64)
        dims, count = self._world.broadcast(kind.to(self._device), 0, "plan").tolist()
        if dims < 0:
            return None
        if active is None or not self.leads:
            shape = (count,) if dims == 1 else (batch_size, count)
            active = torch.empty(shape, dtype=torch.int64, device=self.mesh.device)
        return self._world.broadcast(active.contiguous(), 0, "plan") if count else active

    def any(self, flag: bool) -> bool:
        """Whether any rank says yes: what stops one rank must stop all at the same step."""
        return bool(self.most(int(flag)))

    def most(self, number: int) -> int:
        """Return the largest number that any rank says."""
        if self.mesh.world.size == 1:
            return number
        said = torch.tensor([number], device=self._device)
        dist.all_reduce(said, op=dist.ReduceOp.MAX, group=self.mesh.world.group)
        return int(said.item())

    def decide(self, make: Callable[[], T]) -> T:
        """Let rank 0 make a value and give it to all; what it raises on purpose is raised on all.

        Args:
            make: called on rank 0 alone; what it returns is sent by pickle, between processes that trust each other.

        Raises:
            HeterostepError: of any kind, as rank 0 raised it.
        """
        if self.mesh.world.size == 1:
            return make()
        said: list[Any] = [None]
        if self.leads:
            try:
                said[0] = make()
            except HeterostepError as error:
                said[0] = error
        dist.broadcast_object_list(said, group=self.mesh.world.group, group_src=0, device=self._device)
        if isinstance(said[0], HeterostepError):
            raise said[0]
        value: T = said[0]
        return value

    def collect(self, value: T) -> list[T]:
        """Return every rank's value, by rank, on all ranks; sent by pickle."""
        if self.mesh.world.size == 1:
            return [value]
        values: list[Any] = [None] * self.mesh.world.size
        dist.all_gather_object(values, value, group=self.mesh.world.group)
        return values

    def bring(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return the tensors of every rank, by rank, on rank 0, and [] on all others.

        Any rank may have any number of tensors of any shapes, but all of one type.
        """
        if self.mesh.world.size == 1:
            return [list(tensors)]
        told = self.collect([(tuple(tensor.shape), tensor.dtype) for tensor in tensors])
        dtype = next((dtype for part in told for _, dtype in part), torch.float32)
        flat = [tensor.to(self.mesh.device).flatten() for tensor in tensors]
        rows = torch.cat(flat) if flat else torch.empty(0, dtype=dtype, device=self.mesh.device)
        sizes = [sum(math.prod(shape) for shape, _ in part) for part in told]
        others = self.mesh.world.size - 1
        receive = sizes if self.leads else [0] * len(sizes)
        received = self._world.all_to_all(rows, [len(rows)] + [0] * others, receive, "result")
        if not self.leads:
            return []
        shapes = [[shape for shape, _ in part] for part in told]
        pieces = iter(received.split([math.prod(shape) for part in shapes for shape in part]))
        return [[next(pieces).view(shape) for shape in part] for part in shapes]

    def send(self, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return rank 0's tensor of a shape and type that all know, on all ranks."""
        if tensor is None or not self.leads:
            tensor = torch.empty(shape, dtype=dtype, device=self.mesh.device)
        return self._world.broadcast(tensor.to(self.mesh.device).contiguous(), 0, "result")

    def same(self, tensor: Tensor) -> bool:
        """Whether `tensor` has the same bits on all ranks (two sums of its bytes are compared)."""
        if self.mesh.world.size == 1:
            return True
        octets = tensor.detach().contiguous().view(torch.uint8).flatten().to(torch.int64)
        place = torch.arange(1, octets.numel() + 1, device=octets.device)
        digest = torch.stack([octets.sum(), (octets * place).sum()]).to(self._device)
        least, most = digest.clone(), digest
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self.mesh.world.group)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.mesh.world.group)
        return bool((least == most).all())
