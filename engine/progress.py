"""What people see of a run: its stages, and how far it is."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Literal, TextIO

from .request import Decoding, Event, Started, StepDone

# Between two lines about steps where there is no terminal.
_LINE_SECONDS = 10.0
_MAX_COLUMNS = 100
_CLEAR_LINE = "\r\x1b[K"


class Progress:
    """Shows a run on stderr: a bar in a terminal or notebook, elsewhere plain lines that a log file can keep.

    It imports nothing heavy, so that it can say at once that PyTorch is being imported. What cannot be written, such as
    into a closed pipe, is left out; the run continues.

    Example:
        >>> with Progress() as progress:
        ...     progress.stage("loading model demo")
        ...     engine = Engine(config)
        ...     for event in progress.follow(engine.stream(request)):
        ...         ...
    """

    def __init__(
        self,
        shown: bool | None = None,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Decide where and how.

        Args:
            shown: whether anything is; None: if `stream` is a terminal, or this is a notebook.
            stream: stderr without it.
            clock: seconds from any start.
        """
        self._stream = _Unfailing(sys.stderr if stream is None else stream)
        self._clock = clock
        self._kind = _kind(self._stream, shown)
        self._bar: Any = None
        self._pending = False
        self._start = self._said = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def shown(self) -> bool:
        """Whether anything is."""
        return self._kind != "nothing"

    def stage(self, text: str) -> None:
        """Say what is being done now; in a terminal until the next stage."""
        self.close()
        if self._kind == "terminal":
            self._write(f"{text} ...")
            self._pending = True
        elif self._kind == "lines":
            self._write(f"{text} ...\n")

    def say(self, text: str) -> None:
        """Print a line to stdout that stays, if anything is shown."""
        if self._kind == "nothing":
            return
        self._clear()
        if self._bar is not None:
            self._bar.clear()
        print(text, flush=True)
        if self._bar is not None:
            self._bar.refresh()

    def tell(self, event: str, **fields: Any) -> None:
        """Tell a program of an event; people are told by `stage` and `say`."""

    def close(self) -> None:
        """Take away the bar, or the stage in a terminal."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._clear()

    def follow(self, events: Iterator[Event], label: str = "denoising") -> Iterator[Event]:
        """Show the events of `Engine.stream` as they pass.

        Args:
            events: given on unchanged.
            label: what the steps are called.
        """
        try:
            for event in events:
                self._show(event, label)
                yield event
        finally:
            self.close()

    def _show(self, event: Event, label: str) -> None:
        if self._kind == "nothing":
            return
        if isinstance(event, Started):
            self._begin(event.request.num_inference_steps, event.resumed_at or 0, label, event.eta_seconds)
        elif isinstance(event, StepDone):
            self._step(event, label)
        elif isinstance(event, Decoding):
            if self._bar is None:
                self.stage("decoding")
            else:
                self._bar.set_postfix_str("decoding")

    def _begin(self, num_steps: int, done: int, label: str, eta: float | None) -> None:
        self.close()  # of a run whose ranks were lost, and which begins again
        self._start = self._said = self._clock()
        if self._kind == "lines":
            if done < num_steps:
                about = "" if eta is None else f", about {_time(eta)}"
                self.stage(f"encoding the prompt, then {label} in {num_steps - done} steps{about}")
            return
        self._bar = _bar(self._stream, num_steps, done, label, notebook=self._kind == "notebook")
        then = f"step {done + 1}" if eta is None else f"about {_time(eta)}"
        self._bar.set_postfix_str(f"encoding, then {then}")

    def _step(self, event: StepDone, label: str) -> None:
        now = self._clock()
        if self._bar is not None:
            self._bar.set_postfix_str(f"active {event.share:4.0%}, {_time(event.eta_seconds)} left", refresh=False)
            self._bar.update()
        elif now - self._said >= _LINE_SECONDS:
            self._said = now
            self._write(
                f"{label}: step {event.step} of {event.num_steps}, {_time(now - self._start)} so far, "
                f"{_time(event.eta_seconds)} left\n"
            )

    def _clear(self) -> None:
        if self._pending:
            self._pending = False
            self._write(_CLEAR_LINE)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class JsonProgress(Progress):
    """Prints a run to stdout as JSON, one object on each line: ``event`` says what it is, the rest is of that event.

    ``stage`` and ``message`` have a ``text``; ``started``, ``step`` and ``decoding`` are the engine's events; ``done``
    has the files of a video, its seconds by stage and its share of dense work; ``error`` the exit code.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        """Begin; `stream` is stdout where it is left out."""
        super().__init__(False)
        self._lines = _Unfailing(sys.stdout if stream is None else stream)

    def stage(self, text: str) -> None:
        """See `Progress`."""
        self.tell("stage", text=text)

    def say(self, text: str) -> None:
        """See `Progress`."""
        self.tell("message", text=text)

    def tell(self, event: str, **fields: Any) -> None:
        """See `Progress`."""
        self._lines.write(json.dumps({"event": event, **fields}, ensure_ascii=False) + "\n")
        self._lines.flush()

    def _show(self, event: Event, label: str) -> None:
        from .request import Decoding, Started, StepDone

        if isinstance(event, Started):
            request = event.request
            self.tell(
                "started", label=label, prompt=request.prompt, seed=request.seed, steps=request.num_inference_steps,
                tokens=event.num_tokens, resumed_at=event.resumed_at, eta_seconds=event.eta_seconds,
            )  # fmt: skip
        elif isinstance(event, StepDone):
            self.tell(
                "step", step=event.step, steps=event.num_steps, sigma=event.sigma, active=event.active,
                tokens=event.total, seconds=event.seconds, eta_seconds=event.eta_seconds,
            )  # fmt: skip
        elif isinstance(event, Decoding):
            self.tell("decoding", seconds=event.seconds)


