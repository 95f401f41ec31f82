"""Lose one of two machines in the midst of a job, in many ways: `python benchmarks/lost_machines.py`.

The machines are network namespaces with a link of 1 Gbit/s between them (tests/machines.py); each runs
`heterostep generate --nnodes 2`, or with `--ray` one of two nodes of a Ray cluster. One loses all its processes, is cut
off, or is frozen, and is back after some seconds or never. Each job must end by itself, with the video of an unbroken
one. Writes reports/lost_machines.json and .md, or lost_nodes, after every try.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from harness import REPORTS, environment
from safetensors.torch import load_file

sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests"))
import forked
import machines
from waiting import until

EVERY, AT = 3, 20
MAIN, OTHER = 0, 1
TRIES = [
    ("killed", OTHER, 2), ("killed", OTHER, 5), ("killed", OTHER, 30), ("killed", OTHER, None),
    ("cut off", OTHER, 5), ("cut off", OTHER, 30), ("cut off", OTHER, None), ("frozen", OTHER, 30),
    ("killed", MAIN, 2), ("killed", MAIN, 30),
]  # fmt: skip
"""How a machine is lost, which one, and after how many seconds it is back."""
RAY_TRIES = [
    *[("killed", OTHER, back) for back in (2, 5, 30, None)],
    *[(way, OTHER, back) for way in ("cut off", "frozen") for back in (5, 30, None)],
]
"""The same on Ray, whose head node must stay."""
GENERATE = [
    sys.executable, "-m", "heterostep", "generate", "--prompt", "a red disc moves right", "--seed", "7", "--compute",
    "0.5", "--policy", "tokens", "--job-dir", "job", "--checkpoint-every", str(EVERY), "--latents", "l.safetensors",
    "--overwrite",
]  # fmt: skip


class Torch:
    """Two machines that meet by `--nnodes`."""

    tries, command = TRIES, "heterostep generate --nnodes 2 --master HOST"

    def __init__(self, bed: list[machines.Machine], steps: int) -> None:
        """Start the command on both."""
        self._address, self._steps = bed[MAIN].address, steps
        self.running = [self._start(machine) for machine in bed]

    def again(self, machine: machines.Machine, which: int) -> None:
        """A machine is back: the same command is given on it."""
        self.running[which] = self._start(machine)

    def _start(self, machine: machines.Machine) -> subprocess.Popen:
        flags = ["--steps", str(self._steps), "--nnodes", "2", "--master", self._address]
        with machine.entered(), open(machine.folder / "log", "a") as log:
            return forked.Popen([*GENERATE, *flags], cwd=machine.folder, stdout=log, stderr=log)


class OnRay:
    """Two nodes of a Ray cluster, with a CPU each; the command is given on the head node."""

    tries, command = RAY_TRIES, "heterostep generate --nproc 2 --ray-address HOST:PORT"

    def __init__(self, bed: list[machines.Machine], steps: int) -> None:
        """Start the cluster, and the command when it is whole."""
        self._main = bed[MAIN]
        os.environ.update(machines.RAY_ENVIRONMENT)
        for machine in bed:
            log = machines.start_ray(machine, self._main)
            until(functools.partial(machines.has_started, log), 60)
        address = f"{self._main.address}:{machines.RAY_PORT}"
        flags = ["--steps", str(steps), "--nproc", "2", "--ray-address", address]
        with self._main.entered(), open(self._main.folder / "log", "a") as log:
            self.running = [subprocess.Popen([*GENERATE, *flags], cwd=self._main.folder, stdout=log, stderr=log)]

    def again(self, machine: machines.Machine, which: int) -> None:
        """A machine is back: its node joins the cluster."""
        machines.start_ray(machine, self._main)


def lines_of(machine: machines.Machine) -> list[dict]:
    """The job's progress so far."""
    path = machine.folder / "job" / "progress.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def lose(machine: machines.Machine, way: str) -> None:
    {"killed": machine.kill, "cut off": machine.cut, "frozen": machine.freeze}[way]()


