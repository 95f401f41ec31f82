"""`GangConfig`: how many ranks a gang has, on what, and how patient it is."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from ...errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GangConfig:
    """Settings of a gang.

    Attributes:
        size: W, ranks that it has when all is well.
        gpus: whether each rank has a GPU; else each has a CPU, as Ray counts them.
        spare: whether to keep one more process that has loaded the model and waits, so that a rank that dies is
            replaced in a second. Only on CPUs: a GPU has no room for two.
        threads: of each rank; None shares the cores of a machine among its ranks.
        frozen_after: seconds of silence after which a rank is taken for frozen, and killed.
        collective_seconds: how long a collective may take before its rank gives up.
        start_seconds: how long the cluster may take to start a process in a place that is free.
        patience: seconds that a place may be missing in the cluster before the gang goes on without it.

    Raises:
        ConfigError: a value is out of range.
    """

    size: int
    gpus: bool = False
    spare: bool = False
    threads: int | None = None
    frozen_after: float = 10.0
    collective_seconds: float = 1800.0
    start_seconds: float = 180.0
    patience: float = 15.0

    def __post_init__(self) -> None:
        for name in ("size", "threads"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} of a gang must be a whole number of at least 1, not {value!r}")
        for name in ("frozen_after", "collective_seconds", "start_seconds", "patience"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} of a gang must be a number of seconds above 0, not {value!r}")
        if self.spare and self.gpus:
            raise ConfigError("a gang on GPUs cannot keep a spare process: leave out spare")


def threads_asked() -> int | None:
    """How many threads each rank shall have, if the environment says so."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else None
