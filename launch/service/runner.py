"""What makes the service's videos: a worker group, of one rank or many, which no crash of a rank takes along."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from ...engine.config import EngineConfig
from ...engine.lora import parse_lora
from ...engine.media.files import no_room, when_there_is_room
from ...engine.media.image import read_image
from ...engine.request import Event, GenerateRequest, ResolvedRequest
from ...errors import Cancelled, ConfigError, GroupClosed, Interrupted, RankLost, RequestError
from ..logs import say
from ..workers.group import WorkerGroup
from ..workers.machines import Machines
from ..workers.messages import FILES, GroupConfig, Outcome, Work
from ..workers.process import ThisMachine
from ..workers.video import run_once
from .results import rescue
from .settings import ServiceSettings

_MAX_PAUSE = 60.0
# While the disk is full.
_RETRY_SECONDS = 1.0


class Pauses:
    """When to start what failed to start again: after 1, 2, 4 ... seconds, at most a minute."""

    def __init__(self) -> None:
        """Start at once."""
        self._pause, self._until = 1.0, 0.0

    @property
    def over(self) -> bool:
        """Whether it may be started now."""
        return time.monotonic() >= self._until

    def failed(self) -> None:
        """A start failed."""
        self._until = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, _MAX_PAUSE)

    def succeeded(self) -> None:
        """A start succeeded: the next pause is a short one."""
        self._pause = 1.0


@dataclass(frozen=True, kw_only=True)
class Task:
    """One attempt at a job.

    Attributes:
        id: the job's.
        request: what to make, valid for the runner's model.
        folder: empty and this attempt's own; the files of `workers.messages.FILES` go there.
        state: folder for what lets a later attempt resume where this one ended; shared by all attempts of the job.
        image: file that the video starts from, if it starts from one; `request` holds its fingerprint alone.
    """

    id: str
    request: ResolvedRequest
    folder: Path
    state: Path
    image: Path | None = None


class Runner:
    """Makes one video at a time on `settings.ranks` ranks, on this machine or on Ray.

    One thread may call `tend` and `run`; everything else may be called from other threads meanwhile. A task whose rank
    was lost is not tried again here: the dispatcher does that, and `tend` lets the group recover before.
    """

    def __init__(
        self, settings: ServiceSettings, index: int = 0, *, on_ray: bool = False, frozen_after: float | None = None
    ) -> None:
        """Prepare; `tend` starts the ranks. Ray, if it is used, is initialised already.

        Args:
            settings: model, device, ranks, and how to compute.
            index: number of this runner, which chooses its GPUs on this machine.
            on_ray: whether the ranks are started by Ray.
            frozen_after: as in `GroupConfig`; None is its default.
        """
        self._settings, self._index, self._on_ray = settings, index, on_ray
        self._frozen_after = frozen_after
        self._group: WorkerGroup | None = None
        self._trouble: str | None = None
        self._pauses = Pauses()
        self._closed = self._hopeless = False
        self._stop_request: str | None = None

    @property
    def ready(self) -> bool:
        """Whether a task could run now."""
        return self._group is not None and self._group.ready

    @property
    def trouble(self) -> str | None:
        """Why not, in one sentence, if it is not just starting; None otherwise."""
        return self._trouble

    @property
    def hopeless(self) -> bool:
        """Whether starting it again cannot help: the ranks refused the settings or the model."""
        return self._hopeless

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the rank that was silent longest was heard of; 0 before the first."""
        return self._group.heartbeat_age if self._group is not None else 0.0

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks, by rank."""
        return self._group.pids if self._group is not None else []

    def tend(self) -> None:
        """Start the ranks, or look after them; waits until they are complete. Called while no task runs."""
        if self._closed or self._hopeless or not self._pauses.over:
            return
        try:
            if self._group is None:
                self._group = self._make_group()
            self._watch(self._group)
            if not self._group.ready:
                self._recover(self._group)
        except ConfigError as error:
            self._trouble, self._hopeless = str(error), True
        except RankLost as lost:
            self._pauses.failed()
            self._trouble = str(lost)
            say("runner cannot start", logging.WARNING, runner=self._index, reason=str(lost))
        except GroupClosed:
            say("runner closed", runner=self._index)

    def run(self, task: Task) -> Generator[Event | Outcome]:
        """Make a video: the engine's events, and last the outcome, when the files are there.

        Raises:
            RequestError: this request cannot be served; the runner stays usable.
            Cancelled: after `cancel`; `Interrupted` after `stop`.
            RankLost: a rank died, froze or failed; `tend` replaces it.
            OSError: the files could not be written.
        """
        group, self._stop_request = self._group, None
        assert group is not None, "tend comes before run"
        # Its file is on this machine, the ranks may be on others.
        image = read_image(task.image) if task.image is not None else None
        work = Work(
            request=GenerateRequest(**dataclasses.asdict(task.request) | {"image": image, "lora": self._files(task)}),
            checkpoint_every=self._settings.checkpoint_every,
            files=True,
            previews=True,
        )
        try:
            outcome = yield from run_once(group, work, task.state)
        except RankLost as lost:
            self._log_loss(lost)
            raise
        except GroupClosed as error:
            raise RankLost("died", str(error)) from error
        when_there_is_room(functools.partial(_write_files, task.folder, outcome), self._wait_for_room)
        yield outcome

    def _files(self, task: Task) -> list[str]:
        """The request's LoRA weights with files in place of the names that clients know."""
        files, found = self._settings.loras, []
        for text in task.request.lora:
            name = parse_lora(text).source
            if name not in files:
                raise RequestError(f"the LoRA weights {name!r} are not there any more")
            found.append(f"{files[name]}{text.removeprefix(name)}")
        return found

    def cancel(self) -> None:
        """Let the running task end within one step. Harmless when idle."""
        self._request_stop("cancel")

    def stop(self) -> None:
        """Let the running task save its state and end within one step. Harmless when idle."""
        self._request_stop("stop")

    def close(self) -> None:
        """End the ranks, a running task included."""
        self._closed = True
        if self._group is not None:
            self._group.close()

    def _request_stop(self, verb: str) -> None:
        self._stop_request = verb
        if self._group is not None:
            self._group.request_stop(verb)

    def _wait_for_room(self, error: OSError) -> None:
        if self._stop_request == "cancel":
            raise Cancelled("cancelled while the disk was full") from error
        if self._stop_request is not None or self._closed:
            raise Interrupted("stopped while the disk was full", 0) from error
        time.sleep(_RETRY_SECONDS)

    def _make_group(self) -> WorkerGroup:
        """A group for this machine, or for the cluster as it is now."""
        settings = self._settings
        config = GroupConfig(
            size=settings.ranks,
            degrees=settings.degrees,
            shard_weights=settings.shard_weights and settings.ranks > 1,
            standby=settings.ranks > 1 and not settings.shard_weights,
            threads=settings.threads,
        )
        if self._frozen_after is not None:
            config = dataclasses.replace(config, frozen_after=self._frozen_after)
        machines, engine = self._cluster() if self._on_ray else (self._this_machine(), settings.engine)
        return WorkerGroup(config, engine, machines)

    def _this_machine(self) -> Machines:
        def show(seat: int | None, line: str) -> None:
            say("rank said", runner=self._index, rank=seat, text=line[:2000])

        return ThisMachine(self._index, show)

    def _cluster(self) -> tuple[Machines, EngineConfig]:
        from ..workers.ray_cluster import RayCluster, check_room, has_gpus

        engine = self._settings.engine
        gpus = engine.device != "cpu" and has_gpus()
        if engine.device.startswith("cuda") and not gpus:
            raise ConfigError(f"device {engine.device!r} cannot be used: the Ray cluster has no GPU; take auto or cpu")
        check_room(self._settings.ranks, gpus)
        return RayCluster(gpus), dataclasses.replace(engine, device="cuda" if gpus else "cpu")

    def _watch(self, group: WorkerGroup) -> None:
        with contextlib.suppress(RankLost):
            try:
                group.watch()
            except RankLost as lost:
                self._log_loss(lost)
                raise

    def _recover(self, group: WorkerGroup) -> None:
        start = time.monotonic()
        say("runner started", runner=self._index)
        group.recover()
        self._trouble = None
        self._pauses.succeeded()
        seconds = round(time.monotonic() - start, 3)
        say("runner ready", runner=self._index, pids=group.pids, rendezvous=group.rendezvous, seconds=seconds)

    def _log_loss(self, lost: RankLost) -> None:
        say("rank lost", logging.WARNING, runner=self._index, cause=lost.cause, reason=str(lost))


def _write_files(folder: Path, outcome: Outcome) -> None:
    """Write the files of a result.

    Raises:
        OSError: the disk is full.
        RequestError: they cannot be written; the video is then kept in the system's folder for temporary files, and the
            log says where.
    """
    assert outcome.files is not None, "rank 0 has the files"
    files = outcome.files
    try:
        for name, content in files.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        if no_room(error):
            raise
        raise rescue(folder.name, lambda path: path.write_bytes(files[FILES["video"][0]]), error) from error