def attempt(folder: pathlib.Path, steps: int, kind: type[Torch | OnRay], how: tuple | None) -> dict:
    """One job, in which a machine is lost, and what became of it; without `how` none is."""
    with machines.running(2, folder, "1gbit") as bed:
        main = bed[MAIN]
        job = kind(bed, steps)
        struck = reached = None
        if how is not None:
            way, which, back = how
            while len(lines_of(main)) < AT:
                if job.running[MAIN].poll() is not None:
                    raise SystemExit(f"the job ended before step {AT}:\n{(main.folder / 'log').read_text()}")
                time.sleep(0.02)
            struck, reached = time.time(), len(lines_of(main))
            lose(bed[which], way)
            if back is not None:
                time.sleep(back)
                if way == "killed":
                    job.again(bed[which], which)
                else:
                    (bed[which].mend if way == "cut off" else bed[which].thaw)()
        try:
            code = job.running[MAIN].wait(900)
            if how is None or how[2] is not None:
                code = code or job.running[-1].wait(30)
        except subprocess.TimeoutExpired:
            code = None
        lines = lines_of(main)
        log = (main.folder / "log").read_text()
    for machine in bed:
        shutil.rmtree(f"/tmp/{machine.name}", ignore_errors=True)
    later = [line for line in lines if struck is not None and line["time"] > struck + 0.5]
    return {
        "exit_code": code,
        "whole": [line["step"] for line in lines] == list(range(1, steps + 1)),
        "steps_repeated": max(0, reached + 1 - later[0]["step"]) if later else 0,
        "seconds_to_next_step": later[0]["time"] - struck if later else None,
        "ranks_missed": "resuming with 1 of 2 ranks" in log,
        "ranks_again": "going on with 2 of 2 ranks instead of 1" in log,
        "load": os.getloadavg()[0],
        "log": log[-3000:],
    }


def main() -> None:
    """Parse the command line, run, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--ray", action="store_true", help="lose nodes of a Ray cluster")
    parser.add_argument("--tries", type=int, nargs="*", help="numbers of those in TRIES, or RAY_TRIES; all by default")
    parser.add_argument("--output", type=pathlib.Path, help="without suffix")
    args = parser.parse_args()
    args.output = args.output or REPORTS / ("lost_nodes" if args.ray else "lost_machines")
    kind = OnRay if args.ray else Torch
    reason = machines.why_not()
    if reason is not None:
        raise SystemExit(reason)
    # Its server must not be a process of the machine that needs it first.
    forked.run([sys.executable, "-c", "pass"])
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(temporary)
        attempt(root / "unbroken", args.steps, kind, None)
        wanted = load_file(root / "unbroken" / "machine0" / "l.safetensors")["latents"]
        for number in range(len(kind.tries)) if args.tries is None else args.tries:
            way, which, back = kind.tries[number]
            result = {"way": way, "machine": "main" if which == MAIN else "other", "back_after": back}
            result |= attempt(root / str(number), args.steps, kind, kind.tries[number])
            with contextlib.suppress(FileNotFoundError):
                found = load_file(root / str(number) / "machine0" / "l.safetensors")["latents"]
                result["difference"] = float((found - wanted).abs().max())
            results.append(result)
            print(number, json.dumps(result | {"log": ""}), flush=True)
            write(args, kind, results)


STARTS = (
    "Processes are forked from one that has imported PyTorch already, so a start takes\nabout a second.",
    "A process that Ray starts imports PyTorch first, for 5 to 10 seconds on this machine.",
)


def write(args: argparse.Namespace, kind: type[Torch | OnRay], results: list[dict]) -> None:
    """JSON and Markdown."""
    good = [r for r in results if r["exit_code"] == 0 and r["whole"] and r.get("difference", 1.0) < 1e-4]
    waits = [r["seconds_to_next_step"] for r in results if r["seconds_to_next_step"] is not None]
    report = {"environment": environment("cpu"), "settings": {"steps": args.steps, "at": AT}, "tries": results}
    args.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    rows = "\n".join(
        f"| {r['machine']} machine {r['way']} | {'never' if r['back_after'] is None else r['back_after']} "
        f"| {'-' if r['seconds_to_next_step'] is None else format(r['seconds_to_next_step'], '.1f')} "
        f"| {'without it' if r['ranks_missed'] else 'with both'}{', then with both' if r['ranks_again'] else ''} "
        f"| {r.get('difference', float('nan')):.1e} | {r['load']:.0f} |"
        for r in results
    )
    args.output.with_suffix(".md").write_text(
        f"""# Losing machines

{len(results)} jobs on two machines of one rank each (network namespaces, link 1 Gbit/s, gloo, demo model, policy
`tokens`, {args.steps} steps, checkpoints every {EVERY}), started by `{kind.command}`.
After step {AT} one machine is lost: all its processes are killed, its link is cut, or it is frozen. Made by
`python benchmarks/lost_machines.py{" --ray" if args.ray else ""}`. {STARTS[args.ray]}

{len(good)} of {len(results)} ended by themselves, with all steps and latents within 1e-4 of an unbroken job. From the
loss to the next step: {statistics.median(waits):.1f} s (median), {max(waits):.1f} s (longest).

| lost | back after (s) | next step after (s) | went on | largest difference | load of the machine |
|---|---:|---:|---|---:|---:|
{rows}

A difference of 0 is the same bits. With cfg on two ranks, one rank alone may give them too.
"""
    )


if __name__ == "__main__":
    main()
