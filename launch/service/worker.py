"""The child process of `ProcessRunner`: takes tasks as lines of JSON on stdin and answers on stdout.

Commands: {"run": {...}}, {"cancel": id}, {"stop": id}. Answers: `ready`, `beat`, `started`, `step`, `decoding`,
`made`, `refused`, `cancelled`, `stopped`, `failed`, `unusable`. When stdin ends the service is gone, and so is this
process.

Nothing heavy is imported before the first beat: loading PyTorch may take longer than a frozen process is waited for.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import IO, Any

from ...errors import HeterostepError

BEAT_SECONDS = 0.5


class Line:
    """The worker's end of the connection to the service.

    Attributes:
        tasks: what is to be made.
        wanted: what became of a task's wish to end: `cancel` or `stop`, by its id.
        on_wish: called with such a wish, from the thread that listens.
    """

    def __init__(self, answers: IO[str]) -> None:
        """Answer on `answers`."""
        self._answers, self._lock = answers, threading.Lock()
        self.tasks: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.wanted: dict[str, str] = {}
        self.on_wish: Callable[[str], None] = lambda verb: None

    def answer(self, event: str, **fields: Any) -> None:
        """Send one answer; callable from any thread."""
        with self._lock:
            self._answers.write(json.dumps({"event": event, **fields}) + "\n")
            self._answers.flush()

    def beat(self) -> None:
        """Say every half second that the process lives: a frozen one is silent."""
        while True:
            self.answer("beat")
            time.sleep(BEAT_SECONDS)

    def listen(self) -> None:
        """Take commands until the service is gone."""
        for line in sys.stdin.buffer:
            command = json.loads(line)
            if "run" in command:
                self.tasks.put(command["run"])
                continue
            verb, id = next(iter(command.items()))
            self.wanted[id] = verb
            self.on_wish(verb)
        # Not sys.exit: nothing must be finished, written or waited for on behalf of nobody.
        os._exit(0)


def main() -> None:
    """Run until the service is gone."""
    # Whatever libraries print must not get between the answers.
    line = Line(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
    threading.Thread(target=line.listen, name="listen", daemon=True).start()
    threading.Thread(target=line.beat, name="beat", daemon=True).start()
    from .making import make_videos

    try:
        make_videos(line, json.loads(sys.argv[1]))
    except HeterostepError as error:
        line.answer("unusable", message=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
