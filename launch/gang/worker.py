"""What a rank does: it meets the others, loads the model, and makes its part of videos."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore

from ...engine.denoise.preview import Preview
from ...engine.denoise.work_split import Sharding
from ...engine.engine import Engine
from ...engine.facts import first_line, read_facts
from ...engine.media.files import checkpoint_steps
from ...engine.record import run_record
from ...engine.request import EngineConfig, Event, JobConfig, StepDone, VideoOutput
from ...errors import TOO_LARGE, Cancelled, ConfigError, RequestError, is_out_of_memory
from ...parallel.config import ParallelConfig
from ...parallel.mesh import ParallelMesh
from ..degrees import refit
from ..logs import silence_libraries
from ..rank import JOIN_SECONDS
from ..resume import go_on
from .copies import read_copies, write_copies
from .messages import Outcome, Place, Progress, Work
from .outbox import Outbox

_PREVIEW_SIDE, _PREVIEW_QUALITY = 320, 60


class RankWorker:
    """A rank's model, and its ties to the other ranks."""

    def __init__(self, outbox: Outbox) -> None:
        """Start with neither."""
        silence_libraries()
        self._outbox = outbox
        self._engine: Engine | None = None
        self._preview: Preview | None = None
        self._store: TCPStore | None = None
        self._place: Place | None = None
        # Of this life: making groups anew for every request that needs other degrees would use up sockets.
        self._shardings: dict[ParallelConfig, Sharding] = {}
        self._work, self._wishes = "", dict[str, str]()

    def open_store(self, address: str) -> tuple[str, int]:
        """Open a store on a port that is free for sure; a new one for each life, for the last holds dead addresses."""
        self._store = TCPStore(
            address, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=JOIN_SECONDS)
        )
        return address, self._store.port

    def prepare(self, place: Place, config: EngineConfig, work: Work | None) -> Outcome:
        """Meet the other ranks, and get the model ready.

        Args:
            place: in this life of the gang.
            config: of the engine; `parallel` is chosen here.
            work: what comes next, if that is known: its degrees are used from the start.
        """
        try:
            self._leave()
            self._set_threads(place.threads or max(1, (os.cpu_count() or 1) // place.neighbours))
            self._meet(place, config.device)
            self._place = place
            degrees = self._degrees(config, work)
            engine = self._engine
            if engine is None or config.shard_weights or (place.rank == 0 and not engine.reads):
                self._engine = self._preview = engine = None  # its memory first
                shards = config.shard_weights and degrees is not None
                config = dataclasses.replace(config, parallel=degrees, shard_weights=shards)
                self._engine = engine = Engine(config)
                if degrees is not None and engine.sharding is not None:
                    self._shardings[degrees] = engine.sharding
            self._regroup(engine, degrees)
        except Exception as error:
            return self._failed(error)
        return Outcome(ended="done")

    def warm(self, config: EngineConfig, threads: int | None) -> Outcome:
        """Load the whole model, so that this process can become any rank."""
        try:
            self._set_threads(threads or 1)
            self._engine = Engine(dataclasses.replace(config, parallel=None, shard_weights=False))
        except Exception as error:
            return self._failed(error)
        return Outcome(ended="done")

    def wish(self, work: str, verb: str) -> None:
        """Let a piece of work end within one step; the ranks agree on which."""
        self._wishes[work] = verb
        if work == self._work:
            self._end(verb)

    def _end(self, verb: str) -> None:
        assert self._engine is not None, "there is work"
        if verb == "cancel":
            self._engine.cancel()
        else:
            self._engine.save_and_stop()

    def make(self, work: Work) -> Outcome:
        """Do this rank's part of a video: rank 0 tells how it goes, and has the result."""
        self._outbox.begin(work.id)
        self._work = work.id
        copier = _Copier(work.copies, self._outbox) if work.copies is not None and self._leads else None
        try:
            if copier is not None:
                work = dataclasses.replace(work, state=str(copier.folder))
            return self._make(work, copier)
        except Exception as error:
            return self._failed(error)
        finally:
            if copier is not None:
                copier.close()
            self._work = ""
            self._wishes.clear()

    @property
    def _leads(self) -> bool:
        return self._place is not None and self._place.rank == 0

    def _make(self, work: Work, copier: _Copier | None) -> Outcome:
        engine = self._engine
        assert engine is not None and self._place is not None, "prepare comes before make"
        self._regroup(engine, self._degrees(engine.config, work))
        preview = self._previewer(engine) if work.previews and self._leads else None
        output = None
        for event in self._events(engine, work):
            verb = self._wishes.get(work.id)
            if verb is not None:  # perhaps before there was a run that could be told
                self._end(verb)
            if isinstance(event, VideoOutput):
                output = event
            elif self._leads:
                if isinstance(event, StepDone):
                    event = dataclasses.replace(event, preview=_picture(preview))
                self._outbox.put(Progress(event=event))
                if copier is not None:
                    copier.copy()
        assert output is not None, "a stream ends with a VideoOutput or an exception"
        return self._result(engine, preview, work, output) if self._leads else Outcome(ended="done")

    def _events(self, engine: Engine, work: Work) -> Iterator[Event]:
        if work.state is None and work.copies is None:
            return engine.stream(work.request)
        # Of the other ranks none looks into the folder, but all must know that there is one.
        job = JobConfig(folder=work.state or "of rank 0", checkpoint_every=work.checkpoint_every)
        return go_on(engine, work.request, job, anew=work.files)

    def _result(self, engine: Engine, preview: Preview | None, work: Work, output: VideoOutput) -> Outcome:
        imbalances = [step.parallel.imbalance for step in output.report.steps if step.active and step.parallel]
        if not work.files:
            record = run_record(engine, output)
            return Outcome(ended="done", output=output, record=record, seconds=output.seconds, imbalances=imbalances)
        from ..service.render import write_files

        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="heterostep-result-") as folder:
            hsa = write_files(Path(folder), engine, output)
            files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        if preview is not None:
            preview.learn(output.latents, output.frames)
        seconds = time.perf_counter() - start
        timing = {**output.seconds, "write": seconds, "total": output.seconds["total"] + seconds}
        return Outcome(ended="done", files=files, hsa=hsa, seconds=timing, imbalances=imbalances)

    def _degrees(self, config: EngineConfig, work: Work | None) -> ParallelConfig | None:
        """The degrees for some work, on as many ranks as there are; the same on each of them."""
        assert self._place is not None
        facts = read_facts(config.model)
        guidance = None if work is None else work.request.guidance_scale
        guidance = facts.defaults.guidance_scale if guidance is None else guidance
        asked = work.parallel if work is not None else None
        return refit(asked, self._place.size, facts.shared_heads, facts.passes(guidance))

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

    def _set_threads(self, count: int) -> None:
        if torch.get_num_threads() != count:
            torch.set_num_threads(count)

    def _meet(self, place: Place, device: str) -> None:
        """Join the process group of this life."""
        if place.size == 1:
            return
        wait = timedelta(seconds=JOIN_SECONDS)
        own = self._store if place.rank == 0 else None
        store = own or TCPStore(place.address, place.port, is_master=False, timeout=wait)
        cuda = device != "cpu" and torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(0)  # Ray shows a rank no other
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=PrefixStore(f"life_{place.life}", store),
            rank=place.rank,
            world_size=place.size,
            timeout=timedelta(seconds=place.collective_seconds),
        )

    def _leave(self) -> None:
        """Give up the process groups, so that peers that still wait in them are set free."""
        self._shardings.clear()
        with contextlib.suppress(Exception):  # whatever their state is
            if dist.is_initialized():
                dist.destroy_process_group()

    def _failed(self, error: Exception) -> Outcome:
        """Say how an exception ends this rank's part."""
        if isinstance(error, Cancelled):
            return Outcome(ended="stopped", message=str(error))
        if isinstance(error, RequestError | ConfigError):
            return Outcome(ended="refused", message=str(error))
        root = error.__cause__ if error.__cause__ is not None else error
        self._leave()
        message = f"{type(root).__name__}: {first_line(root)}"
        if is_out_of_memory(root):
            return Outcome(ended="failed", cause="memory", message=TOO_LARGE)
        return Outcome(ended="failed", cause=_cause(root), message=message)


