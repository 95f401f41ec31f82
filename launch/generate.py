"""`heterostep generate`: checks, the run with its progress bar, and the files, which are never lost."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save

from ..engine.denoise.checks import rehearse
from ..engine.engine import Engine, find_finished
from ..engine.facts import read_facts
from ..engine.loading import pick_device
from ..engine.media.files import Placed, check_writable, place, write_json
from ..engine.media.video import check_mp4, heatmap_frames, heatmap_size, write_mp4
from ..engine.progress import Progress
from ..engine.record import run_record
from ..engine.request import (
    EngineConfig,
    Event,
    GenerateRequest,
    JobConfig,
    ResolvedRequest,
    Started,
    VideoOutput,
    allocation,
    resolve,
)
from ..errors import ConfigError, Interrupted, JobStopped, OutputElsewhere
from .logs import silence_libraries
from .ranks import degrees_for, generate_on_ranks, help_elsewhere, saving_signals

if TYPE_CHECKING:
    from ..engine.job import Finished
    from .options import Command, Outputs
    from .workers.rendezvous import TorchrunRank


def generate(command: Command, progress: Progress, rank: TorchrunRank | None = None) -> int:
    """Run the command; returns the exit code.

    Args:
        command: what was asked for.
        progress: shows how far it is, if anything is shown; on rank 0 alone.
        rank: this process's place among others that run the same command; None: it starts them, if there shall be any.

    Raises:
        HeterostepError: a setting, the model or the request is wrong, or the work failed.
    """
    silence_libraries(downloads=progress.shown)
    if rank is not None and command.ranks.machines > 1:
        raise ConfigError("--nnodes of heterostep works only with `heterostep generate`; torchrun has its own")
    if help_elsewhere(command.ranks, progress):
        return 0
    # Everything that can be wrong is checked before a model is loaded, which may take minutes.
    outputs, config, request, job = command.outputs, command.engine, command.request, command.job
    files = OutputFiles(outputs, None if job is None else Path(job.folder))
    facts = read_facts(config.model)
    resolved = resolve(request, facts)
    files.check(resolved)
    rehearse(facts, allocation(config, resolved), resolved, None if job is None else job.checkpoint_every)
    on_ray = command.ranks.ray or command.ranks.ray_address is not None
    if on_ray and rank is not None:
        raise ConfigError("--ray works only with `heterostep generate`: torchrun has already started the ranks")
    if on_ray or command.ranks.size > 1:
        files.announce(progress.say)
        output, record = generate_on_ranks(command, lambda events, label: shown(events, label, progress), progress)
        return _done(output, record, files, job, progress)
    size, decide = (1, None) if rank is None else (rank.world_size, rank.decide)
    parallel, _ = degrees_for(command, size, pick_device(config.device), decide)
    files.announce(progress.say)
    config = dataclasses.replace(config, parallel=parallel, shard_weights=command.shard_weights)
    if job is not None:
        found = _finished(config, request, job, rank)
        if found is not None:
            progress.say(f"the job in {job.folder} is finished; nothing was computed")
            return _done(found.output, found.record, files, job, progress)
    if job is None:
        output, record = _compute(config, request, outputs.compare_dense, progress)
    else:
        output, record = _work(config, request, job, progress)
    return _done(output, record, files, job, progress) if rank is None or rank.leads else 0


def _finished(
    config: EngineConfig, request: GenerateRequest, job: JobConfig, rank: TorchrunRank | None
) -> Finished | None:
    """The result of a job that is done; on many ranks each gets it."""
    if rank is None or rank.leads:
        found = find_finished(config, request, job)
    if rank is None:
        return found
    # Only one process may look into the folder; a finished job needs the others no more.
    if rank.decide("finished", lambda: found is not None):
        if rank.leads:
            return found
        raise SystemExit(0)
    return None


def _done(
    output: VideoOutput, record: dict[str, Any], files: OutputFiles, job: JobConfig | None, progress: Progress
) -> int:
    """Write the files and say what they are.

    Raises:
        OutputElsewhere: one of them could not be written where it was asked to be.
    """
    progress.stage(f"writing {', '.join(map(str, files.paths.values()))}")
    moved = files.write(output, record)
    for line in _summary(output, record, files.paths):
        progress.say(line)
    if moved:
        raise elsewhere(moved, None if job is None else Path(job.folder))
    return 0


def _compute(
    config: EngineConfig, request: GenerateRequest, compare_dense: bool, progress: Progress
) -> tuple[VideoOutput, dict[str, Any]]:
    """Load the model and make the video, and a dense one after it where that is asked for."""
    progress.stage(f"loading model {config.model}")
    engine = Engine(config)
    if compare_dense:
        progress.stage("warming up")
        # The first steps of a process pay for allocations and kernel choices; neither side should.
        engine.generate(dataclasses.replace(request, compute=1.0, num_inference_steps=2), progress=False)
    # Before the dense run, which can take an hour: the plan may be one that cannot be met.
    output = shown(engine.stream(request), "denoising", progress)
    dense = None
    if compare_dense:
        dense = shown(engine.stream(dataclasses.replace(request, compute=1.0)), "dense", progress)
    return output, run_record(engine, output, dense)


def _work(
    config: EngineConfig, request: GenerateRequest, job: JobConfig, progress: Progress
) -> tuple[VideoOutput, dict[str, Any]]:
    """Load the model and resume a job.

    Raises:
        JobStopped: a signal stopped the command; the steps that are done are saved.
        KeyboardInterrupt: Ctrl-C stopped it; the message says that the same command resumes.
    """
    engines: list[Engine] = []
    asked = False

    def stop() -> None:
        nonlocal asked
        asked = True
        if not engines:
            raise JobStopped(f"stopped before the first step; the same command starts the job in {job.folder}")
        engines[0].save_and_stop()

    try:
        with saving_signals(stop):
            progress.stage(f"loading model {config.model}")
            engines.append(Engine(config))

            def events() -> Iterator[Event]:
                for event in engines[0].stream(request, job):
                    if asked:  # perhaps before there was a run that could be told
                        engines[0].save_and_stop()
                    yield event

            output = shown(events(), "denoising", progress)
    except Interrupted as interrupted:
        raise JobStopped(str(interrupted)) from interrupted
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"; the same command resumes the job in {job.folder}") from interrupt
    return output, run_record(engines[0], output)


def shown(events: Iterator[Event], label: str, progress: Progress) -> VideoOutput:
    """Show the events of a run; its video."""
    output = None
    for event in progress.follow(events, label):
        if isinstance(event, Started) and event.resumed_at is not None:
            progress.say(f"resuming after step {event.resumed_at} of {event.request.num_inference_steps}")
        elif isinstance(event, VideoOutput):
            output = event
    assert output is not None
    return output


def _summary(output: VideoOutput, record: dict[str, object], paths: dict[str, Path]) -> list[str]:
    frames, height, width = output.frames.shape[:3]
    seconds = output.seconds
    lines = [
        f"{paths['output']}: {frames} frames of {width}x{height}, {output.fps} per second"
        + ("" if output.audio is None else f", with {output.audio.seconds:.1f} s of sound"),
        f"compute {record['compute']:.3f} of dense; seconds: text {seconds['encode_text']:.1f}, "
        f"denoising {seconds['denoise']:.1f}, decoding {seconds['decode']:.1f}",
    ]
    against = record.get("against_dense")
    if isinstance(against, dict):
        quality = "equal to the dense video" if against["psnr"] is None else f"PSNR {against['psnr']:.1f} dB"
        quality += "" if against["ssim"] is None else f", SSIM {against['ssim']:.3f}"
        lines.append(
            f"denoising: dense {against['seconds_denoise_dense']:.2f} s, this run "
            f"{against['seconds_denoise']:.2f} s, {against['speedup']:.2f} times as fast"
        )
        lines.append(f"against the dense video of the same seed: {quality}")
    lines += [f"{path}: {name}" for name, path in paths.items() if name != "output"]
    return lines


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
