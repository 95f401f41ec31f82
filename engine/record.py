"""The report of a run as JSON: what was asked, on what, what was computed, and how long it took."""

from __future__ import annotations

import dataclasses
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .acting import acting, acting_hsa, acting_request
from .quality import psnr, relative_l2, ssim
from .report import plain_step
from .request import VideoOutput

if TYPE_CHECKING:
    from .engine import Engine

_PACKAGES = ("heterostep", "torch", "diffusers", "transformers", "numpy", "av")


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


def run_record(engine: Engine, output: VideoOutput, dense: VideoOutput | None = None) -> dict[str, Any]:
    """Everything about one run, ready for JSON.

    Args:
        engine: that made the video.
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
        "model": engine.config.model,
        "family": engine.facts.family,
        "device": device_name(engine.device),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "versions": versions(),
        "request": acting_request(output, engine.facts.experts),
        "hsa": acting_hsa(engine, output),
        "acting": acting(engine, output),
        "compute": report.compute,
        "seconds": {"load": engine.load_seconds, **output.seconds},
        "parallel": None if engine.config.parallel is None else dataclasses.asdict(engine.config.parallel),
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
