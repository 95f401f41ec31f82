"""What happens between two steps of a run: events, checkpoints, stopping."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..errors import Cancelled, Interrupted
from .checkpoint import Saved
from .facts import ModelFacts
from .job import Job
from .memory import expected_seconds
from .report import HSAReport, StepRecord
from .request import Event, FrameSink, ResolvedRequest, Started, StepDone
from .sources import Sources

if TYPE_CHECKING:
    from .denoise.session import HSASession
    from .record import Maker


def started(
    facts: ModelFacts, request: ResolvedRequest, resumed_at: int | None, engine: Maker | None = None
) -> Started:
    """The first event of a run; `resumed_at` as there. The `engine` that runs it says how long that may take."""
    eta_seconds = None
    if engine is not None and resumed_at is None and engine.device.type == "cuda":
        gpu = torch.cuda.get_device_name(engine.device)
        eta_seconds = expected_seconds(engine.config, request, gpu, engine.dtype.itemsize)
    num_tokens = math.prod(facts.grid(request.width, request.height, request.num_frames))
    return Started(request=request, num_tokens=num_tokens, resumed_at=resumed_at, eta_seconds=eta_seconds)


class Stop:
    """Whether a run is to stop; plain attributes, which a signal handler may set at any moment.

    Attributes:
        asked: the run stops after its current step.
        save: that step is saved, if the run has a job.
        saved: the run stops after the next step that is saved anyway, so that its plan remains as it is.
    """

    def __init__(self) -> None:
        self.asked = self.save = self.saved = False


def stopped(done: int, num_steps: int, job: Job | None) -> Cancelled:
    """What to raise for a run that stopped after `done` steps; `job` if it was to be saved."""
    if job is None:
        return Cancelled(f"cancelled after step {done} of {num_steps}")
    where = f"step {job.saved} is saved" if job.saved else "no step is saved"
    return Interrupted(
        f"stopped after step {done} of {num_steps}; {where} in {str(job.folder)!r}, and the same request resumes there",
        job.saved,
    )


class StepEvents:
    """The pipeline's `callback_on_step_end`: sends a `StepDone`, saves checkpoints, stops the pipeline when asked.

    Attributes:
        events: of this process's steps.
        done: number of steps done, also before a resume.
        earlier: seconds by stage before a resume.
        stopping: whether the run was told to stop.
    """

    def __init__(
        self,
        num_steps: int,
        num_tokens: int,
        work: float,
        session: HSASession | None,
        emit: Callable[[Event], None],
        stop: Stop,
        clock: Callable[[], float],
        vote: Callable[[bool], bool] = bool,
    ) -> None:
        """Follow one run.

        Args:
            num_steps: T.
            num_tokens: N.
            work: evaluated tokens of the whole run, as far as is known.
            session: of the run; None for a stock pipeline.
            emit: gets the events.
            stop: looked at after each step.
            clock: seconds.
            vote: on many ranks, whether any of them says yes: what stops one stops all.
        """
        self.events: list[StepDone] = []
        self.stopping = False
        self._vote = vote
        self.done, self.earlier = 0, {"denoise": 0.0, "checkpoint": 0.0}
        self._num_steps, self._num_tokens, self._work = num_steps, num_tokens, work
        self._session, self._emit, self._stop, self._clock = session, emit, stop, clock
        self._records: list[StepRecord] = []
        if session is not None:
            session.on_step.append(self._records.append)
        self._start = self._last = clock()
        self._work_done = 0
        self._job: Job | None = None
        self._every: int | None = None

    def keep(self, job: Job | None, every: int, saved: Saved | None) -> None:
        """Save every so many steps, and resume from `saved`; without a `job` another rank saves."""
        assert self._session is not None, "only a run with a session can be saved"
        self._job, self._every = job, every
        self._session.save_every(every)
        if saved is not None:
            self._session.resume(saved.content["session"])
            self.done, self.earlier = saved.step, dict(saved.content["seconds"])
            self._work -= sum(record["active"] for record in saved.content["session"]["run"]["records"])

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's `callback_on_step_end`; returns the tensors that are to replace the pipeline's own."""
        now = self._clock()
        new, self.done = step + 1 > self.done, max(self.done, step + 1)
        # Looked at once: a step that is not saved does not end the run.
        pause = self._stop.saved and new and self._on_schedule and self.done < self._num_steps
        self.stopping = stopping = self._vote(self._stop.asked or pause)
        if stopping:  # on all ranks or on none, so that each votes as often as the others
            self._stop.save = self._vote(self._stop.save or pause)
        passed = self._session.passed(step, **tensors) if self._every and self._session is not None else None
        if passed is None:
            sigmas = pipeline.scheduler.sigmas[-self._num_steps - 1 :]  # a given video is noised in part only
            self._tell(step, float(sigmas[step]), now)
            if self._job is not None:
                self._save(self._job, float(sigmas[step + 1]), tensors, stopping)
        else:
            self._start = now
        # An interrupted pipeline still skips through its loop, so that its hooks and offloading end in order.
        if stopping:
            pipeline._interrupt = True
        self._last = self._clock()
        return passed or {}

    @property
    def _on_schedule(self) -> bool:
        """Whether a run that is not stopped saves here."""
        return self._every is not None and self.done % self._every == 0

    def _tell(self, step: int, sigma: float, now: float) -> None:
        active = self._records[-1].active if self._session is not None else self._num_tokens
        self._work_done += active
        left = max(self._work - self._work_done, 0.0) if step + 1 < self._num_steps else 0.0
        if self._session is not None and self._session.ahead is not None:
            left = self._session.ahead
        event = StepDone(
            step=step + 1,
            num_steps=self._num_steps,
            sigma=sigma,
            active=active,
            total=self._num_tokens,
            seconds=now - self._last,
            eta_seconds=(now - self._start) * left / self._work_done if self._work_done else 0.0,
        )
        self.events.append(event)
        self._emit(event)
        if self._job is not None:
            self._job.progress(event)

    def _save(self, job: Job, sigma: float, tensors: dict[str, torch.Tensor], stopping: bool) -> None:
        """Save where it is time to, or the run stops; and before the VAE, which may need more memory than there is."""
        due = self._on_schedule or self.done == self._num_steps
        if not due and not (stopping and self._stop.save):
            return
        assert self._session is not None
        seconds = {
            "denoise": self.earlier["denoise"] + sum(event.seconds for event in self.events),
            "checkpoint": self.earlier["checkpoint"] + job.seconds,
        }
        job.save(self.done, sigma, {"session": self._session.state(**tensors), "seconds": seconds})


