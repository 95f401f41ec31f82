"""Which layout pays over a link between machines: `python benchmarks/cluster.py`.

Machines are network namespaces (tests/machines.py) with one rank each and links of 100 Mbit/s, 1 and 10 Gbit/s. Dense
Ulysses, ring and cfg, and heterostep's `tokens` at compute 0.5 and 0.25, make the same video with a random Wan
transformer, which is so small that time over the slow link is bytes. The layouts alternate. Writes reports/cluster.json
and .md after every link.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from harness import REPORTS, environment, quiet

import heterostep as hs
from heterostep.benchmarks.speed.step import Shape, build_pipeline
from heterostep.parallel.config import ParallelConfig

sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests"))
import forked
import machines

COMPUTES = (1.0, 0.5, 0.25)
LIMIT = 0.35
"""Time of `tokens` at 0.25 over dense that it may take at most where time is bytes."""
SLOW = "100mbit"


def layouts(world: int) -> dict[str, ParallelConfig]:
    """The layouts that so many ranks can have, one on each machine."""
    found = {
        "ulysses": ParallelConfig(ulysses=world),
        "ring, gathered": ParallelConfig(ring=world, ring_cache="gathered"),
        "ring, sharded": ParallelConfig(ring=world, ring_cache="sharded"),
    }
    return found | ({"cfg": ParallelConfig(cfg=2)} if world == 2 else {})


class Rank:
    """One rank's side of the measurement."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Build the model."""
        self.steps = args.steps
        shape = Shape(args.dim // 64, 64, args.layers, args.dim, 64, tuple(args.grid), torch.float32)
        self.pipe, self.request = build_pipeline(shape, "cpu")
        negative = torch.zeros_like(self.request["prompt_embeds"])
        self.request |= {"guidance_scale": 5.0, "negative_prompt_embeds": negative}

    def run(self, layout: ParallelConfig, compute: float) -> dict[str, Any]:
        """Make the video once; `seconds` is from a barrier before it to one behind it."""
        config = hs.HSAConfig(compute=compute, **({} if compute == 1.0 else {"policy": "tokens"}))
        session = hs.apply(self.pipe, config, parallel=layout)
        try:
            dist.barrier()
            started = time.perf_counter()
            generator = torch.Generator("cpu").manual_seed(0)
            self.pipe(**self.request, num_inference_steps=self.steps, generator=generator)
            dist.barrier()
            seconds = time.perf_counter() - started
            shared = [step.parallel for step in session.report.steps if step.parallel is not None]
            sent = [count for step in shared for count in step.sent.values()]
            return {
                "seconds": seconds,
                "waiting": sum(count.seconds for count in sent),
                "bytes": sum(count.bytes for count in sent),
                "messages": sum(count.calls for count in sent),
                "achieved": session.report.compute,
            }
        finally:
            hs.remove(self.pipe)


def run_rank(args: argparse.Namespace) -> None:
    """Life of one rank: `args.rank` is "R/P"."""
    rank, world = map(int, args.rank.split("/"))
    quiet()
    torch.set_num_threads(1)
    wait = timedelta(seconds=900)
    dist.init_process_group("gloo", init_method=f"tcp://{args.meet}", rank=rank, world_size=world, timeout=wait)
    here, found = Rank(args), []
    here.run(layouts(world)["ulysses"], 0.5)  # warms up
    for number in range(args.rounds):
        for name, layout in layouts(world).items():
            for compute in COMPUTES:
                result = here.run(layout, compute)
                everyone: list[Any] = [None] * world
                dist.all_gather_object(everyone, result)
                most = {key: max(one[key] for one in everyone) for key in result}
                found.append({"layout": name, "compute": compute, "round": number, **most})
    if rank == 0:
        (args.exchange / "result.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def on_machines(world: int, rate: str, options: list[str]) -> dict[str, Any]:
    """Measure on so many machines with links of a speed."""
    with tempfile.TemporaryDirectory(prefix="cluster-") as folder, machines.running(world, pathlib.Path(folder)) as bed:
        for machine in bed:
            machine.shape(rate)
        variables = os.environ | {"GLOO_SOCKET_IFNAME": machines.INTERFACE, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, *options, "--exchange", folder, "--meet", f"{bed[0].address}:29500"]
        ranks = []
        for rank, machine in enumerate(bed):
            with machine.entered():
                ranks.append(forked.Popen([*command, "--rank", f"{rank}/{world}"], env=variables))
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            raise SystemExit(f"a rank of {world} failed: exit codes {codes}")
        runs = json.loads((pathlib.Path(folder) / "result.json").read_text())
        return {"machines": world, "rate": rate, "load": os.getloadavg()[0], "runs": runs}


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Medians of the runs; ratios of runs of the same round."""
    runs, rows = found["runs"], []
    for name, compute in dict.fromkeys((run["layout"], run["compute"]) for run in runs):
        own = [run for run in runs if (run["layout"], run["compute"]) == (name, compute)]
        dense = {run["round"]: run for run in runs if (run["layout"], run["compute"]) == (name, 1.0)}
        row = {"layout": name, "compute": compute}
        row |= {key: statistics.median(run[key] for run in own) for key in ("seconds", "bytes", "messages")}
        row["waiting"] = statistics.median(run["waiting"] / run["seconds"] for run in own)
        row["ratio"] = statistics.median(run["seconds"] / dense[run["round"]]["seconds"] for run in own)
        rows.append(row)
    return rows


def bytes_by_formula(layout: str, share: float, args: argparse.Namespace, world: int) -> float:
    """What a rank sends in the layers of a run, at most: `docs/parallel.md`, both branches, all steps, float32."""
    elements = share * math.prod(args.grid) * args.dim * 2 * args.layers * args.steps
    per_token = {
        "ulysses": 4 * (world - 1) / world**2,
        "ring, gathered": 2 * (world - 1) / world,
        "ring, sharded": (world - 1) / world + 2,
        "cfg": 0.0,
    }
    return 4 * elements * per_token[layout]


def markdown(report: dict[str, Any], args: argparse.Namespace) -> str:
    """The report for people."""
    facts = report["facts"]
    lines = [
        "# Layouts over a link between machines",
        "",
        f"One rank on each machine (network namespaces on one computer of {os.cpu_count()} cores, links shaped by tbf, "
        f"gloo), a random Wan transformer of width {facts['dim']} and {facts['layers']} layers, "
        f"{math.prod(facts['grid'])} tokens, two guidance branches, {facts['steps']} steps, float32. Dense runs are "
        "heterostep's at compute 1. Seconds are medians; a ratio is of runs of the same round; waiting is the share of "
        "time inside collectives, the wait for a late rank included. Bytes are those of the rank that sends most. Made "
        "by `python benchmarks/cluster.py`.",
    ]
    for found in report["links"]:
        lines += [
            "",
            f"## {found['machines']} machines, {found['rate']}",
            "",
            f"Load of the computer: {found['load']:.0f}. Times at more than {os.cpu_count()} are those of a busy one.",
            "",
            "| layout | compute | seconds | over dense | MB sent | messages | waiting |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {row['layout']} | {row['compute']:g} | {row['seconds']:.1f} | {row['ratio']:.2f} "
            f"| {row['bytes'] / 1e6:.1f} | {row['messages']:.0f} | {row['waiting']:.0%} |"
            for row in rows_of(found)
        ]
    lines += ["", "## Checks", "", *checks(report, args)]
    return "\n".join(lines) + "\n"


def checks(report: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """What must hold, and whether it does."""
    said = []
    for found in report["links"]:
        rows = rows_of(found)
        for row in rows:
            layers = bytes_by_formula(row["layout"], row["compute"], args, found["machines"])
            # Beside the layers: velocities of all rows once in a step, and the plan.
            besides = 4 * math.prod(args.grid) * 64 * 2 * args.steps + 16 * math.prod(args.grid) * args.steps
            if row["bytes"] > 1.02 * layers + besides:
                said.append(f"* FAILED: {row['layout']} at {row['compute']:g} sends more than its formula.")
        if found["rate"] == SLOW and found["machines"] == 2:
            for row in rows:
                if row["compute"] == 0.25 and row["layout"] != "cfg":
                    verdict = "holds" if row["ratio"] <= LIMIT else "FAILED"
                    said.append(f"* `tokens` at 0.25 over dense, {row['layout']}: {row['ratio']:.2f}, {verdict}.")
    return [*said, "* Every layout sends at most what its formula says: " + ("no" if "more" in str(said) else "holds.")]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=128, help="width of the model, a multiple of 64 (128)")
    parser.add_argument("--layers", type=int, default=4, help="blocks (4)")
    parser.add_argument("--grid", type=int, nargs=3, default=(4, 16, 16), metavar=("F", "Y", "X"), help="4 16 16")
    parser.add_argument("--steps", type=int, default=12, help="denoising steps of a run (12)")
    parser.add_argument("--rounds", type=int, default=2, help="timed runs of each method (2)")
    parser.add_argument("--machines", type=int, nargs="+", default=(2,), metavar="P", help="machines (2)")
    parser.add_argument("--rates", nargs="+", default=("100mbit", "1gbit", "10gbit"), metavar="R", help="of the links")
    parser.add_argument("--output", type=pathlib.Path, default=REPORTS / "cluster", help="report, without suffix")
    for hidden in ("--rank", "--meet"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--exchange", type=pathlib.Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure and report."""
    args = parse_arguments()
    if args.rank is not None:
        run_rank(args)
        return
    reason = machines.why_not()
    if reason is not None:
        raise SystemExit(reason)
    # Its server must not be a process of the machine that needs it first.
    forked.run([sys.executable, "-c", "pass"])
    facts = {name: getattr(args, name) for name in ("dim", "layers", "steps", "rounds")} | {"grid": list(args.grid)}
    report: dict[str, Any] = {"facts": facts | {"environment": environment("cpu")}, "links": []}
    for world in args.machines:
        for rate in args.rates:
            report["links"].append(on_machines(world, rate, sys.argv[1:]))
            args.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
            args.output.with_suffix(".md").write_text(markdown(report, args))
            print(f"{world} machines, {rate}: done", flush=True)


if __name__ == "__main__":
    main()
