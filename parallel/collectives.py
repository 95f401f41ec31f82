"""Collectives over one axis that take any number of rows from any rank, and count what they send."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import HeterostepError
from .mesh import Axis, ParallelMesh


class Count(NamedTuple):
    """What one kind of collective did: calls, bytes sent to *other* ranks, seconds until it was done.

    Seconds include the wait for ranks that come late, so they are imbalance as much as transport.
    """

    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0


@dataclass
class _Tally:
    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0


class Traffic:
    """A record of collectives, by name.

    On CPU the wall time of a call is taken. On CUDA a pair of events is recorded and read when the totals are asked
    for: a call does not stall the device's queue, but `totals` and `take` wait for it.
    """

    def __init__(self) -> None:
        """Start with nothing sent."""
        self._tallies: dict[str, _Tally] = {}
        self._pending: list[tuple[_Tally, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def recorded(self, name: str, nbytes: int, device: torch.device) -> Iterator[None]:
        """Count the collective that runs inside: its bytes sent to other ranks, and its time."""
        tally = self._tallies.setdefault(name, _Tally())
        tally.calls += 1
        tally.bytes += nbytes
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._pending.append((tally, start, end))
        else:
            started = time.perf_counter()
            yield
            tally.seconds += time.perf_counter() - started

    def totals(self) -> dict[str, Count]:
        """Everything since the last `take`."""
        for tally, start, end in self._pending:
            end.synchronize()
            tally.seconds += start.elapsed_time(end) / 1000.0
        self._pending.clear()
        return {name: Count(t.calls, t.bytes, t.seconds) for name, t in self._tallies.items()}

    def take(self) -> dict[str, Count]:
        """Return the totals and reset them, as at the end of a step."""
        totals = self.totals()
        self._tallies.clear()
        return totals


class Scratch:
    """Memory for messages that are read before the next of the same name is made, as in layer after layer.

    On CPU large buffers come from the operating system page by page at every call, which takes longer than to fill or
    to send them. CUDA's allocator keeps its blocks by itself: there nothing is held.
    """

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, like: Tensor, shape: Sequence[int]) -> Tensor:
        """Return a contiguous uninitialised tensor of type and device of `like`."""
        if like.device.type != "cpu":
            return like.new_empty(shape)
        count, key = math.prod(shape), (name, like.dtype)
        held = self._held.get(key)
        if held is None or held.numel() < count:
            with torch.inference_mode(False):  # usable in and out of that mode, wherever it was made
                held = self._held[key] = torch.empty(count, dtype=like.dtype)
        return held[:count].view(shape)


class Transport:
    """Collectives over one axis; rows are the first dimension, and counts are known to all beforehand.

    Nothing is padded and no sizes are exchanged: a caller derives them from what every rank knows, the cut of the
    active tokens. Any count may be 0. With one rank nothing is called and nothing is counted.
    """

    def __init__(self, axis: Axis, traffic: Traffic | None = None, scratch: Scratch | None = None) -> None:
        """Send over `axis`.

        Args:
            axis: the ranks.
            traffic: where to count; transports may share one.
            scratch: where results live until the next call of the same name; None: each call has memory of its own.
        """
        self.axis = axis
        self.traffic = traffic if traffic is not None else Traffic()
        self.scratch = scratch

    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int], name: str) -> Tensor:
        """Send consecutive slices of `rows` to the ranks in order.

        Args:
            rows: [sum(send), ...].
            send: rows for each rank, this one included.
            receive: rows from each rank; receive[s] here is send[this rank] at s.
            name: what to count it as.

        Returns:
            [sum(receive), ...], by source.
        """
        if self.axis.size == 1:
            return rows
        rows = rows.contiguous()
        out = self._new(name, rows, (sum(receive), *rows.shape[1:]))
        nbytes = (sum(send) - send[self.axis.rank]) * _row_bytes(rows)
        with self.traffic.recorded(name, nbytes, rows.device):
            dist.all_to_all_single(out, rows, list(receive), list(send), group=self.axis.group)
        return out

    def gather(self, rows: Tensor, sizes: Sequence[int], name: str) -> Tensor:
        """Give the rows of every rank to every rank: [sizes[this rank], ...] -> [sum(sizes), ...], by rank.

        Each rank sends its rows to each other one: rows * (P - 1), nothing for padding.
        """
        if self.axis.size == 1:
            return rows
        rows = rows.contiguous()
        out = self._new(name, rows, (sum(sizes), *rows.shape[1:]))
        peers = self.axis.size
        with self.traffic.recorded(name, rows.shape[0] * (peers - 1) * _row_bytes(rows), rows.device):
            if rows.device.type == "cpu":
                # gloo's all_gather and its list of tensors want equal sizes; its all_to_all_single does not.
                copies = self._new(f"{name} copies", rows, (peers, *rows.shape)).copy_(rows.expand(peers, *rows.shape))
                sent = [rows.shape[0]] * peers
                dist.all_to_all_single(out, copies.flatten(0, 1), list(sizes), sent, group=self.axis.group)
            else:
                dist.all_to_all(list(out.split(list(sizes))), [rows] * peers, group=self.axis.group)
        return out

    def broadcast(self, tensor: Tensor, source: int, name: str) -> Tensor:
        """Overwrite `tensor` with that of the rank `source` of this axis, and return it.

        Counted as if the source sent it to each other rank; a backend may let others pass it on.
        """
        if self.axis.size == 1:
            return tensor
        nbytes = tensor.nbytes * (self.axis.size - 1) if self.axis.rank == source else 0
        with self.traffic.recorded(name, nbytes, tensor.device):
            dist.broadcast(tensor, group=self.axis.group, group_src=source)
        return tensor

    def _new(self, name: str, like: Tensor, shape: Sequence[int]) -> Tensor:
        return like.new_empty(shape) if self.scratch is None else self.scratch.take(name, like, shape)


def exchange_rows(rows: Tensor, sizes: Sequence[int], transport: Transport, name: str = "rows") -> Tensor:
    """Put the rows of all ranks together on every rank: [B, n, D] -> [B, A, D], A = sum(sizes).

    The velocities of the active tokens travel so at the end of a pass. Bytes sent: B n D (P - 1) elements. With
    guidance parallelism one call over the world's axis, with ``sizes * cfg``, brings the rows of all branches,
    [B, cfg * A, D], at the cost of none but those rows.
    """
    assert rows.shape[1] == sizes[transport.axis.rank], "rows must be this rank's slice"
    if transport.axis.size == 1:
        return rows
    return transport.gather(rows.transpose(0, 1), sizes, name).transpose(0, 1).contiguous()


def _row_bytes(rows: Tensor) -> int:
    """Bytes of one row; rows may be none at all."""
    return rows.shape[1:].numel() * rows.element_size()


T = TypeVar("T")


class Agreement:
    """What the ranks of a job tell each other besides data.

    Floats may differ in their last bits between machines, and ranks that disagree wait for each other forever. So a
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
        parts = self.collect([(tuple(tensor.shape), tensor.dtype) for tensor in tensors])
        dtype = next((dtype for part in parts for _, dtype in part), torch.float32)
        flat = [tensor.to(self.mesh.device).flatten() for tensor in tensors]
        rows = torch.cat(flat) if flat else torch.empty(0, dtype=dtype, device=self.mesh.device)
        sizes = [sum(math.prod(shape) for shape, _ in part) for part in parts]
        others = self.mesh.world.size - 1
        receive = sizes if self.leads else [0] * len(sizes)
        received = self._world.all_to_all(rows, [len(rows)] + [0] * others, receive, "result")
        if not self.leads:
            return []
        shapes = [[shape for shape, _ in part] for part in parts]
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
