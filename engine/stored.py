"""Videos as they are kept: as plain data, their frames one by one, and final latents that can be decoded again."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..errors import ConfigError, Damaged
from ..hsa.config import HSAConfig
from .checkpoint import Saved, read_manifest, read_saved, write_manifest
from .facts import ModelFacts, first_line
from .media.audio import Audio
from .media.files import LATENTS_NAME, RESULT_NAME, flush_to_disk, unfinished
from .report import HSAReport, plain_step, rank_from, step_from
from .request import ResolvedRequest, VideoResult

_META = "heterostep"
"""Name of our JSON among the metadata of a file of latents."""
_FRAMES = "frames"
# Of a safetensors file: the length of its header, before the header.
_LENGTH = struct.Struct("<Q")


def video_content(video: VideoResult) -> dict[str, Any]:
    """A video as plain data, without its frames."""
    report = video.report
    return {
        "latents": video.latents,
        "audio": None if video.audio is None else torch.from_numpy(video.audio.samples),
        "audio_rate": None if video.audio is None else video.audio.sample_rate,
        "audio_latents": video.audio_latents,
        "fps": video.fps,
        "hsa": None if video.hsa is None else dataclasses.asdict(video.hsa),
        "report": {
            "steps": [plain_step(step) for step in report.steps],
            "compute": report.compute,
            "evaluations": report.evaluations,
            "kv_bytes": report.kv_bytes,
            "num_steps": report.num_steps,
            "conditioned": report.conditioned,
            "ranks": [dataclasses.asdict(rank) for rank in report.ranks],
        },
        "seconds": dict(video.seconds),
        "request": dataclasses.asdict(video.request),
    }


def video_from(content: Mapping[str, Any]) -> VideoResult:
    """The inverse of `video_content`."""
    report = dict(content["report"])
    report["steps"] = [step_from(step) for step in report["steps"]]
    report["ranks"] = tuple(rank_from(rank) for rank in report["ranks"])
    audio = content.get("audio")
    return VideoResult(
        latents=content["latents"],
        audio=None if audio is None else Audio(samples=audio.numpy(), sample_rate=content["audio_rate"]),
        audio_latents=content.get("audio_latents"),
        fps=content["fps"],
        hsa=None if content["hsa"] is None else HSAConfig(**content["hsa"]),
        report=HSAReport(**report),
        seconds=content["seconds"],
        request=request_from(content["request"]),
    )


def write_frames(folder: Path, name: str, saved: Saved, shape: tuple[int, ...], frames: Iterable[NDArray[Any]]) -> None:
    """Write a state whose only tensor is a video, frame by frame; a reader finds it whole, or what was there before.

    Args:
        folder: of the job.
        name: of the state.
        saved: without content.
        shape: [F, H, W, 3].
        frames: F of them, uint8 [H, W, 3].

    Raises:
        OSError: such as a full disk; everything that was there is still there.
    """
    size = math.prod(shape)
    header = json.dumps({_FRAMES: {"dtype": "U8", "shape": shape, "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    digest = hashlib.sha256()
    with unfinished(folder / f"{name}.safetensors") as temporary:
        with open(temporary, "wb") as file:
            for part in itertools.chain([_LENGTH.pack(len(header)), header], _bytes_of(frames)):
                file.write(part)
                digest.update(part)
            file.flush()
            os.fsync(file.fileno())
            written = file.tell()
        if written != _LENGTH.size + len(header) + size:
            raise ValueError(f"the video has {written} bytes with its header, not {size} without it")
        target = f"{name}-{digest.hexdigest()[:8]}.safetensors"
        os.replace(temporary, folder / target)
    flush_to_disk(folder)
    write_manifest(folder, name, saved, {}, {"name": target, "bytes": written, "sha256": digest.hexdigest()})


class StoredFrames:
    """A video that `write_frames` wrote, frame by frame, as often as it is iterated over.

    Attributes:
        job: identity of the job that it is of.
    """

    def __init__(self, folder: Path, name: str) -> None:
        """Open it and prove it whole, without keeping it in memory.

        Raises:
            Damaged: it is not whole, or was altered.
        """
        manifest = read_manifest(folder / f"{name}.json")
        self.job: Mapping[str, Any] = manifest["job"]
        self._path = folder / manifest["file"]["name"]
        _prove(self._path, manifest["file"])
        try:
            with open(self._path, "rb") as file:
                (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
                header = json.loads(file.read(length))
            self._start, self._shape = _LENGTH.size + length, tuple(header[_FRAMES]["shape"])
        except (OSError, ValueError, LookupError) as error:
            raise Damaged(f"{self._path.name} holds no video ({first_line(error)})") from error

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        """Frames uint8 [H, W, 3]."""
        frame, count = self._shape[1:], math.prod(self._shape[1:])
        with open(self._path, "rb") as file:
            file.seek(self._start)
            for _ in range(self._shape[0]):
                yield np.fromfile(file, np.uint8, count).reshape(frame)

    def array(self) -> NDArray[np.uint8]:
        """All frames, uint8 [F, H, W, 3]."""
        return np.stack(list(self))


def _bytes_of(frames: Iterable[NDArray[Any]]) -> Iterator[bytes]:
    return (np.ascontiguousarray(frame).tobytes() for frame in frames)


def _prove(path: Path, file: Mapping[str, Any]) -> None:
    """Check size and hash of a file that is too large for the memory."""
    try:
        if path.stat().st_size != file["bytes"]:
            raise Damaged(f"{path.name} has {path.stat().st_size} bytes, not {file['bytes']}")
        with open(path, "rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != file["sha256"]:
                raise Damaged(f"{path.name} was altered")
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read ({error.strerror})") from error


def denoised(folder: Path) -> VideoResult | None:
    """The video in a job's folder that is denoised, but not decoded, whatever job it is of; None if there is none."""
    try:
        return video_from(read_saved(folder, LATENTS_NAME, "latents").content["video"])
    except Damaged:
        return None


