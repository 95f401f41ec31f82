"""`heterostep generate`: checks, the run with its progress bar, and the files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.denoise.checks import rehearse
from ..engine.engine import Engine, find_finished
from ..engine.facts import read_facts
from ..engine.loading import pick_device
from ..engine.progress import Progress
from ..engine.record import run_record
from ..engine.request import (
    EngineConfig,
    Event,
    GenerateRequest,
    JobConfig,
    Started,
    VideoOutput,
    allocation,
    resolve,
)
from ..errors import ConfigError, Interrupted, JobStopped
from .logs import silence_libraries
from .outputs import OutputFiles, elsewhere
from .ranks import degrees_for, generate_on_ranks
from .signals import saving_signals

if TYPE_CHECKING:
    from ..engine.jobs.job import Finished
    from .options import Command
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
    if on_ray or (command.ranks.nproc or 1) > 1:
        files.announce(progress.say)
        output, record = generate_on_ranks(command, lambda events, label: _run(events, label, progress), progress)
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
    output = _run(engine.stream(request), "denoising", progress)
    dense = None
    if compare_dense:
        dense = _run(engine.stream(dataclasses.replace(request, compute=1.0)), "dense", progress)
    return output, run_record(engine, output, dense)


def _work(
    config: EngineConfig, request: GenerateRequest, job: JobConfig, progress: Progress
) -> tuple[VideoOutput, dict[str, Any]]:
    """Load the model and resume a job.

    Raises:
        JobStopped: a signal told to go; what is done is saved.
        KeyboardInterrupt: likewise by Ctrl-C.
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

            output = _run(events(), "denoising", progress)
    except Interrupted as interrupted:
        raise JobStopped(str(interrupted)) from interrupted
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"; the same command resumes the job in {job.folder}") from interrupt
    return output, run_record(engines[0], output)


def _run(events: Iterator[Event], label: str, progress: Progress) -> VideoOutput:
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
