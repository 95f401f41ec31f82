"""The record of a run, ready for JSON: settings that acted, versions, times, steps, quality against a dense run."""

from __future__ import annotations

import dataclasses
import math
import platform
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ..hsa.config import HSAConfig
from ..hsa.planner import StepPlanner
from ..hsa.policies import TokensPolicy, policy_for
from .config import EngineConfig
from .denoise.schedulers import correct_for, forecast_for, kind_of, scheduler_for
from .facts import ModelFacts
from .lora import lora_label
from .media.feeding import Frames, Reader
from .models import adapter_named
from .report import HSAReport, plain_step
from .request import FrameSink, VideoResult

_PACKAGES = ("heterostep", "torch", "diffusers", "transformers", "numpy", "av")
# Of SSIM: the side of the window, and the width of its Gaussian.
_WINDOW, _SIGMA = 11, 1.5


class Maker(Protocol):
    """What a record says of the engine that made a video; `Engine` is one."""

    config: EngineConfig
    facts: ModelFacts
    device: torch.device
    dtype: torch.dtype
    load_seconds: float
    pipeline: Any
    sharding: Any


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on, without those that are absent."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """A device in words, e.g. `"cuda:0 (NVIDIA H100)"` or `"cpu (x86_64, 1 threads)"`."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"


def compare(output: VideoResult, dense: VideoResult, quality: Quality) -> dict[str, Any]:
    """What was saved against a dense run of the same request, and at what cost in quality.

    Args:
        output: the video.
        dense: that of the dense run.
        quality: of the frames of one against those of the other.

    Returns:
        Denoising seconds of both, their ratio `speedup`, and `psnr` (dB; None for equal videos), `ssim` (None
        for videos too small for it), `latents_relative_l2` of this run against the dense one; None too for what
        is not finite, since JSON has no word for it.
    """
    seconds, dense_seconds = output.seconds["denoise"], dense.seconds["denoise"]
    values = {
        "psnr": quality.psnr,
        "ssim": quality.ssim,
        "latents_relative_l2": relative_l2(output.latents, dense.latents),
    }
    return {
        "seconds_denoise": seconds,
        "seconds_denoise_dense": dense_seconds,
        "speedup": dense_seconds / seconds,
        **{name: value if value is not None and np.isfinite(value) else None for name, value in values.items()},
    }


def _unit(frames: NDArray[Any]) -> NDArray[np.float64]:
    """uint8 0..255 or float 0..1 -> float64 0..1."""
    if frames.dtype == np.uint8:
        return frames.astype(np.float64) / 255.0
    if not np.issubdtype(frames.dtype, np.floating):
        raise ValueError(f"frames must be uint8 or float in [0, 1], not {frames.dtype}")
    return frames.astype(np.float64)


class Quality:
    """How close two videos are, measured frame by frame: neither has to be in memory."""

    def __init__(self) -> None:
        """Begin without frames."""
        self._error, self._values = 0.0, 0
        self._similarities: list[float] | None = []

    def add(self, frame: NDArray[Any], reference: NDArray[Any]) -> None:
        """Take the next frame [H, W, C] of each, uint8, or float in [0, 1]."""
        a, b = _unit(frame), _unit(reference)
        self._error += float(np.sum((a - b) ** 2))
        self._values += a.size
        if min(a.shape[:2]) < _WINDOW:
            self._similarities = None
        elif self._similarities is not None:
            self._similarities.append(_similarity(a, b))

    @property
    def psnr(self) -> float:
        """As `psnr`."""
        error = self._error / self._values
        return math.inf if error == 0.0 else -10.0 * math.log10(error)

    @property
    def ssim(self) -> float | None:
        """As `ssim`; None for frames that are too small."""
        return None if self._similarities is None else float(np.mean(self._similarities))


