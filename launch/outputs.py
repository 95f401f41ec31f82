"""The files that `generate` writes: checked before the work, and never lost after it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.media.files import Placed, check_writable, place, write_json
from ..engine.request import ResolvedRequest, VideoOutput
from ..errors import ConfigError, OutputElsewhere

if TYPE_CHECKING:
    from .options import Outputs

_SUFFIXES = {"output": ".mp4", "heatmap": ".mp4", "latents": ".safetensors", "report": ".json"}
_OWN = "outputs.json"
"""In a job's folder: the files that it has written, with sizes and times, so that it may replace them."""


class OutputFiles:
    """Where the files of one video go.

    Attributes:
        paths: by the name of the flag; a path changes if its file had to be written elsewhere.
        existing: of these, the files that are there already, without those of this job.
    """

    def __init__(self, outputs: Outputs, job_folder: Path | None) -> None:
        """Check that all can be written.

        Args:
            outputs: what was asked for.
            job_folder: of the job, if it is one.

        Raises:
            ConfigError: a file cannot be written, two have one name, or one exists that is not to be replaced.
        """
        given = {name: getattr(outputs, name) for name in _SUFFIXES if getattr(outputs, name) is not None}
        self.paths = {name: check_writable(path, _SUFFIXES[name]) for name, path in given.items()}
        if len({path.resolve() for path in self.paths.values()}) < len(self.paths):
            raise ConfigError("two outputs have the same name; give each its own")
        self._outputs, self._folder = outputs, job_folder
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
        # Imported late, as in `write`: a bad flag should not wait for them.
        from ..engine.media.heatmap import heatmap_size
        from ..engine.media.video import check_mp4

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

    def write(self, output: VideoOutput, record: Mapping[str, Any]) -> list[str]:
        """Write all of them; what cannot be written where it was asked to be is written elsewhere.

        Returns:
            A sentence for each that lies elsewhere.

        Raises:
            OSError: a file could be written nowhere; the others are written.
        """
        writers = _writers(output, record, self._outputs.scale)
        wanted, replaced = self.paths, not self._outputs.no_clobber
        with ThreadPoolExecutor() as pool:  # all at once: drawing and encoding leave the interpreter to each other
            placed = {
                name: pool.submit(place, path, writers[name], overwrite=replaced or name in self._own)
                for name, path in wanted.items()
            }
        self.paths = wanted | {name: done.result().path for name, done in placed.items() if done.exception() is None}
        self._remember()
        for done in placed.values():
            done.result()  # raises, now that the others are written
        return [_elsewhere(wanted[name], done.result()) for name, done in placed.items() if done.result().reason]

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


def _writers(output: VideoOutput, record: Mapping[str, Any], scale: int) -> dict[str, Callable[[Path], object]]:
    """What writes each file, by the name of its flag."""
    from safetensors.torch import save

    from ..engine.media.heatmap import heatmap_frames
    from ..engine.media.video import write_mp4

    frames, fps, report = output.frames, output.fps, output.report

    def heatmap(path: Path) -> None:
        assert report.evaluations is not None, "a finished run has evaluations"
        shares = [step.active / step.total for step in report.steps]
        write_mp4(path, heatmap_frames(frames, report.evaluations.cpu().numpy(), shares), fps)

    def latents(path: Path) -> None:
        # Not save_file: that makes a file for its owner alone, and hides a full disk in an error of its own.
        tensors = {"latents": output.latents, "audio_latents": output.audio_latents}
        path.write_bytes(save({name: t.contiguous() for name, t in tensors.items() if t is not None}))

    return {
        "output": lambda path: write_mp4(path, frames, fps, scale=scale, audio=output.audio),
        "heatmap": heatmap,
        "latents": latents,
        "report": lambda path: write_json(path, record),
    }


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
