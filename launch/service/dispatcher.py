"""From the queue to the runners and back: claims, progress, retries, cancelling, and what an earlier process left."""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ...engine.media.files import no_room, when_there_is_room
from ...engine.request import ResolvedRequest, StepDone
from ...errors import Cancelled, ConfigError, Interrupted, RankLost, RequestError, StoreUnavailable
from ..logs import say
from ..workers.messages import FILES, Outcome
from ..workers.video import reason_to_give_up, reason_to_give_up_restarts, saved_step
from .database import Lease, is_held
from .metrics import Follower, Metrics, num_pixels
from .results import (
    clean_up,
    complete,
    delete_job,
    describe_results,
    folder_bytes,
    is_complete,
    job_facts,
    read_manifest,
    remove_state,
    rescue,
)
from .rows import Job
from .runner import Runner, Task
from .settings import ServiceSettings
from .store import JobStore

_IDLE_SECONDS = 0.25
_WATCH_SECONDS = 0.2
_PROBE_SECONDS = 2.0
_CLEAN_UP_SECONDS = 60.0
# While the disk is full.
_RETRY_SECONDS = 1.0

T = TypeVar("T")


class Dispatcher:
    """Keeps the runners busy with the jobs of one model; a thread for each runner, and one that watches.

    Attributes:
        runners: as given.
        mean_seconds: that the last videos took, the newer the more they count; None before the first.
    """

    def __init__(
        self, settings: ServiceSettings, model: str, store: JobStore, runners: Sequence[Runner], metrics: Metrics
    ) -> None:
        """Prepare; `start` begins."""
        self._settings, self._model, self._store, self._metrics = settings, model, store, metrics
        self.runners = runners
        self._lease: Lease | None = None
        self._stopping = threading.Event()
        self._wake = threading.Condition()
        self._running: dict[str, Runner] = {}
        self._threads: list[threading.Thread] = []
        # Jobs whose runner was lost: when, and why.
        self._lost: dict[str, tuple[float, str]] = {}
        # Folders that belong to no job, and the last unforeseen failures: each is logged once.
        self._unknown: list[Path] = []
        self._said: dict[str, tuple[str, float]] = {}
        # Of the last video, seconds for a pixel: what is left to do when denoising ends.
        self._after_denoising = 0.0
        self.mean_seconds: float | None = None

    @property
    def ready(self) -> bool:
        """Whether a job could run now, in this process."""
        return self._store.trouble is None and not self.broken and any(runner.ready for runner in self.runners)

    @property
    def broken(self) -> bool:
        """Whether a thread has died that should run as long as the process."""
        return not self._stopping.is_set() and not all(thread.is_alive() for thread in self._threads)

    @property
    def trouble(self) -> str | None:
        """Why no job can run now, in one sentence; None if one can."""
        if self._stopping.is_set():
            return "the service is stopping"
        if self.broken:
            return "a thread of the dispatcher has died"
        if self._store.trouble is not None:
            return self._store.trouble
        return next((runner.trouble for runner in self.runners if runner.trouble), "the model is being loaded")

    @property
    def hopeless(self) -> str | None:
        """Why no runner can ever run a job; None while there is hope."""
        reasons = [runner.trouble for runner in self.runners if runner.hopeless]
        return reasons[0] if len(reasons) == len(self.runners) else None

    def start(self) -> None:
        """Take up what an earlier process left behind, and begin to work."""
        self._lease = Lease(self._settings.leases)
        try:
            self._store.mend()
            self._adopt()
            describe_results(self._settings, self._store)
            self._clean_up()
        except StoreUnavailable:  # the store has said why; the thread that watches tries again
            pass
        except OSError as error:
            self._tell_failure("start failed", error)
        self._threads = [threading.Thread(target=self._drive, args=(runner,), daemon=True) for runner in self.runners]
        self._threads.append(threading.Thread(target=self._watch, daemon=True))
        for thread in self._threads:
            thread.start()

    def stop(self, grace_seconds: float = 10.0) -> None:
        """Save what runs, put it back into the queue, and end the runners."""
        self._stopping.set()
        self.wake()
        deadline = time.monotonic() + grace_seconds
        while self._running and time.monotonic() < deadline:
            # Again and again: the first time may have been just before a run began.
            for runner in self.runners:
                runner.stop()
            time.sleep(_WATCH_SECONDS)
        for runner in self.runners:
            runner.close()
        for thread in self._threads:
            thread.join(5.0)
        if self._lease is not None:
            self._lease.release()

    def wake(self) -> None:
        """Say that something was queued or is to be cancelled: it is seen at once instead of soon."""
        with self._wake:
            self._wake.notify_all()

    def _pause(self, seconds: float) -> None:
        with self._wake:
            if not self._stopping.is_set():
                self._wake.wait(seconds)

    # One thread for each runner.

    def _drive(self, runner: Runner) -> None:
        assert self._lease is not None
        unsettled: Job | None = None
        while not self._stopping.is_set():
            try:
                if unsettled is not None:
                    self._settle(unsettled, "error", "how it ended could not be recorded", unsettled.step)
                    unsettled = None
                runner.tend()
                able = runner.ready and self._store.trouble is None
                job = self._store.claim(self._lease.name, self._model) if able else None
                if job is None:
                    self._pause(_IDLE_SECONDS)
                    continue
                unsettled = job
                self._serve(job, runner)
                unsettled = None
            except StoreUnavailable:  # the store has said why
                self._stopping.wait(_RETRY_SECONDS)
            except Exception as error:  # if the thread ended, its runner would stay idle forever
                self._tell_failure("dispatcher failed", error)
                self._stopping.wait(_RETRY_SECONDS)

    def _tell_failure(self, event: str, error: Exception) -> None:
        """Log an unforeseen failure; the same one again is one record a minute."""
        last, when = self._said.get(event, ("", 0.0))
        if repr(error) != last or time.monotonic() - when > _CLEAN_UP_SECONDS:
            self._said[event] = repr(error), time.monotonic()
            say(event, logging.ERROR, exc_info=True)

    def _recorded(self, act: Callable[[], T]) -> T:
        """Record how an attempt ended; as long as that cannot be written, wait, with the runner and its model kept.

        Raises:
            StoreUnavailable: the service stops meanwhile; its next start finds the attempt unfinished.
        """
        while True:
            try:
                return when_there_is_room(act, self._wait_for_room)
            except StoreUnavailable:
                if self._stopping.wait(_RETRY_SECONDS):
                    raise

    def _wait_for_room(self, error: OSError) -> None:
        self._store.failed(error)
        if self._stopping.wait(_RETRY_SECONDS):
            raise StoreUnavailable("the disk is full, and the service stops") from error

    def _serve(self, job: Job, runner: Runner) -> None:
        """One attempt at a job."""
        say("job begun", job=job.id, attempt=job.attempt)
        folder = self._settings.results / f".{job.id}.{job.attempt}.{job.lease}"
        state = self._settings.state / job.id
        follower = Follower(job, self._store, self._metrics, self._rest)
        self._running[job.id] = runner
        try:
            folder.mkdir()
            state.mkdir(exist_ok=True)
            request, image = ResolvedRequest(**job.request), self._image(job, state)
            task = Task(id=job.id, request=request, folder=folder, state=state, image=image)
            with contextlib.closing(runner.run(task)) as events:
                for event in events:
                    follower.see(event)
                    if isinstance(event, StepDone) and job.id in self._lost:
                        since, cause = self._lost.pop(job.id)
                        self._metrics.observe("heterostep_recovery_seconds", time.monotonic() - since, cause=cause)
            self._complete(job, follower.made, folder)
        except Interrupted:
            self._recorded(lambda: self._store.requeue(job, None))
            say("job saved", job=job.id, step=follower.step)
        except Cancelled:
            self._end(job, "cancelled", {"code": "cancelled", "message": f"cancelled after step {follower.step}"})
        except (RequestError, ConfigError) as error:  # no other attempt could do better
            self._end(job, "failed", {"code": "invalid_request", "message": str(error)})
        except RankLost as error:
            if self._stopping.is_set():  # it was closed, not lost
                self._recorded(lambda: self._store.requeue(job, None))
            else:
                self._lose(job, error.cause, str(error), follower.step)
        except OSError as error:
            if no_room(error):  # not the request's fault: again, as soon as there is room
                self._store.failed(error)
                self._recorded(lambda: self._store.requeue(job, None))
                return
            self._lose(job, "error", f"the results could not be written ({error.strerror or error})", follower.step)
        finally:
            del self._running[job.id]
            shutil.rmtree(folder, ignore_errors=True)
        # Whoever removed it while it ran left that to us; after the last look at that, it may even be complete.
        unwanted = self._store.unwanted(job.id)
        if unwanted is not None:
            delete_job(self._settings, self._store, unwanted)
            say("job removed", job=job.id, why="deleted")

    def _image(self, job: Job, state: Path) -> Path | None:
        """Put the image that a job starts from, if there is one, into its folder."""
        content = self._store.image(job)
        if content is None:
            return None
        path = state / "image.png"
        path.write_bytes(content)
        return path

    def _rest(self, pixels: int) -> float:
        """Estimate of the seconds from the last step to the files."""
        return self._after_denoising * pixels

    def _complete(self, job: Job, made: Outcome | None, folder: Path) -> None:
        """Make the result visible: files first, then the row. After a kill between the two, the files are found."""
        assert made is not None, "a run ends with an outcome or an exception"
        if self._recorded(lambda: self._store.cancelled([job.id])):  # too late for the runner, but not for the user
            raise Cancelled("cancelled")
        timing = {"queued": (job.started_at or 0.0) - job.created_at, **made.seconds}
        manifest = {"hsa": made.hsa, "timing": timing, "job": job_facts(job, time.time())}
        self._make_visible(job, folder, manifest)
        self._after_denoising = (made.seconds["decode"] + made.seconds["write"]) / num_pixels(job)
        total, mean = made.seconds["total"], self.mean_seconds
        self.mean_seconds = total if mean is None else 0.7 * mean + 0.3 * total
        if self._recorded(lambda: self._finish(job)):
            for stage, seconds in made.seconds.items():
                self._metrics.observe("heterostep_stage_seconds", seconds, stage=stage)
            for imbalance in made.imbalances:
                self._metrics.observe("heterostep_rank_imbalance", imbalance)

    def _make_visible(self, job: Job, folder: Path, manifest: Mapping[str, Any]) -> None:
        target = self._settings.results / job.id
        try:
            self._recorded(lambda: complete(folder, target, manifest))
        except OSError as error:
            if not is_complete(target):  # it is, where the disk failed after the last step
                video = folder / FILES["video"][0]
                raise rescue(folder.name, lambda path: shutil.copyfile(video, path), error) from error

    def _finish(self, job: Job) -> bool:
        """Record that the files of a job are complete."""
        target = self._settings.results / job.id
        manifest = read_manifest(target)
        done = self._store.finish(
            job,
            "completed",
            progress=100,
            step=job.request["num_inference_steps"],
            hsa=manifest["hsa"],
            timing=manifest["timing"],
            bytes=folder_bytes(target),
        )
        if done:
            remove_state(self._settings, job.id, "completed")
            say("job completed", job=job.id, seconds=round(manifest["timing"]["total"], 3))
        return done

    def _end(self, job: Job, status: str, error: dict[str, str]) -> None:
        self._lost.pop(job.id, None)
        if self._recorded(lambda: self._store.finish(job, status, error=error)):
            self._remove_state(job, status)
            say(f"job {status}", job=job.id, reason=error["message"])

    def _remove_state(self, job: Job, status: str) -> None:
        """Remove what a job would have been resumed from; where the video itself stays, the log says so."""
        kept = remove_state(self._settings, job.id, status)
        if kept is not None:
            say("stored video kept", logging.WARNING, job=job.id, folder=str(kept))

    def _lose(self, job: Job, cause: str, message: str, step: int) -> None:
        self._recorded(lambda: self._settle(job, cause, message, step))

    def _settle(self, job: Job, cause: str, message: str, step: int) -> None:
        """Decide about a job that no runner has any more: it is complete, begun again, or given up."""
        if is_complete(self._settings.results / job.id):
            self._finish(job)
            return
        saved = saved_step(self._settings.state / job.id)
        fault = {"cause": cause, "message": message, "step": step, "saved": saved, "at": int(time.time())}
        alike = [one for one in (*job.faults, fault) if (one["cause"] == "restart") == (cause == "restart")]
        if cause == "restart":
            reason = reason_to_give_up_restarts(len(alike))
        else:
            reason = reason_to_give_up([one.get("saved", 0) for one in alike])
        if reason is None:
            if self._store.requeue(job, fault):
                if cause != "restart":  # when it died is not known
                    self._lost[job.id] = (time.monotonic(), cause)
                self._metrics.count("heterostep_recoveries", cause=cause)
                say("job requeued", logging.WARNING, job=job.id, cause=cause, reason=message, step=step)
        else:
            why = f"given up after {len(alike)} attempts ({reason}); the last time, {message}"
            self._lost.pop(job.id, None)
            if self._store.give_up(job, fault, {"code": "runner_lost", "message": why}):
                self._remove_state(job, "failed")
                say("job failed", logging.ERROR, job=job.id, cause=cause, reason=why, step=step)

    # One thread for everything else.

    def _watch(self) -> None:
        probed = cleaned = time.monotonic()
        while not self._stopping.is_set():
            try:
                self._cancel_wanted()
                now = time.monotonic()
                if now - probed > _PROBE_SECONDS:
                    probed = now
                    self._store.probe()
                    self._adopt()
                if now - cleaned > _CLEAN_UP_SECONDS:
                    cleaned = now
                    self._clean_up()
            except StoreUnavailable:  # the store has said why
                self._stopping.wait(_RETRY_SECONDS)
            except Exception as error:  # as in _drive
                self._tell_failure("watch failed", error)
                self._stopping.wait(_RETRY_SECONDS)
            self._pause(_WATCH_SECONDS)

    def _clean_up(self) -> None:
        unknown = clean_up(self._settings, self._store)
        if unknown and unknown != self._unknown:
            folders = sorted({str(path.parent) for path in unknown})
            names = [path.name for path in unknown[:5]]
            say("folders belong to no job and stay", logging.WARNING, count=len(unknown), folders=folders, first=names)
        self._unknown = unknown

    def _cancel_wanted(self) -> None:
        running = dict(self._running)
        if running:
            for id in self._store.cancelled(list(running)):
                running[id].cancel()

    def _adopt(self) -> None:
        """Take over the jobs of processes that have ended."""
        assert self._lease is not None
        for job in self._store.running():
            if (
                job.lease is not None
                and job.lease != self._lease.name
                and not is_held(self._settings.leases, job.lease)
            ):
                self._settle(job, "restart", "the service was restarted", job.step)
                self.wake()
