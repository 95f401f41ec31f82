"""Kill or freeze a random rank of a worker group at a random step, many times: `python benchmarks/gang_recovery.py`.

Every job must end by itself, with the bits of an unbroken one on as many ranks. The time that counts is from the kill
to the next denoising step that is done: notice, rendezvous, the spare process or a new one, and the step itself.

Before most jobs the group is given the time to have its standby ready again, as it would have where ranks die
hours apart; before the `--rapid` ones it is not.
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

from heterostep.engine.config import EngineConfig
from heterostep.engine.request import GenerateRequest, Started, StepDone
from heterostep.errors import RankLost
from heterostep.hsa.config import HSAConfig
from heterostep.launch.workers.group import WorkerGroup
from heterostep.launch.workers.messages import GroupConfig, Work
from heterostep.launch.workers.ray_cluster import RayCluster, connected
from heterostep.launch.workers.video import make_video

EVERY = 3


class Attack:
    """One kill, and what became of it."""

    def __init__(self, kind: str, rank: int, at: int) -> None:
        self.kind, self.rank, self.at = kind, rank, at
        self.struck = self.noticed = self.seconds = None
        self.cause, self.resumed_at, self.spared, self.load = None, None, None, None

    def strike(self, group: WorkerGroup) -> None:
        self.spared, self.load = group.standby_ready, os.getloadavg()[0]
        os.kill(group.pids[self.rank], signal.SIGSTOP if self.kind == "SIGSTOP" else signal.SIGKILL)
        self.struck = time.monotonic()

    def result(self) -> dict:
        return {
            "signal": self.kind,
            "rank": self.rank,
            "steps_done": self.at,
            "resumed_at": self.resumed_at,
            "cause": self.cause,
            "spare_ready": self.spared,
            "load": self.load,
            "seconds_to_notice": self.noticed,
            "seconds_to_next_step": self.seconds,
        }


def job(group: WorkerGroup, work: Work, folder: pathlib.Path, attacks: list[Attack]) -> tuple[torch.Tensor, bool]:
    """Make the video while it is attacked; its latents, and whether every step was done."""
    due, current, steps = list(attacks), None, set()

    def lost(loss: RankLost) -> None:
        assert current is not None, f"lost without an attack: {loss}"
        current.noticed, current.cause = time.monotonic() - current.struck, loss.cause

    run = make_video(group, work, folder, lost)
    while True:
        try:
            event = next(run)
        except StopIteration as end:
            if current is not None:  # the step that it struck was the last one
                current.seconds = time.monotonic() - current.struck
            return end.value.output.latents, steps == set(range(1, work.request.num_inference_steps + 1))
        if isinstance(event, Started) and current is not None:
            current.resumed_at = event.resumed_at or 0
        elif isinstance(event, StepDone):
            steps.add(event.step)
            if current is not None and current.noticed is not None:
                current.seconds, current = time.monotonic() - current.struck, None
            if current is None and due and event.step == due[0].at:
                current = due.pop(0)
                current.strike(group)


def plan(args: argparse.Namespace, rng: random.Random) -> list[tuple[Attack, bool]]:
    """An attack on each job, at a random step of a random rank; and whether to wait for the spare process before."""
    kinds = ["SIGSTOP"] * args.freezes + ["SIGKILL"] * (args.kills - args.freezes)
    waits = [number >= args.rapid for number in range(args.kills)]
    rng.shuffle(kinds)
    rng.shuffle(waits)
    places = [(rng.randrange(args.nproc), rng.randint(1, args.steps - 3)) for _ in kinds]
    return [(Attack(kind, *where), wait) for kind, where, wait in zip(kinds, places, waits, strict=True)]


def await_standby(group: WorkerGroup) -> None:
    """Look after an idle group until it has its standby."""
    while not group.standby_ready:
        group.watch()
        time.sleep(0.2)


def main() -> None:
    """Parse the command line, run, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--freezes", type=int, default=10, help="so many of them by SIGSTOP")
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--rapid", type=int, default=10, help="so many of them before a new spare process is ready")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--frozen-after", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path, default=REPORTS / "gang_recovery", help="without suffix")
    args = parser.parse_args()
    attacks, jobs = [], []
    engine = EngineConfig(model="demo", device="cpu", dtype="float32", hsa=HSAConfig(compute=0.5, policy="tokens"))
    config = GroupConfig(size=args.nproc, threads=1, standby=True, frozen_after=args.frozen_after)
    request = GenerateRequest(prompt="a red disc moves right", seed=7, num_frames=9, num_inference_steps=args.steps)
    work = Work(request=request, checkpoint_every=EVERY)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, connected(None, args.nproc, "cpu"):
        root, group = pathlib.Path(temporary), WorkerGroup(config, engine, RayCluster(gpus=False))
        group.recover(work)
        wanted, whole = job(group, work, root / "unbroken", [])
        assert whole
        for number, (attack, wait) in enumerate(plan(args, random.Random(args.seed))):
            if wait:
                await_standby(group)
            latents, whole = job(group, work, root / str(number), [attack])
            attacks.append(attack.result())
            jobs.append({"same_bits": torch.equal(latents, wanted), "all_steps": whole})
            line = json.dumps(jobs[-1] | attacks[-1])
            print(f"{time.monotonic() - start:.0f} s", number, line, flush=True)
        rendezvous = group.rendezvous
        group.close()
    write(args, jobs, attacks, rendezvous, time.monotonic() - start)


