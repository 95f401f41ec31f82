"""What a gang's driver and its ranks tell each other: values that travel between processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...engine.request import Decoding, GenerateRequest, Started, StepDone
from ...errors import RankFailure

if TYPE_CHECKING:
    from ...engine.request import VideoOutput
    from ...parallel.config import ParallelConfig

CAUSES = ("died", "frozen", "node", "memory", "timeout", "error")
"""Why a rank was lost, the likelier root of the trouble first."""


class RankLost(RankFailure):
    """A rank is gone or no longer usable; the gang can be made whole, and the work goes on where it was saved.

    Attributes:
        cause: one of CAUSES.
    """

    def __init__(self, cause: str, message: str) -> None:
        """Say why in one word and in one sentence."""
        super().__init__(message)
        self.cause = cause


class Closed(RankFailure):
    """The gang was closed while somebody waited for it."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Where a rank's process runs.

    Attributes:
        pid: its number on its machine.
        node: Ray's id of the machine.
        device: its GPU's number there, as Ray counts them; empty without one.
    """

    pid: int
    node: str
    device: str


@dataclass(frozen=True, kw_only=True)
class Place:
    """A rank's place in one life of the gang.

    Attributes:
        rank: its number.
        size: how many ranks there are in this life.
        neighbours: how many of them are on its machine.
        life: counts from 1; every rendezvous is of another one.
        address: of rank 0's store.
        port: likewise.
        threads: as in `GangConfig`.
        collective_seconds: likewise.
    """

    rank: int
    size: int
    neighbours: int
    life: int
    address: str
    port: int
    threads: int | None
    collective_seconds: float


@dataclass(frozen=True, kw_only=True)
class Work:
    """One attempt at one video, for all ranks alike.

    Attributes:
        id: tells this piece of work from all others; wishes name it.
        request: what to make.
        parallel: the degrees that are wished for; others are chosen where they do not fit. None: chosen.
        state: the job's folder on rank 0's machine; None: no step is saved, unless `copies` is given.
        copies: files of the job's folder, where rank 0 cannot reach it: it saves into a folder of its own, and sends
            what it saves.
        checkpoint_every: steps from one checkpoint to the next.
        files: whether the files of a service's result are wanted, instead of the video itself.
        previews: whether pictures are wanted on the way.
    """

    id: str
    request: GenerateRequest
    parallel: ParallelConfig | None = None
    state: str | None = None
    copies: Mapping[str, bytes] | None = None
    checkpoint_every: int = 5
    files: bool = False
    previews: bool = False


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Something happened on rank 0.

    Attributes:
        event: the engine's; None where there are only copies.
        copies: files of the job's folder that are new, in the order in which to write them.
    """

    event: Started | StepDone | Decoding | None
    copies: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a rank ended its part of something.

    Attributes:
        ended: "done"; "refused": a foreseen error, the same on all ranks; "stopped": by a wish; "failed".
        message: of an error, in one sentence.
        cause: of a failure, one of CAUSES; "peer" where the rank only saw that another one was gone.
        output: the video, from rank 0.
        record: of its making, from rank 0 (`engine.record`).
        files: of a service's result, by name, from rank 0.
        hsa: the response's block of that name.
        seconds: by stage.
        imbalances: of the evaluated steps: the most tokens of a rank over their mean.
    """

    ended: str
    message: str = ""
    cause: str = ""
    output: VideoOutput | None = None
    record: Mapping[str, Any] | None = None
    files: Mapping[str, bytes] | None = None
    hsa: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    imbalances: Sequence[float] = ()
