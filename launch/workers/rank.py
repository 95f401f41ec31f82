"""What a rank does: it meets the others, loads the model, makes its part of videos, and writes a result's files."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ...engine.config import EngineConfig
from ...engine.denoise.long_video import windows_of
from ...engine.denoise.preview import Preview
from ...engine.denoise.work_split import Sharding
from ...engine.engine import Engine
from ...engine.facts import first_line, read_facts
from ...engine.record import Comparison, run_record
from ...engine.request import Event, FrameSink, GenerateRequest, JobConfig, StepDone, VideoResult, resolve
from ...errors import (
    TOO_LARGE,
    Cancelled,
    ConfigError,
    Interrupted,
    JobDiffers,
    JobInUse,
    RequestError,
    is_out_of_memory,
)
from ...parallel.config import ParallelConfig
from ...parallel.mesh import ParallelMesh
from ..logs import silence_libraries
from .messages import FILES, PEER, Copier, GroupConfig, Outcome, Place, Progress, Work
from .render import Rendering, Writers, frame_writers, service_writers, summary, webp, write_report
from .rendezvous import JOIN_SECONDS, join_group, measure_link, refit

_PREVIEW_SIDE, _PREVIEW_QUALITY = 320, 60
# A process that was killed holds its job's folder until the system has cleared it away.
_TRIES, _PAUSE_SECONDS = 80, 0.25
# How long a result waits for room in the system's folder for temporary files.
_ROOM_SECONDS = 600.0


def resume_job(
    engine: Engine, request: GenerateRequest, job: JobConfig, sink: FrameSink | None = None, *, anew: bool
) -> Iterator[Event]:
    """Make a video, or resume it where it was saved, as `Engine.stream` does.

    An earlier process may have begun the job, and may not have let go of it yet. Every rank calls this, and all come to
    the same decisions: what the job's folder says reaches them alike.

    Args:
        engine: idle.
        request: what to make.
        job: where it is kept.
        sink: as for `Engine.stream`.
        anew: whether to start over, instead of raising ConfigError, where the folder holds what other settings or
            another version of heterostep saved.
    """
    for left in reversed(range(_TRIES)):  # counted, not timed: every rank must count alike
        try:
            yield from engine.stream(request, job, sink)
            return
        except JobInUse:
            if not left:
                raise
            time.sleep(_PAUSE_SECONDS)
        except JobDiffers:
            if not anew:
                raise
            job = dataclasses.replace(job, resume="never")


class RoomWait:
    """Waits for room in the system's folder for temporary files: says so once, and gives up after ten minutes."""

    def __init__(self, stop_request: Callable[[], str | None]) -> None:
        """Begin at the first call; `stop_request` is as in `Rank`."""
        self._stop_request = stop_request
        self._deadline: float | None = None

    def __call__(self, error: OSError) -> None:
        """Pause before the next try.

        Raises:
            Cancelled: after a stop request; `Interrupted` if the job is kept.
            RequestError: the disk was full for too long.
        """
        verb = self._stop_request()
        if verb in ("cancel", "stop"):
            said = "ended while the disk was full"
            raise (Cancelled(said) if verb == "cancel" else Interrupted(said, 0)) from error
        folder, now, minutes = tempfile.gettempdir(), time.monotonic(), _ROOM_SECONDS / 60
        if self._deadline is None:
            self._deadline = now + _ROOM_SECONDS
            log = logging.getLogger("heterostep")
            log.warning("heterostep: the disk of %s is full; the result waits up to %.0f minutes", folder, minutes)
        if now >= self._deadline:
            raise RequestError(
                f"the video is made, but its files could not be written: the disk of {folder} was full for "
                f"{minutes:.0f} minutes; free some of it, or let TMPDIR name a folder of another disk, and ask again"
            ) from error
        time.sleep(_PAUSE_SECONDS)


