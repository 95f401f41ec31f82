"""What the driver of a worker group and its workers send each other, files of a job and of a result among it.

The values travel by pickle, through pipes between a process and its own children or through Ray: never from or to
clients. Files are copied where rank 0 is on another machine than the job's folder (`Copier`).
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...engine.media.files import FRAMES_NAME, checkpoint_steps, has_latents, write_durably
from ...engine.request import Decoding, GenerateRequest, Started, StepDone, VideoResult
from ...errors import ConfigError

if TYPE_CHECKING:
    from ...engine.record import Quality

CAUSES = ("died", "frozen", "node", "memory", "timeout", "error")
"""Why a rank was lost, the likelier root of the trouble first."""
PEER = "peer"
"""The cause of a rank that only saw that another one was gone."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Where a worker's process runs; the first thing that it sends.

    Attributes:
        pid: its number on its machine.
        node: stands for the machine; empty on the driver's own, where there is no Ray.
        address: of the machine, for the other ranks.
        device: the number of the GPU that Ray gave it; empty without one.
    """

    pid: int
    node: str = ""
    address: str = "127.0.0.1"
    device: str = ""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A rank's place in one rendezvous of the group.

    Attributes:
        rank: its number.
        size: how many ranks there are.
        machines: how many of them each machine has, in the order of the ranks.
        neighbours: how many are on its own.
        gpu: which of the machine's GPUs it takes, where there are any, counted round; None: it sees its own alone.
        rendezvous: number of the rendezvous, from 1.
        address: of rank 0's store.
        port: of that store.
    """

    rank: int
    size: int
    machines: tuple[int, ...]
    neighbours: int
    gpu: int | None
    rendezvous: int
    address: str
    port: int


@dataclass(frozen=True, kw_only=True)
class Work:
    """One attempt at one video, for all ranks alike.

    Attributes:
        request: what to make.
        folder: of the job, on rank 0's machine; None: no step is saved, unless `copies` is given.
        copies: files of the job's folder, where rank 0 cannot reach it: it saves into a folder of its own, and sends
            what it saves.
        checkpoint_every: steps from one checkpoint to the next.
        files: whether the files of a service's result are wanted, instead of the video itself.
        wanted: which files of `generate` that show the frames are wanted, by the names of their flags, instead of the
            frames themselves; None: the frames are.
        scale: of these files, how much the pixels of the video are enlarged.
        compare: whether the frames are kept ("first"), compared with those that were kept ("second"), or neither ("").
        previews: whether pictures are wanted on the way.
    """

    request: GenerateRequest
    folder: str | None = None
    copies: Mapping[str, bytes] | None = None
    checkpoint_every: int = 5
    files: bool = False
    wanted: Sequence[str] | None = None
    scale: int = 1
    compare: str = ""
    previews: bool = False


@dataclass(frozen=True)
class Order:
    """Something that a worker is to do.

    Attributes:
        number: every order of a worker has another one.
        what: a method of `rank.Rank`.
        arguments: of the method.
    """

    number: int
    what: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class StopRequest:
    """The order is to end.

    Attributes:
        order: its number.
        verb: "cancel" within one step, "stop" likewise after saving it, or "pause" after the next step saved anyway.
    """

    order: int
    verb: str


@dataclass(frozen=True)
class Kill:
    """Another process of the worker's machine is to be killed: Ray needs five seconds for one that is frozen."""

    pid: int


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
    """How a rank ended its part of an order.

    Attributes:
        ended: "done"; "refused": a foreseen error, mostly the same on all ranks; "cancelled" or "stopped": by a
            stop request; "failed".
        message: of an error, in one sentence.
        cause: of a failure, one of CAUSES or PEER.
        saved: of a job that was stopped, how many steps need not be done again.
        port: of the store, after `open_store`.
        device: on which the model is, after `join`.
        link: between machines, after `join`, from rank 0; see `rendezvous.measure_link`.
        output: the video, from rank 0; without its frames where files are wanted of it.
        record: of its making, from rank 0 (`engine.record`).
        files: that were wanted, by name, from rank 0.
        quality: of the first video against the second, from rank 0, of a comparison.
        hsa: the response's block of that name.
        seconds: by stage: `encode_text`, `denoise`, `checkpoint`, `decode`, `write`, `total`.
        imbalances: of the evaluated steps on several ranks: the most tokens of a rank over their mean.
    """

    ended: str = "done"
    message: str = ""
    cause: str = ""
    saved: int = 0
    port: int = 0
    device: str = ""
    link: tuple[float, float] | None = None
    output: VideoResult | None = None
    record: Mapping[str, Any] | None = None
    files: Mapping[str, bytes] | None = None
    quality: Quality | None = None
    hsa: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    imbalances: Sequence[float] = ()


