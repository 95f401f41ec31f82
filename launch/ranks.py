"""`heterostep generate` on several ranks: a worker group on this machine, or on Ray, makes the video.

Signals of a cluster's scheduler save the job first (`saving_signals`).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..engine.checkpoint import remove_others
from ..engine.config import EngineConfig
from ..engine.decoding import deliver, find_finished
from ..engine.denoise.long_video import windows_of
from ..engine.facts import read_facts
from ..engine.loading import pick_device, pick_dtype
from ..engine.progress import Progress
from ..engine.record import compare
from ..engine.request import Event, JobConfig, VideoResult, resolve, with_sources
from ..engine.stored import denoised
from ..errors import Cancelled, ConfigError, JobStopped, RankLost
from ..parallel.config import ParallelConfig
from .options import Command, Ranks
from .outputs import OutputFiles, saving_signals
from .workers.group import WorkerGroup
from .workers.machines import Machines
from .workers.member import MemberMachine
from .workers.messages import GroupConfig, Outcome, Work, threads_asked
from .workers.network import WAIT_SECONDS, Meeting, key_of
from .workers.process import ThisMachine
from .workers.rendezvous import parallel_from
from .workers.several import SeveralMachines
from .workers.video import make_video

Show = Callable[[Iterator[Event], str], VideoResult]
"""Shows a run's events under a label, and returns its video."""
Made = tuple[VideoResult, dict[str, Any]]
"""A video and the record of its making."""
Started = tuple[WorkerGroup, Callable[[RankLost], None]]
"""A group, and what is told of its losses."""
_TAIL = 12


def generate_on_ranks(
    commands: Sequence[Command], files: Sequence[OutputFiles], show: Show, progress: Progress
) -> Generator[Made]:
    """Make the videos that the flags ask for, one after the other, on ranks of this machine or others, or of Ray.

    Args:
        commands: their requests are valid for the model. Without a job, a video's steps are saved in a temporary folder
            as long as this process lives.
        files: of each; those that show the frames are written.
        show: shows the events.
        progress: shows what else is done.

    Yields:
        Each video and the record of its making.

    Raises:
        ConfigError: flags that do not fit each other, the model, the machine or the cluster.
        JobStopped: a signal stopped the command; the steps that are done are saved.
    """
    first = commands[0]
    if first.ranks.ray or first.ranks.ray_address is not None:
        yield from _on_ray(commands, files, show, progress)
        return
    config, reason = settled_here(first)
    yield from _each(commands, files, config, lambda: group_here(first, config, reason, progress), show, progress)


def _each(
    commands: Sequence[Command],
    files: Sequence[OutputFiles],
    config: EngineConfig,
    start: Callable[[], AbstractContextManager[Started]],
    show: Show,
    progress: Progress,
) -> Generator[Made]:
    """The videos one after the other, by one group, which is started when one is to be computed."""
    with contextlib.ExitStack() as held:
        started: Started | None = None
        for command, its_files in zip(commands, files, strict=True):
            found = _finished(config, command, its_files, progress)
            if found is None:
                if started is None:
                    started = held.enter_context(start())
                    held.enter_context(contextlib.closing(started[0]))
                found = _make(started[0], command, its_files, show, started[1])
            yield found


def settled_here(command: Command) -> tuple[EngineConfig, str]:
    """The settings for ranks of this machine without anything automatic, and why.

    Raises:
        ConfigError: flags that do not fit each other, the model or the machine.
    """
    gpus = pick_device(command.engine.device).type == "cuda"
    _check_gpus(command.ranks.nproc or 1, command.engine.device, torch.cuda.device_count() if gpus else None)
    return _settled(command, gpus)


@contextlib.contextmanager
def group_here(
    command: Command, config: EngineConfig, reason: str, progress: Progress, index: int = 0
) -> Iterator[Started]:
    """A group of ranks on this machine, or on this and others; it is to be closed. And what is told of its losses.

    Args:
        command: what is asked for.
        config: of `settled_here`.
        reason: likewise.
        progress: shows what is done.
        index: of the group among those beside each other on this machine.
    """
    progress.say(reason)
    output = _Output(None if command.job is None else Path(command.job.folder) / "logs")
    with contextlib.ExitStack() as stack:
        machines: Machines = ThisMachine(index, show=output.show)
        if command.ranks.machines > 1:
            machines = stack.enter_context(_several(command.ranks, output, progress))
        progress.stage(f"loading model {config.model} on {command.ranks.size} ranks")
        yield WorkerGroup(group_config(command, config), alone(config), machines), output.lost


