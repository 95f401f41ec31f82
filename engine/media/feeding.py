"""Frames go to several readers while they are made; none of them is kept longer than the slowest reader needs it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Frames = Iterable[NDArray[np.uint8]]
"""Frames uint8 [H, W, 3], one after the other."""
Reader = Callable[[Frames], object]
"""Takes all frames of a video, such as a function that writes a file."""

# Runs of frames that may wait for a reader.
_WAITING = 1


class SourceFailed(BaseException):
    """Inside a reader: no further frames will come. No Exception, so that none takes it for a failure of its own."""


def feed(runs: Iterable[NDArray[np.uint8]], readers: Sequence[Reader]) -> None:
    """Give every reader all frames, each in a thread of its own.

    A reader that fails, or has seen enough, does not keep the others from theirs.

    Args:
        runs: consecutive frames [f, H, W, 3].
        readers: what takes them.

    Raises:
        Exception: whatever `runs` raises; else what the first of the readers raised that failed.
    """
    lanes = [_Lane(reader) for reader in readers]
    try:
        for run in runs:
            for lane in lanes:
                lane.put(run)
    except BaseException:
        for lane in lanes:
            lane.end(_FAILED)
        raise
    for lane in lanes:
        lane.end(_DONE)
    for lane in lanes:
        if lane.error is not None:
            raise lane.error


_DONE, _FAILED = object(), object()


class _Lane:
    """A reader in its thread."""

    def __init__(self, reader: Reader) -> None:
        self.error: BaseException | None = None
        self._runs: queue.Queue[Any] = queue.Queue(_WAITING)
        self._ended = False
        # A daemon, so that a second Ctrl-C ends the process.
        self._thread = threading.Thread(target=self._work, args=(reader,), name="heterostep-frames", daemon=True)
        self._thread.start()

    def put(self, run: NDArray[np.uint8]) -> None:
        self._runs.put(run)

    def end(self, how: object) -> None:
        """Say that no run follows, and wait for the reader."""
        self._runs.put(how)
        self._thread.join()

    def _work(self, reader: Reader) -> None:
        try:
            reader(self._frames())
        except SourceFailed:
            pass
        except BaseException as error:  # it is raised in the thread that feeds
            self.error = error
        while not self._ended:  # what it did not want; otherwise the others would wait
            self._take()

    def _take(self) -> Any:
        run = self._runs.get()
        self._ended = run is _DONE or run is _FAILED
        return run

    def _frames(self) -> Iterator[NDArray[np.uint8]]:
        while not self._ended:
            run = self._take()
            if run is _FAILED:
                raise SourceFailed
            if run is not _DONE:
                yield from run
            del run
