"""What sharing one video among ranks gains: `python benchmarks/parallel.py`.

Dense sequence parallelism of xfuser, diffusers and ours, and HSA, all on the same random Wan transformer (no weights
are needed for time), on 1, 2 and 4 ranks over gloo. The methods alternate; ratios are made of neighbouring runs. xfuser
is measured where it can be imported: it is no dependency. Writes reports/parallel.json, .md and .png.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from harness import DEMO_MODEL, REPORTS, Bench, clips, environment, quiet
from parallel_report import checks, markdown, plot

import heterostep as hs
from heterostep.benchmarks.speed.step import Shape, build_pipeline
from heterostep.parallel.config import ParallelConfig
from heterostep.parallel.partition import cut, imbalance

SPARSE = tuple((policy, compute) for policy in ("tokens", "joint") for compute in (0.5, 0.25))
CUTS = ("contiguous", "interleaved", "exact")


class Rank:
    """One rank's side of the measurement: the methods by name, and a way to time one."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Build the model and every method that this machine has."""
        self.steps = args.steps
        shape = Shape(args.dim // 64, 64, args.layers, 4 * args.dim, 64, tuple(args.grid), torch.float32)
        self.pipe, self.request = build_pipeline(shape, "cpu")
        self.num_tokens = math.prod(shape.grid)
        self.stock = self.pipe.transformer.requires_grad_(False)
        self.world = dist.get_world_size()
        self.parallel = ParallelConfig(ulysses=self.world) if self.world > 1 else None
        self.absent: dict[str, str] = {}
        self.achieved: dict[str, float] = {}
        self.methods: dict[str, Callable[[], Any]] = {"ours dense": lambda: self._ours("ours dense", None, 1.0)}
        self._add_peers()
        for policy, compute in SPARSE:
            name = f"ours {policy} {compute:g}"
            self.methods[name] = lambda n=name, p=policy, c=compute: self._ours(n, p, c)

    def _add_peers(self) -> None:
        """Peers on several ranks; on one they are all the stock pipeline."""
        if self.world == 1:
            self.methods["diffusers"] = lambda: self._peer(self.stock)
            return
        import peers

        for name, build in {"diffusers Ulysses": peers.diffusers_ulysses, "xfuser USP": peers.xfuser_usp}.items():
            try:
                model = build(self.stock, self.world)
            except Exception as error:  # a foreign library on a machine it was not made for
                self.absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            else:
                self.methods[name] = lambda m=model: self._peer(m)

    def _peer(self, model: Any) -> torch.Tensor:
        self.pipe.transformer = model
        try:
            return self._call()
        finally:
            self.pipe.transformer = self.stock

    def _ours(self, name: str, policy: str | None, compute: float) -> torch.Tensor:
        config = hs.HSAConfig(compute=compute, **({} if policy is None else {"policy": policy}))
        session = hs.apply(self.pipe, config, parallel=self.parallel)
        try:
            latents = self._call()
            self.achieved[name] = session.report.compute
            return latents
        finally:
            hs.remove(self.pipe)

    def _call(self) -> torch.Tensor:
        """Run the pipeline; `seconds` is from a barrier before it to one behind it."""
        dist.barrier()
        started = time.perf_counter()
        generator = torch.Generator("cpu").manual_seed(0)
        latents: torch.Tensor = self.pipe(**self.request, num_inference_steps=self.steps, generator=generator).frames
        dist.barrier()
        self.seconds = time.perf_counter() - started
        return latents

    def measure(self, rounds: int) -> dict[str, Any]:
        """A round that counts bytes and compares results, then the timed ones."""
        from traffic import SentBytes

        sent, error, dense = {}, {}, None
        for name, run in self.methods.items():
            with SentBytes() as counted:
                latents = run()
            sent[name] = counted.total / self.steps
            dense = latents if dense is None else dense
            error[name] = float((latents - dense).norm() / dense.norm())
        seconds: dict[str, list[float]] = {name: [] for name in self.methods}
        before: list[float] = []
        self.methods["ours dense"]()
        last = self.seconds
        for _ in range(rounds):
            before.append(last)
            # Dense peers next to our dense run: what a busy machine does to one it does to the other.
            for name, run in [*list(self.methods.items())[1:], ("ours dense", self.methods["ours dense"])]:
                run()
                seconds[name].append(self.seconds)
            last = self.seconds
        return {
            "world": self.world,
            "absent": self.absent,
            "rows": [
                {
                    "method": name,
                    "seconds": seconds[name],
                    "base": [(b + d) / 2 for b, d in zip(before, seconds["ours dense"], strict=True)],
                    "bytes_per_step": sent[name],
                    "relative_error": error[name],
                    "achieved": self.achieved.get(name, 1.0),
                }
                for name in self.methods
            ],
        }


def run_rank(args: argparse.Namespace) -> None:
    """Life of one rank: `args.rank` is "R/P"."""
    rank, world = map(int, args.rank.split("/"))
    quiet()
    torch.set_num_threads(1)
    # xfuser asks the environment, which this process was given by `on_ranks`.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{args.exchange / 'rendezvous'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=300),
    )
    found = Rank(args).measure(args.rounds)
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, [row["bytes_per_step"] for row in found["rows"]])
    if rank == 0:
        for i, row in enumerate(found["rows"]):
            row["bytes_per_step"] = max(sent[i] for sent in everyone)
        (args.exchange / "result.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def on_ranks(world: int, options: list[str]) -> dict[str, Any]:
    """Measure on `world` ranks of this machine, each a process of one thread."""
    with tempfile.TemporaryDirectory(prefix="parallel-") as folder:
        command = [sys.executable, __file__, *options, "--exchange", folder]
        ranks = [subprocess.Popen([*command, "--rank", f"{rank}/{world}"]) for rank in range(world)]
        try:
            codes = [rank.wait() for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        if any(codes):
            raise SystemExit(f"a rank of {world} failed: exit codes {codes}")
        return json.loads((pathlib.Path(folder) / "result.json").read_text())


def summed_up(found: dict[str, Any]) -> dict[str, Any]:
    """Medians, spread, and ratios to our dense runs before and behind each."""
    rows = []
    for row in found["rows"]:
        ratios = [own / base for own, base in zip(row["seconds"], row["base"], strict=True)]
        rows.append(
            {
                "method": row["method"],
                "seconds": statistics.median(row["seconds"]),
                "fastest": min(row["seconds"]),
                "slowest": max(row["seconds"]),
                "ratio": 1.0 if row["method"] == "ours dense" else statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                **{name: row[name] for name in ("bytes_per_step", "relative_error", "achieved")},
            }
        )
    return {"world": found["world"], "absent": found["absent"], "rows": rows}


def moving_sets(steps: int, count: int, compute: float) -> tuple[list[torch.Tensor], tuple[int, int, int]]:
    """The active tokens of every partial step of the demo model under policy "tokens", and its grid."""
    bench = Bench(DEMO_MODEL)
    sets: list[torch.Tensor] = []
    grid: tuple[int, int, int] | None = None
    for clip in clips("held-out", count):
        session = hs.apply(bench.pipe, hs.HSAConfig(compute=compute, policy="tokens"))
        plan = session.planner.plan

        def record(*args: Any, plan: Callable[..., Any] = plan) -> Any:
            active = plan(*args)
            if active is not None and active.numel():
                sets.append(active.flatten().clone())
            return active

        session.planner.plan = record
        try:
            bench.denoise(clip, steps)
            assert session.report.evaluations is not None
            grid = tuple(session.report.evaluations.shape[-3:])
        finally:
            hs.remove(bench.pipe)
    assert grid is not None
    return sets, grid


def measure_cuts(steps: int, count: int) -> list[dict[str, Any]]:
    """Imbalance of each cut on those sets: mean and worst."""
    rows = []
    for compute in (0.5, 0.25):
        sets, grid = moving_sets(steps, count, compute)
        for world in (2, 4, 8):
            row: dict[str, Any] = {"compute": compute, "world": world, "sets": len(sets), "grid": list(grid)}
            for name in CUTS:
                found = [imbalance(sizes_of(name, active, world, grid)) for active in sets]
                row[name] = {"mean": statistics.fmean(found), "worst": max(found)}
            rows.append(row)
    return rows


def sizes_of(name: str, active: torch.Tensor, parts: int, grid: tuple[int, int, int]) -> list[int]:
    """Active tokens of each rank under a cut.

    ``contiguous``: each rank owns an equal range, as xDiT and diffusers cut a sequence. ``interleaved``: rank
    (f + y + x) mod parts owns a token, the static cut that spreads moving objects best. ``exact``: ours, no owners.
    """
    if name == "exact":
        return cut(active.numel(), parts)
    f, y, x = (torch.arange(size) for size in grid)
    owner = ((f[:, None, None] + y[:, None] + x) % parts).flatten()
    if name == "contiguous":
        owner = torch.arange(parts).repeat_interleave(torch.tensor(cut(owner.numel(), parts)))
    sizes: list[int] = torch.bincount(owner[active], minlength=parts).tolist()
    return sizes


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=256, help="width of the model, a multiple of 64 (256)")
    parser.add_argument("--layers", type=int, default=2, help="blocks (2)")
    parser.add_argument(
        "--grid",
        type=int,
        nargs=3,
        default=(16, 16, 16),
        metavar=("F", "Y", "X"),
        help="tokens (16 16 16: N = 4,096)",
    )
    parser.add_argument("--steps", type=int, default=12, help="denoising steps of a run (12)")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each method (3)")
    parser.add_argument("--worlds", type=int, nargs="+", default=(1, 2, 4), metavar="P", help="ranks (1 2 4)")
    parser.add_argument("--demo-steps", type=int, default=40, help="steps of the demo model's runs for the cuts (40)")
    parser.add_argument("--demo-clips", type=int, default=2, help="clips of the demo model for the cuts (2)")
    parser.add_argument("--output", type=pathlib.Path, default=REPORTS / "parallel", help="report, without suffix")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    parser.add_argument("--exchange", type=pathlib.Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure and report."""
    args = parse_arguments()
    if args.rank is not None:
        run_rank(args)
        return
    quiet()
    torch.set_num_threads(1)
    started = time.perf_counter()
    facts = {name: getattr(args, name) for name in ("dim", "layers", "steps", "rounds")}
    facts |= {"grid": list(args.grid), "num_tokens": math.prod(args.grid)}
    facts["environment"] = environment("cpu")
    facts["environment"]["versions"]["xfuser"] = _version("xfuser")
    worlds = [summed_up(on_ranks(world, sys.argv[1:])) for world in args.worlds]
    report = {"facts": facts, "worlds": worlds, "checks": checks(worlds)}
    report["cuts"] = measure_cuts(args.demo_steps, args.demo_clips)
    report["facts"]["seconds"] = time.perf_counter() - started
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(report, args.output.name)
    args.output.with_suffix(".md").write_text(text)
    plot(args.output.with_suffix(".png"), report)
    print(text)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