def write(args: argparse.Namespace, jobs: list[dict], attacks: list[dict], rendezvous: int, seconds: float) -> None:
    """JSON and Markdown."""
    good = sum(job["same_bits"] and job["all_steps"] for job in jobs)
    settings = {name: getattr(args, name) for name in ("nproc", "steps", "frozen_after", "rapid", "seed")}
    report = {"environment": environment("cpu"), "settings": settings | {"checkpoint_every": EVERY}}
    report |= {"seconds": seconds, "rendezvous": rendezvous, "jobs": jobs, "kills": attacks}
    args.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    causes = collections.Counter((attack["signal"], attack["cause"]) for attack in attacks)
    rows = [_row("all", attacks)]
    for kind in ("SIGKILL", "SIGSTOP"):
        for spared, words in ((True, "standby ready"), (False, "standby still loading")):
            chosen = [a for a in attacks if a["signal"] == kind and a["spare_ready"] == spared]
            rows += [_row(f"{kind}, {words}", chosen)] if chosen else []
    args.output.with_suffix(".md").write_text(
        f"""# Killing ranks of a worker group

{len(jobs)} jobs of {args.nproc} ranks (Ray actors, gloo, demo model, policy `tokens`, {args.steps} steps, a checkpoint
every {EVERY}), one after the other on one group with a standby process; in each a random rank was killed at a random
step, in {args.freezes} of them frozen by SIGSTOP, which is noticed after {args.frozen_after:g} s of silence. Made by
`python benchmarks/gang_recovery.py` in {seconds / 60:.0f} minutes on {os.cpu_count()} cores{_busy(attacks)}.

| | |
|---|---:|
| jobs that ended by themselves, all steps done, latents of an unbroken run bit for bit | {good} of {len(jobs)} |
| causes that were named | {", ".join(f"{kind} {cause}: {n}" for (kind, cause), n in sorted(causes.items()))} |

| seconds from the kill to the next step | kills | median | 95 % | worst |
|---|---:|---:|---:|---:|
{chr(10).join(rows)}
"""
    )
    print(f"{good} of {len(jobs)}; wrote {args.output}.md")


def _busy(attacks: list[dict]) -> str:
    """What else ran on the machine, as far as the load tells."""
    load = statistics.median(attack["load"] for attack in attacks)
    return f" (median load {load:.1f}: the group's two busy ranks, and other programs)" if load > 3.0 else ""


def _row(kind: str, attacks: list[dict]) -> str:
    waits = sorted(attack["seconds_to_next_step"] for attack in attacks)
    late = waits[min(len(waits) - 1, int(0.95 * len(waits)))]
    return f"| {kind} | {len(waits)} | {statistics.median(waits):.1f} | {late:.1f} | {waits[-1]:.1f} |"


if __name__ == "__main__":
    main()
