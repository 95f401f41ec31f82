"""What `generate` must not lose: its files, checked before the work, and its job, saved on a signal."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ..engine.media.feeding import Frames, Reader
from ..engine.media.files import Placed, Placing, check_writable, write_json
from ..engine.media.video import check_mp4, heatmap_size
from ..engine.request import FrameSink, ResolvedRequest, VideoResult
from ..engine.stored import latents_file
from ..errors import TOO_LARGE, ConfigError, OutputElsewhere, RequestError, Undecoded, is_out_of_memory
from .workers.render import frame_writers

if TYPE_CHECKING:
    from .options import Outputs

_SUFFIXES = {"output": ".mp4", "heatmap": ".mp4", "latents": ".safetensors", "report": ".json"}
_OWN = "outputs.json"
"""In a job's folder: the files that it has written, with sizes and times, so that it may replace them."""


class OutputFiles(FrameSink):
    """Where the files of one video go.

    Attributes:
        paths: by the name of the flag; a path changes if its file had to be written elsewhere.
        existing: of these, the files that are there already, without those of this job.
        video: whose files these are, as soon as it is denoised.
    """

    def __init__(self, outputs: Outputs, job_folder: Path | None, model: str = "", dtype: str = "") -> None:
        """Check that all can be written.

        Args:
            outputs: what was asked for.
            job_folder: of the job, if it is one.
            model: that makes the video, as `latents.source_of` says it.
            dtype: of its transformer.

        Raises:
            ConfigError: a file cannot be written, or one exists that is not to be replaced.
        """
        given = {name: getattr(outputs, name) for name in _SUFFIXES if getattr(outputs, name) is not None}
        self.paths = {name: check_writable(path, _SUFFIXES[name]) for name, path in given.items()}
        self._outputs, self._folder, self._made_by = outputs, job_folder, (model, dtype)
        self.video: VideoResult | None = None
        self._placings: dict[str, Placing] = {}
        own = _own_files(job_folder)
        present = {name: path for name, path in self.paths.items() if path.exists()}
        self._own = {name for name, path in present.items() if own.get(_key(path)) == _stamp(path)}
        self.existing = [path for name, path in present.items() if name not in self._own]
        if outputs.no_clobber and self.existing:
            raise ConfigError(
                f"{_listed(self.existing)} already exist{'s' * (len(self.existing) == 1)}, and --no-clobber "
                "forbids replacing files; choose another name, or leave out --no-clobber"
            )

    def check(self, request: ResolvedRequest) -> None:
        """Check that the videos can be written in their size, by opening them as `write` does.

        Raises:
            ConfigError: they cannot.
        """
        scale = self._outputs.scale
        check_mp4(self.paths["output"], request.height * scale, request.width * scale, request.fps)
        if "heatmap" in self.paths:
            check_mp4(self.paths["heatmap"], *heatmap_size(request.height, request.width), request.fps)

    def announce(self, say: Callable[[str], None]) -> None:
        """Say which files will be replaced."""
        if self.existing and not self._outputs.overwrite:
            say(
                f"{_listed(self.existing)} will be replaced (--no-clobber refuses this, --overwrite hides this message)"
            )

    def pending(self, video: VideoResult) -> Sequence[Reader]:
        """The writers of files that show the frames; what was denoised is written before them, so that it is safe."""
        self._denoised(video)
        waiting = [name for name in self._writers(video) if name in self.paths and self._placing(name).open]
        return [functools.partial(self._write_frames, name, video) for name in waiting]

    def take(self, video: VideoResult, files: Mapping[str, bytes]) -> None:
        """Write files that show the frames, and were made elsewhere, by the names of their flags."""
        self._denoised(video)
        for name, content in files.items():
            self._place(name, lambda path, content=content: path.write_bytes(content))  # type: ignore[misc]

    def write(self, record: Mapping[str, Any]) -> list[str]:
        """Write what does not show the frames; what cannot be written where it was asked to be is written elsewhere.

        Returns:
            A sentence for each file that lies elsewhere.

        Raises:
            OSError: a file could be written nowhere; the others are written.
        """
        if "report" in self.paths:
            self._place("report", lambda path: write_json(path, record))
        wanted = self.paths
        placed = {name: placing.placed for name, placing in self._placings.items()}
        self.paths = wanted | {name: there.path for name, there in placed.items() if there is not None}
        self._remember()
        outcomes = {name: self._placings[name].outcome() for name in wanted}  # raises, now that the others are written
        return [_elsewhere(wanted[name], outcome) for name, outcome in outcomes.items() if outcome.reason]

    @contextlib.contextmanager
    def rescuing(self) -> Iterator[None]:
        """Keep what was denoised, if it cannot be decoded; a job keeps it anyway.

        Raises:
            Undecoded: with what went wrong, and where the latents are; RequestError if the VAE's values were wrong.
        """
        try:
            yield
        except Exception as error:
            kept = None if self._folder is not None else self._rescue()
            if kept is None:
                raise
            said = TOO_LARGE if is_out_of_memory(error) else str(error) or type(error).__name__
            kind = RequestError if isinstance(error, RequestError) else Undecoded
            raise kind(
                f"{said}; what was denoised is kept in {kept}: `heterostep decode {kept} --output FILE` decodes it"
            ) from error

    def _rescue(self) -> Path | None:
        """Where the latents of a video are that could not be decoded; None if there are none, or no place for them."""
        if self.video is None:
            return None
        if "latents" not in self._placings:
            target = self.paths["output"].with_suffix(".safetensors")
            self._placings["latents"] = Placing(target, overwrite=False)
            self._place("latents", lambda path: path.write_bytes(self._latents(self.video)))
        placed = self._placings["latents"].placed
        return None if placed is None else placed.path

    def _denoised(self, video: VideoResult) -> None:
        """Take note of a video, and write its latents, once."""
        if self.video is None:
            self.video = video
            if "latents" in self.paths:
                self._place("latents", lambda path: path.write_bytes(self._latents(video)))

    def _latents(self, video: VideoResult | None) -> bytes:
        assert video is not None
        return latents_file(video, *self._made_by)

    def _placing(self, name: str) -> Placing:
        overwrite = not self._outputs.no_clobber or name in self._own
        return self._placings.setdefault(name, Placing(self.paths.get(name, ""), overwrite=overwrite))

    def _place(self, name: str, write: Callable[[Path], object]) -> None:
        placing = self._placing(name)
        while placing.open:
            placing.attempt(write)

    def _write_frames(self, name: str, video: VideoResult, frames: Frames) -> None:
        self._placing(name).attempt(lambda path: self._writers(video)[name](path, frames))

    def _writers(self, video: VideoResult) -> Mapping[str, Callable[[Path, Frames], object]]:
        """What writes each file that shows the frames, by the name of its flag."""
        return frame_writers(video, self._outputs.scale)

    def _remember(self) -> None:
        """Note in the job's folder what it has written."""
        if self._folder is None or not self._folder.is_dir():
            return
        stamps = {_key(path): _stamp(path) for path in self.paths.values() if path.exists()}
        try:
            write_json(self._folder / _OWN, {**_own_files(self._folder), **stamps})
        except OSError as error:  # the files themselves are there
            logging.getLogger("heterostep").warning(
                "heterostep: the job folder could not note which files are its own (%s)", error.strerror
            )


def elsewhere(sentences: list[str], job_folder: Path | None) -> OutputElsewhere:
    """The error that says where files lie, and what to do about it."""
    again = "" if job_folder is None else f"; the same command with another --output writes it again from {job_folder}"
    return OutputElsewhere("; ".join(sentences) + again)


def _elsewhere(wanted: Path, placed: Placed) -> str:
    return f"{wanted} could not be written ({placed.reason}); the finished file is {placed.path}"


def _own_files(folder: Path | None) -> dict[str, Any]:
    """What a job has written; nothing where that is not known."""
    try:
        found = json.loads((folder / _OWN).read_text(encoding="utf-8")) if folder is not None else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _key(path: Path) -> str:
    return str(path.absolute())


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _listed(paths: list[Path]) -> str:
    return ", ".join(str(path) for path in paths)


@contextlib.contextmanager
def saving_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` on SIGTERM and SIGUSR1 while the context lasts; in the main thread, between two of its instructions.

    What was done on these signals before is done again afterwards. Elsewhere than in the main thread, where Python
    takes no signals, nothing changes.
    """
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        stop()

    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