class Rank:
    """A rank's model, and its ties to the other ranks."""

    def __init__(self, report: Callable[[Progress], None], stop_request: Callable[[], str | None]) -> None:
        """Start with neither.

        Args:
            report: sends what happens to the driver.
            stop_request: the verb of the stop request for the present order, if there is one.
        """
        silence_libraries()
        self._report, self._stop_request = report, stop_request
        self._engine: Engine | None = None
        self._preview: Preview | None = None
        self._store: TCPStore | None = None
        self._place: Place | None = None
        self._group: GroupConfig | None = None
        self._link: tuple[float, float] | None = None
        self._comparison: Comparison | None = None
        # Process groups by degrees, for this rendezvous: creating them for every request leaks sockets.
        self._shardings: dict[ParallelConfig, Sharding] = {}

    def do(self, what: str, *arguments: object) -> Outcome:
        """Carry out an order: `open_store`, `join`, `load` or `make`."""
        try:
            outcome: Outcome = getattr(self, what)(*arguments)
        except Exception as error:
            outcome = self._failed(error)
        # Others may wait in the groups. A request that every rank refuses alike leaves them usable.
        if outcome.ended == "failed" or (outcome.ended == "refused" and what == "join"):
            self._leave()  # now that the exception is gone, which held tensors and groups
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return outcome

    def open_store(self, address: str) -> Outcome:
        """Open a store on a port that is free for sure; a new one for each rendezvous, at which the ranks meet."""
        wait = timedelta(seconds=JOIN_SECONDS)
        self._store = TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=wait)
        return Outcome(port=self._store.port)

    def join(self, place: Place, group: GroupConfig, config: EngineConfig, work: Work | None) -> Outcome:
        """Meet the other ranks, and get the model ready.

        Args:
            place: in this rendezvous of the group.
            group: its settings.
            config: of the engine, but for what is the group's.
            work: what comes next, if that is known: the degrees for it are used from the start.
        """
        self._leave()
        self._place, self._group = place, group
        device = _device(config.device, place)
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        _set_threads(place, group.threads)
        self._meet(place, group, device)
        self._link = measure_link(place.rank, place.machines)
        degrees = self._degrees(config, work)
        engine = self._engine
        if engine is None or group.shard_weights or (place.rank == 0 and not engine.reads):
            self._engine = self._preview = engine = None  # its memory first
            shards = group.shard_weights and degrees is not None
            config = dataclasses.replace(config, device=device, parallel=degrees, shard_weights=shards)
            self._engine = engine = Engine(config)
            if degrees is not None and engine.sharding is not None:
                self._shardings[degrees] = engine.sharding
        self._regroup(engine, degrees)
        return Outcome(device=str(engine.device), link=self._link)

    def load(self, config: EngineConfig, threads: int | None) -> Outcome:
        """Load the whole model, to stand by until a rank dies."""
        torch.set_num_threads(threads or 1)
        self._engine = Engine(config)
        return Outcome()

    def make(self, work: Work) -> Outcome:
        """Do this rank's part of a video: rank 0 tells how it goes, and has the result."""
        if work.copies is None or not self._leads:
            return self._make(work, None)
        with contextlib.closing(Copier(work.copies, self._report)) as copier:
            return self._make(dataclasses.replace(work, folder=str(copier.folder)), copier)

    def stop(self, verb: str) -> None:
        """Let the video being made end, as `StopRequest` says; the ranks agree on the step."""
        engine = self._engine
        if engine is not None:
            if verb == "cancel":
                engine.cancel()
            elif verb == "pause":
                engine.stop_when_saved()
            else:
                engine.save_and_stop()

    @property
    def _leads(self) -> bool:
        return self._place is not None and self._place.rank == 0

    def _make(self, work: Work, copier: Copier | None) -> Outcome:
        engine = self._engine
        assert engine is not None and self._place is not None, "join comes before make"
        self._regroup(engine, self._degrees(engine.config, work))
        if engine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(engine.device)  # what is reported is this video's
        preview = self._previewer(engine) if work.previews and self._leads else None
        with Rendering(functools.partial(_writers, work, preview), RoomWait(self._stop_request)) as rendering:
            output = None
            for event in self._events(engine, work, self._sink(work, rendering)):
                verb = self._stop_request()
                if verb is not None:  # perhaps before there was a run that could be told
                    self.stop(verb)
                if isinstance(event, VideoResult):
                    output = event
                elif self._leads:
                    if isinstance(event, StepDone):
                        event = dataclasses.replace(event, preview=_picture(preview))
                    self._report(Progress(event=event))
                    if copier is not None:
                        copier.copy()
            assert output is not None, "a stream ends with a video or an exception"
            return self._result(engine, rendering, work, output) if self._leads else Outcome()

    def _events(self, engine: Engine, work: Work, sink: FrameSink | None) -> Iterator[Event]:
        if work.folder is None and work.copies is None:
            return engine.stream(work.request, sink=sink)
        # Of the other ranks none looks into the folder, but all must know that there is one.
        job = JobConfig(folder=work.folder or "of rank 0", checkpoint_every=work.checkpoint_every)
        return resume_job(engine, work.request, job, sink, anew=work.files)

    def _sink(self, work: Work, rendering: Rendering) -> FrameSink | None:
        """Where the frames go; None: to the driver, with the video."""
        if not work.files and work.wanted is None:
            return None
        if work.compare == "first":
            self._comparison = Comparison()
            return self._comparison.first(rendering)
        if work.compare == "second":
            if self._comparison is None:  # another process had it
                raise RequestError("the rank with the first video was lost before the comparison: repeat the command")
            return self._comparison
        return rendering

    def _result(self, engine: Engine, rendering: Rendering, work: Work, output: VideoResult) -> Outcome:
        imbalances = [step.parallel.imbalance for step in output.report.steps if step.active and step.parallel]
        if not work.files:
            record = run_record(engine, output)
            if self._link is not None:
                record["link"] = {"message_seconds": self._link[0], "bytes_per_second": self._link[1]}
            return Outcome(
                output=output,
                record=record,
                files=rendering.read() if work.wanted else None,
                quality=self._comparison.quality if work.compare == "second" and self._comparison else None,
                seconds=output.seconds,
                imbalances=imbalances,
            )
        start = time.perf_counter()
        rendering.write(FILES["report"][0], lambda path: write_report(path, engine, output))
        files, hsa = rendering.read(), summary(output, engine.device)
        seconds = time.perf_counter() - start
        timing = {**output.seconds, "write": seconds, "total": output.seconds["total"] + seconds}
        return Outcome(files=files, hsa=hsa, seconds=timing, imbalances=imbalances)

    def _degrees(self, config: EngineConfig, work: Work | None) -> ParallelConfig | None:
        """The degrees for some work, on as many ranks as there are; the same on each of them."""
        assert self._place is not None and self._group is not None
        facts = read_facts(config.model)
        guidance = None if work is None else work.request.guidance_scale
        guidance = facts.defaults.guidance_scale if guidance is None else guidance
        windows = 1
        given = work is None or work.request.image is not None or work.request.video is not None
        if work is not None and not given and not self._group.shard_weights:
            with contextlib.suppress(RequestError):  # which the engine says
                windows, _ = windows_of(facts, resolve(work.request, facts))
        place, branches = self._place, facts.passes(guidance)
        return refit(self._group.degrees, place.size, facts.shared_heads, branches, windows, place.machines)

    def _regroup(self, engine: Engine, degrees: ParallelConfig | None) -> None:
        """Let the engine share its next videos as `degrees` say; sharded weights stay as they were shared."""
        if engine.config.shard_weights:
            return
        if degrees is not None and degrees not in self._shardings:
            self._shardings[degrees] = Sharding(ParallelMesh.create(degrees, engine.device), degrees)
        engine.regroup(None if degrees is None else self._shardings[degrees])

    def _previewer(self, engine: Engine) -> Preview:
        if self._preview is None:
            self._preview = Preview(engine.pipeline)
        return self._preview

    def _meet(self, place: Place, group: GroupConfig, device: str) -> None:
        """Join the process group of this rendezvous."""
        if place.size == 1:
            return
        wait = timedelta(seconds=JOIN_SECONDS)
        own = self._store if place.rank == 0 else None
        store = own or TCPStore(place.address, place.port, is_master=False, timeout=wait)
        cuda = device.startswith("cuda")
        name = f"rendezvous_{place.rendezvous}"
        join_group(store, name, place.rank, place.size, cuda=cuda, seconds=group.collective_seconds)

    def _leave(self) -> None:
        """Give up the process groups, so that peers that still wait in them are set free."""
        self._shardings.clear()
        if self._engine is not None:
            self._engine.sharding = None
        with contextlib.suppress(Exception):  # whatever their state is
            if dist.is_initialized():
                dist.destroy_process_group()
        gc.collect()  # connections are closed with the last reference to a group

    def _failed(self, error: Exception) -> Outcome:
        """Say how an exception ends this rank's part."""
        if isinstance(error, Interrupted):
            return Outcome(ended="stopped", message=str(error), saved=error.step)
        if isinstance(error, Cancelled):
            return Outcome(ended="cancelled", message=str(error))
        if isinstance(error, RequestError | ConfigError):
            return Outcome(ended="refused", message=str(error))
        root = error.__cause__ if error.__cause__ is not None else error
        if is_out_of_memory(root):
            return Outcome(ended="failed", cause="memory", message=TOO_LARGE)
        return Outcome(ended="failed", cause=_cause(root), message=f"{type(root).__name__}: {first_line(root)}")