class _Copier:
    """A folder of rank 0's own for a job whose folder it cannot reach; what is saved there is sent to the driver."""

    def __init__(self, files: Mapping[str, bytes], outbox: Outbox) -> None:
        """Begin with the job's files."""
        self.folder = Path(tempfile.mkdtemp(prefix="heterostep-job-"))
        self._outbox, self._known = outbox, set(files)
        self._newest: int | None = None
        write_copies(self.folder, files, ())

    def copy(self) -> None:
        """Send what is new since the last time, if a step was saved."""
        newest = next(iter(checkpoint_steps(self.folder)), None)
        if newest != self._newest:
            self._newest = newest
            self._send()

    def close(self) -> None:
        """Send the rest, and remove the folder."""
        self._send()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _send(self) -> None:
        copies = read_copies(self.folder, self._known)
        self._known |= copies.keys()
        self._outbox.put(Progress(event=None, copies=copies))


def _cause(error: BaseException) -> str:
    """Whether an error is this rank's own, or only tells that the others did not answer."""
    text = str(error)
    if "imed out" in text or "imeout" in text:
        return "timeout"
    return "peer" if isinstance(error, dist.DistError) or "gloo" in text or "onnection" in text else "error"


def _picture(preview: Preview | None) -> bytes | None:
    picture = preview.take() if preview is not None else None
    if picture is None:
        return None
    from ..service.render import webp

    return webp(picture, _PREVIEW_SIDE, _PREVIEW_QUALITY)
