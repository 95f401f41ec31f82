"""The engine: a request becomes a video, through the stock diffusers pipeline."""

from __future__ import annotations

import dataclasses
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import RequestError
from ..hsa.config import HSAConfig
from .facts import read_facts
from .loading import load_pipeline, pick_device, pick_dtype
from .report import HSAReport, StepRecord
from .request import (
    Cancelled,
    Decoding,
    EngineConfig,
    Event,
    GenerateRequest,
    ResolvedRequest,
    Started,
    StepDone,
    VideoOutput,
    resolve,
)
from .session import apply, remove

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .session import HSASession

__all__ = [
    "Cancelled",
    "Decoding",
    "Engine",
    "EngineConfig",
    "GenerateRequest",
    "Started",
    "StepDone",
    "VideoOutput",
]

# What WanPipeline itself uses when it is given a prompt.
_MAX_SEQUENCE_LENGTH = 512


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

    Raises:
        ConfigError: the model cannot be loaded, or the device is not there.
    """

    def __init__(self, config: EngineConfig | None = None) -> None:
        start = time.perf_counter()
        self.config = config if config is not None else EngineConfig()
        self.facts = read_facts(self.config.model)
        self.device = pick_device(self.config.device)
        self.dtype = pick_dtype(self.config.dtype, self.device)
        self.pipeline = load_pipeline(self.facts, self.device, self.dtype)
        self.load_seconds = time.perf_counter() - start
        self._busy = threading.Lock()
        self._cancel = threading.Event()

    def generate(self, request: GenerateRequest) -> VideoOutput:
        """Make a video and wait for it.

        Raises:
            RequestError: the request does not fit the model, or a video is being made already.
            Cancelled: `cancel` was called from another thread.
        """
        for event in self.stream(request):
            if isinstance(event, VideoOutput):
                return event
        raise AssertionError("a stream ends with a VideoOutput or an exception")

    def stream(self, request: GenerateRequest) -> Iterator[Event]:
        """Make a video and tell how it goes.

        The stock pipeline runs in a thread of its own. Closing the iterator early (`break` out of the loop,
        an exception, Ctrl-C) stops the run after the current step.

        Args:
            request: checked here, before the iterator is returned.

        Returns:
            An iterator over one `Started`, a `StepDone` for each step, one `Decoding`, and last the
            `VideoOutput`.

        Raises:
            RequestError: the request does not fit the model, or (at the first event) a video is being made
                already.
            Cancelled: from the iterator, after `cancel`.
        """
        return self._events(resolve(request, self.facts))

    def cancel(self) -> None:
        """Stop the video being made after its current step; callable from any thread. No-op when idle."""
        self._cancel.set()

    def _events(self, request: ResolvedRequest) -> Iterator[Event]:
        if not self._busy.acquire(blocking=False):
            raise RequestError("this engine is making a video already; wait for it, cancel it, or use a second engine")
        self._cancel = cancel = threading.Event()
        events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()

        def work() -> None:
            outcome: Event | BaseException
            try:
                outcome = self._run(request, events.put, cancel)
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
                if isinstance(event, VideoOutput):
                    return
        finally:
            cancel.set()
            # An abandoned stream can be collected by whatever thread runs at the time, even by the worker itself.
            if worker is not threading.current_thread():
                worker.join()

    def _run(self, request: ResolvedRequest, emit: Callable[[Event], None], cancel: threading.Event) -> VideoOutput:
        """The life of a request: text, denoising, VAE. Runs in the worker thread."""
        grid = self.facts.grid(request.width, request.height, request.num_frames)
        num_tokens = math.prod(grid)
        emit(Started(request=request, num_tokens=num_tokens))
        start = time.perf_counter()
        embeds = self._encode_text(request)
        encoded = self._clock()

        hsa = self._hsa(request)
        session = apply(self.pipeline, hsa) if hsa is not None else None
        try:
            work = num_tokens * request.num_inference_steps * (hsa.compute if hsa is not None else 1.0)
            on_step = _StepEvents(request.num_inference_steps, num_tokens, work, session, emit, cancel, self._clock)
            latents = self._denoise(request, embeds, on_step)
            report = session.report if session is not None else _dense_report(on_step.events, grid)
        finally:
            if session is not None:
                remove(self.pipeline)  # frees the K/V caches before the VAE needs the memory
        if cancel.is_set():
            raise Cancelled(f"cancelled after step {len(on_step.events)} of {request.num_inference_steps}")
        if not bool(torch.isfinite(latents).all()):
            raise RequestError(
                f"the model returned values that are no numbers in {str(self.dtype).removeprefix('torch.')}; "
                "ask for another dtype, such as float32, or a lower guidance"
            )
        denoised = self._clock()

        emit(Decoding(seconds=denoised - encoded))
        frames = self._decode(latents)
        decoded = self._clock()
        seconds = {
            "encode_text": encoded - start,
            "denoise": denoised - encoded,
            "decode": decoded - denoised,
            "total": decoded - start,
        }
        return VideoOutput(
            frames=frames,
            fps=request.fps,
            hsa=hsa,
            report=report,
            seconds=seconds,
            latents=latents.float().cpu(),
            request=request,
        )

    def _hsa(self, request: ResolvedRequest) -> HSAConfig | None:
        """The allocation for one request; None where the stock pipeline needs no hook."""
        hsa = self.config.hsa
        if request.compute is not None:
            hsa = dataclasses.replace(hsa or HSAConfig(), compute=request.compute)
        # All tokens at every step under the model's own scheduler is the stock pipeline, bit for bit.
        return None if hsa is None or (hsa.compute == 1.0 and hsa.solver is None) else hsa

    @torch.no_grad()
    def _encode_text(self, request: ResolvedRequest) -> dict[str, torch.Tensor | None]:
        prompt, negative = self.pipeline.encode_prompt(
            request.prompt,
            request.negative_prompt,
            do_classifier_free_guidance=request.guidance_scale > 1.0,
            max_sequence_length=_MAX_SEQUENCE_LENGTH,
        )
        return {"prompt_embeds": prompt, "negative_prompt_embeds": negative}

    def _denoise(
        self, request: ResolvedRequest, embeds: dict[str, torch.Tensor | None], on_step: _StepEvents
    ) -> torch.Tensor:
        # With a VAE that does not compress time, WanPipeline adds one to the number of frames that it is
        # given.
        extra = 1 if self.facts.vae_temporal == 1 else 0
        latents: torch.Tensor = self.pipeline(
            **embeds,
            width=request.width,
            height=request.height,
            num_frames=request.num_frames - extra,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            guidance_scale_2=request.guidance_scale_2,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            max_sequence_length=_MAX_SEQUENCE_LENGTH,
            output_type="latent",
            callback_on_step_end=on_step,
        ).frames
        return latents

    @torch.no_grad()
    def _decode(self, latents: torch.Tensor) -> NDArray[np.uint8]:
        """Latents [1, C, F, Y, X] -> uint8 [F, H, W, 3], as the end of `WanPipeline.__call__` does it."""
        vae = self.pipeline.vae
        latents = latents.to(device=self.pipeline._execution_device, dtype=vae.dtype)
        mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1).to(latents.device, latents.dtype)
        inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1).to(latents.device, latents.dtype)
        video = vae.decode(latents / inverse_std + mean, return_dict=False)[0]
        frames = self.pipeline.video_processor.postprocess_video(video, output_type="np")[0]
        self.pipeline.maybe_free_model_hooks()
        pixels: NDArray[np.uint8] = (frames * 255.0).round().astype(np.uint8)
        return pixels

    def _clock(self) -> float:
        """Seconds, with the device's queue empty: otherwise a GPU stage would be charged to a later one."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class _StepEvents:
    """The pipeline's `callback_on_step_end`: sends a `StepDone`; interrupts the pipeline when cancelled."""

    def __init__(
        self,
        num_steps: int,
        num_tokens: int,
        work: float,
        session: HSASession | None,
        emit: Callable[[Event], None],
        cancel: threading.Event,
        clock: Callable[[], float],
    ) -> None:
        self.events: list[StepDone] = []
        self._num_steps, self._num_tokens, self._work = num_steps, num_tokens, work
        self._emit, self._cancel, self._clock = emit, cancel, clock
        self._records: list[StepRecord] | None = None
        if session is not None:
            self._records = []
            session.on_step.append(self._records.append)
        self._start = self._last = clock()
        self._work_done = 0

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        now = self._clock()
        # An interrupted pipeline still skips through its loop, so that its hooks and offloading end in order.
        if self._cancel.is_set():
            pipeline._interrupt = True
        active = self._num_tokens if self._records is None else self._records[-1].active
        self._work_done += active
        left = max(self._work - self._work_done, 0.0) if step + 1 < self._num_steps else 0.0
        event = StepDone(
            step=step,
            num_steps=self._num_steps,
            sigma=float(pipeline.scheduler.sigmas[step]),
            active=active,
            total=self._num_tokens,
            seconds=now - self._last,
            eta_seconds=(now - self._start) * left / self._work_done if self._work_done else 0.0,
        )
        self._last = now
        self.events.append(event)
        self._emit(event)
        return {}


def _dense_report(events: list[StepDone], grid: tuple[int, int, int]) -> HSAReport:
    """The report of a run of the stock pipeline: every token at every step."""
    records = [
        StepRecord(
            step=event.step,
            sigma=event.sigma,
            active=event.active,
            total=event.total,
            reason="dense",
            seconds=event.seconds,
        )
        for event in events
    ]
    evaluations = torch.full(grid, len(events), dtype=torch.int32)
    return HSAReport(steps=records, compute=1.0, evaluations=evaluations, kv_bytes=0, num_steps=len(events))
