"""`heterostep generate --ray`: the same video, made by a gang of ranks that heals, on a laptop or a cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ...engine.engine import find_finished
from ...engine.facts import read_facts
from ...engine.jobs.checkpoint import remove_others
from ...engine.loading import pick_device, pick_dtype
from ...engine.media.image import read_image
from ...engine.record import compare
from ...engine.request import EngineConfig, Event, GenerateRequest, JobConfig, VideoOutput, resolve
from ...errors import Cancelled, ConfigError, JobStopped
from ...parallel.config import ParallelConfig
from ..degrees import parallel_from
from ..options import Command
from ..signals import saving_signals
from .cluster import check_room, cluster_address, connected, has_gpus
from .config import GangConfig, threads_asked
from .gang import Gang
from .messages import RankLost, Work
from .video import make_video

Show = Callable[[Iterator[Event], str], VideoOutput]
"""Shows a run's events under a label, and returns its video."""


def generate_on_ray(
    command: Command, show: Show, say: Callable[[str], None], stage: Callable[[str], None]
) -> tuple[VideoOutput, dict[str, Any]]:
    """Make the video that the flags ask for.

    Args:
        command: its request is valid for the model. Without a job the video is kept in a temporary folder as long as
            this process lives.
        show: shows the events.
        say: prints a line.
        stage: says what is being done now.

    Returns:
        The video and the record of its making.

    Raises:
        ConfigError: flags that do not fit each other, the model or the cluster.
        JobStopped: a signal told to go; what is done is saved.
    """
    config, request, job = command.engine, command.request, command.job
    size = command.ranks.nproc or 1
    if request.image is not None:  # its file is on this machine, the ranks may be on others
        request = dataclasses.replace(request, image=read_image(request.image))
    if config.device.startswith("cuda:"):
        raise ConfigError(f"--device {config.device} with --ray: Ray chooses the GPUs; take cuda, cpu or auto")
    address = cluster_address(command.ranks.ray_address)
    # What is wrong with a run on this machine is said before Ray starts, which takes seconds.
    here = _settled(command, config, request, pick_device(config.device).type == "cuda") if address is None else None
    found = _finished(here[0], request, job, say) if here is not None else None
    if found is not None:
        return found
    stage("starting Ray")
    with connected(address, size, config.device), contextlib.ExitStack() as stack:
        if here is None:
            gpus = config.device != "cpu" and has_gpus()
            if config.device == "cuda" and not gpus:
                raise ConfigError("--device cuda: the Ray cluster has no GPU; take --device cpu or auto")
            here = _settled(command, config, request, gpus)
            found = _finished(here[0], request, job, say)
            if found is not None:
                return found
        config, reason = here
        gpus = config.device == "cuda"
        check_room(size, gpus)
        say(reason or "1 rank")
        stage(f"loading model {config.model} on {size} ranks")
        spare = not gpus and size > 1 and not config.shard_weights
        gang = Gang(GangConfig(size=size, gpus=gpus, spare=spare, threads=threads_asked()), config)
        stack.callback(gang.close)
        if job is not None:
            return _keep(gang, _work(request, config.parallel, job), job, show, say)
        work = _work(request, config.parallel, None)
        if command.outputs.compare_dense:
            return _compare(gang, work, show, say)
        kept = stack.enter_context(tempfile.TemporaryDirectory(prefix="heterostep-job-"))
        return _make(gang, work, Path(kept), show, say)


def _settled(command: Command, config: EngineConfig, request: GenerateRequest, gpus: bool) -> tuple[EngineConfig, str]:
    """The settings without anything automatic, which might mean something else on the ranks' machines; and why."""
    dtype = str(pick_dtype(config.dtype, torch.device("cuda" if gpus else "cpu"))).removeprefix("torch.")
    config = dataclasses.replace(config, device="cuda" if gpus else "cpu", dtype=dtype)
    parallel, reason = _degrees(command, config, request, gpus)
    return dataclasses.replace(config, parallel=parallel, shard_weights=command.shard_weights), reason


