"""Count what any implementation sends, by the collectives that it calls."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class SentBytes(TorchDispatchMode):
    """Bytes that this rank sends to others in collectives while the mode is on; groups are taken to be the world.

    Attributes:
        total: bytes so far.
        calls: collectives so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = self.calls = 0
        self._rank, self._size = dist.get_rank(), dist.get_world_size()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the call and pass it on."""
        name = str(func)
        if name.startswith(("c10d.", "_c10d_functional.")):
            self._count(name.split(".")[1], args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name in ("wait_tensor", "_wrap_tensor_autograd", "barrier"):
            return
        self.calls += 1
        others = self._size - 1
        if name == "alltoall_base_":  # (output, input, group, output splits, input splits, ...)
            self.total += self._but_own(args[1], args[4])
        elif name == "all_to_all_single":  # (input, output splits, input splits, group)
            self.total += self._but_own(args[0], args[2])
        elif name in ("_allgather_base_", "all_gather_into_tensor_out"):
            self.total += args[1 if name.startswith("_") else 0].nbytes * others
        elif name in ("all_gather_into_tensor",):
            self.total += args[0].nbytes * others
        elif name == "allgather_":  # (outputs, inputs, ...)
            self.total += sum(tensor.nbytes for tensor in args[1]) * others
        elif name == "broadcast_":  # (tensors, group, root, ...)
            self.total += sum(tensor.nbytes for tensor in args[0]) * others if args[2] == self._rank else 0
        elif name == "allreduce_":
            # A ring's: each rank sends every part but one, twice.
            self.total += sum(tensor.nbytes for tensor in args[0]) * 2 * others // self._size
        else:
            raise NotImplementedError(f"{name}: how much it sends is not known here")

    def _but_own(self, rows: Any, splits: Any) -> int:
        if not splits:
            return rows.nbytes * (self._size - 1) // self._size
        kept = splits[self._rank]
        return rows.nbytes * (sum(splits) - kept) // max(sum(splits), 1)