def _several(ranks: Ranks, output: _Output, progress: Progress) -> SeveralMachines:
    """This machine, which all are told to meet at, and the others."""
    assert ranks.master is not None
    meeting, nproc, key = Meeting.at(ranks.master), ranks.nproc or 1, key_of(ranks.cluster_key_file)
    least = nproc * (ranks.min_nnodes or 1)
    if ranks.cluster_key_file is None:
        where = f"{meeting.address}:{meeting.port}"
        progress.say(f"without --cluster-key-file, anyone who reaches {where} can run programs on all machines")
    return SeveralMachines(meeting, nproc, least, key, output.show, progress.say)


def help_elsewhere(ranks: Ranks, progress: Progress) -> bool:
    """Where another machine is the main one: start ranks for it until it is done. Returns whether that was so.

    Raises:
        ConfigError: this machine cannot take part.
        RankFailure: the main machine failed, or was lost for too long.
        JobStopped: a signal stopped the job.
    """
    if ranks.machines == 1:
        return False
    assert ranks.master is not None
    meeting = Meeting.at(ranks.master)
    if meeting.ours:
        return False
    progress.stage(f"waiting for the main machine at {meeting.address}:{meeting.port}")
    member = MemberMachine(meeting, ranks.nproc or 1, key_of(ranks.cluster_key_file), progress.say)
    with saving_signals(member.stop):
        member.serve()
    return True


def _on_ray(
    commands: Sequence[Command], files: Sequence[OutputFiles], show: Show, progress: Progress
) -> Generator[Made]:
    from .workers.ray_cluster import RayCluster, check_room, cluster_address, connected, has_gpus

    first = commands[0]
    config, size = first.engine, first.ranks.nproc or 1
    if config.device.startswith("cuda:"):
        raise ConfigError(f"--device {config.device} with --ray: Ray chooses the GPUs; take cuda, cpu or auto")
    address = cluster_address(first.ranks.ray_address)
    # What is wrong with a run on this machine is said before Ray starts, which takes seconds.
    here = _settled(first, pick_device(config.device).type == "cuda") if address is None else None
    while here is not None and commands and (found := _finished(here[0], commands[0], files[0], progress)) is not None:
        yield found
        commands, files = commands[1:], files[1:]
    if not commands:
        return
    progress.stage("starting Ray")
    with connected(address, size, config.device):
        if here is None:
            gpus = config.device != "cpu" and has_gpus()
            if config.device == "cuda" and not gpus:
                raise ConfigError("--device cuda: the Ray cluster has no GPU; take --device cpu or auto")
            here = _settled(first, gpus)
        config, reason = here

        @contextlib.contextmanager
        def start() -> Iterator[Started]:
            gpus = config.device == "cuda"
            check_room(size, gpus)
            progress.say(reason or "1 rank")
            progress.stage(f"loading model {config.model} on {size} ranks")
            standby = not gpus and size > 1 and not config.shard_weights
            yield WorkerGroup(group_config(first, config, standby), alone(config), RayCluster(gpus)), _resuming

        yield from _each(commands, files, config, start, show, progress)


def group_config(command: Command, config: EngineConfig, standby: bool = False) -> GroupConfig:
    """The settings of a command's group, with the degrees of `config`; `standby` whether a process stands by."""
    return GroupConfig(
        size=command.ranks.size,
        degrees={} if config.parallel is None else dataclasses.asdict(config.parallel),
        shard_weights=config.shard_weights,
        standby=standby,
        threads=threads_asked(),
        start_seconds=WAIT_SECONDS if command.ranks.machines > 1 else GroupConfig.start_seconds,
        least=(command.ranks.nproc or 1) * (command.ranks.min_nnodes or 1) if command.ranks.machines > 1 else 1,
    )


