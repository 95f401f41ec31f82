"""`GroupConfig`: how many ranks a worker group has, and how patient it is."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """Settings of a worker group.

    Attributes:
        size: W, ranks that it has when all is well.
        degrees: settings of `ParallelConfig`, all or some; those that are left out, or do not fit the number of ranks
            or the request, are chosen.
        shard_weights: as in `EngineConfig`.
        standby: whether to keep one more process that has loaded the model and waits, so that a rank that dies is
            replaced in a second. Only on CPUs: a GPU has no room for two.
        threads: of each rank; None shares the cores of a machine among its ranks.
        frozen_after: seconds of silence after which a rank is taken for frozen, and killed.
        collective_seconds: how long a collective may take before its rank gives up.
        start_seconds: how long a process may take to start in a place that is free.
        patience: seconds that a place may be missing in the cluster before the group resumes without it.

    Raises:
        ConfigError: a value is out of range.
    """

    size: int
    degrees: Mapping[str, Any] = field(default_factory=dict)
    shard_weights: bool = False
    standby: bool = False
    threads: int | None = None
    frozen_after: float = 10.0
    collective_seconds: float = 1800.0
    start_seconds: float = 180.0
    patience: float = 15.0

    def __post_init__(self) -> None:
        for name in ("size", "threads"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} of a worker group must be a whole number of at least 1, not {value!r}")
        for name in ("frozen_after", "collective_seconds", "start_seconds", "patience"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} of a worker group must be a number of seconds above 0, not {value!r}")


def threads_asked() -> int | None:
    """How many threads each rank shall have, if the environment says so."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else None
