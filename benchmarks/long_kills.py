"""Kill long videos' jobs at random steps and while they decode: `python benchmarks/long_kills.py`.

Half of the jobs have one rank, which gets SIGKILL, and the same command is given again. The others have two ranks that
share the windows, under torchrun, which starts both again when one is killed. Each video must have the bits of an
unbroken one on as many ranks, and no denoised video is denoised again.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import long
import torch
from harness import REPORTS, environment
from recovery import lines_of, rank_process
from safetensors.torch import load_file

EVERY = 3


def command(nproc: int, steps: int) -> list[str]:
    """The job, as a user gives it."""
    ranks = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc), "--max-restarts", "3", "-m"]
    program = (
        ["heterostep", "generate"] if nproc == 1 else [*ranks, "heterostep.launch.torchrun", "--windows", str(nproc)]
    )
    flags = ["--prompt", long.PROMPT, "--frames", "65", "--steps", str(steps), "--compute", "0.5", "--seed", "7"]
    kept = ["--job-dir", "job", "--checkpoint-every", str(EVERY), "--latents", "l.safetensors", "--output", "v.mp4"]
    return [sys.executable, "-m", *program, *flags, *kept, "--overwrite"]


def broken(folder: pathlib.Path, nproc: int, steps: int, at: int | None, rng: random.Random) -> dict[str, Any]:
    """Run a job, kill one of its ranks after step `at`, while it decodes if that is None, and let it end."""
    rank, mark, wait = rng.randrange(nproc), str(time.time_ns()), rng.uniform(0.0, 0.3)
    surroundings = os.environ | {"HETEROSTEP_MARK": mark, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def start() -> subprocess.Popen[bytes]:
        with open(folder / "stderr", "a") as log:
            return subprocess.Popen(command(nproc, steps), cwd=folder, env=surroundings, stdout=log, stderr=log)

    def reached() -> bool:
        return (folder / "job" / "latents.json").exists() if at is None else len(lines_of(folder)) >= at

    job = start()
    while not reached():
        if job.poll() is not None:
            raise SystemExit(f"the job ended before it was killed:\n{(folder / 'stderr').read_text()}")
        time.sleep(0.005)
    if at is None:
        time.sleep(wait)
    os.kill(job.pid if nproc == 1 else rank_process(mark, rank), signal.SIGKILL)
    done, killed = len(lines_of(folder)), time.time()
    too_late = (folder / "job" / "result.json").exists()
    code = job.wait(600)
    if nproc == 1:
        code = start().wait(600)
    later = [line["step"] for line in lines_of(folder) if line["time"] > killed + 0.5]
    return {
        "ranks": nproc,
        "rank": rank,
        "killed_after_step": done,
        "decoding": at is None,
        "in_time": not too_late,
        "exit_code": code,
        "steps_repeated": done - later[0] + 1 if later else 0,
        "whole": [line["step"] for line in lines_of(folder)] == list(range(1, steps + 1)),
    }


def main() -> None:
    """Parse the command line, run, and add the outcome to the report of `long.py`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=10, help="the fifth of each five is killed while it decodes")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path, default=REPORTS / "long", help="without suffix")
    args = parser.parse_args()
    rng, tries, wanted = random.Random(args.seed), [], {}
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(temporary)
        for number in range(args.tries):
            nproc = 1 if number < args.tries // 2 else 2
            if nproc not in wanted:
                wanted[nproc] = root / f"unbroken-{nproc}"
                wanted[nproc].mkdir()
                subprocess.run(command(nproc, args.steps), cwd=wanted[nproc], check=True, capture_output=True)
            folder = root / str(number)
            folder.mkdir()
            tried = broken(folder, nproc, args.steps, None if number % 5 == 4 else rng.randrange(1, args.steps), rng)
            tried["same_bits"] = same(folder, wanted[nproc])
            tries.append(tried)
            print(number, json.dumps(tried), flush=True)
    saved = args.output.with_suffix(".json")
    report = json.loads(saved.read_text())
    report["kills"] = {"environment": environment("cpu"), "steps": args.steps, "every": EVERY, "tries": tries}
    saved.write_text(json.dumps(report, indent=1) + "\n")
    long.write(args.output.with_suffix(".md"), report)


def same(folder: pathlib.Path, other: pathlib.Path) -> bool:
    """Whether two jobs made the same file and the same latents."""
    if not all((where / name).exists() for where in (folder, other) for name in ("v.mp4", "l.safetensors")):
        return False
    latents, want = (load_file(where / "l.safetensors")["latents"] for where in (folder, other))
    return torch.equal(latents, want) and (folder / "v.mp4").read_bytes() == (other / "v.mp4").read_bytes()


if __name__ == "__main__":
    main()