def _pairs(frames: NDArray[Any], reference: NDArray[Any]) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Frame by frame: a whole 720p video in float64 would need gigabytes."""
    if frames.shape != reference.shape:
        raise ValueError(f"videos must have one shape, got {frames.shape} and {reference.shape}")
    return ((_unit(frame), _unit(other)) for frame, other in zip(frames, reference, strict=True))


def psnr(frames: NDArray[Any], reference: NDArray[Any]) -> float:
    """Peak signal-to-noise ratio of a whole video, in dB; `inf` for equal videos.

    One mean squared error over all frames, not a mean of the frames' values, so that one equal frame does not
    make it infinite.

    Args:
        frames: [F, H, W, C], uint8, or float in [0, 1].
        reference: the same shape.
    """
    error = sum(float(np.sum((a - b) ** 2)) for a, b in _pairs(frames, reference)) / frames.size
    return math.inf if error == 0.0 else -10.0 * math.log10(error)


def ssim(frames: NDArray[Any], reference: NDArray[Any]) -> float:
    """Structural similarity, mean over frames, channels and window positions.

    As in Wang et al. 2004: Gaussian window 11 x 11 with sigma 1.5, K1 = .01, K2 = .03, population
    covariances, only windows that lie wholly inside the picture.

    Args:
        frames: [F, H, W, C], uint8, or float in [0, 1]; H and W at least 11.
        reference: the same shape.

    Returns:
        1.0 for equal videos, near 0 for unrelated ones.
    """
    if frames.shape == reference.shape and min(frames.shape[1:3]) < _WINDOW:
        raise ValueError(f"SSIM needs frames of at least {_WINDOW} x {_WINDOW} pixels, got {frames.shape[1:3]}")
    return float(np.mean([_similarity(a, b) for a, b in _pairs(frames, reference)]))


def _similarity(frame: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
    """SSIM of two frames [H, W, C]."""
    offsets = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights = weights / weights.sum()

    def blur(x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(x, weights.view(1, 1, -1, 1))
        return F.conv2d(x, weights.view(1, 1, 1, -1))

    x = torch.from_numpy(np.ascontiguousarray(frame.transpose(2, 0, 1)))[:, None]
    y = torch.from_numpy(np.ascontiguousarray(reference.transpose(2, 0, 1)))[:, None]
    mean_x, mean_y = blur(x), blur(y)
    var_x = blur(x * x) - mean_x**2
    var_y = blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return float(similarity.mean())


def relative_l2(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference, in float64; any equal shapes."""
    if value.shape != reference.shape:
        raise ValueError(f"tensors must have one shape, got {tuple(value.shape)} and {tuple(reference.shape)}")
    difference = torch.linalg.vector_norm(value.double() - reference.double())
    return float(difference / torch.linalg.vector_norm(reference.double()))


def run_record(maker: Maker, output: VideoResult) -> dict[str, Any]:
    """Everything about one run, ready for JSON.

    Args:
        maker: the engine that made the video.
        output: the video.

    Returns:
        `model`, `family`, `device`, `dtype`, `versions`, `request` and `hsa` (with the values that acted where some
        were left out), `acting` (what else acted: scheduler, guidance, kernel, degrees, types), `compute` (achieved),
        `estimated_psnr` (see `HSAReport`),
        `seconds` by stage, `parallel` (degrees) and `ranks` (traffic and memory of each), `steps`, `kv_bytes`,
        `conditioned` (tokens that were given), `audio` (None without sound), and `evaluations` (a summary and the
        histogram over tokens). What compares it with a dense run adds `against_dense` (`compare`).
    """
    report = output.report
    assert report.evaluations is not None, "a finished run has evaluations"
    evaluations = report.evaluations.cpu().numpy()
    counts, tokens = np.unique(evaluations, return_counts=True)
    return {
        "model": maker.config.model,
        "family": maker.facts.family,
        "device": device_name(maker.device),
        "dtype": str(maker.dtype).removeprefix("torch."),
        "versions": versions(),
        "request": acting_request(output, maker.facts.experts),
        "hsa": acting_hsa(maker, output),
        "acting": acting(maker, output),
        "compute": report.compute,
        "estimated_psnr": report.estimated_psnr,
        "seconds": {"load": maker.load_seconds, **output.seconds},
        "parallel": None if maker.config.parallel is None else dataclasses.asdict(maker.config.parallel),
        "ranks": [dataclasses.asdict(rank) for rank in report.ranks],
        "steps": [plain_step(step) for step in report.steps],
        "kv_bytes": report.kv_bytes,
        "conditioned": report.conditioned,
        "audio": None
        if output.audio is None
        else {
            "channels": len(output.audio.samples),
            "sample_rate": output.audio.sample_rate,
            "seconds": output.audio.seconds,
        },
        "evaluations": {
            "grid": list(evaluations.shape),
            "min": int(evaluations.min()),
            "mean": float(evaluations.mean()),
            "max": int(evaluations.max()),
            "histogram": {str(count): int(number) for count, number in zip(counts, tokens, strict=True)},
        },
    }


def acting_request(output: VideoResult, experts: int) -> dict[str, Any]:
    """The request with the share and the guidance of each expert that acted; of files, the names alone."""
    request = dataclasses.asdict(output.request)
    request["lora"] = [lora_label(text) for text in output.request.lora]
    request["noise"] = None if output.request.noise is None else Path(output.request.noise).name
    if request["compute"] is None and (output.hsa is None or output.hsa.quality is None):
        request["compute"] = 1.0 if output.hsa is None else output.hsa.compute
    if experts > 1 and request["guidance_scale_2"] is None:
        request["guidance_scale_2"] = request["guidance_scale"]
    return request