@dataclass(frozen=True)
class Report:
    """What a worker says of an order.

    Attributes:
        order: its number.
        content: a Progress, or last the Outcome.
    """

    order: int
    content: Progress | Outcome


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """Settings of a worker group.

    Attributes:
        size: W, ranks that it has when all is well.
        degrees: settings of `ParallelConfig`, all or some; those that are left out, or do not fit the number of ranks
            or the request, are chosen.
        shard_weights: whether each rank keeps only its share of the transformer's weights.
        standby: whether to keep one more process that has loaded the model and waits, so that a rank that dies is
            replaced in a second. Only on CPUs: a GPU has no room for two.
        threads: of each rank; None shares the cores of a machine among its ranks.
        frozen_after: seconds of silence after which a rank is taken for frozen, and killed.
        collective_seconds: how long a collective may take before its rank gives up.
        start_seconds: how long a process may take to start in a place that is free.
        patience: seconds that a place may be missing in the cluster before the group resumes without it.
        least: ranks without which it does not resume; it waits for them for `start_seconds`.

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
    least: int = 1

    def __post_init__(self) -> None:
        for name in ("size", "threads", "least"):
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


FILES: Mapping[str, tuple[str, str]] = {
    "video": ("video.mp4", "video/mp4"),
    "heatmap": ("heatmap.mp4", "video/mp4"),
    "thumbnail": ("thumbnail.webp", "image/webp"),
    "spritesheet": ("spritesheet.webp", "image/webp"),
    "report": ("report.json", "application/json"),
}
"""What can be downloaded of a finished video, by variant: file name and media type."""

_STATE = re.compile(r"(?:checkpoint-\d+|latents|frames|result)(?:-[0-9a-f]+)?\.(?:json|safetensors)")
_PROGRESS = "progress.jsonl"


def read_copies(folder: Path, known: Collection[str] = ()) -> dict[str, bytes]:
    """Files of a job's folder by name, in the order in which they must be written: manifests after what they name.

    Args:
        folder: of the job.
        known: names of what the reader has already; they are left out, but for the progress, which grows.
    """
    names = [path.name for path in folder.iterdir() if _STATE.fullmatch(path.name)]
    names.sort(key=lambda name: (name.endswith(".json"), name))
    files: dict[str, bytes] = {}
    for name in [_PROGRESS, *names]:
        if name not in known or name == _PROGRESS:
            try:
                files[name] = (folder / name).read_bytes()
            except FileNotFoundError:  # the job removes what is old, and begins without progress
                continue
    return files


def write_copies(folder: Path, files: Mapping[str, bytes], before: Collection[str]) -> list[str]:
    """Write files that `read_copies` returned, and remove those that are older than these and the last ones.

    Args:
        folder: of the job; made if it is not there.
        files: to write, in their order.
        before: what the last call returned.

    Returns:
        The names that the next call keeps.

    Raises:
        OSError: the disk is full or failing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if not (_STATE.fullmatch(name) or name == _PROGRESS):
            raise ValueError(f"not a file of a job: {name!r}")
        write_durably(folder / name, content)
    states = [name for name in files if name != _PROGRESS]
    if not states:
        return list(before)
    finished = any(name.startswith("result") for name in states)  # its checkpoints are gone
    # Its frames may have come before, with an attempt that did not end.
    kept = {*states, *(_frames_in(folder) if finished else before)}
    for path in sorted(folder.iterdir(), key=lambda path: path.suffix != ".json"):
        if _STATE.fullmatch(path.name) and path.name not in kept:
            path.unlink(missing_ok=True)
    return states


def _frames_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(FRAMES_NAME)]


class Copier:
    """A folder of rank 0's own for a job whose folder it cannot reach; what is saved there is sent to the driver."""

    def __init__(self, files: Mapping[str, bytes], report: Callable[[Progress], None]) -> None:
        """Begin with the job's files."""
        self._kept = tempfile.TemporaryDirectory(prefix="heterostep-job-", ignore_cleanup_errors=True)
        self.folder = Path(self._kept.name)
        self._report, self._known = report, set(files)
        self._newest: tuple[int | None, bool] = (None, False)
        try:
            write_copies(self.folder, files, ())
        except BaseException:
            self._kept.cleanup()
            raise

    def copy(self) -> None:
        """Send what is new since the last time, if a step was saved, or all are done."""
        newest = (next(iter(checkpoint_steps(self.folder)), None), has_latents(self.folder))
        if newest != self._newest:
            self._newest = newest
            self._send()

    def close(self) -> None:
        """Send the rest, and remove the folder."""
        try:
            self._send()
        finally:
            self._kept.cleanup()

    def _send(self) -> None:
        copies = read_copies(self.folder, self._known)
        self._known |= copies.keys()
        self._report(Progress(event=None, copies=copies))
