"""`heterostep generate`: checks, the run with its progress bar, and the files."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine.engine import Engine
from ..engine.facts import read_facts
from ..engine.files import check_writable, replacing, write_json
from ..engine.record import run_record
from ..engine.request import Decoding, EngineConfig, GenerateRequest, Started, StepDone, VideoOutput, resolve
from ..errors import ConfigError
from ..hsa.config import HSAConfig
from .logs import silence_libraries

if TYPE_CHECKING:
    from tqdm import tqdm

MAX_SIDE = 16384
"""Greatest width and height, in pixels, that libx264 encodes."""

_SUFFIXES = {"output": ".mp4", "heatmap": ".mp4", "latents": ".safetensors", "report": ".json"}


def generate(arguments: argparse.Namespace) -> int:
    """Run the command with parsed arguments; returns the exit code."""
    silence_libraries()
    # Everything that can be wrong is checked before a model is loaded, which may take minutes.
    paths = _paths(arguments)
    policy = {} if arguments.policy is None else {"policy": arguments.policy}
    hsa = HSAConfig(compute=arguments.compute, solver=arguments.solver, forecast=arguments.forecast, **policy)
    config = EngineConfig(model=arguments.model, hsa=hsa, dtype=arguments.dtype, device=arguments.device)
    request = _request(arguments)
    resolved = resolve(request, read_facts(config.model))
    if max(resolved.width, resolved.height) * arguments.scale > MAX_SIDE:
        raise ConfigError(f"scale {arguments.scale} makes the video larger than the {MAX_SIDE} pixels H.264 allows")

    say: Callable[[str], None] = (lambda text: None) if arguments.quiet else print
    engine = Engine(config)
    if arguments.compare_dense:
        # The first steps of a process pay for allocations and kernel choices; neither side should.
        engine.generate(dataclasses.replace(request, compute=1.0, num_inference_steps=2))
    # Before the dense run, which can take an hour: the plan may be one that cannot be met.
    output = _run(engine, request, "denoising", arguments.quiet)
    dense = None
    if arguments.compare_dense:
        dense = _run(engine, dataclasses.replace(request, compute=1.0), "dense", arguments.quiet)
    record = run_record(engine, output, dense)
    _write(output, record, paths, arguments.scale)
    for line in _summary(output, record, paths):
        say(line)
    return 0


def _paths(arguments: argparse.Namespace) -> dict[str, Path]:
    given = {name: getattr(arguments, name) for name in _SUFFIXES if getattr(arguments, name) is not None}
    paths = {name: check_writable(path, _SUFFIXES[name]) for name, path in given.items()}
    if len({path.resolve() for path in paths.values()}) < len(paths):
        raise ConfigError("two outputs have the same name; give each its own")
    return paths


def _request(arguments: argparse.Namespace) -> GenerateRequest:
    width, height = arguments.size or (None, None)
    return GenerateRequest(
        prompt=arguments.prompt,
        negative_prompt=arguments.negative_prompt,
        width=width,
        height=height,
        num_frames=arguments.frames,
        fps=arguments.fps,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance,
        seed=arguments.seed,
    )


def _run(engine: Engine, request: GenerateRequest, label: str, quiet: bool) -> VideoOutput:
    output = None
    bar: tqdm | None = None
    try:
        for event in engine.stream(request):
            if isinstance(event, Started):
                bar = _bar(event.request.num_inference_steps, label, quiet)
            elif isinstance(event, StepDone):
                assert bar is not None
                share = event.active / event.total
                bar.set_postfix_str(f"active {share:4.0%}, {event.eta_seconds:.0f} s left", refresh=False)
                bar.update()
            elif isinstance(event, Decoding):
                assert bar is not None
                bar.set_postfix_str("decoding")
            else:
                output = event
    finally:
        if bar is not None:
            bar.close()
    assert output is not None
    return output


def _bar(num_steps: int, label: str, quiet: bool) -> tqdm:
    from tqdm import tqdm

    # disable=None: no bar where stderr is a file or a pipe.
    return tqdm(
        total=num_steps,
        desc=label,
        disable=True if quiet else None,
        leave=False,
        bar_format="{desc:9} {percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt} steps{postfix}",
    )


def _write(output: VideoOutput, record: dict[str, object], paths: dict[str, Path], scale: int) -> None:
    # Imported late: drawing needs matplotlib and Pillow, and a bad request should not wait for them.
    from safetensors.torch import save

    from ..engine.video import heatmap_frames, write_mp4

    write_mp4(paths["output"], output.frames, output.fps, scale=scale)
    if "heatmap" in paths:
        assert output.report.evaluations is not None, "a finished run has evaluations"
        evaluations = output.report.evaluations.cpu().numpy()
        shares = [step.active / step.total for step in output.report.steps]
        picture = heatmap_frames(output.frames, evaluations, shares)
        write_mp4(paths["heatmap"], picture, output.fps)
    if "latents" in paths:
        with replacing(paths["latents"]) as temporary:
            # Not save_file: that makes a file for its owner alone, and hides a full disk in an error of its own.
            temporary.write_bytes(save({"latents": output.latents.contiguous()}))
    if "report" in paths:
        write_json(paths["report"], record)


def _summary(output: VideoOutput, record: dict[str, object], paths: dict[str, Path]) -> list[str]:
    frames, height, width = output.frames.shape[:3]
    seconds = output.seconds
    lines = [
        f"{paths['output']}: {frames} frames of {width}x{height}, {output.fps} per second",
        f"compute {record['compute']:.3f} of dense; seconds: text {seconds['encode_text']:.1f}, "
        f"denoising {seconds['denoise']:.1f}, decoding {seconds['decode']:.1f}",
    ]
    against = record.get("against_dense")
    if isinstance(against, dict):
        quality = "equal to the dense video" if against["psnr"] is None else f"PSNR {against['psnr']:.1f} dB"
        quality += "" if against["ssim"] is None else f", SSIM {against['ssim']:.3f}"
        lines.append(
            f"denoising: dense {against['seconds_denoise_dense']:.2f} s, this run "
            f"{against['seconds_denoise']:.2f} s, {against['speedup']:.2f} times as fast"
        )
        lines.append(f"against the dense video of the same seed: {quality}")
    lines += [f"{path}: {name}" for name, path in paths.items() if name != "output"]
    return lines
