"""`heterostep bench quality`: one rank or several make the videos that `benchmarks.quality` compares."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..benchmarks.quality import report
from ..benchmarks.quality.run import Maker, OneRank, QualityBench
from ..benchmarks.quality.settings import PRESETS, QualitySettings, listed, read_prompts
from ..benchmarks.quality.store import Store, with_scheduler
from ..benchmarks.results import result as results
from ..engine.denoise.checks import rehearse
from ..engine.facts import read_facts, read_scheduler
from ..engine.loading import pick_device
from ..engine.progress import Progress
from ..engine.record import device_name, versions
from ..engine.request import GenerateRequest, VideoOutput, VideoResult
from ..errors import RankLost
from ..hsa.config import HSAConfig
from .generate import shown
from .logs import silence_libraries
from .options import Command
from .ranks import group_here, once, settled_here
from .workers.group import WorkerGroup
from .workers.messages import Work


def bench_quality(settings: QualitySettings, command: Command, said: Sequence[str], progress: Progress) -> int:
    """Run the command; returns the exit code.

    Args:
        settings: what to measure.
        command: the model, what all videos have in common, and the ranks.
        said: the command's arguments, which the report names.
        progress: shows how far it is.

    Raises:
        HeterostepError: a setting, the model or a request is wrong, or the work failed.
    """
    silence_libraries(downloads=progress.shown)
    old = None if settings.compare is None else results.read(settings.compare)
    facts = read_facts(command.engine.model)
    prompts = read_prompts(settings, facts, _image(command.request))
    preset = None if settings.preset is None else PRESETS[settings.preset]
    solver = settings.scheduler or (preset.scheduler if preset is not None else None)
    shift = settings.shift if settings.shift is not None else (preset.shift if preset is not None else None)
    request, hsa = _request(command.request, preset.request if preset is not None else {}), command.engine.hsa
    identity = {"model": facts.name, "scheduler": solver, "shift": shift, "versions": versions()}
    identity |= {"request": _plain(request), "hsa": dataclasses.asdict(hsa or HSAConfig())}
    identity |= _machinery(command)
    folder = Path(settings.output)
    store = Store(folder, identity)
    # What can be wrong is checked before anything is written.
    bench = QualityBench(settings, facts, prompts, request, hsa or HSAConfig(), store, progress.say)
    for prompt in prompts:
        for method in bench.policies:
            rehearse(facts, bench.allocation_of(method, prompt.name), bench.resolved[prompt.name])
    store.prepare()
    model = with_scheduler(facts, folder / "model", solver, shift)
    command = dataclasses.replace(command, engine=dataclasses.replace(command.engine, model=model), request=request)
    with _maker(command, bench.policies[0].hsa if bench.policies else None, progress) as maker:
        estimate = bench.estimate(maker)
        progress.say(str(estimate))
        if settings.estimate:
            return 0
        bench.run(maker)
    resolved = bench.resolved[prompts[0].name]
    facts_of_report = {
        "command": shlex.join(["heterostep", *said]),
        "model": facts.name,
        "prompts": len(prompts),
        "request": {**_plain(resolved), "prompt": None},
        "scheduler": f"{read_scheduler(read_facts(model))[0]}"
        + (f" with shift {shift:g}" if shift is not None else ""),
        "ranks": command.ranks.size,
        "device": device_name(pick_device(command.engine.device)),
        "versions": versions(),
    }
    default = (listed(settings.policies) or ["joint"])[0]
    for path in report.write(store, list(bench.requests), facts_of_report, default, settings.preset):
        progress.say(f"wrote {path}")
    if old is not None:
        new = results.read(folder / "report.json")
        for line in results.said_changes({"changes": results.changes(new, old)}):
            progress.say(line)
    return 0


def _image(request: GenerateRequest) -> str | None:
    return None if request.image is None else str(request.image)


def _plain(request: GenerateRequest) -> dict[str, Any]:
    """What all videos have in common, ready for JSON."""
    return {name: value for name, value in dataclasses.asdict(request).items() if name not in ("prompt", "image")}


def _machinery(command: Command) -> dict[str, Any]:
    """What all videos are made with: it changes their values or the time that they take."""
    fields = (item.name for item in dataclasses.fields(command.engine))
    engine = {name: getattr(command.engine, name) for name in fields if name not in ("model", "hsa", "parallel")}
    ranks = {"size": command.ranks.size, "shard_weights": command.shard_weights, **command.degrees}
    return {"engine": engine, "ranks": ranks}


def _request(given: GenerateRequest, preset: Any) -> GenerateRequest:
    """The request with the preset's values where nothing else was given."""
    missing = {name: value for name, value in preset.items() if getattr(given, name) is None}
    if given.seconds is not None:
        missing.pop("num_frames", None)
    return dataclasses.replace(given, **missing)


