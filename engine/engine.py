"""The engine: a request becomes a video, through the stock diffusers pipeline."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from ..errors import Cancelled, ConfigError, HeterostepError, Interrupted, RankFailure, RequestError, is_out_of_memory
from ..hsa.config import HSAConfig
from .checkpoint import identity_of
from .config import EngineConfig
from .decoding import deliver, finish, look_up
from .denoise.inputs import encode_prompts, seen_image
from .denoise.long_video import opening, worded_windows
from .denoise.schedulers import shifted
from .denoise.session import apply, remove
from .denoise.work_split import Sharding
from .facts import first_line, read_facts
from .features import Loras, Offload
from .job import Job
from .loading import as_pipeline, load_pipeline, pick_device, pick_dtype
from .memory import Room
from .models import adapter_named
from .models.base import check_finite
from .progress import Progress as Shown
from .report import HSAReport
from .request import (
    Decoding,
    Event,
    FrameSink,
    GenerateRequest,
    JobConfig,
    ResolvedRequest,
    Started,
    StepDone,
    VideoOutput,
    VideoResult,
    allocation,
    prepare,
)
from .sources import Sources
from .steps import Progress, StepEvents, Stop, Work, dense_report, started
from .stored import source_of

__all__ = [
    "Cancelled",
    "Decoding",
    "Engine",
    "EngineConfig",
    "GenerateRequest",
    "Interrupted",
    "JobConfig",
    "Started",
    "StepDone",
    "VideoOutput",
]

T = TypeVar("T")


class Engine:
    """A loaded model that makes one video at a time.

    Example:
        >>> engine = Engine(EngineConfig(model="demo"))
        >>> video = engine.generate(GenerateRequest(prompt="a red disc moves right", compute=0.5))
        >>> video.frames.shape
        (17, 64, 64, 3)

    Attributes:
        config: as given.
        facts: the model's sizes and defaults.
        device: where the model is.
        dtype: of text encoder and transformer.
        pipeline: the stock diffusers pipeline; load LoRA weights into it, or offload it, as usual.
        load_seconds: how long loading took.
        sharding: how the work is shared with other ranks; None on one rank.

    Raises:
        ConfigError: the model cannot be loaded, or the device is not there, or the ranks do not fit the degrees.
    """

    def __init__(self, config: EngineConfig | None = None) -> None:
        start = time.perf_counter()
        self.config = config if config is not None else EngineConfig()
        self.facts = read_facts(self.config.model)
        self.device = pick_device(self.config.device)
        self.dtype = pick_dtype(self.config.dtype, self.device)
        self.sharding = Sharding.of_ranks(self.config.parallel, self.device)
        # One rank reads the prompts for all: the text encoder may be larger than a rank's share of all else.
        shards = self.sharding.mesh if self.sharding is not None and self.config.shard_weights else None
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else None
        self._room = Room(self.device.type, free)
        offload = self._room.usual(self.config, self.facts)
        self.pipeline = load_pipeline(
            self.facts, self.config, self.device, self.dtype, text=self.leads, offload=offload, shards=shards
        )
        self._adapter = adapter_named(self.facts.pipeline)
        self._offload = Offload(self.pipeline, self._adapter, self.device, offload)
        self._loras = Loras(self._adapter, self.pipeline, self.device)
        self.load_seconds = time.perf_counter() - start
        self._busy = threading.Lock()
        self._stop = Stop()

    @property
    def leads(self) -> bool:
        """Whether this rank reads prompts, keeps jobs and decodes; true on one rank."""
        return self.sharding is None or self.sharding.agreement.leads

    @property
    def reads(self) -> bool:
        """Whether it has the text encoder, and so can lead."""
        return self.pipeline.text_encoder is not None

    def regroup(self, sharding: Sharding | None) -> None:
        """Share the next videos with these ranks; None: with none. The weights stay where they are.

        Raises:
            ConfigError: the weights are sharded over other ranks, or this rank is to lead but cannot read prompts.
        """
        if self.config.shard_weights:
            raise ConfigError(
                "sharded weights belong to the ranks that loaded them: reload the model to use other ranks"
            )
        if not self.reads and (sharding is None or sharding.agreement.leads):
            raise ConfigError("this rank has no text encoder, so it cannot be rank 0: reload the model on it")
        parallel = None if sharding is None else sharding.config
        self.config, self.sharding = dataclasses.replace(self.config, parallel=parallel), sharding

    def generate(
        self, request: GenerateRequest, job: JobConfig | None = None, *, progress: bool | None = None
    ) -> VideoOutput:
        """Make a video and wait for it; errors as for `stream`.

        Args:
            request: as for `stream`.
            job: as for `stream`.
            progress: whether stderr shows how far it is, on rank 0: a bar in a terminal or notebook, elsewhere lines;
                None: if it is a terminal or notebook.

        Returns:
            The video.
        """
        for event in Shown(progress if self.leads else False).follow(self.stream(request, job)):
            if isinstance(event, VideoOutput):
                return event
        raise AssertionError("a stream ends with a VideoOutput or an exception")

    def stream(
        self, request: GenerateRequest, job: JobConfig | None = None, sink: FrameSink | None = None
    ) -> Iterator[Event]:
        """Make a video and tell how it goes.

        The stock pipeline runs in a thread of its own. Closing the iterator early (`break` out of the loop,
        an exception, Ctrl-C) stops the run after the current step; with a job that step is saved.

        Args:
            request: checked here, before the iterator is returned.
            job: a folder in which the work survives this process: the run resumes where an earlier one of the same
                job was saved, and one that is finished already gives its video without computing anything.
            sink: takes the frames while later ones are decoded, so that they are never in memory together; None: they
                come with the video. On many ranks each is given one, and that of rank 0 gets the frames.

        Returns:
            An iterator over one `Started`, a `StepDone` for each step, one `Decoding`, and last the
            `VideoOutput`, or with a sink the `VideoResult`.

        Raises:
            RequestError: the request does not fit the model, or (at the first event) a video is being made
                already.
            ConfigError: at the first event: the job's folder cannot be used, is in use, or holds another job.
            Cancelled: from the iterator, after `cancel`.
            Interrupted: from the iterator, after `save_and_stop`.
        """
        return self._events(*prepare(request, self.facts), job, sink)

    def cancel(self) -> None:
        """Stop the video being made after its current step; callable from any thread. No-op when idle."""
        self._stop.asked = True

    def save_and_stop(self) -> None:
        """Stop the video being made after its current step, and save that; from any thread or signal handler.

        The run ends with `Interrupted`. Without a job it is `cancel`. A run that is decoding is saved already, and ends
        by itself. No-op when idle.
        """
        self._stop.save = True
        self._stop.asked = True

    def stop_when_saved(self) -> None:
        """Stop the video being made after the next step that is saved anyway, as `save_and_stop` does.

        A resumed run then has the plan of an unbroken one. A run without such a step goes on to its end.
        """
        self._stop.saved = True

    def _events(
        self, request: ResolvedRequest, sources: Sources, job: JobConfig | None, sink: FrameSink | None
    ) -> Iterator[Event]:
        if not self._busy.acquire(blocking=False):
            raise RequestError("this engine is already making a video; wait for it, cancel it, or use a second engine")
        self._stop = stop = Stop()
        events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()

        # A thread begins on the first GPU, wherever the thread that starts it is.
        current = torch.cuda.current_device() if self.device.type == "cuda" else None

        def work() -> None:
            outcome: Event | BaseException
            try:
                if current is not None:
                    torch.cuda.set_device(current)
                outcome = self._run(request, sources, job, sink, events.put, stop)
            except BaseException as error:  # it is raised again in the caller's thread
                outcome = error
            self._busy.release()
            events.put(outcome)

        # A daemon, so that a second Ctrl-C ends the process even inside a step that takes minutes.
        worker = threading.Thread(target=work, name="heterostep-engine", daemon=True)
        try:
            worker.start()
        except BaseException:  # the system had no thread to give
            self._busy.release()
            raise
        try:
            while True:
                event = events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, VideoResult):
                    return
        finally:
            if not stop.asked:  # abandoned: what is done shall not be lost
                stop.save = True
            stop.asked = True
            # An abandoned stream can be collected by whatever thread runs at the time, even by the worker itself.
            if worker is not threading.current_thread():
                worker.join()

    def _run(self, request: ResolvedRequest, sources: Sources, config: JobConfig | None, *way: Any) -> VideoResult:
        """Make the video, from where its job was saved if memory is used up. Runs in the worker thread."""
        again = None if config is None else dataclasses.replace(config, resume="auto")
        configs = iter((config, again))
        return self._with_less(lambda: self._attempt(request, sources, next(configs), *way))

    def _with_less(self, run: Callable[[], VideoResult]) -> VideoResult:
        """Run something, once more with less on the device if its memory is used up."""
        try:
            return run()
        except Exception as error:
            mode = self._offload.cheaper
            if not is_out_of_memory(error) or mode is None or self.sharding is not None:
                raise
            logging.getLogger("heterostep").warning("heterostep: out of memory; going on with offload=%s", mode)
        # Outside of the handler, whose exception holds the tensors of the attempt.
        self._offload.need(mode)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return run()

    def _attempt(
        self,
        request: ResolvedRequest,
        sources: Sources,
        config: JobConfig | None,
        sink: FrameSink | None,
        emit: Callable[[Event], None],
        stop: Stop,
    ) -> VideoResult:
        """Make the video, or find it made.

        Raises:
            RankFailure: something else than heterostep itself found wrong; on many ranks only.
        """
        step = Progress()
        try:
            if self.config.offload == "auto" and self.sharding is None:
                self._offload.need(self._room.settle(self.config, self.facts, request))
            self._loras.put_on(request.lora)
            if config is None:
                return self._make(Work(request, sources, None, None, None, sink, emit, stop, step))
            hsa = allocation(self.config, request)
            identity = identity_of(self.facts, request, hsa, self.dtype, self.pipeline, self.config)
            # All that is saved is alike on all ranks: one reads and writes it.
            job = Job(config, identity) if self.leads else None
            with contextlib.ExitStack() as held:
                found = self._decide(lambda: look_up(job, held, arrays=sink is None))
                work = Work(request, sources, job, config.checkpoint_every, found.saved, sink, emit, stop, step)
                if found.video is None:
                    return self._make(work)
                emit(started(self.facts, request, request.num_inference_steps))
                if found.denoised:
                    return finish(self, found.video, job, sink, emit)
                if sink is not None and job is not None:
                    deliver(job.frames(), sink, found.video)
                return found.video
        except (HeterostepError, Cancelled):
            raise
        except Exception as error:
            if self.sharding is None:
                raise
            axis = self.sharding.mesh.world
            raise RankFailure(
                f"rank {axis.rank} of {axis.size} failed {step.where}: {type(error).__name__}: {first_line(error)}"
            ) from error

    def _make(self, work: Work) -> VideoResult:
        """The life of a request: text, denoising, VAE."""
        request, job, saved = work.request, work.job, work.saved
        work.emit(started(self.facts, request, None if saved is None else saved.step, self))
        start = time.perf_counter()
        pipeline = as_pipeline(self.pipeline, self.facts.pipeline_for(*(source is not None for source in work.sources)))
        embeds = encode_prompts(self._adapter, pipeline, request, self.device, self.sharding)
        encoded = self._clock()
        if self._vote(work.stop.asked):
            raise work.stopped(0 if saved is None else saved.step)
        hsa = allocation(self.config, request)
        with shifted(pipeline, request.flow_shift):
            latents, audio_latents, report, on_step = self._denoised(work, pipeline, hsa, embeds)
        if on_step.stopping:
            raise work.stopped(on_step.done)
        for values in (latents, *(() if audio_latents is None else (audio_latents,))):
            check_finite(values, "the transformer", self.dtype, "a lower --guidance")
        seconds = {"encode_text": encoded - start, "denoise": self._clock() - encoded}
        if job is not None:
            seconds["checkpoint"] = job.seconds
            seconds["denoise"] -= job.seconds
            for stage, earlier in on_step.earlier.items():
                seconds[stage] += earlier
        video = VideoResult(
            fps=request.fps,
            hsa=hsa,
            report=report,
            seconds=seconds,
            latents=latents.float().cpu(),
            request=request,
            audio_latents=None if audio_latents is None else audio_latents.float().cpu(),
        )
        if job is not None:  # the VAE may need more memory than there is
            job.keep_latents(video, source_of(self.facts))
        # What is denoised is not denoised again.
        return self._with_less(lambda: finish(self, video, job, work.sink, work.emit))

    def _denoised(
        self, work: Work, pipeline: Any, hsa: HSAConfig | None, embeds: dict[str, torch.Tensor | None]
    ) -> tuple[torch.Tensor, torch.Tensor | None, HSAReport, StepEvents]:
        """Latents of the video and of its sound, what was computed, and what followed the steps."""
        request, every = work.request, work.every
        grid = self.facts.grid(request.width, request.height, request.num_frames)
        num_steps = request.num_inference_steps
        # At compute=1 the hook does not change the result, but resuming and runs on several ranks need it.
        windows = worded_windows(self._adapter, pipeline, self.facts, request, self.device, self.sharding)
        hooked = any(need is not None for need in (hsa, every, self.sharding, windows))
        dense = HSAConfig(compute=1.0)
        session = apply(pipeline, hsa or dense, sharding=self.sharding, windows=windows) if hooked else None
        try:
            tokens = (grid[0] + self._adapter.more_frames(request)) * grid[1] * grid[2]
            cost = tokens * num_steps * (hsa.compute if hsa is not None else 1.0)
            on_step = StepEvents(num_steps, tokens, cost, session, work.emit, work.stop, self._clock, self._vote)
            work.progress.follow(on_step)
            if every is not None:
                on_step.keep(work.job, every, work.saved)
            if session is not None and self.sharding is not None:
                seen = seen_image(pipeline, work.sources)
                for unit, text in self._adapter.told(embeds).items():
                    session.tell(unit, text.to(pipeline.transformer.dtype), **seen)
            carried = ("latents", *(session.step_tensors if session is not None else ()))
            conditions = {**embeds, **self._adapter.start(self.facts, request, work.sources)}
            latents, audio_latents = self._denoise(pipeline, request, conditions, on_step, carried)
            report = session.full_report() if session is not None else dense_report(on_step.events, grid)
            report = report.of_frames(grid[0])
        finally:
            if session is not None:
                remove(pipeline)  # frees the K/V caches before the VAE needs the memory
        return latents, audio_latents, report, on_step

    def _decide(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on all ranks."""
        return make() if self.sharding is None else self.sharding.agreement.decide(make)

    def _vote(self, flag: bool) -> bool:
        """Whether any rank says yes."""
        return flag if self.sharding is None else self.sharding.agreement.any(flag)

    def _denoise(
        self,
        pipeline: Any,
        request: ResolvedRequest,
        conditions: dict[str, Any],
        on_step: StepEvents,
        carried: tuple[str, ...],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Latents of the video and of its sound; `carried` is what `on_step` needs to see after each step."""
        output = pipeline(
            **self._adapter.arguments(self.facts, request),
            **{"width": request.width, "height": request.height, "num_inference_steps": request.num_inference_steps}
            | conditions,
            **opening(self._adapter, pipeline, self.facts, request),
            output_type="latent",
            callback_on_step_end=on_step,
            callback_on_step_end_tensor_inputs=list(carried),
        )
        return self._adapter.results(output)

    def _clock(self) -> float:
        """Seconds, with the device's queue empty: otherwise a GPU stage would be charged to a later one."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
