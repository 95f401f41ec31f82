"""Kill a random rank of a torchrun job at a random step, many times: `python benchmarks/recovery.py --tries 20`.

Each job must end by itself, with the bits of an unbroken one, and repeat no more steps than between two checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from harness import REPORTS, environment
from safetensors.torch import load_file

EVERY = 3


def command(nproc: int, steps: int) -> list[str]:
    """The job, as a user gives it."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc), "--max-restarts",
        "3", "-m", "heterostep.launch.torchrun", "--prompt", "a red disc moves right", "--seed", "7", "--steps",
        str(steps), "--compute", "0.5", "--policy", "tokens", "--ulysses", str(nproc), "--job-dir", "job",
        "--checkpoint-every", str(EVERY), "--latents", "l.safetensors", "--output", "v.mp4",
    ]  # fmt: skip


def rank_process(mark: str, rank: int) -> int:
    """Process number of a rank of the job whose environment has HETEROSTEP_MARK=mark."""
    for folder in pathlib.Path("/proc").iterdir():
        try:
            environ = (folder / "environ").read_bytes().split(b"\0") if folder.name.isdigit() else []
        except OSError:
            continue
        if f"RANK={rank}".encode() in environ and f"HETEROSTEP_MARK={mark}".encode() in environ:
            return int(folder.name)
    raise SystemExit(f"rank {rank} is not there")


def lines_of(folder: pathlib.Path) -> list[dict]:
    """The job's progress so far."""
    path = folder / "job" / "progress.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def broken(folder: pathlib.Path, nproc: int, steps: int, rng: random.Random) -> dict:
    """Run the job once and kill one of its ranks; what happened."""
    rank, at = rng.randrange(nproc), rng.randrange(1, steps - 1)
    mark = str(time.time_ns())
    with open(folder / "stderr", "w") as log:
        job = subprocess.Popen(
            command(nproc, steps), cwd=folder, env=os.environ | {"HETEROSTEP_MARK": mark}, stdout=log, stderr=log
        )
        while len(lines_of(folder)) < at:
            if job.poll() is not None:
                raise SystemExit(f"the job ended before step {at}:\n{(folder / 'stderr').read_text()}")
            time.sleep(0.005)
        os.kill(rank_process(mark, rank), signal.SIGKILL)
        killed, reached = time.time(), len(lines_of(folder))
        code = job.wait(600)
    lines = lines_of(folder)
    later = [line for line in lines if line["time"] > killed + 0.5]
    return {
        "rank": rank,
        "step": reached,
        "exit_code": code,
        "steps_repeated": reached - later[0]["step"] if later else 0,
        "seconds_to_next_step": later[0]["time"] - killed if later else None,
        "whole": [line["step"] for line in lines] == list(range(steps)),
    }


def main() -> None:
    """Parse the command line, run, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path, default=REPORTS / "recovery", help="without suffix")
    args = parser.parse_args()
    rng, results = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(temporary)
        (root / "unbroken").mkdir()
        subprocess.run(command(args.nproc, args.steps), cwd=root / "unbroken", check=True, capture_output=True)
        wanted = load_file(root / "unbroken" / "l.safetensors")["latents"]
        for number in range(args.tries):
            folder = root / str(number)
            folder.mkdir()
            result = broken(folder, args.nproc, args.steps, rng)
            path = folder / "l.safetensors"
            result["same_bits"] = path.exists() and torch.equal(load_file(path)["latents"], wanted)
            results.append(result)
            print(number, json.dumps(result), flush=True)
    write(args, results)


def write(args: argparse.Namespace, results: list[dict]) -> None:
    """JSON and Markdown."""
    good = [r for r in results if r["same_bits"] and r["whole"] and r["exit_code"] == 0]
    waits = [r["seconds_to_next_step"] for r in results if r["seconds_to_next_step"] is not None]
    repeated = max(r["steps_repeated"] for r in results)
    settings = {"tries": args.tries, "ranks": args.nproc, "steps": args.steps, "checkpoint_every": EVERY}
    where = environment("cpu")
    report = {"environment": where, "settings": settings, "tries": results}
    args.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(
        f"""# Killing ranks

{args.tries} jobs of {args.nproc} ranks (gloo, demo model, policy `tokens`, {args.steps} steps, checkpoints every
{EVERY}) under `torchrun --max-restarts 3`; in each a random rank got SIGKILL at a random step. Made by
`python benchmarks/recovery.py`.

| | |
|---|---:|
| ended by themselves, all steps done, latents of an unbroken run bit for bit | {len(good)} of {len(results)} |
| steps repeated, most | {repeated} |
| seconds from the kill to the next step, median | {statistics.median(waits):.1f} |
| longest | {max(waits):.1f} |
"""
    )
    print(f"{len(good)} of {len(results)}; wrote {args.output}.md")


if __name__ == "__main__":
    main()
