"""What a partial step costs, beside a dense one of the same run: `python benchmarks/step.py`.

On a GPU: `--shape wan-1.3b --device cuda --output benchmarks/reports/step-wan-1.3b`. A random Wan transformer (no
weights are needed for time). Stock pipeline and HSA alternate; ratios are made
of neighbouring runs, their medians are reported. Writes reports/step.json and .md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import time
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from harness import REPORTS, environment, quiet
from torch import Tensor

import heterostep as hs


@dataclasses.dataclass(frozen=True)
class Shape:
    """A transformer's sizes and the video it makes: heads, their width, layers, width of the feed-forward layer and of
    the text, tokens (frames, rows, columns)."""

    heads: int
    head_dim: int
    layers: int
    ffn_dim: int
    text_dim: int
    grid: tuple[int, int, int]
    dtype: torch.dtype


SHAPES = {
    "small": Shape(6, 64, 4, 1536, 64, (8, 16, 16), torch.float32),
    # The published sizes, at 832 x 480 and 81 frames.
    "wan-1.3b": Shape(12, 128, 30, 8960, 4096, (21, 30, 52), torch.bfloat16),
    "wan-14b": Shape(40, 128, 40, 13824, 4096, (21, 30, 52), torch.bfloat16),
}
SHARES = (1.0, 0.5, 0.25, 0.1)
LIMITS = {1.0: 1.05, 0.5: 0.56, 0.25: 0.31}
"""Denoising time over dense that each compute may take at most."""
LOOPS = (("joint", 1.0), ("joint", 0.5), ("joint", 0.25), ("tokens", 0.5), ("tokens", 0.25))
"""The default policy, and the one whose steps are partial whatever the default does."""
PLAN_TOKENS = 75_600
"""Wan at 720p x 81 frames."""
PLAN_LIMIT = 0.030


class FixedShare:
    """A planner: the first step is full, every other one has the same number of random tokens."""

    def __init__(self, share: float, num_tokens: int) -> None:
        count = round(share * num_tokens)
        self.active = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(0))[:count].sort().values

    def plan(self, step: int, num_steps: int, sigma: float, num_tokens: int) -> Tensor | None:
        """All tokens at step 0, then the fixed ones (None for a share of 1: a full step under HSA)."""
        return None if step == 0 or len(self.active) == num_tokens else self.active


def build_pipeline(shape: Shape, device: str) -> tuple[Any, dict[str, Any]]:
    """A random pipeline, and the arguments of a call."""
    torch.manual_seed(0)
    z, width = 16, shape.heads * shape.head_dim
    with torch.device(device):
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=shape.heads,
            attention_head_dim=shape.head_dim,
            in_channels=z,
            out_channels=z,
            text_dim=shape.text_dim,
            freq_dim=256 if width > 1000 else 64,
            ffn_dim=shape.ffn_dim,
            num_layers=shape.layers,
            rope_max_seq_len=128,
        )
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=z,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * z,
        latents_std=[1.0] * z,
    )
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=transformer.to(shape.dtype).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer_2=None,
    ).to(device)
    pipe.set_progress_bar_config(disable=True)
    frames, height, width = shape.grid
    request = {
        "prompt_embeds": torch.randn(1, 64, shape.text_dim, device=device, dtype=shape.dtype),
        "height": 16 * height,
        "width": 16 * width,
        "num_frames": 4 * (frames - 1) + 1,
        "guidance_scale": 1.0,
        "output_type": "latent",
    }
    return pipe, request


class StepClock:
    """Times the steps of one pipeline run, from the transformer's first call to the scheduler's end."""

    def __init__(self, pipe: Any, request: dict[str, Any], steps: int) -> None:
        """Run `steps` steps; `seconds` has one time for each, `peak_bytes` what the GPU held at most."""
        self.seconds: list[float] = []
        self._cuda = pipe.device.type == "cuda"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        handle = pipe.transformer.register_forward_pre_hook(self._begin)
        try:
            generator = torch.Generator("cpu").manual_seed(0)
            pipe(**request, num_inference_steps=steps, generator=generator, callback_on_step_end=self._end)
        finally:
            handle.remove()
        self.peak_bytes = torch.cuda.max_memory_allocated() if self._cuda else None

    def _begin(self, *_: Any) -> None:
        self._started = self._now()

    def _end(self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.seconds.append(self._now() - self._started)
        return tensors

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def time_steps(pipe: Any, request: dict[str, Any], num_tokens: int, rounds: int, repeats: int) -> list[dict[str, Any]]:
    """Partial steps: one full step, then `repeats` timed ones, with a dense run on either side."""
    StepClock(pipe, request, 2)
    ratios: dict[float, list[float]] = {share: [] for share in SHARES}
    absolute: dict[float, list[float]] = {share: [] for share in SHARES}
    dense_times: list[float] = []
    for _ in range(rounds):
        for share in SHARES:
            dense = StepClock(pipe, request, 2).seconds
            hs.apply(pipe, hs.HSAConfig(compute=1.0), planner=FixedShare(share, num_tokens))
            try:
                partial = StepClock(pipe, request, repeats + 1).seconds[1:]
            finally:
                hs.remove(pipe)
            dense += StepClock(pipe, request, 2).seconds
            dense_times += dense
            absolute[share] += partial
            ratios[share].append(float(np.median(partial) / np.median(dense)))
    rows = [{"share": 0.0, "seconds": float(np.median(dense_times)), "what": "dense (stock)"}]
    for share in SHARES:
        rows.append(
            {
                "share": share,
                "seconds": float(np.median(absolute[share])),
                "ratio": float(np.median(ratios[share])),
                "lowest": min(ratios[share]),
                "highest": max(ratios[share]),
            }
        )
    return rows


def time_loops(pipe: Any, request: dict[str, Any], steps: int, rounds: int) -> list[dict[str, Any]]:
    """Whole denoising loops under `hs.apply` against the stock pipeline before and after them."""
    ratios: dict[tuple[str, float], list[float]] = {loop: [] for loop in LOOPS}
    achieved: dict[tuple[str, float], float] = {}
    peaks: dict[tuple[str, float], int | None] = {}
    dense = StepClock(pipe, request, steps)
    before = sum(dense.seconds)
    for _ in range(rounds):
        seconds: dict[tuple[str, float], float] = {}
        for policy, compute in LOOPS:
            session = hs.apply(pipe, hs.HSAConfig(compute=compute, policy=policy))
            try:
                clock = StepClock(pipe, request, steps)
                seconds[policy, compute], peaks[policy, compute] = sum(clock.seconds), clock.peak_bytes
                achieved[policy, compute] = session.report.compute
            finally:
                hs.remove(pipe)
        after = sum(StepClock(pipe, request, steps).seconds)
        for loop in LOOPS:
            ratios[loop].append(2 * seconds[loop] / (before + after))
        before = after
    return [
        {
            "policy": policy,
            "compute": compute,
            "achieved": achieved[policy, compute],
            "peak_bytes": peaks[policy, compute],
            "dense_peak_bytes": dense.peak_bytes,
            "ratio": float(np.median(found)),
            "lowest": min(found),
            "highest": max(found),
            "limit": LIMITS[compute],
            "holds": bool(np.median(found) <= LIMITS[compute]),
        }
        for (policy, compute), found in ratios.items()
    ]


def time_planner(device: str, policies: tuple[str, ...] = ("joint", "tokens", "groups")) -> list[dict[str, Any]]:
    """Plan and observe of one evaluated step at N = 75,600, 64 numbers a token: median and worst."""
    sigmas = [3 * s / (1 + 2 * s) for s in np.linspace(1, 0, 41)]
    velocity = [torch.randn(1, PLAN_TOKENS, 64, device=device) for _ in range(2)]
    rows = []
    for policy in policies:
        planner = hs.StepPlanner(hs.HSAConfig(compute=0.5, policy=policy))
        planner.begin(sigmas, PLAN_TOKENS)
        times, partial = [], 0
        for step in range(40):
            began = time.perf_counter()
            active = planner.plan(step, 40, sigmas[step], PLAN_TOKENS)
            active = None if active is None else active.to(device)
            planner.observe(step, sigmas[step], velocity[step % 2], active)
            if device != "cpu":
                torch.cuda.synchronize()
            # The first step only allocates; a skipped one has nothing to learn from.
            if step and (active is None or active.numel()):
                partial += active is not None
                times.append(time.perf_counter() - began)
        rows.append(
            {
                "policy": policy,
                "evaluated_steps": len(times) + 1,
                "partial_steps": partial,
                "seconds": float(np.median(times)),
                "highest": max(times),
                "holds": bool(np.median(times) <= PLAN_LIMIT),
            }
        )
    return rows


def _memory(row: dict[str, Any]) -> str:
    if row["peak_bytes"] is None:
        return ""
    return f"{row['peak_bytes'] / 2**30:.1f} GiB (dense {row['dense_peak_bytes'] / 2**30:.1f})"


def markdown(report: dict[str, Any]) -> str:
    """Render the report."""
    facts, env = report["facts"], report["facts"]["environment"]
    frames, height, width = facts["grid"]
    lines = [
        "# Overheads",
        "",
        f"Random Wan transformer, {facts['shape']}: width {facts['dim']}, {facts['layers']} layers, N = "
        f"{facts['num_tokens']:,} tokens ({frames} x {height} x {width}), {facts['dtype']}, no guidance. "
        f"{env['date']}, {env['device']}, {env['threads']} thread(s), load {env['load_average']}, torch "
        f"{env['versions']['torch']}, git {env['git']}.",
        "",
    ]
    if report["steps"]:
        lines += [
            "## One step",
            "",
            "| active tokens A/N | seconds | over dense | lowest .. highest |",
            "|---:|---:|---:|---:|",
        ]
    for row in report["steps"]:
        if "what" in row:
            lines.append(f"| {row['what']} | {row['seconds']:.3f} | 1 | |")
        else:
            spread = f"{row['lowest']:.3f} .. {row['highest']:.3f}"
            lines.append(f"| {row['share']:g} | {row['seconds']:.3f} | **{row['ratio']:.3f}** | {spread} |")
    if report["steps"]:
        lines += ["", "A/N = 1 is a full step under the hook whose keys and values are kept for partial steps.", ""]
    lines += [
        f"## Denoising of {facts['loop_steps']} steps",
        "",
        "| policy | compute | achieved | time over dense | lowest .. highest | at most | holds | GPU memory, peak |",
        "|---|---:|---:|---:|---:|---:|---|---:|",
    ]
    for row in report["loops"]:
        lines.append(
            f"| {row['policy']} | {row['compute']:g} | {row['achieved']:.3f} | **{row['ratio']:.3f}** | "
            f"{row['lowest']:.3f} .. {row['highest']:.3f} | {row['limit']:g} | "
            f"{'yes' if row['holds'] else '**no**'} | {_memory(row)} |"
        )
    lines += [
        "",
        f"## Planner at N = {PLAN_TOKENS:,}",
        "",
        "| policy | evaluated steps, of these partial | ms, median | ms, worst | <= 30 ms |",
    ]
    lines.append("|---|---:|---:|---:|---|")
    for row in report["planner"]:
        lines.append(
            f"| {row['policy']} | {row['evaluated_steps']}, {row['partial_steps']} | "
            f"{1e3 * row['seconds']:.1f} | {1e3 * row['highest']:.1f} | "
            f"{'yes' if row['holds'] else '**no**'} |"
        )
    return "\n".join(lines) + "\n"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small", help="sizes of the model and the video (small)")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of everything (3)")
    parser.add_argument("--repeats", type=int, default=2, help="timed partial steps of a run; 0: whole loops only (2)")
    parser.add_argument("--loop-steps", type=int, default=12, help="steps of the whole loops (12)")
    parser.add_argument("--output", type=pathlib.Path, default=REPORTS / "step", help="report, without suffix")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    return parser.parse_args()


def main() -> None:
    """Measure and report."""
    args = parse_arguments()
    quiet()
    torch.set_num_threads(args.threads)
    shape = SHAPES[args.shape]
    num_tokens = math.prod(shape.grid)
    pipe, request = build_pipeline(shape, args.device)
    report = {
        "facts": {
            "shape": args.shape,
            "dim": shape.heads * shape.head_dim,
            "layers": shape.layers,
            "grid": list(shape.grid),
            "dtype": str(shape.dtype).removeprefix("torch."),
            "num_tokens": num_tokens,
            "rounds": args.rounds,
            "loop_steps": args.loop_steps,
            "environment": environment(args.device),
        },
        "planner": time_planner(args.device),
        "steps": time_steps(pipe, request, num_tokens, args.rounds, args.repeats) if args.repeats else [],
        "loops": time_loops(pipe, request, args.loop_steps, args.rounds),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    (args.output.parent / f"{args.output.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(report)
    (args.output.parent / f"{args.output.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