class Progress:
    """How far a run is, for messages."""

    def __init__(self) -> None:
        self._on_step: StepEvents | None = None

    def follow(self, on_step: StepEvents) -> None:
        """Look at a run's steps."""
        self._on_step = on_step

    @property
    def where(self) -> str:
        """How far the run is, as part of a sentence."""
        return "before its first step" if self._on_step is None else f"after {self._on_step.done} steps"


def dense_report(events: list[StepDone], grid: tuple[int, int, int]) -> HSAReport:
    """The report of a run of the stock pipeline: every token at every step."""
    records = [
        StepRecord(
            step=event.step - 1,
            sigma=event.sigma,
            active=event.active,
            total=event.total,
            reason="dense",
            seconds=event.seconds,
        )
        for event in events
    ]
    evaluations = torch.full(grid, len(events), dtype=torch.int32)
    return HSAReport(steps=records, compute=1.0, evaluations=evaluations, kv_bytes=0, num_steps=len(events))


class Work(NamedTuple):
    """One request on its way to a video.

    Attributes:
        sources: what it is made from beside text.
        job: where it is kept, on the rank that keeps it.
        every: steps between checkpoints; None for a video that is not kept.
        saved: the checkpoint that it resumes at.
        sink: takes its frames; None: they are returned.
        emit: takes its events.
        stop: whether it shall stop.
        progress: how far it is, for messages.
    """

    request: ResolvedRequest
    sources: Sources
    job: Job | None
    every: int | None
    saved: Saved | None
    sink: FrameSink | None
    emit: Callable[[Event], None]
    stop: Stop
    progress: Progress

    def stopped(self, step: int) -> Cancelled:
        """The exception that ends it after a step."""
        return stopped(step, self.request.num_inference_steps, self.job if self.stop.save else None)
