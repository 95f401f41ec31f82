"""Kill or freeze a random rank of a gang at a random step, many times: `python benchmarks/gang_recovery.py --kills 50`.

Every job must end by itself, with the bits of an unbroken one on as many ranks. The time that counts is from the kill to
the next denoising step that is done: notice, new process or spare, rendezvous, loading, and the step itself.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import random
import signal
import statistics
import tempfile
import time

import torch
from harness import REPORTS, environment

from heterostep.engine.request import EngineConfig, GenerateRequest, Started, StepDone
from heterostep.hsa.config import HSAConfig
from heterostep.launch.gang.cluster import connected
from heterostep.launch.gang.config import GangConfig
from heterostep.launch.gang.gang import Gang
from heterostep.launch.gang.messages import RankLost, Work
from heterostep.launch.gang.video import make_video

EVERY = 3


class Attack:
    """One kill, and what became of it."""

    def __init__(self, kind: str, rank: int, at: int) -> None:
        self.kind, self.rank, self.at = kind, rank, at
        self.struck = self.noticed = self.seconds = None
        self.cause, self.resumed_at = None, None

    def strike(self, gang: Gang) -> None:
        os.kill(gang.pids[self.rank], signal.SIGSTOP if self.kind == "SIGSTOP" else signal.SIGKILL)
        self.struck = time.monotonic()

    def result(self) -> dict:
        return {
            "signal": self.kind,
            "rank": self.rank,
            "steps_done": self.at,
            "resumed_at": self.resumed_at,
            "cause": self.cause,
            "seconds_to_notice": self.noticed,
            "seconds_to_next_step": self.seconds,
        }


def job(gang: Gang, work: Work, folder: pathlib.Path, attacks: list[Attack]) -> tuple[torch.Tensor, bool]:
    """Make the video while it is attacked; its latents, and whether every step was done."""
    due, current, steps = list(attacks), None, set()

    def lost(loss: RankLost) -> None:
        assert current is not None, f"lost without an attack: {loss}"
        current.noticed, current.cause = time.monotonic() - current.struck, loss.cause

    run = make_video(gang, work, folder, lost)
    while True:
        try:
            event = next(run)
        except StopIteration as end:
            return end.value.output.latents, steps == set(range(work.request.num_inference_steps))
        if isinstance(event, Started) and current is not None:
            current.resumed_at = event.resumed_at or 0
        elif isinstance(event, StepDone):
            steps.add(event.step)
            if current is not None and current.noticed is not None:
                current.seconds, current = time.monotonic() - current.struck, None
            if current is None and due and event.step + 1 == due[0].at:
                current = due.pop(0)
                current.strike(gang)


def plan(args: argparse.Namespace, rng: random.Random) -> list[list[Attack]]:
    """For each job the attacks on it: random ranks and steps, with a checkpoint between two of them."""
    kinds = ["SIGSTOP"] * args.freezes + ["SIGKILL"] * (args.kills - args.freezes)
    rng.shuffle(kinds)
    jobs = []
    while kinds:
        half = args.steps // 2
        # Two losses without a checkpoint between them end a job: it is what it is made for.
        spans = [(1, half - EVERY), (half + 1, args.steps - 1)][: len(kinds)]
        jobs.append([Attack(kinds.pop(), rng.randrange(args.nproc), rng.randint(*span)) for span in spans])
    return jobs


def main() -> None:
    """Parse the command line, run, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--freezes", type=int, default=10, help="so many of them by SIGSTOP")
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--frozen-after", type=float, default=10.0)
    parser.add_argument("--no-spare", action="store_true", help="without a spare process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path, default=REPORTS / "gang_recovery", help="without suffix")
    args = parser.parse_args()
    rng, attacks, jobs = random.Random(args.seed), [], []
    engine = EngineConfig(model="demo", device="cpu", dtype="float32", hsa=HSAConfig(compute=0.5, policy="tokens"))
    config = GangConfig(size=args.nproc, threads=1, spare=not args.no_spare, frozen_after=args.frozen_after)
    request = GenerateRequest(prompt="a red disc moves right", seed=7, num_inference_steps=args.steps)
    work = Work(id="video", request=request, checkpoint_every=EVERY)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, connected(None, args.nproc, "cpu"):
        root, gang = pathlib.Path(temporary), Gang(config, engine)
        gang.heal(work)
        wanted, whole = job(gang, work, root / "unbroken", [])
        assert whole
        for number, attacked in enumerate(plan(args, rng)):
            latents, whole = job(gang, work, root / str(number), attacked)
            same = torch.equal(latents, wanted)
            struck = [attack.result() for attack in attacked if attack.struck is not None]
            attacks += struck
            jobs.append({"same_bits": same, "all_steps": whole, "kills": len(struck)})
            print(f"{time.monotonic() - start:.0f} s", number, json.dumps([jobs[-1], struck]), flush=True)
        lives = gang.lives
        gang.close()
    write(args, jobs, attacks, lives, time.monotonic() - start)


def write(args: argparse.Namespace, jobs: list[dict], attacks: list[dict], lives: int, seconds: float) -> None:
    """JSON and Markdown."""
    good = sum(job["same_bits"] and job["all_steps"] for job in jobs)
    settings = {"ranks": args.nproc, "steps": args.steps, "checkpoint_every": EVERY, "spare": not args.no_spare}
    settings |= {"frozen_after": args.frozen_after, "seed": args.seed}
    report = {"environment": environment("cpu"), "settings": settings, "seconds": seconds, "lives": lives}
    report |= {"jobs": jobs, "kills": attacks}
    args.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    causes = collections.Counter(attack["cause"] for attack in attacks)
    rows = "\n".join(_row(kind, [a for a in attacks if a["signal"] in kinds]) for kind, kinds in _KINDS.items())
    spare = "no spare process" if args.no_spare else "a spare process that has loaded the model"
    args.output.with_suffix(".md").write_text(
        f"""# Killing ranks of a gang

{len(jobs)} jobs of {args.nproc} ranks (Ray actors, gloo, demo model, policy `tokens`, {args.steps} steps, a checkpoint
every {EVERY}), one after the other on one gang with {spare}; a random rank was killed at a random step
{len(attacks)} times, {sum(a["signal"] == "SIGSTOP" for a in attacks)} of them by SIGSTOP, which is noticed after
{args.frozen_after:g} s of silence. Made by `python benchmarks/gang_recovery.py` in {seconds / 60:.0f} minutes on a machine
of {os.cpu_count()} cores.

| | |
|---|---:|
| jobs that ended by themselves, all steps done, latents of an unbroken run bit for bit | {good} of {len(jobs)} |
| causes that were named | {", ".join(f"{cause}: {count}" for cause, count in sorted(causes.items()))} |

| seconds from the kill to the next step | kills | median | 95 % | worst |
|---|---:|---:|---:|---:|
{rows}
"""
    )
    print(f"{good} of {len(jobs)}; wrote {args.output}.md")


_KINDS = {"all": ("SIGKILL", "SIGSTOP"), "SIGKILL": ("SIGKILL",), "SIGSTOP": ("SIGSTOP",)}


def _row(kind: str, attacks: list[dict]) -> str:
    waits = sorted(attack["seconds_to_next_step"] for attack in attacks)
    if not waits:
        return f"| {kind} | 0 | | | |"
    late = waits[min(len(waits) - 1, int(0.95 * len(waits)))]
    return f"| {kind} | {len(waits)} | {statistics.median(waits):.1f} | {late:.1f} | {waits[-1]:.1f} |"


if __name__ == "__main__":
    main()
