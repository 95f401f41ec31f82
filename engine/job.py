"""A job: one video whose making survives the process.

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
from typing import Any, BinaryIO, NamedTuple, TypeVar

from filelock import FileLock, Timeout

from ..errors import ConfigError, Damaged, JobDiffers, JobInUse
from .checkpoint import Saved, differences, read_saved, remove_others, write_saved
from .facts import first_line
from .media.feeding import Frames
from .media.files import FRAMES_NAME, LATENTS_NAME, RESULT_NAME, checkpoint_name, checkpoint_steps, has_result
from .request import JobConfig as JobConfig  # in 0.1.0 it was defined here
from .request import StepDone, VideoResult
from .stored import StoredFrames, video_content, video_from, write_frames

T = TypeVar("T")

KEPT = 2
"""Checkpoints that are kept: the newest, and one to fall back to."""


class Finished(NamedTuple):
    """The stored result of a job: the video, its frames, and the record of its making (`record.run_record`)."""

    video: VideoResult
    frames: StoredFrames
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
        self._whole_video = False
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
        frames = self._try(FRAMES_NAME, self.frames)
        if frames is None or frames.job != saved.job:
            return None
        return Finished(video_from(saved.content["video"]), frames, dict(saved.content["record"]))

    def frames(self) -> StoredFrames:
        """The frames of a finished video; raises Damaged if there are none."""
        return StoredFrames(self.folder, FRAMES_NAME)

    def denoised(self) -> VideoResult | None:
        """Return the video that is denoised, but not decoded yet; its `seconds` end there. None if there is none.

        Raises:
            ConfigError: it belongs to another job.
        """
        if self._anew:
            return None
        for name, kind in ((LATENTS_NAME, "latents"), (RESULT_NAME, "result")):  # a result may have lost its frames
            if (self.folder / f"{name}.json").is_file():
                saved = self._read(name, kind)
                if saved is not None:
                    self._check(saved, finished=False)
                    return video_from(saved.content["video"])
        return None

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
            self._tidy()
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

    def keep_latents(self, video: VideoResult, model: str) -> None:
        """Store a video that is denoised, so that nothing of this is lost while it is decoded; the log says if not."""
        start = time.perf_counter()
        try:
            write_saved(self.folder, LATENTS_NAME, self._saved("latents", video, {"model": model}))
        except OSError as error:
            _warn("the denoised video could not be kept in the job folder (%s)", _reason(error))
            self._tidy()
        self.seconds += time.perf_counter() - start

    def keep_frames(self, video: VideoResult, frames: Frames) -> None:
        """Store the frames; should that fail, the log says so, and the video stays one that is to be decoded."""
        try:
            write_frames(self.folder, FRAMES_NAME, self._saved("frames", video, None), video.shape, frames)
            self._whole_video = True
        except OSError as error:
            _warn("the result could not be kept in the job folder (%s)", _reason(error))
            self._tidy(LATENTS_NAME, RESULT_NAME)  # a result that lost its frames has the latents

    def finish(self, video: VideoResult, model: str, record: Mapping[str, Any]) -> None:
        """Store what else there is of the result, and remove the checkpoints; should that fail, the log says so."""
        if not self._whole_video:
            return
        try:
            write_saved(self.folder, RESULT_NAME, self._saved("result", video, {"model": model, "record": record}))
            remove_others(self.folder, [RESULT_NAME, FRAMES_NAME])
        except OSError as error:
            _warn("the result could not be kept in the job folder (%s)", _reason(error))

    def _tidy(self, *names: str) -> None:
        """Remove what was written of a state that the disk has no room for; checkpoints and some others stay."""
        with contextlib.suppress(OSError):
            remove_others(self.folder, [*names, *(checkpoint_name(whole) for whole in self._whole)])

    def _saved(self, kind: str, video: VideoResult, more: Mapping[str, Any] | None) -> Saved:
        """A state of after the last step; without `more` it holds the job's identity alone."""
        content = {} if more is None else {"video": video_content(video), **more}
        return Saved(kind=kind, step=video.request.num_inference_steps, sigma=0.0, job=self._identity, content=content)

    def _read(self, name: str, kind: str) -> Saved | None:
        return self._try(name, lambda: read_saved(self.folder, name, kind))

    def _try(self, name: str, read: Callable[[], T]) -> T | None:
        try:
            return read()
        except Damaged as error:
            if self._quiet:
                return None
            _warn("%s in job folder %s is skipped: %s", name, str(self.folder), error)
            return None

    def _check(self, saved: Saved, *, finished: bool | None = None) -> None:
        finished = saved.kind == "result" if finished is None else finished
        found = differences(saved.job, self._identity, finished=finished)
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
        if finished is None and config.resume != "never" and job.denoised() is None:
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