class _Unfailing:
    """A stream whose failures are ignored; tqdm would keep a lock after one, for which all other bars wait."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream  # None: a process without stderr
        self.encoding = getattr(stream, "encoding", None)

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: a closed file
            if self._stream is not None:
                self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            if self._stream is not None:
                self._stream.flush()

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return self._stream is not None and self._stream.isatty()
        return False

    def columns(self) -> int:
        """How wide a bar may be; some terminals say that they are 0 x 0."""
        columns = 0
        with contextlib.suppress(OSError, ValueError):
            columns = os.get_terminal_size(self._stream.fileno()).columns if self._stream is not None else 0
        return min(columns or 80, _MAX_COLUMNS)


def _kind(stream: _Unfailing, shown: bool | None) -> Literal["nothing", "terminal", "notebook", "lines"]:
    if shown is False:
        return "nothing"
    if stream.isatty():
        return "terminal"
    if _in_notebook():
        return "notebook"
    return "lines" if shown else "nothing"


def _in_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config


def _bar(stream: _Unfailing, num_steps: int, done: int, label: str, *, notebook: bool) -> Any:
    # Imported late, as is said above; `auto` draws with widgets where it can, and imports more.
    if notebook:
        from tqdm.auto import tqdm

        bar = "{bar}"
    else:
        from tqdm import tqdm

        bar = "{bar:24}"
    return tqdm(
        file=stream,
        total=num_steps,
        initial=done,
        desc=label,
        leave=notebook,
        ncols=None if notebook else stream.columns(),
        nrows=None if notebook else 24,  # of a terminal of 0 x 0 tqdm thinks that all its rows are taken
        bar_format="{desc:9} {percentage:3.0f}%|" + bar + "| {n_fmt}/{total_fmt} steps{postfix}",
    )


def _time(seconds: float) -> str:
    """Seconds, or hours, minutes and seconds."""
    return f"{seconds:.0f} s" if seconds < 100 else str(timedelta(seconds=round(seconds)))
