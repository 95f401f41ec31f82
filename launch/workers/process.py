"""Worker processes on this machine: children of the driver, which talk to it through pipes."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import IO, Any

from ...errors import RankLost
from .messages import GroupConfig, Identity, Kill, Order, StopRequest
from .watch import Worker

_MODULE = "heterostep.launch.workers.loop"


class LocalWorker(Worker):
    """A child process.

    Attributes:
        process: the child.
    """

    def __init__(
        self, seat: int | None, environment: dict[str, str], arrived: threading.Condition, show: Callable[[str], None]
    ) -> None:
        """Start it.

        Args:
            seat: as in `Worker`.
            environment: further environment variables.
            arrived: notified when it has sent something.
            show: gets each line that it prints, in a thread of its own.
        """
        super().__init__(seat)
        self.process = process = subprocess.Popen(
            # -P: a file of the working directory must not stand in for a module.
            [sys.executable, "-P", "-m", _MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # The same modules, also where they were found by other means than installation (a Ray working directory).
            env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            # Ctrl-C in a terminal goes to all processes of its group, but this one is ended in order.
            start_new_session=True,
        )
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        self._arrived = arrived
        self._received: list[Any] = []
        self._sent: queue.SimpleQueue[Order | StopRequest | Kill | None] = queue.SimpleQueue()
        self._ended = False
        # Threads, as a process that is frozen neither reads nor writes; they end with the pipes.
        threading.Thread(target=self._read_stdout, args=(process.stdout,), daemon=True).start()
        threading.Thread(target=self._write_stdin, args=(process.stdin,), daemon=True).start()
        threading.Thread(target=_read_stderr, args=(process.stderr, show), daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether it lives."""
        return self.process.poll() is None

    @property
    def waiting(self) -> bool:
        """Whether `receive` has something to return or to raise."""
        return bool(self._received) or self._ended

    def post(self, message: Order | StopRequest | Kill) -> None:
        """Send it a message."""
        self._sent.put(message)

    def receive(self) -> list[Any]:
        """What it sent since the last call."""
        with self._arrived:
            received, self._received = self._received, []
        if self._ended and not received:
            raise RankLost("died", self._how_it_ended())
        return received

    def kill(self, others: Sequence[Worker] = ()) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        self._sent.put(None)

    def _read_stdout(self, stream: IO[bytes]) -> None:
        with contextlib.suppress(EOFError, pickle.UnpicklingError):  # half a message of a process that was killed
            while True:
                messages = pickle.load(stream) or [None]
                with self._arrived:
                    self._received += messages
                    self._arrived.notify_all()
        with self._arrived:
            self._ended = True
            self._arrived.notify_all()

    def _write_stdin(self, stream: IO[bytes]) -> None:
        with contextlib.suppress(OSError):  # it is gone, which `receive` says
            while (message := self._sent.get()) is not None:
                pickle.dump(message, stream)
                stream.flush()

    def _how_it_ended(self) -> str:
        try:
            code = self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            return "closed its output"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


class ThisMachine:
    """This machine, as the place of a group's workers."""

    def __init__(self, index: int = 0, show: Callable[[int | None, str], None] | None = None) -> None:
        """Start nothing yet.

        Args:
            index: number of the group among those of this process, which chooses its GPUs.
            show: gets the seat of a worker and each line that it prints; None prints them on stderr.
        """
        self._index, self._show = index, show if show is not None else _print
        self._arrived = threading.Condition()
        self._size = 1

    @property
    def complete(self) -> bool:
        """There always is a place."""
        return True

    def reserve(self, config: GroupConfig, attend: Callable[[], None]) -> None:
        """Take note of the number of ranks."""
        self._size = config.size

    def start(self, seat: int | None) -> LocalWorker:
        """Start a process."""
        # Seats are ranks here, where every place can be filled; libraries and people look at these.
        names = {} if seat is None else {"RANK": str(seat), "LOCAL_RANK": str(seat), "WORLD_SIZE": str(self._size)}
        return LocalWorker(seat, names, self._arrived, lambda line: self._show(seat, line))

    def wait(self, workers: Sequence[Worker], seconds: float) -> None:
        """Return when one of some workers has sent something, or after some seconds."""
        with self._arrived:
            self._arrived.wait_for(lambda: any(getattr(worker, "waiting", True) for worker in workers), seconds)

    def near(self, identity: Identity) -> bool:
        """Every process is."""
        return True

    def rank_key(self, worker: Worker) -> int:
        """Seats are ranks."""
        assert worker.seat is not None
        return worker.seat

    def gpu(self, seat: int) -> int | None:
        """Groups beside each other take one GPU after the other."""
        return self._index * self._size + seat

    def release(self) -> None:
        """There is nothing to give back."""


def _read_stderr(stream: IO[bytes], show: Callable[[str], None]) -> None:
    for line in stream:
        text = line.decode("utf-8", "replace").rstrip()
        if text:
            # A full disk or a closed terminal must not end this thread: a process that nobody reads stands still.
            with contextlib.suppress(OSError, ValueError):
                show(text)


def _print(seat: int | None, line: str) -> None:
    print(line, file=sys.stderr, flush=True)