def acting_hsa(maker: Maker, output: VideoResult) -> dict[str, Any] | None:
    """The allocation with its deduced values; None where the stock pipeline ran alone.

    What a policy does not have stays None: a profile, a limit of age, a type of keys and values.
    """
    hsa = output.hsa
    if hsa is None:
        return None
    scheduler, policy = _scheduler(maker, hsa), policy_for(hsa)
    first, last = _windows(output.report)
    forecast = forecast_for(hsa, scheduler, len(output.report.steps))
    values = {
        "warmup": first,
        "cooldown": last,
        "profile": policy.exponent if isinstance(policy, TokensPolicy) else None,
        "solver": kind_of(scheduler),
        "forecast": forecast,
        "correct": correct_for(hsa, forecast),
        "kv_forecast": 0.0,
        "max_age": None if hsa.policy == "groups" else StepPlanner(hsa).max_age,
        "kv_dtype": _name(maker.dtype) if output.report.kv_bytes else None,
    }
    given = dataclasses.asdict(hsa)
    return {name: values.get(name) if value is None else value for name, value in given.items()}


def acting(maker: Maker, output: VideoResult) -> dict[str, Any]:
    """What else acted: scheduler, guidance of each expert, attention kernel, degrees, and the types of all parts."""
    request, facts = output.request, maker.facts
    guidance = facts.guidance_for(request.guidance_scale)
    scales = [request.guidance_scale, request.guidance_scale_2 or request.guidance_scale][: facts.experts]
    sharding, kernel = maker.sharding, maker.config.attention or "diffusers"
    degrees = {"cfg": 1, "ring": 1, "ulysses": 1}
    types = {name: getattr(part, "dtype", None) for name, part in maker.pipeline.components.items()}
    return {
        "policy": "dense" if output.hsa is None else output.hsa.policy,
        "scheduler": type(_scheduler(maker, output.hsa)).__name__,
        "guidance": scales,
        "more_guidance": None if guidance is None else guidance._asdict(),
        "guidance_passes": facts.passes(request.guidance_scale),
        "kernel": kernel if sharding is None else sharding.placement.name.rpartition(", ")[2],
        "quantize": maker.config.quantize,
        "compiled": maker.config.compile,
        "vae_tiling": bool(getattr(maker.pipeline.vae, "use_tiling", False)),
        "degrees": degrees if sharding is None else {name: getattr(sharding.config, name) for name in degrees},
        "dtypes": {name: _name(dtype) for name, dtype in types.items() if isinstance(dtype, torch.dtype)},
    }


def _scheduler(maker: Maker, hsa: HSAConfig | None) -> Any:
    """The scheduler of a run."""
    stock = maker.pipeline.scheduler
    if hsa is None:
        return stock
    return scheduler_for(hsa, stock, adapter_named(maker.facts.pipeline).solvers, maker.facts.pipeline)


def _windows(report: HSAReport) -> tuple[int, int]:
    """Number of first and of last steps that evaluated every token."""
    full = [step.active == step.total for step in report.steps]
    return _leading(full), _leading(full[::-1])


def _leading(full: list[bool]) -> int:
    return ([*full, False]).index(False)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Comparison(FrameSink):
    """Takes the second video, after `first` gave a sink for the first one; a context manager.

    The frames of the first are kept in a temporary file meanwhile.

    Attributes:
        quality: of the first video against the second, once that is decoded.
    """

    def __init__(self) -> None:
        """Begin without frames."""
        self.quality = Quality()
        self._file = tempfile.TemporaryFile(prefix="heterostep-frames-")  # noqa: SIM115 - closed at the end
        self._kept = self._compared = False

    def __enter__(self) -> Comparison:
        """Nothing more is done."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the file."""
        self._file.close()

    def first(self, sink: FrameSink | None = None) -> FrameSink:
        """A sink for the first video, which goes to another sink too."""
        return _First(self, sink or FrameSink())

    def pending(self, video: VideoResult) -> Sequence[Reader]:
        """Compare, once."""
        return () if self._compared else (self._compare,)

    def keep(self) -> Sequence[Reader]:
        """Keep the first video, once."""
        return () if self._kept else (self._keep,)

    def _keep(self, frames: Frames) -> None:
        self._file.seek(0)
        for frame in frames:
            self._file.write(np.ascontiguousarray(frame).data)
        self._file.flush()
        self._kept = True

    def _compare(self, frames: Frames) -> None:
        self._file.seek(0)
        self.quality = Quality()
        for frame in frames:
            kept = np.frombuffer(self._file.read(frame.nbytes), np.uint8).reshape(frame.shape)
            self.quality.add(kept, frame)
        self._compared = True


class _First(FrameSink):
    def __init__(self, comparison: Comparison, sink: FrameSink) -> None:
        self._comparison, self._sink = comparison, sink

    def pending(self, video: VideoResult) -> Sequence[Reader]:
        return (*self._comparison.keep(), *self._sink.pending(video))