@contextlib.contextmanager
def _maker(command: Command, first: HSAConfig | None, progress: Progress) -> Iterator[Any]:
    """Whatever makes the videos, as long as it is needed; `first` is the first policy's allocation."""
    if command.ranks.size == 1:
        progress.stage(f"loading model {command.engine.model}")
        yield OneRank(command.engine, lambda events, label: _with_frames(shown(events, label, progress)))
        return
    with contextlib.closing(Ranks(command, first, progress)) as ranks:
        yield ranks


@contextlib.contextmanager
def makers(command: Command, replicas: int, progress: Progress) -> Iterator[list[Maker]]:
    """So many makers beside each other; only one alone shows its steps, and computes in this process if it can."""
    if replicas == 1:
        with _maker(command, command.engine.hsa, progress) as maker:
            yield [maker]
        return
    quiet = Progress(False)
    made = [Ranks(command, command.engine.hsa, quiet, index) for index in range(replicas)]
    progress.stage(f"{replicas} replicas make videos")
    try:
        yield list(made)
    finally:
        for each in made:
            each.close()


class Ranks:
    """Makes videos on ranks of this machine: a worker group for each allocation, one after the other.

    Attributes:
        pipeline: None: other processes have it.
    """

    pipeline = None

    def __init__(self, command: Command, first: HSAConfig | None, progress: Progress, index: int = 0) -> None:
        """Start nothing yet; the group of the allocation `first` makes the dense videos too, so that one is started.

        `index` is its number among those beside each other, which chooses its GPUs.
        """
        self._command, self._first, self._progress, self._index = command, first, progress, index
        self._group: WorkerGroup | None = None
        self._open_now = contextlib.ExitStack()
        self._hsa: HSAConfig | None = None
        self._on_loss: Callable[[RankLost], None] = lambda lost: None

    def make(self, request: GenerateRequest, hsa: HSAConfig | None, label: str) -> VideoOutput:
        """Make a video; see `Maker`."""
        # The share is the request's; the stock pipeline is a share of 1 where no other solver is asked for.
        first = self._first if self._first is not None and self._first.solver is None else None
        other = hsa if hsa is not None else first
        other = None if other is None else dataclasses.replace(other, compute=1.0)
        request = dataclasses.replace(request, compute=1.0 if hsa is None else hsa.compute)
        stock = hsa is None and (self._hsa is None or self._hsa.solver is None)
        if self._group is None or not (stock or other == self._hsa):
            self._open(other)
        assert self._group is not None
        show = lambda events, text: shown(events, text, self._progress)  # noqa: E731
        return _with_frames(once(self._group, Work(request=request), None, show, self._on_loss, label)[0])

    def _open(self, hsa: HSAConfig | None) -> None:
        self.close()
        command = dataclasses.replace(self._command, engine=dataclasses.replace(self._command.engine, hsa=hsa))
        config, reason = settled_here(command)
        opened = group_here(command, config, reason, self._progress, self._index)
        self._group, self._on_loss = self._open_now.enter_context(opened)
        self._open_now.callback(self._group.close)
        self._hsa = hsa

    def close(self) -> None:
        """End the ranks."""
        self._open_now.close()
        self._group = None


def _with_frames(video: VideoResult) -> VideoOutput:
    """A video that was made without a sink for its frames, and so has them."""
    assert isinstance(video, VideoOutput)
    return video