def alone(config: EngineConfig) -> EngineConfig:
    """The settings of the engine without those of the group."""
    return replace(config, parallel=None, shard_weights=False)


def _check_gpus(size: int, device: str, found: int | None) -> None:
    """Refuse what a rank of this machine would refuse, before any is started; `found` GPUs, None: CPUs are used."""
    if device.startswith("cuda:"):
        raise ConfigError(f"--device {device} with --nproc: each rank takes a GPU of its own; take cuda, cpu or auto")
    if found is not None and size > found:
        raise ConfigError(
            f"--nproc {size} needs as many GPUs, but this machine has {found}: ask for fewer ranks, or compute on the "
            "CPU with --device cpu"
        )


def _settled(command: Command, gpus: bool) -> tuple[EngineConfig, str]:
    """The settings without anything automatic, which might mean something else on the ranks' machines; and why."""
    name = "cuda" if gpus else "cpu"
    dtype = str(pick_dtype(command.engine.dtype, torch.device(name))).removeprefix("torch.")
    config = replace(command.engine, device=name, dtype=dtype)
    size, device = command.ranks.size, pick_device("auto" if gpus else "cpu")
    if gpus and device.type == "cpu":  # kernels and memory are those of other machines: the ranks check them
        parallel, reason = degrees_for(_elsewhere(command), size, device)
        if parallel is not None and "kernel" in command.degrees:
            parallel = replace(parallel, kernel=command.degrees["kernel"])
    else:
        parallel, reason = degrees_for(command, size, device)
    return replace(config, parallel=parallel, shard_weights=command.shard_weights), reason


def _finished(config: EngineConfig, command: Command, files: OutputFiles, progress: Progress) -> Made | None:
    """The result of a job that is done, its files written."""
    job = command.job
    found = find_finished(replace(config, device="cpu"), command.request, job) if job is not None else None
    if job is None or found is None:
        return None
    progress.say(f"the job in {job.folder} is finished; nothing was computed")
    deliver(found.frames, files, found.video)
    return found.video, dict(found.record)


def degrees_for(
    command: Command, size: int, device: torch.device, decide: Callable[[str, Callable[[], bool]], bool] | None = None
) -> tuple[ParallelConfig | None, str]:
    """The degrees for the command's video, and why.

    Args:
        command: names degrees, or leaves them out.
        size: number of ranks.
        device: where they compute.
        decide: as in `parallel_from`.
    """
    facts = read_facts(command.engine.model)
    resolved = resolve(command.request, facts)
    branches = facts.passes(resolved.guidance_scale)
    windows, num_tokens = windows_of(facts, resolved)
    kv_bytes = branches * facts.cache_bytes(num_tokens, pick_dtype(command.engine.dtype, device).itemsize)
    ranks = command.ranks
    return parallel_from(
        command.degrees,
        size,
        facts.shared_heads,
        branches,
        kv_bytes,
        device,
        num_windows=windows,
        shard_weights=command.shard_weights,
        machines=(ranks.nproc or 1,) * ranks.machines if ranks.machines > 1 else (),
        decide=decide,
    )


def _elsewhere(command: Command) -> Command:
    """The command without its kernel, which only the ranks' machines can check."""
    degrees = {name: value for name, value in command.degrees.items() if name != "kernel"}
    return replace(command, degrees=degrees)


def _make(
    group: WorkerGroup, command: Command, files: OutputFiles, show: Show, on_loss: Callable[[RankLost], None]
) -> Made:
    """The video that is asked for, kept as a job, beside a dense one, or neither.

    Args:
        group: that makes it.
        command: what is asked for.
        files: those that show the frames are written.
        show: shows the events.
        on_loss: told of each loss.
    """
    wanted = [name for name in ("output", "heatmap") if name in files.paths]
    with files.rescuing(), tempfile.TemporaryDirectory(prefix="heterostep-job-") as kept:
        job = command.job or JobConfig(folder=kept)
        work = Work(
            request=with_sources(command.request, read_facts(command.engine.model)),
            checkpoint_every=job.checkpoint_every,
            wanted=wanted,
            scale=command.outputs.scale,
        )
        if command.job is not None:
            return _keep(group, work, job, files, show, on_loss, command.label)
        if command.outputs.compare_dense:
            return _compare(group, work, files, show, on_loss, command.place[0] > 1)
        try:
            return once(group, work, Path(kept), show, on_loss, command.label, files=files)
        except Exception:
            files.video = files.video or denoised(Path(kept))  # so that it can be rescued
            raise


