"""A runner that is a child process with an engine of its own: it may crash, freeze or be killed, and is replaced."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from typing import IO, Any

from ...engine.request import Decoding, ResolvedRequest, Started, StepDone
from ...errors import Cancelled, RequestError
from .events import Event, Made, RunnerLost, Stopped
from .logs import say
from .runner import Pauses, Task
from .settings import ServiceSettings

_MODULE = "heterostep.launch.service.worker"


class ProcessRunner:
    """Makes one video at a time in a child process (`worker.py`), and starts another child when it dies.

    Attributes:
        pid: of the child; None while there is none.
    """

    def __init__(self, settings: ServiceSettings, index: int = 0, frozen_after: float = 60.0) -> None:
        """Prepare; `tend` starts the child.

        Args:
            settings: model, device, and how to compute.
            index: number of this runner, which chooses its GPU.
            frozen_after: seconds of silence after which the child is taken for frozen, and killed.
        """
        self._options = {
            "engine": dataclasses.asdict(settings.engine),
            "checkpoint_every": settings.checkpoint_every,
            "index": index,
        }
        self._index, self._frozen_after = index, frozen_after
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self._ready = False
        self._trouble: str | None = None
        self._heard = self._begun = 0.0
        self._pauses = Pauses()
        self._task: str | None = None
        self._closed = self._hopeless = False

    @property
    def ready(self) -> bool:
        """Whether a task could run now."""
        process = self._process
        return self._ready and process is not None and process.poll() is None

    @property
    def trouble(self) -> str | None:
        """Why the last child could not be used."""
        return self._trouble

    @property
    def hopeless(self) -> bool:
        """Whether the engine refused its settings or its model."""
        return self._hopeless

    @property
    def pid(self) -> int | None:
        """The child's process id."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the child was last heard of."""
        return time.monotonic() - self._heard if self._heard else 0.0

    def tend(self) -> None:
        """Start the child if there is none, and see whether it lives."""
        if self._closed:
            return
        if self._process is None:
            if self._pauses.over:
                self._start()
            return
        try:
            while True:
                self._take(0.0)
        except queue.Empty:
            pass
        except RunnerLost as error:
            self._bury(str(error))

    def run(self, task: Task) -> Generator[Event]:
        """Make a video in the child; see `Runner.run`."""
        request = dataclasses.asdict(task.request) | {"image": str(task.image) if task.image is not None else None}
        fields = {"id": task.id, "request": request, "folder": str(task.folder), "state": str(task.state)}
        self._task, over = task.id, False
        try:
            self._send({"run": fields})
            while not over:
                try:
                    answer = self._take(1.0)
                except queue.Empty:
                    continue
                over = answer["event"] in ("made", "refused", "cancelled", "stopped")
                event = _event(answer)
                if event is not None:
                    yield event
        except RunnerLost as error:
            self._bury(str(error))
            over = True
            raise
        finally:
            self._task = None
            if not over:  # nobody listens any more, and the child must not go on
                self._bury("its task was abandoned")

    def cancel(self) -> None:
        """Let the running task end within one step."""
        self._ask("cancel")

    def stop(self) -> None:
        """Let the running task end within one step, to go on when the service starts again."""
        self._ask("stop")

    def close(self) -> None:
        """End the child."""
        self._closed = True
        process = self._process
        if process is not None:
            _end(process)

    def _ask(self, verb: str) -> None:
        task = self._task
        if task is not None:
            try:
                self._send({verb: task})
            except RunnerLost:
                say("runner gone before it could be asked", runner=self._index, verb=verb)

    def _start(self) -> None:
        self._answers = queue.SimpleQueue()
        process = subprocess.Popen(
            # -P: a file of the working directory must not stand in for a module.
            [sys.executable, "-P", "-m", _MODULE, json.dumps(self._options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # The same modules, also where they were found by other means than installation (a Ray working directory).
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            # Ctrl-C in a terminal goes to all processes of its group, but this one is ended in order.
            start_new_session=True,
        )
        self._process = process
        self._heard = self._begun = time.monotonic()
        listen = threading.Thread(target=_listen, args=(process.stdout, self._answers), daemon=True)
        errors = threading.Thread(target=_log_errors, args=(process.stderr, self._index), daemon=True)
        listen.start()
        errors.start()
        say("runner started", runner=self._index, pid=process.pid)

    def _send(self, command: dict[str, Any]) -> None:
        process = self._process
        if process is None or process.stdin is None:
            raise RunnerLost("died", "the process is gone")
        try:
            with self._sending:
                process.stdin.write(json.dumps(command).encode() + b"\n")
                process.stdin.flush()
        except OSError as error:
            raise RunnerLost("died", "the process is gone") from error

    def _take(self, timeout: float) -> dict[str, Any]:
        """Return the child's next answer.

        Raises:
            queue.Empty: there is none now.
            RunnerLost: and there never will be.
        """
        try:
            answer = self._answers.get(timeout=timeout) if timeout else self._answers.get_nowait()
        except queue.Empty:
            if self.heartbeat_age > self._frozen_after:
                raise RunnerLost("frozen", f"the process was silent for {self.heartbeat_age:.0f} s") from None
            raise
        self._heard = time.monotonic()
        if answer is None:
            assert self._process is not None
            raise RunnerLost("died", _how_it_ended(self._process))
        if answer["event"] == "ready":
            self._ready, self._trouble, self._hopeless = True, None, False
            self._pauses.succeeded()
            seconds = round(self._heard - self._begun, 3)
            say("runner ready", runner=self._index, seconds=seconds, device=answer["device"])
        elif answer["event"] == "unusable":
            self._trouble, self._hopeless = answer["message"], True
        elif answer["event"] == "failed":
            # Its memory or its device may be in any state: a new process is cheap beside a wrong video.
            raise RunnerLost("error", answer["message"])
        return answer

    def _bury(self, reason: str) -> None:
        """End what is left of the child; `tend` starts another, later if it failed before it was ready."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
        if not self._ready:
            self._pauses.failed()
            self._trouble = self._trouble or reason
        self._ready = False
        say("runner lost", logging.WARNING, runner=self._index, reason=self._trouble or reason)


def _listen(stream: IO[bytes], answers: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    """Put a child's answers into a queue, and None when it is gone."""
    for line in stream:
        try:
            answers.put(json.loads(line))
        except ValueError:  # half a line of a process that was killed while it wrote
            continue
    answers.put(None)


def _log_errors(stream: IO[bytes], index: int) -> None:
    for line in stream:
        text = line.decode("utf-8", "replace").rstrip()
        if text:
            say("runner said", runner=index, text=text[:2000])


def _event(answer: dict[str, Any]) -> Event | None:
    """The runner's event for a worker's answer; None for a mere sign of life."""
    kind = answer.pop("event")
    if kind == "started":
        return Started(**answer | {"request": ResolvedRequest(**answer["request"])})
    if kind == "step":
        preview = answer.pop("preview")
        return StepDone(**answer, preview=base64.b64decode(preview) if preview is not None else None)
    if kind == "decoding":
        return Decoding(**answer)
    if kind == "made":
        return Made(**answer)
    if kind == "refused":
        raise RequestError(answer["message"])
    if kind == "cancelled":
        raise Cancelled("cancelled")
    if kind == "stopped":
        raise Stopped("stopped")
    return None


def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(5.0)
    except subprocess.TimeoutExpired:
        return "the process closed its output"
    if code < 0:
        return f"the process was killed by {signal.Signals(-code).name}"
    return f"the process ended with code {code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Close a child's stdin, which it takes as the sign to go; kill it if it does not."""
    if process.stdin is not None:
        with contextlib.suppress(OSError):  # it is gone already
            process.stdin.close()
    try:
        process.wait(2.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
