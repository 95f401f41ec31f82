"""`Machines`: where worker processes are started."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from .messages import GroupConfig, Identity
from .watch import Worker


class Machines(Protocol):
    """This machine (`process.py`), several that meet at an address (`several.py`), or Ray's (`ray_cluster.py`)."""

    def reserve(self, config: GroupConfig, attend: Callable[[], None]) -> None:
        """Get a place for each rank, if that is not done; `attend` is called again and again meanwhile."""
        ...

    def start(self, seat: int | None) -> Worker:
        """Start a process in a place, or, for None, a standby."""
        ...

    def wait(self, workers: Sequence[Worker], seconds: float) -> None:
        """Return when one of some workers may have sent something, or after some seconds."""
        ...

    @property
    def complete(self) -> bool:
        """Whether there is every place that was reserved."""
        ...

    def near(self, identity: Identity) -> bool:
        """Whether a process can use this process's folders."""
        ...

    def rank_key(self, worker: Worker) -> Any:
        """What workers are sorted by to number the ranks: neighbours in the order are neighbours in the machine."""
        ...

    def gpu(self, seat: int) -> int | None:
        """See `Place.gpu`."""
        ...

    def release(self) -> None:
        """Give the places back."""
        ...