def _finished(
    config: EngineConfig, request: GenerateRequest, job: JobConfig | None, say: Callable[[str], None]
) -> tuple[VideoOutput, dict[str, Any]] | None:
    """The result of a job that is done."""
    found = find_finished(dataclasses.replace(config, device="cpu"), request, job) if job is not None else None
    if job is None or found is None:
        return None
    say(f"the job in {job.folder} is finished; nothing was computed")
    return found.output, dict(found.record)


def _degrees(
    command: Command, config: EngineConfig, request: GenerateRequest, gpus: bool
) -> tuple[ParallelConfig | None, str]:
    """The degrees for the ranks at the start, and why."""
    facts = read_facts(config.model)
    resolved = resolve(request, facts)
    branches, device = facts.passes(resolved.guidance_scale), pick_device("auto" if gpus else "cpu")
    num_tokens = math.prod(facts.grid(resolved.width, resolved.height, resolved.num_frames))
    kv_bytes = branches * facts.cache_bytes(num_tokens, pick_dtype(config.dtype, device).itemsize)
    if gpus and device.type == "cpu":  # kernels and memory are those of other machines: the ranks check them
        degrees = {name: value for name, value in command.degrees.items() if name != "kernel"}
        there = dataclasses.replace(command, degrees=degrees)
        parallel, reason = parallel_from(there, facts.shared_heads, branches, kv_bytes, device)
        if parallel is not None and "kernel" in command.degrees:
            parallel = dataclasses.replace(parallel, kernel=command.degrees["kernel"])
        return parallel, reason
    return parallel_from(command, facts.shared_heads, branches, kv_bytes, device)


def _work(request: GenerateRequest, parallel: ParallelConfig | None, job: JobConfig | None) -> Work:
    every = job.checkpoint_every if job is not None else JobConfig(folder=".").checkpoint_every
    return Work(id="video", request=request, parallel=parallel, checkpoint_every=every)


def _make(
    gang: Gang, work: Work, folder: Path | None, show: Show, say: Callable[[str], None], label: str = "denoising"
) -> tuple[VideoOutput, dict[str, Any]]:
    """One video through the gang, and its record."""
    records: list[dict[str, Any]] = []

    def told(lost: RankLost) -> None:
        say(f"{lost}; the gang heals, and the video goes on where it was saved")

    def events() -> Iterator[Event]:
        outcome = yield from make_video(gang, work, folder, told)
        assert outcome.output is not None and outcome.record is not None, "rank 0 has the video"
        records.append(dict(outcome.record))
        yield outcome.output

    output = show(events(), label)
    return output, records[0]


def _compare(gang: Gang, work: Work, show: Show, say: Callable[[str], None]) -> tuple[VideoOutput, dict[str, Any]]:
    """The video and a dense one after it; no step of either is saved."""
    dense = dataclasses.replace(work.request, compute=1.0)
    # The first steps of a process pay for allocations and kernel choices; neither side should.
    first = dataclasses.replace(work, request=dataclasses.replace(dense, num_inference_steps=2))
    for _ in make_video(gang, first, None, lambda lost: say(f"{lost}; the gang heals")):
        pass
    output, record = _make(gang, work, None, show, say)
    other, _ = _make(gang, dataclasses.replace(work, request=dense), None, show, say, "dense")
    record["against_dense"] = compare(output, other)
    return output, record


def _keep(
    gang: Gang, work: Work, job: JobConfig, show: Show, say: Callable[[str], None]
) -> tuple[VideoOutput, dict[str, Any]]:
    """The video of a job that outlives this process."""
    if job.resume == "never":  # once: after a loss it goes on
        remove_others(Path(job.folder), ())

    def stop() -> None:
        if not gang.working:
            raise JobStopped(f"stopped; the same command resumes the job in {job.folder}")
        gang.wish("stop")

    try:
        with saving_signals(stop):
            return _make(gang, work, Path(job.folder), show, say)
    except Cancelled as stopped:
        raise JobStopped(str(stopped)) from stopped
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"; the same command resumes the job in {job.folder}") from interrupt
