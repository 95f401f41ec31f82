"""`heterostep generate`: checks, the run with its progress bar, and the files, which are never lost."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.config import EngineConfig
from ..engine.decoding import deliver, find_finished
from ..engine.denoise.checks import rehearse
from ..engine.denoise.long_video import windows_of
from ..engine.engine import Engine
from ..engine.facts import ModelFacts, read_facts
from ..engine.features import check_features
from ..engine.loading import pick_device, pick_dtype
from ..engine.lora import locate_lora, parse_lora
from ..engine.memory import Room
from ..engine.progress import Progress
from ..engine.record import Comparison, compare, run_record
from ..engine.request import Event, FrameSink, JobConfig, ResolvedRequest, Started, VideoResult, allocation, resolve
from ..engine.stored import source_of
from ..errors import ConfigError, Interrupted, JobStopped
from .logs import silence_libraries
from .outputs import OutputFiles, elsewhere, saving_signals
from .ranks import Made, Show, degrees_for, generate_on_ranks, help_elsewhere

if TYPE_CHECKING:
    from ..engine.job import Finished
    from .options import Command
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
        show: Show = functools.partial(shown, progress=progress)
        made: Generator[Made | None] = generate_on_ranks(commands, files, show, progress)
    else:
        made = _made_here(commands, files, progress, rank)
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
    facts = read_facts(first.engine.model)
    on_ray, dtype = first.ranks.ray or first.ranks.ray_address is not None, first.engine.dtype
    if not on_ray:  # the devices of a cluster are others
        dtype = str(pick_dtype(dtype, pick_device(first.engine.device))).removeprefix("torch.")
    for command in commands:
        folder = None if command.job is None else Path(command.job.folder)
        files.append(OutputFiles(command.outputs, folder, source_of(facts), dtype))
    paths = [path.resolve() for each in files for path in each.paths.values()]
    if len(set(paths)) < len(paths):
        raise ConfigError("two outputs have the same name; give each its own, those of several videos with {index}")
    resolved = [resolve(command.request, facts) for command in commands]
    for each, request in zip(files, resolved, strict=True):
        each.check(request)
    if not on_ray:
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


def _made_here(
    commands: Sequence[Command], files: Sequence[OutputFiles], progress: Progress, rank: TorchrunRank | None
) -> Generator[Made | None]:
    """The videos, made by an engine of this process; None on a rank that does not lead."""
    first = commands[0]
    size, decide = (1, None) if rank is None else (rank.world_size, rank.decide)
    parallel, _ = degrees_for(first, size, pick_device(first.engine.device), decide)
    here = _Here(dataclasses.replace(first.engine, parallel=parallel, shard_weights=first.shard_weights), progress)
    leads = rank is None or rank.leads
    for command, its_files in zip(commands, files, strict=True):
        done, found = _finished(here.config, command, rank)
        if found is not None and command.job is not None:
            progress.say(f"the job in {command.job.folder} is finished; nothing was computed")
            deliver(found.frames, its_files, found.video)
            made: Made | None = (found.video, found.record)
        elif not done:
            with its_files.rescuing():
                sink = its_files if leads else FrameSink()
                made = _compute(here, command, sink) if command.job is None else _work(here, command, command.job, sink)
        yield made if leads else None


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
    video: VideoResult, record: dict[str, Any], command: Command, files: OutputFiles, progress: Progress
) -> list[str]:
    """Write the files of a video that are left, and say what all are; a sentence for each that lies elsewhere."""
    moved = files.write(record)
    for line in _summary(video, record, files.paths):
        progress.say(line)
    progress.tell(
        "done",
        index=command.place[0],
        prompt=command.request.prompt,
        seed=command.request.seed,
        compute=record["compute"],
        seconds=dict(video.seconds),
        files={name: str(path) for name, path in files.paths.items()},
    )
    return moved


def _compute(here: _Here, command: Command, sink: FrameSink) -> Made:
    """Load the model and make the video, and a dense one after it where that is asked for."""
    request, progress = command.request, here.progress
    all_of_it = dataclasses.replace(request, compute=1.0, quality=None)
    engine = here.load()
    if not command.outputs.compare_dense:
        video = shown(engine.stream(request, sink=sink), command.label, progress)
        return video, run_record(engine, video)
    if command.place[0] == 1:
        progress.stage("warming up")
        # The first steps of a process pay for allocations and kernel choices; neither side should.
        for _ in engine.stream(dataclasses.replace(all_of_it, num_inference_steps=2), sink=FrameSink()):
            pass
    with Comparison() as comparison:
        # Before the dense run, which can take an hour: the plan may be one that cannot be met.
        video = shown(engine.stream(request, sink=comparison.first(sink)), command.label, progress)
        other = shown(engine.stream(all_of_it, sink=comparison), "dense", progress)
        record = run_record(engine, video)
        if engine.leads:
            record["against_dense"] = compare(video, other, comparison.quality)
        return video, record


def _work(here: _Here, command: Command, job: JobConfig, sink: FrameSink) -> Made:
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
                for event in engine.stream(command.request, job, sink):
                    if asked:  # perhaps before there was a run that could be told
                        engine.save_and_stop()
                    yield event

            video = shown(events(), command.label, here.progress)
    except Interrupted as interrupted:
        raise JobStopped(str(interrupted)) from interrupted
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"; the same command resumes the job in {job.folder}") from interrupt
    return video, run_record(engine, video)


def shown(events: Iterator[Event], label: str, progress: Progress) -> VideoResult:
    """Show the events of a run; its video."""
    video = None
    for event in progress.follow(events, label):
        if isinstance(event, Started) and event.resumed_at is not None:
            progress.say(f"resuming after step {event.resumed_at} of {event.request.num_inference_steps}")
        elif isinstance(event, VideoResult):
            video = event
    assert video is not None
    return video


_PLAUSIBLE = 1.3
"""Times 1 / compute: a run cannot be faster than its share of the work allows, but for the scatter of timings."""


def _estimated(video: VideoResult) -> str:
    estimate = video.report.estimated_psnr
    return "" if estimate is None else f", latents about {estimate:.0f} dB from it (estimated)"


def _summary(video: VideoResult, record: dict[str, Any], paths: dict[str, Path]) -> list[str]:
    frames, height, width = video.shape[:3]
    seconds = video.seconds
    lines = [
        f"{paths['output']}: {frames} frames of {width}x{height}, {video.fps} per second"
        + ("" if video.audio is None else f", with {video.audio.seconds:.1f} s of sound"),
        f"compute {record['compute']:.3f} of dense{_estimated(video)}; seconds: text {seconds['encode_text']:.1f}, "
        f"denoising {seconds['denoise']:.1f}, decoding {seconds['decode']:.1f}",
    ]
    against = record.get("against_dense")
    if isinstance(against, dict):
        quality = "equal to the dense video" if against["psnr"] is None else f"PSNR {against['psnr']:.1f} dB"
        quality += "" if against["ssim"] is None else f", SSIM {against['ssim']:.3f}"
        plausible = against["speedup"] < _PLAUSIBLE / record["compute"]
        busy = "" if plausible else "; other work on this machine distorts that"
        lines.append(
            f"denoising: dense {against['seconds_denoise_dense']:.2f} s, this run "
            f"{against['seconds_denoise']:.2f} s, {against['speedup']:.2f} times as fast{busy}"
        )
        lines.append(f"frames against the dense video of the same seed: {quality}")
    lines += [f"{path}: {name}" for name, path in paths.items() if name != "output"]
    return lines