def _device(name: str, place: Place) -> str:
    """The device of a rank: with "auto" and "cuda" a GPU of its own, as far as they go."""
    if place.size > 1 and name.startswith("cuda:"):
        raise ConfigError(
            f"--device {name} with {place.size} ranks: each takes a GPU of its own; take cuda, cpu or auto"
        )
    count = torch.cuda.device_count() if name in ("auto", "cuda") and torch.cuda.is_available() else 0
    if count and place.gpu is None:
        return "cuda:0"
    if count and place.neighbours > count:
        raise ConfigError(
            f"{place.neighbours} ranks need as many GPUs, but there are {count}: ask for fewer ranks, or compute on "
            "the CPU with --device cpu"
        )
    return f"cuda:{(place.gpu or 0) % count}" if count else name


def _set_threads(place: Place, threads: int | None) -> None:
    """Share the cores of the machine among its ranks; PyTorch's own choice stays where there is one rank."""
    if threads is None and place.neighbours == 1 and "OMP_NUM_THREADS" not in os.environ:
        return
    count = threads or max(1, (os.cpu_count() or 1) // place.neighbours)
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


def _cause(error: BaseException) -> str:
    """Whether an error is this rank's own, or only tells that the others did not answer."""
    text = str(error)
    if "imed out" in text or "imeout" in text:
        return "timeout"
    return PEER if isinstance(error, dist.DistError) or "gloo" in text or "onnection" in text else "error"


def _writers(work: Work, preview: Preview | None, video: VideoResult) -> Writers:
    """What writes the files that some work wants of a video."""
    if work.files:
        learn = None if preview is None else lambda frames: preview.learn(video.latents, frames, video.shape)
        return service_writers(video, learn)
    writers = frame_writers(video, work.scale)
    return {f"{name}.mp4": writers[name] for name in work.wanted or ()}


def _picture(preview: Preview | None) -> bytes | None:
    picture = preview.take() if preview is not None else None
    if picture is None:
        return None
    return webp(picture, _PREVIEW_SIDE, _PREVIEW_QUALITY)
