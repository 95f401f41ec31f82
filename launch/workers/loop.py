"""The loop inside a worker process: orders come in, reports go out, and a heartbeat tells that the process lives.

`python -m heterostep.launch.workers.loop` is a worker on the machine of its driver: pickled messages come on stdin and
leave on stdout. When stdin ends the driver is gone, and so is this process. A Ray actor runs the same loop
(`ray_cluster.py`).

PyTorch is imported at once, while the heartbeat goes on already: all ranks then do so at the same time.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
from typing import IO, TYPE_CHECKING, Any, NoReturn

from .messages import Identity, Kill, Order, Progress, Report, StopRequest

if TYPE_CHECKING:
    from .rank import Rank

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
        """Work for as long as the process lives; end it if that cannot be, for a heartbeat alone looks like work."""
        try:
            self._work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def _work(self) -> NoReturn:
        from .rank import Rank

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
    # Not sys.exit: nothing must be finished, written or waited for on behalf of nobody.
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
    loop = WorkerLoop(Identity(pid=os.getpid()))
    threading.Thread(target=_listen, args=(loop,), name="listen", daemon=True).start()
    threading.Thread(target=_send, args=(loop, answers), name="send", daemon=True).start()
    loop.run()


if __name__ == "__main__":
    main()