class Latents(NamedTuple):
    """A video to be decoded.

    Attributes:
        video: final latents [1, C, F, Y, X] as the pipeline gives them.
        audio: those of its sound; None if there is none.
        facts: `model`, `dtype`, and `request` (a `ResolvedRequest` as plain data), as far as they are known.
    """

    video: torch.Tensor
    audio: torch.Tensor | None
    facts: Mapping[str, Any]


def latents_file(video: VideoResult, model: str, dtype: str) -> bytes:
    """A safetensors file of final latents that says how to decode them.

    Args:
        video: finished, or denoised.
        model: where its VAE is (`source_of`).
        dtype: of the transformer, which some VAEs share.
    """
    facts = {"model": model, "dtype": dtype, "request": dataclasses.asdict(video.request)}
    tensors = {"latents": video.latents, "audio_latents": video.audio_latents}
    # Not save_file: that makes a file for its owner alone, and hides a full disk in an error of its own.
    present = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    return save(present, metadata={_META: json.dumps(facts)})


def source_of(facts: ModelFacts) -> str:
    """Where a model is, for a later process in another folder."""
    return os.path.abspath(facts.name) if facts.name != "demo" and os.path.isdir(facts.name) else facts.name


def read_latents(source: Path) -> Latents:
    """Read a file of latents, or the folder of a job that is at least denoised.

    Raises:
        ConfigError: it is neither.
    """
    if source.is_dir():
        return _from_job(source)
    try:
        with safe_open(source, "pt") as file:
            facts = json.loads((file.metadata() or {}).get(_META, "{}"))
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in ("latents", "audio_latents") if name in names}
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{str(source)!r} cannot be read as a file of latents ({first_line(error)})") from error
    latents = tensors.get("latents")
    fits = latents is not None and latents.ndim == 5 and len(latents) == 1 and latents.numel() > 0
    if latents is None or not fits or not latents.is_floating_point() or not isinstance(facts, dict):
        raise ConfigError(
            f"{str(source)!r} holds no tensor `latents` [1, C, F, Y, X] of floating-point numbers; --latents writes "
            "such files"
        )
    return Latents(latents, tensors.get("audio_latents"), facts)


def _from_job(folder: Path) -> Latents:
    for name, kind in ((LATENTS_NAME, "latents"), (RESULT_NAME, "result")):
        if not (folder / f"{name}.json").is_file():
            continue
        try:
            saved = read_saved(folder, name, kind)
        except Damaged as error:
            raise ConfigError(f"the job folder {str(folder)!r} cannot be decoded: {error}") from error
        video = saved.content["video"]
        facts = {"model": saved.content["model"], "dtype": saved.job["dtype"], "request": video["request"]}
        return Latents(video["latents"], video["audio_latents"], facts)
    raise ConfigError(
        f"{str(folder)!r} is not the folder of a denoised video: give a file of --latents, or a job's folder whose "
        "steps are all done"
    )


def request_from(plain: Mapping[str, Any]) -> ResolvedRequest:
    """A request that was plain data, without settings of other versions; JSON has lists for tuples."""
    known = {item.name for item in dataclasses.fields(ResolvedRequest)}
    values: dict[str, Any] = {name: _as_tuples(value) for name, value in plain.items() if name in known}
    return ResolvedRequest(**values)


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list) else value
