"""A job: one video whose making survives the process; and what happens between two steps of any run.

A job's folder holds checkpoints, progress, and the result. On many ranks only the first has a `Job`; what it loads it
shares with the others, since all that is saved is alike on each of them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import torch
from filelock import FileLock, Timeout

from ..errors import Cancelled, ConfigError, Damaged, Interrupted, JobDiffers, JobInUse
from .checkpoint import Saved, differences, output_content, output_from, read_saved, remove_others, write_saved
from .facts import first_line
from .media.files import RESULT_NAME, checkpoint_name, checkpoint_steps, has_result
from .report import HSAReport, StepRecord
from .request import Event, StepDone, VideoOutput
from .request import JobConfig as JobConfig  # in 0.1.0 it was defined here

if TYPE_CHECKING:
    from .denoise.session import HSASession


KEPT = 2
"""Checkpoints that are kept: the newest, and one to fall back to."""


class Finished(NamedTuple):
    """The stored result of a job: the video, and the record of its making (`record.run_record`)."""

    output: VideoOutput
    record: dict[str, Any]


class Job:
    """A job's folder while one process works in it; a context manager, which keeps other processes out.

    Attributes:
        folder: of the job.
        every: steps from one checkpoint to the next.
        saved: number of steps of the newest whole checkpoint, 0 if there is none.
        seconds: that writing checkpoints took.
    """

    def __init__(self, config: JobConfig, identity: Mapping[str, Any], quiet: bool = False) -> None:
        """Prepare; nothing is read or written yet.

        Args:
            config: folder and settings.
            identity: what the job makes (`checkpoint.identity_of`).
            quiet: do not log what is skipped.
        """
        self.folder, self.every = Path(config.folder), config.checkpoint_every
        self.saved, self.seconds = 0, 0.0
        self._anew, self._identity, self._quiet = config.resume == "never", identity, quiet
        self._whole: list[int] = []
        # `stream` may be closed by another thread than began it. A mere marker file would outlive a killed process.
        self._lock = FileLock(self.folder / ".lock", blocking=False, thread_local=False, fallback_to_soft=False)
        self._progress: BinaryIO | None = None
        self._progress_works, self._failing = True, False

    def __enter__(self) -> Job:
        """Make the folder and keep others out.

        Raises:
            ConfigError: the folder cannot be used.
            JobInUse: another process uses it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout as error:
            raise JobInUse(
                f"the job folder {str(self.folder)!r} is in use by another run: wait for it, or name another folder"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise ConfigError(f"the job folder {str(self.folder)!r} cannot be used ({error.strerror})") from error
            _warn("the file system of %s has no locks: do not start the same job twice", str(self.folder))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let others in."""
        with contextlib.suppress(OSError):  # the progress file may hold a line that no longer fits onto the disk
            if self._progress is not None:
                self._progress.close()
        self._progress = None
        self._lock.release()

    def finished(self) -> Finished | None:
        """Return the stored result, or None if there is none.

        Raises:
            ConfigError: it is the result of another job.
        """
        if self._anew or not has_result(self.folder):
            return None
        saved = self._read(RESULT_NAME, "result")
        if saved is None:
            return None
        self._check(saved)
        return Finished(output_from(saved.content["output"]), dict(saved.content["record"]))

    def newest(self) -> Saved | None:
        """Return the newest whole checkpoint; what is torn or altered is skipped with a line in the log.

        `resume="never"` removes all checkpoints and the result instead.

        Raises:
            ConfigError: it belongs to another job.
            OSError: something cannot be removed.
        """
        if self._anew:
            remove_others(self.folder, ())
            return None
        for step in checkpoint_steps(self.folder):
            saved = self._read(checkpoint_name(step), "checkpoint")
            if saved is not None:
                self._check(saved)
                self.saved, self._whole = step, [step]
                return saved
        return None

    def save(self, step: int, sigma: float, state: Mapping[str, Any]) -> bool:
        """Write the checkpoint after `step` steps, at noise level `sigma`, and keep one before it.

        A disk that is full must not end a run that can do without: it is logged, and tried again at the next
        checkpoint. Returns whether the checkpoint is there.
        """
        if step == self.saved:
            return True
        start = time.perf_counter()
        saved = Saved(kind="checkpoint", step=step, sigma=sigma, job=self._identity, content=state)
        try:
            if self._progress is not None:  # what it says of the steps so far must outlast the machine too
                os.fsync(self._progress.fileno())
            write_saved(self.folder, checkpoint_name(step), saved)
            self.saved, self._failing = step, False
            self._whole = [*self._whole, step][-KEPT:]
            remove_others(self.folder, [checkpoint_name(whole) for whole in self._whole])
        except OSError as error:
            left = f"that of step {self.saved} is" if self.saved else "none is"
            if not self._failing:  # once, not at every step until there is room
                _warn("the checkpoint of step %d could not be written (%s); %s there", step, _reason(error), left)
            self._failing = True
            with contextlib.suppress(OSError):  # what was written of it fills the disk
                remove_others(self.folder, [checkpoint_name(whole) for whole in self._whole])
        self.seconds += time.perf_counter() - start
        return self.saved == step

    def progress(self, event: StepDone) -> None:
        """Append a step to `progress.jsonl`; the first call removes what is there of this and later steps."""
        line = {
            "step": event.step,
            "num_steps": event.num_steps,
            "sigma": event.sigma,
            "active": event.share,
            "seconds": round(event.seconds, 4),
            "eta_seconds": round(event.eta_seconds, 2),
            "time": round(time.time(), 3),
        }
        try:
            if self._progress is None:
                self._progress = _open_progress(self.folder / "progress.jsonl", event.step)
            self._progress.write((json.dumps(line) + "\n").encode())
            self._progress.flush()
        except OSError as error:
            if self._progress_works:
                _warn("progress.jsonl cannot be written from step %d on (%s)", event.step, _reason(error))
            self._progress_works = False

    def finish(self, output: VideoOutput, record: Mapping[str, Any]) -> None:
        """Store the result, and remove the checkpoints; should that fail, they stay, and the log says so."""
        content = {"output": output_content(output), "record": record}
        steps = output.request.num_inference_steps
        saved = Saved(kind="result", step=steps, sigma=0.0, job=self._identity, content=content)
        try:
            write_saved(self.folder, RESULT_NAME, saved)
            remove_others(self.folder, [RESULT_NAME])
        except OSError as error:
            _warn("the result could not be kept in the job folder (%s)", _reason(error))

    def _read(self, name: str, kind: str) -> Saved | None:
        try:
            return read_saved(self.folder, name, kind)
        except Damaged as error:
            if self._quiet:
                return None
            _warn("%s in job folder %s is skipped: %s", name, str(self.folder), error)
            return None

    def _check(self, saved: Saved) -> None:
        found = differences(saved.job, self._identity, finished=saved.kind == "result")
        if found:
            raise JobDiffers(
                f"the job folder {str(self.folder)!r} holds another job, which differs in {', '.join(found)}: repeat "
                'that request, name another folder (--job-dir), or start over (--resume never, resume="never")'
            )


def look(config: JobConfig, identity: Mapping[str, Any]) -> Finished | None:
    """Return a job's stored result, if it has one, and refuse what the job could not start or resume with.

    Raises:
        ConfigError: the folder cannot be used, is in use, or holds another job.
    """
    with Job(config, identity, quiet=True) as job:
        finished = job.finished()
        if finished is None and config.resume != "never":
            job.newest()
        return finished


def _warn(message: str, *values: object) -> None:
    logging.getLogger("heterostep").warning("heterostep: " + message, *values)


def _reason(error: OSError) -> str:
    return error.strerror or first_line(error)


def _open_progress(path: Path, step: int) -> BinaryIO:
    """Open for appending the line of `step`, after cutting off that step's line, later ones, and a torn end."""
    file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 - the job closes it
    end = 0
    for line in file:
        try:
            known = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError, RecursionError):
            break
        if not line.endswith(b"\n") or not isinstance(known, int) or known >= step:
            break
        end += len(line)
    file.truncate(end)
    file.seek(end)
    return file


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
