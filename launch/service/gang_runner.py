"""A runner that is a gang of ranks on Ray: they make each video together, and are replaced when they die."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Generator
from typing import TYPE_CHECKING

from ...engine.media.image import read_image
from ...engine.request import GenerateRequest
from ...errors import Cancelled, ConfigError, RankFailure
from .condition import no_room, when_there_is_room
from .events import Event, Made, RunnerLost, Stopped
from .logs import say
from .runner import Pauses, Task
from .settings import ServiceSettings

if TYPE_CHECKING:
    from ..gang.gang import Gang
    from ..gang.messages import Outcome, Progress, Work


class GangRunner:
    """Makes one video at a time on `settings.ranks` ranks.

    The runner does not try a task again by itself: the dispatcher does, and `tend` makes the gang whole before.
    """

    def __init__(self, settings: ServiceSettings, index: int = 0, frozen_after: float = 10.0) -> None:
        """Prepare; `tend` starts the gang. Ray is initialised already.

        Args:
            settings: model, device, ranks, and how to compute.
            index: number of this runner, for the log.
            frozen_after: seconds of silence after which a rank is taken for frozen, and killed.
        """
        self._settings, self._index, self._frozen_after = settings, index, frozen_after
        self._gang: Gang | None = None
        self._trouble: str | None = None
        self._pauses = Pauses()
        self._closed = self._hopeless = False
        self._wanted: str | None = None

    @property
    def ready(self) -> bool:
        """Whether a task could run now."""
        return self._gang is not None and self._gang.ready

    @property
    def trouble(self) -> str | None:
        """Why the gang could not be made whole the last time."""
        return self._trouble

    @property
    def hopeless(self) -> bool:
        """Whether the ranks refused the settings or the model."""
        return self._hopeless

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the rank that was silent longest was heard of."""
        return self._gang.heartbeat_age if self._gang is not None else 0.0

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks, by rank."""
        return self._gang.pids if self._gang is not None else []

    def tend(self) -> None:
        """Start the gang, or look after it; waits until it is whole again."""
        if self._closed or self._hopeless or not self._pauses.over:
            return
        from ..gang.messages import Closed, RankLost

        try:
            if self._gang is None:
                self._gang = self._make_gang()
            if self._gang.ready:
                with contextlib.suppress(RankLost):
                    self._watch(self._gang)
            if not self._gang.ready:
                self._heal(self._gang)
        except ConfigError as error:
            self._trouble, self._hopeless = str(error), True
        except RankLost as error:
            self._pauses.failed()
            self._trouble = str(error)
            say("gang cannot be made whole", logging.WARNING, runner=self._index, reason=str(error))
        except Closed:
            say("gang closed", runner=self._index)

    def run(self, task: Task) -> Generator[Event]:
        """Make a video with the gang; see `Runner.run`."""
        from ..gang.messages import Closed, RankLost

        gang = self._gang
        assert gang is not None, "tend comes before run"
        self._wanted = None
        try:
            with contextlib.closing(gang.run(self._work(task, gang))) as run:
                outcome = yield from _events(run, task)
            yield when_there_is_room(lambda: _made(task, outcome), self._wait_for_room)
        except RankLost as error:
            self._tell_loss(error)
            raise RunnerLost(error.cause, str(error)) from error
        except Closed as error:
            raise RunnerLost("died", str(error)) from error
        except Cancelled as error:
            if self._wanted == "stop":
                raise Stopped("stopped") from error
            raise

    def cancel(self) -> None:
        """Let the running task end within one step."""
        self._wish("cancel")

    def stop(self) -> None:
        """Let the running task end within one step, to go on when the service starts again."""
        self._wish("stop")

    def close(self) -> None:
        """End the ranks."""
        self._closed = True
        if self._gang is not None:
            self._gang.close()

    def _wait_for_room(self, error: OSError) -> None:
        if self._closed:
            raise RunnerLost("died", "the ranks were ended while the disk was full") from error
        if self._wanted is not None:
            raise Cancelled("ended while the disk was full") from error
        time.sleep(1.0)

    def _wish(self, verb: str) -> None:
        self._wanted = verb
        if self._gang is not None and self._gang.working:
            self._gang.wish(verb)

    def _make_gang(self) -> Gang:
        """A gang for the cluster as it is now."""
        from ..gang.cluster import check_room, has_gpus
        from ..gang.config import GangConfig
        from ..gang.gang import Gang

        settings = self._settings
        gpus = settings.engine.device != "cpu" and has_gpus()
        if settings.engine.device.startswith("cuda") and not gpus:
            raise ConfigError(
                f"device {settings.engine.device!r} is not there: the Ray cluster has no GPU; take auto or cpu"
            )
        check_room(settings.ranks, gpus)
        engine = dataclasses.replace(settings.engine, device="cuda" if gpus else "cpu")
        config = GangConfig(
            size=settings.ranks,
            gpus=gpus,
            spare=not gpus and settings.ranks > 1,
            threads=settings.threads,
            frozen_after=self._frozen_after,
        )
        return Gang(config, engine)

    def _work(self, task: Task, gang: Gang) -> Work:
        from ..gang.copies import read_copies
        from ..gang.messages import Work

        # Its file is on this machine, the ranks may be on others.
        image = read_image(task.image) if task.image is not None else None
        return Work(
            id=task.id,
            request=GenerateRequest(**dataclasses.asdict(task.request) | {"image": image}),
            state=str(task.state) if gang.near else None,
            copies=None if gang.near else read_copies(task.state),
            checkpoint_every=self._settings.checkpoint_every,
            files=True,
            previews=True,
        )

    def _watch(self, gang: Gang) -> None:
        try:
            gang.watch()
        except RankFailure as error:
            self._tell_loss(error)
            raise

    def _heal(self, gang: Gang) -> None:
        start = time.monotonic()
        gang.heal()
        self._trouble = None
        self._pauses.succeeded()
        seconds = round(time.monotonic() - start, 3)
        say("gang ready", runner=self._index, ranks=gang.size, life=gang.lives, pids=gang.pids, seconds=seconds)

    def _tell_loss(self, error: RankFailure) -> None:
        say("gang lost a rank", logging.WARNING, runner=self._index, reason=str(error))


def _events(run: Generator[Progress, None, Outcome], task: Task) -> Generator[Event, None, Outcome]:
    """The runner's events of an attempt; what rank 0 saves elsewhere is copied to the task's folder."""
    from ..gang.copies import write_copies

    kept: list[str] = []
    while True:
        try:
            progress = next(run)
        except StopIteration as end:
            outcome: Outcome = end.value
            return outcome
        if progress.copies:
            try:
                kept = write_copies(task.state, progress.copies, kept)
            except OSError as error:
                if not no_room(error):
                    raise
                # The video goes on without being saved.
        if progress.event is not None:
            yield progress.event


def _made(task: Task, outcome: Outcome) -> Made:
    """Put the files where they belong."""
    assert outcome.files is not None, "rank 0 has the files"
    for name, content in outcome.files.items():
        (task.folder / name).write_bytes(content)
    return Made(hsa=outcome.hsa, seconds=outcome.seconds, imbalances=outcome.imbalances)
