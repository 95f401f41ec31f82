"""Worker processes on this machine: the driver's end of their pipes, and the loop that runs inside each.

`python -m heterostep.launch.workers.process ADDRESS` is a worker on the machine with this address: pickled messages
come on stdin and leave on stdout, a heartbeat among them. When stdin ends the driver is gone, and so is this process.
A Ray actor runs the same loop (`ray_cluster.py`).

A worker imports PyTorch at once, while the heartbeat goes on already: all ranks then do so at the same time.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, NoReturn

from ...errors import RankLost
from .messages import GroupConfig, Identity, Kill, Order, Progress, Report, StopRequest
from .watch import Worker

if TYPE_CHECKING:
    from .rank import Rank


_MODULE = "heterostep.launch.workers.process"
_LOOPBACK = "127.0.0.1"


class LocalWorker(Worker):
    """A child process.

    Attributes:
        process: the child.
    """

    def __init__(
        self,
        seat: int | None,
        environment: Mapping[str, str],
        address: str,
        arrived: threading.Condition,
        show: Callable[[str], None],
    ) -> None:
        """Start it.

        Args:
            seat: as in `Worker`.
            environment: further environment variables.
            address: of this machine, for the other ranks.
            arrived: notified when it has sent something.
            show: gets each line that it prints, in a thread of its own.
        """
        super().__init__(seat)
        self.process = process = subprocess.Popen(
            # -P: a file of the working directory must not stand in for a module.
            [sys.executable, "-P", "-m", _MODULE, address],
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
    """This machine, as the place of a group's workers.

    Attributes:
        arrived: notified when a process has sent something.
    """

    def __init__(
        self,
        index: int = 0,
        show: Callable[[int | None, str], None] | None = None,
        address: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start nothing yet.

        Args:
            index: number of the group among those of this process, which chooses its GPUs.
            show: gets the seat of a worker and each line that it prints; None prints them on stderr.
            address: of this machine, where it is one of several.
            environment: further environment variables of each process.
        """
        self._index, self._show = index, show if show is not None else _print
        self._address, self._environment = address, environment or {}
        self.arrived = threading.Condition()
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
        # Libraries and people look at these. On one machine seats are ranks, as every place can be filled.
        names = {} if seat is None else {"LOCAL_RANK": str(seat)}
        if seat is not None and self._address is None:
            names |= {"RANK": str(seat), "WORLD_SIZE": str(self._size)}
        names |= self._environment
        return LocalWorker(seat, names, self._address or _LOOPBACK, self.arrived, lambda line: self._show(seat, line))

    def wait(self, workers: Sequence[Any], seconds: float) -> None:
        """Return when one of some workers has sent something, or after some seconds."""
        with self.arrived:
            self.arrived.wait_for(lambda: any(getattr(worker, "waiting", True) for worker in workers), seconds)

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


BEAT_SECONDS = 0.5
"""A worker that has nothing to say says so after this time."""


class Outbox:
    """Messages that wait for the driver; written by the thread that works, read by the thread of the heartbeat."""

    def __init__(self) -> None:
        """Begin empty."""
        self._changed = threading.Condition()
        self._messages: list[Any] = []

    def put(self, message: Any) -> None:
        """Add a message."""
        with self._changed:
            self._messages.append(message)
            self._changed.notify_all()

    def take(self, seconds: float) -> list[Any]:
        """Remove and return all messages; if there are none, wait for one, at most so long."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while not self._messages and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            messages, self._messages = self._messages, []
            return messages


class WorkerLoop:
    """Carries out orders, one after the other.

    Attributes:
        outbox: what the driver is to hear.
    """

    def __init__(self, identity: Identity) -> None:
        """Introduce the process to the driver; nothing is loaded."""
        self.outbox = Outbox()
        self.outbox.put(identity)
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._stop_requests: dict[int, str] = {}
        self._rank: Rank | None = None
        self._order = 0

    def post(self, message: Order | StopRequest | Kill) -> None:
        """Take a message of the driver; never waits."""
        if isinstance(message, Order):
            self._orders.put(message)
        elif isinstance(message, Kill):
            with contextlib.suppress(ProcessLookupError):
                os.kill(message.pid, signal.SIGKILL)
        else:
            # Kept too: it may come before there is a run that could be told.
            self._stop_requests[message.order] = message.verb
            if self._rank is not None and message.order == self._order:
                self._rank.stop(message.verb)

    def run(self) -> NoReturn:
        """Work until the process ends; an unforeseen error ends it, since a heartbeat alone looks like work."""
        try:
            self._work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def _work(self) -> NoReturn:
        # Objects of libraries are never garbage: not to look for it among them takes a sixth off the start.
        gc.disable()
        from .rank import Rank

        gc.freeze()
        gc.enable()
        self._rank = rank = Rank(self._progress, lambda: self._stop_requests.get(self._order))
        while True:
            order = self._orders.get()
            self._order = order.number
            outcome = rank.do(order.what, *order.arguments)
            self._order = 0
            self._stop_requests.clear()
            self.outbox.put(Report(order.number, outcome))

    def _progress(self, progress: Progress) -> None:
        self.outbox.put(Report(self._order, progress))


def _listen(loop: WorkerLoop) -> None:
    with contextlib.suppress(EOFError, pickle.UnpicklingError):
        while True:
            loop.post(pickle.load(sys.stdin.buffer))
    # Not sys.exit: the driver is gone, so nothing must be finished, written or waited for.
    os._exit(0)


def _send(loop: WorkerLoop, answers: IO[bytes]) -> None:
    with contextlib.suppress(BrokenPipeError):
        while True:
            pickle.dump(loop.outbox.take(BEAT_SECONDS), answers)
            answers.flush()
    os._exit(0)


def main() -> None:
    """Run until the driver is gone."""
    # Whatever libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    loop = WorkerLoop(Identity(pid=os.getpid(), address=sys.argv[1]))
    threading.Thread(target=_listen, args=(loop,), name="listen", daemon=True).start()
    threading.Thread(target=_send, args=(loop, answers), name="send", daemon=True).start()
    loop.run()


if __name__ == "__main__":
    main()
