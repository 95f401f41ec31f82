"""How fast the ranks are, measured over the first steps of a run."""

from __future__ import annotations

from .agreement import Agreement
from .mesh import ParallelMesh

MEASURED_STEPS = 6
"""Steps over which speeds are measured; the first one, which pays for allocations, does not count."""


class Speeds:
    """Rows per second of the ranks of a sequence group, for cuts that let all of them end at the same time.

    Attributes:
        weights: by rank of the sequence axis, the same on all ranks; None until something is known.
    """

    def __init__(self, mesh: ParallelMesh, agreement: Agreement) -> None:
        """Know nothing yet."""
        self.mesh, self._agreement = mesh, agreement
        self.weights: tuple[float, ...] | None = None
        self._steps, self._rows, self._seconds = 0, 0, 0.0

    def observe(self, rows: int, seconds: float) -> None:
        """Add a step of this rank: rows that it evaluated, and how long that took without waiting for others.

        All ranks must report the same steps: they exchange what they know.
        """
        self._steps += 1
        if self._steps == 1 or self._steps > MEASURED_STEPS:
            return
        self._rows, self._seconds = self._rows + rows, self._seconds + seconds
        known = self._agreement.collect((self._rows, self._seconds))
        if any(count == 0 or spent <= 0.0 for count, spent in known):
            return
        speeds = [count / spent for count, spent in known]
        size = self.mesh.sequence.size
        # Groups for other guidance branches cut alike: the slowest of those that get the same slice counts.
        self.weights = tuple(min(speeds[rank::size]) for rank in range(size))
