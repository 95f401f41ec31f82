"""`VideoService`: what the HTTP API does, without HTTP."""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ...engine.facts import read_facts
from ...engine.memory import Room
from ...engine.request import GenerateRequest, allocation, resolve
from ...errors import FileGone, QueueFull, StoreUnavailable
from ..logs import say
from ..workers.messages import FILES
from .access import ApiKeys
from .bodies import ModelCard, Video, to_video
from .dispatcher import Dispatcher
from .metrics import Metrics
from .requests import Asked, check_plan, to_request, usual_share
from .results import delete_job, gone
from .rows import Job
from .runner import Runner
from .settings import ServiceSettings, check_degrees, limits_for, public_name
from .store import JobStore

Version = tuple[int, int | None]
"""Of a job's row, and its place in the queue: something to show has changed when this has."""

RunnerFactory = Callable[[ServiceSettings, int], Runner]

_DAY = 86400.0
_MAX_RETRY_AFTER = 60
# Nobody has made a video here yet.
_UNKNOWN_SECONDS = 10.0


class VideoService:
    """One process of the service: a job store, which it may share with others, and runners of its own.

    Attributes:
        settings: as given.
        keys: who may call; None: everybody.
        metrics: what this process counts and measures.
        model: what the API calls the model.
    """

    def __init__(
        self,
        settings: ServiceSettings,
        make_runner: RunnerFactory = Runner,
        replica: str = "",
        room: Room | None = None,
    ) -> None:
        """Check model and keys, and open the job store; `start` begins to work.

        Args:
            settings: of the service.
            make_runner: makes a runner from the settings and its number.
            replica: the label of its metrics, where several processes answer at one address.
            room: memory of each rank, if all are on this machine and have not loaded anything yet.

        Raises:
            ConfigError: the model, the key file or the data directory cannot be used.
        """
        self.settings, self._room = settings, room
        self.keys = ApiKeys.read(settings.api_key_file) if settings.api_key_file is not None else None
        self._facts = read_facts(settings.engine.model)
        self._share = usual_share(settings.engine.hsa)
        self._limits = limits_for(settings, self._facts)
        check_degrees(settings, self._facts)
        usual = resolve(GenerateRequest(prompt="-"), replace(self._facts, image="none"))
        check_plan(self._facts, allocation(settings.engine, usual), usual, settings.checkpoint_every)
        self.model = public_name(settings.engine.model)
        self.metrics = Metrics(replica)
        self._store = JobStore(settings.database, self._count)
        runners = [make_runner(settings, index) for index in range(settings.replicas)]
        self._dispatcher = Dispatcher(settings, self.model, self._store, runners, self.metrics)
        self.metrics.watch(self._store, runners)
        self._started = int(time.time())
        self._stopping = False

    def start(self) -> None:
        """Begin to work, first on what an earlier process left behind."""
        self._dispatcher.start()

    def stop_soon(self) -> None:
        """Let streams end and take no jobs, before `stop`; callable from a signal handler."""
        self._stopping = True

    def stop(self) -> None:
        """Save what runs and end; queued jobs wait for the next start."""
        self._stopping = True
        self._dispatcher.stop()
        self._store.close()

    def close(self) -> None:
        """Close the job store of a service that was not started."""
        self._store.close()

    @property
    def broken(self) -> bool:
        """Whether the service must be replaced: it cannot recover by itself."""
        return self._dispatcher.broken

    @property
    def refusal(self) -> str | None:
        """Why no job is taken; None if jobs are, which may then have to wait."""
        return "the service is stopping" if self._stopping else self._store.trouble

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called: streams should end."""
        return self._stopping

    @property
    def trouble(self) -> str | None:
        """Why no job could run now; None if one could."""
        return None if self._dispatcher.ready and not self._stopping else self._dispatcher.trouble

    @property
    def hopeless(self) -> str | None:
        """Why no job ever could; None while there is hope."""
        return self._dispatcher.hopeless

    @property
    def takes_images(self) -> bool:
        """Whether a video may start from an image."""
        return self._facts.image != "none"

    def submit(self, asked: Asked, owner: str, idempotency_key: str | None) -> tuple[Video, bool]:
        """Queue a video, or find the one that the same Idempotency-Key made; the second value is whether it is new.

        Raises:
            RequestError: it cannot be served.
            QueueFull: too many wait.
        """
        request, image = to_request(
            asked,
            model=self.model,
            facts=self._facts,
            limits=self._limits,
            share=self._share,
            engine=self.settings.engine,
            every=self.settings.checkpoint_every,
            loras=self.settings.loras,
            noises=self.settings.noises,
        )
        if self._room is not None:
            ranks, sharded = self.settings.ranks, self.settings.shard_weights
            self._room.settle(self.settings.engine, self._facts, request, ranks=ranks, shard_weights=sharded)
        try:
            job, new = self._store.create(
                id=f"video_{secrets.token_hex(16)}",
                owner=owner,
                model=self.model,
                request=request,
                max_queue=self.settings.max_queue,
                idempotency_key=idempotency_key,
                fingerprint=asked.fingerprint,
                image=image,
            )
        except QueueFull:
            self._count("rejected")
            raise
        self._dispatcher.wake()
        return self._shown(job), new

    def find(self, id: str, owner: str) -> Video | None:
        """A video of an owner."""
        job = self._store.get(id, owner)
        return self._shown(job) if job is not None else None

    def changed(self, id: str, owner: str, version: Version) -> tuple[Video, Version] | None:
        """A video and its version, if it is another than `version`; None if it is the same.

        Raises:
            KeyError: the video is gone.
        """
        job = self._store.get(id, owner)
        if job is None:
            raise KeyError(id)
        now = (job.version, self._position(job))
        return (self._shown(job), now) if now != version else None

    def preview(self, id: str, since: int) -> tuple[int, bytes] | None:
        """The newest preview of a running video after step `since`: its step, and a WebP picture."""
        return self._store.preview(id, since)

    def list(
        self, owner: str, *, after: str | None, limit: int, newest_first: bool, statuses: Sequence[str] = ()
    ) -> tuple[list[Video], bool]:
        """A page of an owner's videos, of these statuses if any are given, and whether there are more."""
        jobs, more = self._store.page(owner, after=after, limit=limit, newest_first=newest_first, statuses=statuses)
        return [self._shown(job) for job in jobs], more

    def cancel(self, id: str, owner: str) -> Video | None:
        """Cancel a video: at once if it is queued, within a step if it runs, not at all if it is finished."""
        job = self._store.cancel(id, owner)
        self._dispatcher.wake()
        return self._shown(job) if job is not None else None

    def delete(self, id: str, owner: str) -> bool:
        """Remove a video for good, cancelling it first if need be; False if there is none."""
        job = self._store.delete(id, owner)
        if job is None:
            return False
        self._dispatcher.wake()
        if job.status != "in_progress":  # else the runner still writes; it is cleaned up afterwards
            with contextlib.suppress(OSError):  # it is tried again
                delete_job(self.settings, self._store, job)
        return True

    def file(self, id: str, variant: str) -> tuple[Path, str]:
        """Path and media type of a completed video's file.

        Raises:
            FileGone: somebody else removed or emptied it.
        """
        name, media_type = FILES[variant]
        folder = self.settings.results / id
        absent = gone(folder)
        message = f"gone from the service's disk: {', '.join(absent)}"
        with contextlib.suppress(StoreUnavailable):
            if self._store.tell(id, {"code": "files_gone", "message": message} if absent else None) and absent:
                say("files gone", logging.ERROR, job=id, files=absent)
        if name in absent:
            raise FileGone(f"the file {name} of video {id} is gone from the service's disk; make the video again")
        return folder / name, media_type

    def retry_after(self) -> int:
        """Seconds after which a place in the queue should be free."""
        seconds = self._dispatcher.mean_seconds or _UNKNOWN_SECONDS
        return max(1, min(_MAX_RETRY_AFTER, round(seconds / self.settings.replicas)))

    def card(self) -> ModelCard:
        """The model, with what a request to it may ask for."""
        facts, limits = self._facts, self._limits
        return ModelCard(
            id=self.model,
            created=self._started,
            family=facts.family,
            inputs=["text", "image"] if self.takes_images else ["text"],
            image=facts.image,  # type: ignore[arg-type]  # it is one of these
            defaults={**facts.defaults._asdict(), **self._share},
            loras=list(self.settings.loras),
            size_step=facts.size_step,
            frame_step=facts.frame_step,
            limits={
                "prompt": limits.prompt,
                "pixels": limits.pixels,
                "frames": limits.frames,
                "steps": limits.steps,
            },
        )

    def _count(self, status: str) -> None:
        self.metrics.count("heterostep_requests", status=status)

    def _shown(self, job: Job) -> Video:
        settings = self.settings
        return to_video(
            job,
            position=self._position(job),
            keep_seconds=settings.keep_days * _DAY,
            openai_statuses=settings.openai_statuses,
        )

    def _position(self, job: Job) -> int | None:
        return self._store.position(job) if job.status == "queued" else None
