"""`heterostep generate`: checks, the run with its progress bar, and the files, which are never lost."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save

from ..engine.config import EngineConfig
from ..engine.denoise.checks import rehearse
from ..engine.denoise.long_video import windows_of
from ..engine.engine import Engine
from ..engine.facts import ModelFacts, read_facts
from ..engine.features import check_features
from ..engine.finished import find_finished
from ..engine.loading import pick_device
from ..engine.lora import locate_lora, parse_lora
from ..engine.media.files import Placed, check_writable, place, write_json
from ..engine.media.video import check_mp4, heatmap_frames, heatmap_size, write_mp4
from ..engine.memory import Room
from ..engine.progress import Progress
from ..engine.record import run_record
from ..engine.request import Event, JobConfig, ResolvedRequest, Started, VideoOutput, allocation, resolve
from ..errors import ConfigError, Interrupted, JobStopped, OutputElsewhere
from .logs import silence_libraries
from .ranks import Made, degrees_for, generate_on_ranks, help_elsewhere, saving_signals

if TYPE_CHECKING:
    from ..engine.job import Finished
    from .options import Command, Outputs
    from .workers.rendezvous import TorchrunRank


def generate(commands: Sequence[Command], progress: Progress, rank: TorchrunRank | None = None) -> int:
    """Make the videos of a command, one after the other; returns the exit code.

    Args:
        commands: what was asked for, of each video; they differ in request and files alone.
        progress: shows how far it is, if anything is shown; on rank 0 alone.
        rank: this process's place among others that run the same command; None: it starts them, if there shall be any.

    Raises:
        HeterostepError: a setting, the model or the request is wrong, or the work failed.
    """
    silence_libraries(downloads=progress.shown)
    first = commands[0]
    if rank is not None and first.ranks.machines > 1:
        raise ConfigError("--nnodes of heterostep works only with `heterostep generate`; torchrun has its own")
    if help_elsewhere(first.ranks, progress):
        return 0
    # Everything that can be wrong is checked before a model is loaded, which may take minutes.
    commands, files = _checked(commands, progress)
    on_ray = first.ranks.ray or first.ranks.ray_address is not None
    if on_ray and rank is not None:
        raise ConfigError("--ray works only with `heterostep generate`: torchrun has already started the ranks")
    if on_ray or first.ranks.size > 1:
        made: Generator[Made | None] = generate_on_ranks(
            commands, lambda events, label: shown(events, label, progress), progress
        )
    else:
        made = _made_here(commands, progress, rank)
    for each in files:
        each.announce(progress.say)
    moved: list[str] = []
    with contextlib.closing(made):
        for command, its_files, found in zip(commands, files, made, strict=True):
            if found is not None:
                moved += _write(*found, command, its_files, progress)
    if moved:
        folder = None if first.job is None else Path(first.job.folder)
        raise elsewhere(moved, folder if len(commands) == 1 or folder is None else folder.parent)
    return 0


def _checked(commands: Sequence[Command], progress: Progress) -> tuple[list[Command], list[OutputFiles]]:
    """Check the requests and the files of all videos; returns the commands with an offload that fits, and the files.

    Raises:
        HeterostepError: what is wrong with one of them.
    """
    first, files = commands[0], []
    for command in commands:
        files.append(OutputFiles(command.outputs, None if command.job is None else Path(command.job.folder)))
    paths = [path.resolve() for each in files for path in each.paths.values()]
    if len(set(paths)) < len(paths):
        raise ConfigError("two outputs have the same name; give each its own, those of several videos with {index}")
    facts = read_facts(first.engine.model)
    resolved = [resolve(command.request, facts) for command in commands]
    for each, request in zip(files, resolved, strict=True):
        each.check(request)
    if not (first.ranks.ray or first.ranks.ray_address):  # the devices of a cluster are others
        check_features(first.engine, facts, pick_device(first.engine.device))
    for text in first.request.lora:
        locate_lora(parse_lora(text))
    # Prompt and seed do not count in the plan.
    every = None if first.job is None else first.job.checkpoint_every
    rehearse(facts, allocation(first.engine, resolved[0]), resolved[0], every)
    windows, _ = windows_of(facts, resolved[0])
    if windows > 1:
        window, overlap = resolved[0].window, resolved[0].overlap
        progress.say(f"{windows} windows of {window} frames, which overlap by {overlap} or more")
    return _fitting(commands, facts, resolved[0], progress), files


def _fitting(
    commands: Sequence[Command], facts: ModelFacts, request: ResolvedRequest, progress: Progress
) -> list[Command]:
    """The commands with the fastest offload that fits into the memory of this machine, if the ranks are on it.

    Raises:
        RequestError: nothing fits.
    """
    first = commands[0]
    ranks = first.ranks
    if ranks.ray or ranks.ray_address or ranks.machines > 1:
        return list(commands)
    room = Room.here(str(pick_device(first.engine.device)), ranks.size)
    offload = room.settle(first.engine, facts, request, ranks=ranks.size, shard_weights=first.shard_weights)
    if offload != first.engine.offload and offload != "none":
        progress.say(f"offload {offload}: all weights together do not fit into the GPU's memory")
    engine = dataclasses.replace(first.engine, offload=offload)
    return [dataclasses.replace(command, engine=engine) for command in commands]


def _made_here(commands: Sequence[Command], progress: Progress, rank: TorchrunRank | None) -> Generator[Made | None]:
    """The videos, made by an engine of this process; None on a rank that does not lead."""
    first = commands[0]
    size, decide = (1, None) if rank is None else (rank.world_size, rank.decide)
    parallel, _ = degrees_for(first, size, pick_device(first.engine.device), decide)
    here = _Here(dataclasses.replace(first.engine, parallel=parallel, shard_weights=first.shard_weights), progress)
    for command in commands:
        done, found = _finished(here.config, command, rank)
        if found is not None and command.job is not None:
            progress.say(f"the job in {command.job.folder} is finished; nothing was computed")
            made: Made | None = (found.output, found.record)
        elif not done:
            made = _compute(here, command) if command.job is None else _work(here, command, command.job)
        yield made if rank is None or rank.leads else None


def _finished(config: EngineConfig, command: Command, rank: TorchrunRank | None) -> tuple[bool, Finished | None]:
    """Whether a job is done, and on the rank that leads its result."""
    job = command.job
    if job is None:
        return False, None
    # Only one process may look into the folder.
    found = find_finished(config, command.request, job) if rank is None or rank.leads else None
    if rank is None:
        return found is not None, found
    return rank.decide(f"finished {command.place[0]}", lambda: found is not None), found


class _Here:
    """An engine of this process, loaded when a video first needs it."""

    def __init__(self, config: EngineConfig, progress: Progress) -> None:
        self.config, self.progress = config, progress
        self.engine: Engine | None = None

    def load(self) -> Engine:
        if self.engine is None:
            self.progress.stage(f"loading model {self.config.model}")
            self.engine = Engine(self.config)
        return self.engine


def _write(
    output: VideoOutput, record: dict[str, Any], command: Command, files: OutputFiles, progress: Progress
) -> list[str]:
    """Write the files of a video and say what they are; returns a sentence for each that lies elsewhere."""
    progress.stage(f"writing {', '.join(map(str, files.paths.values()))}")
    moved = files.write(output, record)
    for line in _summary(output, record, files.paths):
        progress.say(line)
    progress.tell(
        "done",
        index=command.place[0],
        prompt=command.request.prompt,
        seed=command.request.seed,
        compute=record["compute"],
        seconds=dict(output.seconds),
        files={name: str(path) for name, path in files.paths.items()},
    )
    return moved


def _compute(here: _Here, command: Command) -> Made:
    """Load the model and make the video, and a dense one after it where that is asked for."""
    request, progress = command.request, here.progress
    engine = here.load()
    if command.outputs.compare_dense and command.place[0] == 1:
        progress.stage("warming up")
        # The first steps of a process pay for allocations and kernel choices; neither side should.
        engine.generate(dataclasses.replace(request, compute=1.0, num_inference_steps=2), progress=False)
    # Before the dense run, which can take an hour: the plan may be one that cannot be met.
    output = shown(engine.stream(request), command.label, progress)
    dense = None
    if command.outputs.compare_dense:
        dense = shown(engine.stream(dataclasses.replace(request, compute=1.0)), "dense", progress)
    return output, run_record(engine, output, dense)


def _work(here: _Here, command: Command, job: JobConfig) -> Made:
    """Load the model and resume a job.

    Raises:
        JobStopped: a signal stopped the command; the steps that are done are saved.
        KeyboardInterrupt: Ctrl-C stopped it; the message says that the same command resumes.
    """
    asked = False

    def stop() -> None:
        nonlocal asked
        asked = True
        if here.engine is None:
            raise JobStopped(f"stopped before the first step; the same command starts the job in {job.folder}")
        here.engine.save_and_stop()

    try:
        with saving_signals(stop):
            engine = here.load()

            def events() -> Iterator[Event]:
                for event in engine.stream(command.request, job):
                    if asked:  # perhaps before there was a run that could be told
                        engine.save_and_stop()
                    yield event

            output = shown(events(), command.label, here.progress)
    except Interrupted as interrupted:
        raise JobStopped(str(interrupted)) from interrupted
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"; the same command resumes the job in {job.folder}") from interrupt
    return output, run_record(engine, output)


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
            ConfigError: a file cannot be written, or one exists that is not to be replaced.
        """
        given = {name: getattr(outputs, name) for name in _SUFFIXES if getattr(outputs, name) is not None}
        self.paths = {name: check_writable(path, _SUFFIXES[name]) for name, path in given.items()}
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
