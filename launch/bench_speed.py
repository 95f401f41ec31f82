"""`heterostep bench offline`, `single-stream`, `scaling`: replicas of one rank or several make videos for the clock."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..benchmarks.quality.run import Maker
from ..benchmarks.quality.settings import read_prompts
from ..benchmarks.results import result as results
from ..benchmarks.speed.runs import Energy, Run, Saved, drive, figures, traffic
from ..benchmarks.speed.settings import BOUNDARY, PRESETS, OfflineSettings, ResultFiles, ScalingSettings
from ..engine.denoise.checks import rehearse
from ..engine.estimate import estimate
from ..engine.facts import ModelFacts, read_facts
from ..engine.loading import pick_device
from ..engine.progress import Progress
from ..engine.record import device_name
from ..engine.request import GenerateRequest, ResolvedRequest, allocation, resolve
from ..errors import ConfigError
from ..hsa.config import HSAConfig
from ..parallel.config import ParallelConfig
from .bench import makers
from .logs import silence_libraries
from .options import Command
from .plan import PlanSettings, case_of
from .ranks import degrees_for


class Measurement:
    """A result that grows row by row, is kept at each, and is finished however the work ends."""

    def __init__(self, files: ResultFiles, result: dict[str, Any], progress: Progress) -> None:
        """Check the files."""
        self.files = results.Files(files.output_file, files.compare)
        self.result, self._progress = result, progress

    def add(self, *rows: dict[str, Any]) -> None:
        """Take rows that are measured."""
        self.result["rows"] += rows
        self.files.keep(self.result)

    @contextlib.contextmanager
    def finishing(self, picture: tuple[str, str] | None = None) -> Iterator[None]:
        """Print and write what there is at the end, also after Ctrl-C or an error.

        Raises:
            KeyboardInterrupt: as it came, with a word on what was written.
        """
        try:
            yield
        except KeyboardInterrupt as error:
            self.result["interrupted"] = True
            self._end(picture)
            raise KeyboardInterrupt("; the result has what was measured until then") from error
        except BaseException:
            if self.result["rows"]:
                self.result["interrupted"] = True
                self._end(picture)
            raise
        self._end(picture)

    def _end(self, picture: tuple[str, str] | None) -> None:
        self._progress.close()
        self.files.compare(self.result)
        print("\n".join(results.table(self.result)))
        if self.files.old is not None:
            others = results.differing(self.result, self.files.old)
            lines = results.said_changes(self.result) + [f"other {', '.join(others)} than the old one"] * bool(others)
            print("\n".join(["", *lines]))
        for path in self.files.finish(self.result, picture):  # last: the disk may be full
            self._progress.say(f"wrote {path}")


def bench_offline(
    settings: OfflineSettings,
    files: ResultFiles,
    command: Command,
    said: Sequence[str],
    progress: Progress,
    verb: str = "offline",
) -> int:
    """Run `bench offline`, or `bench single-stream`, which has one replica; returns the exit code.

    Args:
        settings: what to measure.
        files: where the result goes.
        command: the model, what all videos have in common, and the ranks of a replica.
        said: the command's arguments, which the result names.
        progress: shows how far it is.
        verb: which of the two.

    Raises:
        HeterostepError: a setting, the model or a request is wrong, or the work failed.
    """
    if verb == "single-stream" and settings.replicas > 1:
        raise ConfigError(f"single-stream makes one video at a time; leave out --replicas {settings.replicas}")
    facts, ranks = _checked(command, settings.replicas, progress)
    prompts = read_prompts(settings, facts, None)  # type: ignore[arg-type]
    count = settings.videos or 4 * settings.replicas
    chosen = [prompt.fields for prompt in itertools.islice(itertools.cycle(prompts), count)]
    requests = [dataclasses.replace(command.request, **fields) for fields in chosen]
    resolved = [resolve(request, facts) for request in requests]
    for share in settings.shares:
        rehearse(facts, _allocation(command, resolved[0], share), resolved[0])
    saves = _saves(settings, [request.prompt for request in requests])
    warmup = f"{settings.warmup_videos} whole video(s) by each replica at each share"
    result = new_result(verb, said, settings, command, resolved, warmup)
    if settings.preset is not None:
        result["notes"] += deviations(settings.preset, resolved[0], facts, settings.prompts)
    measurement = Measurement(files, result, progress)
    made = makers(command, settings.replicas, progress)
    with measurement.finishing(("compute", "videos_per_gpu_hour")), made as replicas:
        energy = Energy(_gpus(command.engine.device, settings.replicas * ranks))
        for share, save in zip(settings.shares, saves, strict=True):
            what = {"compute": share, "replicas": settings.replicas, "ranks": ranks}
            run = _measure(replicas, requests, command, share, settings.warmup_videos, what, measurement, save, energy)
            if ranks > 1:
                measurement.add(*traffic(what, run))
    return 0


def bench_scaling(
    settings: ScalingSettings, files: ResultFiles, command: Command, said: Sequence[str], progress: Progress
) -> int:
    """Run `bench scaling`; returns the exit code.

    Args:
        settings: what to measure.
        files: where the result goes.
        command: the model and the video; degrees are chosen for each number of ranks.
        said: the command's arguments.
        progress: shows how far it is.

    Raises:
        HeterostepError: a setting, the model or the request is wrong, or the work failed.
    """
    facts, _ = _checked(command, settings.gpus, progress)
    request = resolve(command.request, facts)
    for share in settings.shares:
        rehearse(facts, _allocation(command, request, share), request)
    warmup = f"{settings.warmup_videos} whole video(s) by each replica at each share"
    measurement = Measurement(files, new_result("scaling", said, settings, command, [request], warmup), progress)
    base: dict[str, float] = {}
    with measurement.finishing(("ranks", "videos_per_gpu_hour")):
        for replicas, ranks in settings.layouts:
            each = dataclasses.replace(command, ranks=dataclasses.replace(command.ranks, nproc=ranks))
            parallel, _ = degrees_for(each, ranks, pick_device(command.engine.device))
            with makers(each, replicas, progress) as group:
                for share in settings.shares:
                    what = {"compute": share, "replicas": replicas, "ranks": ranks}
                    requests = [command.request] * (settings.videos * replicas)
                    run = _measure(group, requests, each, share, settings.warmup_videos, what, measurement)
                    found = measurement.result["rows"][-1]["metrics"]
                    planned = _planned(settings.gpu, each, request, share, parallel)
                    found |= _beside(found, base, share, replicas * ranks, planned)
                    measurement.add(*traffic(what, run))
    return 0


def _measure(
    replicas: Sequence[Maker],
    requests: Sequence[GenerateRequest],
    command: Command,
    share: float,
    warmup: int,
    what: dict[str, Any],
    measurement: Measurement,
    save: Saved | None = None,
    energy: Energy | None = None,
) -> Run:
    """Warm up, make the videos, and add their row, also where it was interrupted."""
    hsa = dataclasses.replace(command.engine.hsa or HSAConfig(), compute=share)
    label = f"compute {share:g}, {what['replicas']} x {what['ranks']} rank(s)"
    ready = Run(busy=[0.0] * len(replicas))
    for number in range(warmup):
        drive(replicas, [requests[number % len(requests)]] * len(replicas), hsa, ready, f"{label}, warming up")
    run, before = Run(busy=[0.0] * len(replicas)), energy.joules() if energy is not None else None
    try:
        drive(replicas, requests, hsa, run, label, save)
    finally:
        after = energy.joules() if energy is not None else None
        run.joules = None if before is None or after is None else after - before
        if run.made:
            measurement.add(figures(what, run, what["ranks"]))
    return run


def _checked(command: Command, replicas: int, progress: Progress) -> tuple[ModelFacts, int]:
    """The model's facts and the ranks of a replica, where all of them have a place.

    Raises:
        ConfigError: there are fewer GPUs.
    """
    silence_libraries(downloads=progress.shown)
    ranks, device = command.ranks.nproc or 1, command.engine.device
    if pick_device(device).type == "cuda" and replicas * ranks > (found := torch.cuda.device_count()):
        raise ConfigError(
            f"{replicas} x {ranks} ranks need as many GPUs, but this machine has {found}: ask for fewer, or compute on "
            "the CPU with --device cpu"
        )
    if replicas * ranks > 1 and device.startswith("cuda:"):
        raise ConfigError(f"--device {device} with several ranks: each takes a GPU of its own; take cuda, cpu or auto")
    return read_facts(command.engine.model), ranks


def _saves(settings: OfflineSettings, prompts: Sequence[str]) -> list[Saved | None]:
    """What writes the videos of each share; those of several shares have a folder each, since their names are alike."""
    if settings.save is None:
        return [None] * len(settings.shares)
    if len(settings.shares) == 1:
        return [Saved(settings.save, prompts)]
    return [Saved(os.path.join(settings.save, f"compute-{share:g}"), prompts) for share in settings.shares]


def _gpus(device: str, count: int) -> Sequence[int]:
    """Numbers of the GPUs that so many ranks use; none on a CPU."""
    found = pick_device(device)
    if found.type != "cuda":
        return ()
    return range(count) if found.index is None else (found.index,)


def _allocation(command: Command, request: ResolvedRequest, share: float) -> HSAConfig | None:
    return allocation(command.engine, dataclasses.replace(request, compute=share))


def new_result(
    verb: str, said: Sequence[str], settings: Any, command: Command, requests: Sequence[ResolvedRequest], warmup: str
) -> dict[str, Any]:
    """An empty result of a verb that makes videos."""
    first = dataclasses.asdict(requests[0]) | {"prompt": None, "compute": None}
    engine = {name: value for name, value in dataclasses.asdict(command.engine).items() if name != "parallel"}
    asked = {**dataclasses.asdict(settings), "request": first, "engine": engine, "degrees": dict(command.degrees)}
    seeds = list(dict.fromkeys(request.seed for request in requests))
    device = device_name(pick_device(command.engine.device))
    if device.startswith("cpu"):
        device = f"{results.processor()} ({device})"
    return results.new(verb, said, asked, warmup=warmup, seeds=seeds, device=device)


def deviations(preset: str, request: ResolvedRequest, facts: ModelFacts, prompts: str | None) -> list[str]:
    """Say in what a run differs from the task of a preset, so that nobody takes its figures for those of the task."""
    wanted = {**PRESETS[preset], "boundary_ratio": BOUNDARY[preset]}
    values = {**{name: getattr(request, name) for name in PRESETS[preset]}, "boundary_ratio": facts.boundary_ratio}
    found = [
        name if name == "negative_prompt" else f"{name} {values[name]} for {value}"
        for name, value in wanted.items()
        if values[name] != value
    ]
    found += ["the initial noise is drawn (--noise FILE names theirs)"] * (request.noise is None)
    found += ["our prompts (--prompts FILE names theirs)"] * (prompts is None)
    return [f"Not the task of {preset}: {'; '.join(found)}."] if found else [f"The settings of {preset}."]


def _beside(
    found: dict[str, Any], base: dict[str, float], share: float, gpus: int, planned: dict[str, float]
) -> dict[str, dict[str, float]]:
    """Speed-up and efficiency against the first row of this share; denoising over the very first, as planned too."""
    alone = base.setdefault(f"seconds {share}", found["seconds"]["value"])
    rate = base.setdefault(f"rate {share}", found["videos_per_hour"]["value"])
    first = base.setdefault("denoise", found["denoise_seconds"]["value"])
    beside = {
        "speedup": alone / found["seconds"]["value"],
        "efficiency": found["videos_per_hour"]["value"] / (rate * gpus),
        "denoise_over_first": found["denoise_seconds"]["value"] / first,
    }
    if planned:
        start = base.setdefault("planned", planned["denoise"])
        beside |= {"planned_seconds": planned["video"], "planned_over_first": planned["denoise"] / start}
    return {name: results.metric(value) for name, value in beside.items()}


def _planned(
    gpu: str | None, command: Command, request: ResolvedRequest, share: float, parallel: ParallelConfig | None
) -> dict[str, float]:
    """What `plan` says of the same video and degrees."""
    if gpu is None:
        return {}
    names = ("num_frames", "num_inference_steps", "guidance_scale", "fps")
    asked = {name: getattr(request, name) for name in names}
    settings = PlanSettings(model=command.engine.model, gpu=gpu, dtype=command.engine.dtype, **asked)
    hsa = dataclasses.replace(command.engine.hsa or HSAConfig(), compute=share)
    one = estimate(case_of(settings, hsa, (request.width, request.height)), parallel or ParallelConfig())
    return {"video": one.video, "denoise": one.denoise}
