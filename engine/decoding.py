"""The end of a request: final latents become frames and sound, a few frames at a time.

They go into an array, to whoever writes files, and into the job.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .checkpoint import Saved, identity_of
from .config import EngineConfig
from .denoise.work_split import Sharding
from .facts import read_facts
from .job import Finished, Job, look
from .loading import pick_device, pick_dtype
from .media.audio import Audio
from .media.feeding import Reader, feed
from .models import Adapter, adapter_named
from .models.base import check_finite
from .record import Maker, run_record
from .request import (
    Decoding,
    Event,
    FrameSink,
    GenerateRequest,
    JobConfig,
    VideoOutput,
    VideoResult,
    allocation,
    resolve,
)
from .stored import source_of
from .vae.pieces import NoMemory, cuts, decode_pieces, is_large

Runs = Iterator[NDArray[np.uint8]]
"""Consecutive frames uint8 [f, H, W, 3] of a video."""


class VideoDecoder:
    """The final latents of one video, decoded as often as is asked.

    Neither the host's memory nor the device's grows with the number of frames, but for models whose VAE cannot be given
    a few at a time. Where memory is too small, the video is decoded once more from its start, in smaller tiles. Many
    ranks share the tiles of a video that is large enough to have some.
    """

    def __init__(self, pipeline: Any, adapter: Adapter, sharding: Sharding | None, latents: torch.Tensor) -> None:
        """Prepare; nothing is computed yet.

        Args:
            pipeline: the stock pipeline.
            adapter: its adapter.
            sharding: of the ranks, each of which must make the same calls; None on one rank.
            latents: [1, C, F, Y, X] as the pipeline gives them, alike on all ranks.
        """
        self._pipeline, self._adapter, self._sharding, self._latents = pipeline, adapter, sharding, latents
        self._pieces = adapter.pieces(pipeline.vae)
        self._shared = sharding is not None and is_large(self._pieces, latents)
        self._cuts = cuts(self._pieces, latents, self._shared)

    def decode(self, read: Callable[[Runs], object]) -> None:
        """Decode the video.

        Args:
            read: called on rank 0 with all frames; once more where memory was too small for the first try, after the
                iterator has raised `NoMemory`, which it must let pass.

        Raises:
            RequestError: the VAE returns NaN or infinite values; on all ranks alike.
            MemoryError: memory is too small in any case.
        """
        while not self._whole(read):
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if len(self._cuts) == 1:
                raise MemoryError("the memory of the device is too small to decode the video")
            del self._cuts[0]
            log = logging.getLogger("heterostep")
            log.warning("heterostep: memory is too small to decode the video at once; it is decoded in smaller tiles")

    def _whole(self, read: Callable[[Runs], object]) -> bool:
        """Decode all of it in the present way; False where memory is too small, on all ranks alike."""
        if self._sharding is None:
            return self._attempt(read)
        agreement = self._sharding.agreement
        if not self._shared:  # the others wait
            return agreement.decide(functools.partial(self._attempt, read))
        return self._attempt(read if agreement.leads else _exhaust)

    def _attempt(self, read: Callable[[Runs], object]) -> bool:
        try:
            read(self._runs())
        except NoMemory:
            return False
        finally:
            self._pipeline.maybe_free_model_hooks()
        return True

    @torch.no_grad()
    def _runs(self) -> Runs:
        """One pass; on other ranks than rank 0 it gives nothing, and takes part."""
        pipeline, vae = self._pipeline, self._pipeline.vae
        # What `vae.decode` itself calls first, for offloaded models.
        hook = getattr(vae, "_hf_hook", None)
        if hook is not None and hasattr(hook, "pre_forward"):
            hook.pre_forward(vae)
        latents = self._adapter.decodable(vae, self._latents.to(pipeline._execution_device))
        agreement = self._sharding.agreement if self._sharding is not None and self._shared else None
        for frames in decode_pieces(self._pieces, latents, self._cuts[0], agreement, self._pixels):
            if frames is not None:
                yield frames

    def _pixels(self, video: torch.Tensor) -> NDArray[np.uint8]:
        """Decoded [1, 3, f, H, W] -> uint8 [f, H, W, 3]."""
        check_finite(video, "the VAE", self._pipeline.vae.dtype)
        frames = self._pipeline.video_processor.postprocess_video(video, output_type="np")[0]
        pixels: NDArray[np.uint8] = (frames * 255.0).round().astype(np.uint8)
        return pixels


def _exhaust(runs: Runs) -> None:
    for _ in runs:
        pass


def decode_frames(
    decoder: VideoDecoder, sharding: Sharding | None, shape: tuple[int, int, int, int]
) -> NDArray[np.uint8]:
    """Decode a whole video into an array of `shape` [F, H, W, 3], on every rank.

    Raises:
        RequestError: as for `VideoDecoder.decode`.
    """
    leads = sharding is None or sharding.agreement.leads
    frames = np.empty(shape if leads else (0, 0, 0, 0), np.uint8)

    def fill(runs: Runs) -> None:
        done = 0
        for run in runs:
            frames[done : done + len(run)] = run
            done += len(run)

    decoder.decode(fill)
    if sharding is None:
        return frames
    sent: NDArray[np.uint8] = (
        sharding.agreement.send(torch.from_numpy(frames) if leads else None, shape, torch.uint8).cpu().numpy()
    )
    return sent


def decode_audio(pipeline: Any, adapter: Adapter, latents: torch.Tensor) -> Audio:
    """Decode the latents of sound into samples, on this rank."""
    audio = adapter.audio(pipeline, latents.to(pipeline._execution_device))
    pipeline.maybe_free_model_hooks()
    return audio


class Found(NamedTuple):
    """What a job's folder holds.

    Attributes:
        video: that is finished, or denoised; None if there is none.
        denoised: whether it has yet to be decoded.
        saved: the checkpoint from which the job resumes where there is no video.
    """

    video: VideoResult | None = None
    denoised: bool = False
    saved: Saved | None = None


def look_up(job: Job | None, held: contextlib.ExitStack, *, arrays: bool) -> Found:
    """Lock a job until `held` is closed, and see how far it is; a finished video comes with its frames for `arrays`."""
    assert job is not None, "asked on the rank that keeps the job"
    held.enter_context(job)
    finished = job.finished()
    if finished is not None:
        return Found(VideoOutput.of(finished.video, finished.frames.array()) if arrays else finished.video)
    video = job.denoised()
    return Found(video, video is not None, None if video is not None else job.newest())


def deliver(frames: Iterable[NDArray[np.uint8]], sink: FrameSink, video: VideoResult) -> None:
    """Give a sink the frames [H, W, 3] of a video that is kept, as often as it asks for them."""
    while readers := sink.pending(video):
        feed((frame[None] for frame in frames), readers)


def finish(
    maker: Maker, video: VideoResult, job: Job | None, sink: FrameSink | None, emit: Callable[[Event], None]
) -> VideoResult:
    """Decode what is denoised, and keep it in its job.

    Args:
        maker: the engine; each rank's calls this.
        video: denoised; its `seconds` end there.
        job: where it is kept, on the rank that keeps it.
        sink: takes the frames, on rank 0; None: they are returned, on all ranks.
        emit: told when it begins.

    Raises:
        RequestError: what is decoded is not finite; on all ranks alike.
        MemoryError: there is too little even for small tiles.
    """
    emit(Decoding(seconds=video.seconds["denoise"]))
    start = time.perf_counter()
    adapter = adapter_named(maker.facts.pipeline)
    keep = () if job is None else (functools.partial(job.keep_frames, video),)
    video, decoder = with_sound(maker.pipeline, adapter, maker.sharding, video)
    frames = None
    if sink is None:
        frames = decode_frames(decoder, maker.sharding, video.shape)
        feed([frames], keep)
    else:
        decode_into(decoder, maker.sharding, functools.partial(sink.pending, video), keep)
    seconds = {**video.seconds, "decode": time.perf_counter() - start}
    video = dataclasses.replace(video, seconds={**seconds, "total": sum(seconds.values())})
    if job is not None:
        job.finish(video, source_of(maker.facts), run_record(maker, video))
    return video if frames is None else VideoOutput.of(video, frames)


def with_sound(
    pipeline: Any, adapter: Adapter, sharding: Sharding | None, video: VideoResult
) -> tuple[VideoResult, VideoDecoder]:
    """Decode the sound of a video, if it has any; the decoder of its frames."""
    if video.audio_latents is not None:
        make = functools.partial(decode_audio, pipeline, adapter, video.audio_latents)
        video = dataclasses.replace(video, audio=make() if sharding is None else sharding.agreement.decide(make))
    return video, VideoDecoder(pipeline, adapter, sharding, video.latents)


def decode_into(
    decoder: VideoDecoder,
    sharding: Sharding | None,
    pending: Callable[[], Sequence[Reader]],
    first: Sequence[Reader] = (),
) -> None:
    """Decode for the readers `first` and those that are pending on rank 0, and again while there are any."""
    readers: list[Reader] = []

    def ask() -> bool:
        nonlocal first
        readers[:], first = [*first, *pending()], ()
        return bool(readers)

    while ask() if sharding is None else sharding.agreement.decide(ask):
        decoder.decode(lambda runs: feed(runs, readers))


def find_finished(config: EngineConfig, request: GenerateRequest, job: JobConfig) -> Finished | None:
    """Look, without loading the model, whether a job is finished; if not, whether an engine could work on it.

    Raises:
        ConfigError: the job's folder cannot be used, is in use, or holds another job.
        RequestError: the request does not fit the model.
    """
    facts = read_facts(config.model)
    resolved = resolve(request, facts)
    dtype = pick_dtype(config.dtype, pick_device(config.device))
    return look(job, identity_of(facts, resolved, allocation(config, resolved), dtype, config=config))
