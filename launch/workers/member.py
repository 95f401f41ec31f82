"""What a machine does that is not the main one: it starts ranks when it is told to, and passes messages on."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable

from ...errors import ConfigError, JobStopped, RankFailure, RankLost
from ...version import __version__
from .network import (
    REACH_SECONDS,
    WAIT_SECONDS,
    End,
    Ended,
    Farewell,
    Hello,
    Line,
    Meeting,
    Post,
    Said,
    Start,
    environment_at,
    prove,
)
from .process import LocalWorker, ThisMachine
from .watch import LOOK_SECONDS

_PAUSE_SECONDS = 0.5
_SAVE_SECONDS = 20.0


class MemberMachine:
    """This machine, at the service of the main one."""

    def __init__(self, meeting: Meeting, nproc: int, key: bytes, say: Callable[[str], None]) -> None:
        """Be ready to connect.

        Args:
            meeting: where the main machine is.
            nproc: how many ranks this machine takes.
            key: see `network.prove`.
            say: tells people what happens.
        """
        self._meeting, self._nproc, self._key, self._say = meeting, nproc, key, say
        self._workers: dict[int, LocalWorker] = {}
        self._leave_at: float | None = None

    def stop(self) -> None:
        """A signal told this machine to go: the main one has probably got it too, and is given the time to save."""
        self._leave_at = time.monotonic() + _SAVE_SECONDS

    def serve(self) -> None:
        """Work until the main machine needs this one no more; whenever it is lost, wait for it to come back.

        Raises:
            ConfigError: the main machine refuses this one.
            RankFailure: it did not answer for `WAIT_SECONDS`, or failed.
            JobStopped: a signal stopped the job.
        """
        while True:
            line = self._connect()
            try:
                farewell = self._work(line)
            finally:
                for worker in self._workers.values():
                    worker.kill()
                self._workers.clear()
                line.close()
            if farewell is None:
                self._say("the main machine was lost; waiting for it")
                time.sleep(_PAUSE_SECONDS)  # it may close every connection, as one of another version would
            elif farewell.how == "done":
                return
            else:
                kinds = {"stopped": JobStopped, "refused": ConfigError}
                raise kinds.get(farewell.how, RankFailure)(farewell.text)

    def _connect(self) -> Line:
        """Reach the main machine, which may start later or be on its way back."""
        where = f"{self._meeting.address}:{self._meeting.port}"
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            self._check_leave()
            try:
                stream = socket.create_connection((self._meeting.address, self._meeting.port), REACH_SECONDS)
                if not prove(stream, self._key, b"other", b"main"):
                    raise ConfigError(
                        f"the main machine at {where} has another key; give all machines the same --cluster-key-file"
                    )
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise RankFailure(
                        f"no main machine answers at {where} for {WAIT_SECONDS:.0f} s ({error}); the machine with that "
                        "address must run the same command"
                    ) from error
                time.sleep(_PAUSE_SECONDS)
        self._here = ThisMachine(
            show=lambda _, text: print(text, file=sys.stderr, flush=True),
            address=stream.getsockname()[0],
            environment=environment_at(stream.getsockname()[0]),
        )
        line = Line(stream, self._here.arrived)
        line.send(Hello(__version__, socket.gethostname(), self._nproc))
        self._say(f"connected to the main machine at {where}")
        return line

    def _work(self, line: Line) -> Farewell | None:
        """Do what the main machine says; its farewell, or None when it was lost."""
        while not line.lost:
            self._check_leave()
            self._here.wait([line, *self._workers.values()], LOOK_SECONDS)
            for message in line.receive():
                if isinstance(message, Farewell):
                    return message
                self._obey(message)
            for number, worker in list(self._workers.items()):
                try:
                    messages = worker.receive()
                except RankLost as lost:
                    line.send(Ended(number, lost.cause, str(lost)))
                    self._workers.pop(number).kill()
                    continue
                if messages:
                    line.send(Said(number, messages))
        return None

    def _obey(self, message: Start | Post | End) -> None:
        worker = self._workers.get(message.number)
        if isinstance(message, Start):
            self._workers[message.number] = self._here.start(message.slot)
        elif worker is not None and isinstance(message, Post):
            worker.post(message.message)
        elif worker is not None:
            self._workers.pop(message.number).kill()

    def _check_leave(self) -> None:
        if self._leave_at is not None and time.monotonic() > self._leave_at:
            raise JobStopped(f"process {os.getpid()} was told to go; the job goes on without this machine")
