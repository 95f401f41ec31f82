"""What a rank has to tell its driver, until the driver comes for it."""

from __future__ import annotations

import threading
import time

from .messages import Progress


class Outbox:
    """Messages of one piece of work; written by the thread that works, read by the threads of the heartbeat."""

    def __init__(self) -> None:
        """Begin empty."""
        self._changed = threading.Condition()
        self._work = ""
        self._messages: list[Progress] = []
        self._read = 0

    def begin(self, work: str) -> None:
        """Forget what was said of earlier work."""
        with self._changed:
            self._work, self._messages, self._read = work, [], 0
            self._changed.notify_all()

    def put(self, message: Progress) -> None:
        """Say something."""
        with self._changed:
            self._messages.append(message)
            self._changed.notify_all()

    def since(self, work: str, seen: int, seconds: float) -> list[Progress]:
        """What was said of `work` after the first `seen` messages; waits for more if there are none.

        Args:
            work: of another one nothing is said.
            seen: messages that the reader has; they are forgotten here.
            seconds: the longest wait.
        """
        deadline = time.monotonic() + seconds
        with self._changed:
            while not (work == self._work and self._read + len(self._messages) > seen):
                left = deadline - time.monotonic()
                if left <= 0:
                    return []
                self._changed.wait(left)
            del self._messages[: seen - self._read]
            self._read = seen
            return list(self._messages)
