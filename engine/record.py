"""The record of a run, ready for JSON: settings that acted, versions, times, steps, quality against a dense run."""

from __future__ import annotations

import dataclasses
import math
import platform
from importlib.metadata import PackageNotFoundError, version
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
from .models import adapter_named
from .report import HSAReport, plain_step
from .request import VideoOutput

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


def compare(output: VideoOutput, dense: VideoOutput) -> dict[str, Any]:
    """What was saved against a dense run of the same request, and at what cost in quality.

    Returns:
        Denoising seconds of both, their ratio `speedup`, and `psnr` (dB; None for equal videos), `ssim` (None
        for videos too small for it), `latents_relative_l2` of this run against the dense one; None too for what
        is not finite, since JSON has no word for it.
    """
    seconds, dense_seconds = output.seconds["denoise"], dense.seconds["denoise"]
    quality = {
        "psnr": psnr(output.frames, dense.frames),
        "ssim": ssim(output.frames, dense.frames) if min(output.frames.shape[1:3]) >= 11 else None,
        "latents_relative_l2": relative_l2(output.latents, dense.latents),
    }
    return {
        "seconds_denoise": seconds,
        "seconds_denoise_dense": dense_seconds,
        "speedup": dense_seconds / seconds,
        **{name: value if value is not None and np.isfinite(value) else None for name, value in quality.items()},
    }


def _unit(frames: NDArray[Any]) -> NDArray[np.float64]:
    """uint8 0..255 or float 0..1 -> float64 0..1."""
    if frames.dtype == np.uint8:
        return frames.astype(np.float64) / 255.0
    if not np.issubdtype(frames.dtype, np.floating):
        raise ValueError(f"frames must be uint8 or float in [0, 1], not {frames.dtype}")
    return frames.astype(np.float64)


def _pair(frames: NDArray[Any], reference: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if frames.shape != reference.shape:
        raise ValueError(f"videos must have one shape, got {frames.shape} and {reference.shape}")
    return _unit(frames), _unit(reference)


def psnr(frames: NDArray[Any], reference: NDArray[Any]) -> float:
    """Peak signal-to-noise ratio of a whole video, in dB; `inf` for equal videos.

    One mean squared error over all frames, not a mean of the frames' values, so that one equal frame does not
    make it infinite.

    Args:
        frames: [F, H, W, C], uint8, or float in [0, 1].
        reference: the same shape.
    """
    a, b = _pair(frames, reference)
    error = float(np.mean((a - b) ** 2))
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
    a, b = _pair(frames, reference)
    if min(a.shape[1:3]) < _WINDOW:
        raise ValueError(f"SSIM needs frames of at least {_WINDOW} x {_WINDOW} pixels, got {a.shape[1:3]}")
    offsets = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights = weights / weights.sum()

    def blur(x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(x, weights.view(1, 1, -1, 1))
        return F.conv2d(x, weights.view(1, 1, 1, -1))

    # Frame by frame: a whole 720p video in float64 would need gigabytes.
    values = []
    for frame, other in zip(a, b, strict=True):
        x = torch.from_numpy(np.ascontiguousarray(frame.transpose(2, 0, 1)))[:, None]
        y = torch.from_numpy(np.ascontiguousarray(other.transpose(2, 0, 1)))[:, None]
        mean_x, mean_y = blur(x), blur(y)
        var_x = blur(x * x) - mean_x**2
        var_y = blur(y * y) - mean_y**2
        covariance = blur(x * y) - mean_x * mean_y
        c1, c2 = 0.01**2, 0.03**2
        similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
            (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
        )
        values.append(float(similarity.mean()))
    return float(np.mean(values))


def relative_l2(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference, in float64; any equal shapes."""
    if value.shape != reference.shape:
        raise ValueError(f"tensors must have one shape, got {tuple(value.shape)} and {tuple(reference.shape)}")
    difference = torch.linalg.vector_norm(value.double() - reference.double())
    return float(difference / torch.linalg.vector_norm(reference.double()))


def run_record(maker: Maker, output: VideoOutput, dense: VideoOutput | None = None) -> dict[str, Any]:
    """Everything about one run, ready for JSON.

    Args:
        maker: the engine that made the video.
        output: the video.
        dense: the dense run of the same request, if one was made to compare.

    Returns:
        `model`, `family`, `device`, `dtype`, `versions`, `request` and `hsa` (with the values that acted where some
        were left out), `acting` (what else acted: scheduler, guidance, kernel, degrees, types), `compute` (achieved),
        `seconds` by stage, `parallel` (degrees) and `ranks` (traffic and memory of each), `steps`, `kv_bytes`,
        `conditioned` (tokens that were given), `audio` (None without sound), `evaluations` (a summary and the histogram
        over tokens), and perhaps `against_dense`.
    """
    report = output.report
    assert report.evaluations is not None, "a finished run has evaluations"
    evaluations = report.evaluations.cpu().numpy()
    counts, tokens = np.unique(evaluations, return_counts=True)
    record: dict[str, Any] = {
        "model": maker.config.model,
        "family": maker.facts.family,
        "device": device_name(maker.device),
        "dtype": str(maker.dtype).removeprefix("torch."),
        "versions": versions(),
        "request": acting_request(output, maker.facts.experts),
        "hsa": acting_hsa(maker, output),
        "acting": acting(maker, output),
        "compute": report.compute,
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
    if dense is not None:
        record["against_dense"] = compare(output, dense)
    return record


def acting_request(output: VideoOutput, experts: int) -> dict[str, Any]:
    """The request with the share and the guidance of each expert that acted; of files, the names alone."""
    request = dataclasses.asdict(output.request)
    request["lora"] = [lora_label(text) for text in output.request.lora]
    if request["compute"] is None:
        request["compute"] = 1.0 if output.hsa is None else output.hsa.compute
    if experts > 1 and request["guidance_scale_2"] is None:
        request["guidance_scale_2"] = request["guidance_scale"]
    return request


def acting_hsa(maker: Maker, output: VideoOutput) -> dict[str, Any] | None:
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


def acting(maker: Maker, output: VideoOutput) -> dict[str, Any]:
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