def once(
    group: WorkerGroup,
    work: Work,
    folder: Path | None,
    show: Show,
    on_loss: Callable[[RankLost], None],
    label: str = "denoising",
    *,
    files: OutputFiles | None = None,
) -> Made:
    """One video through the group, and its record; of a comparison with the quality.

    Args:
        group: makes it.
        work: what is to be made.
        folder: where steps are saved; None: nowhere.
        show: shows the events.
        on_loss: told of each loss.
        label: of the steps.
        files: those that show the frames are written, if `work` wants them.
    """
    made: list[Outcome] = []

    def events() -> Iterator[Event]:
        outcome = yield from make_video(group, work, folder, on_loss)
        assert outcome.output is not None and outcome.record is not None, "rank 0 has the video"
        made.append(outcome)
        yield outcome.output

    video = show(events(), label)
    record = dict(made[0].record or {})
    if files is not None:
        files.take(video, {Path(name).stem: content for name, content in (made[0].files or {}).items()})
    if made[0].quality is not None:
        record["quality"] = made[0].quality
    return video, record


def _compare(
    group: WorkerGroup, work: Work, files: OutputFiles, show: Show, on_loss: Callable[[RankLost], None], warm: bool
) -> Made:
    """The video and a dense one after it, by ranks that are `warm` or not; no step of either is saved."""
    dense = replace(work.request, compute=1.0, quality=None)
    # The first steps of a process pay for allocations and kernel choices; neither side should.
    first = replace(work, request=replace(dense, num_inference_steps=2), wanted=())
    for _ in make_video(group, first, None, on_loss) if not warm else ():
        pass
    video, record = once(group, replace(work, compare="first"), None, show, on_loss, files=files)
    second = replace(work, request=dense, wanted=(), compare="second")
    other, against = once(group, second, None, show, on_loss, "dense")
    record["against_dense"] = compare(video, other, against["quality"])
    return video, record


def _keep(
    group: WorkerGroup,
    work: Work,
    job: JobConfig,
    files: OutputFiles,
    show: Show,
    on_loss: Callable[[RankLost], None],
    label: str,
) -> Made:
    """The video of a job that outlives this process."""
    if job.resume == "never":  # once: after a loss it is resumed
        remove_others(Path(job.folder), ())

    def stop() -> None:
        if not group.working:
            raise JobStopped(f"stopped; the same command resumes the job in {job.folder}")
        group.request_stop("stop")

    try:
        with saving_signals(stop):
            return once(group, work, Path(job.folder), show, on_loss, label, files=files)
    except Cancelled as stopped:
        raise JobStopped(str(stopped)) from stopped
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"; the same command resumes the job in {job.folder}") from interrupt


def _resuming(lost: RankLost) -> None:
    logging.getLogger("heterostep").warning("heterostep: %s; starting again where the video was saved", lost)


class _Output:
    """What ranks of this machine print: rank 0 has the terminal, the others a file each, shown when a rank is lost."""

    def __init__(self, folder: Path | None) -> None:
        """Keep the files in a folder; None: nowhere."""
        self._folder = folder
        self._tails: dict[int, collections.deque[str]] = {}

    def show(self, seat: int | None, line: str) -> None:
        """Take a line; called from a thread for each rank."""
        if not seat:
            print(line, file=sys.stderr, flush=True)
            return
        self._tails.setdefault(seat, collections.deque(maxlen=_TAIL)).append(line)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(self._folder / f"rank-{seat}.log", "a", encoding="utf-8") as file:
                file.write(f"{line}\n")

    def lost(self, lost: RankLost) -> None:
        """Say that a rank was lost, and what those printed that do not have the terminal."""
        _resuming(lost)
        for seat, tail in self._tails.items():
            for line in tail:
                print(f"  rank {seat}: {line}", file=sys.stderr)
            tail.clear()
