"""`heterostep bench recovery`: jobs whose ranks are killed or frozen, how long until the next step, and the goodput."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..benchmarks.results import result as results
from ..benchmarks.speed.settings import RecoverySettings, ResultFiles
from ..engine.facts import read_facts
from ..engine.progress import Progress
from ..engine.request import Started, StepDone, resolve
from ..errors import ConfigError, RankLost
from .bench_speed import Measurement, new_result
from .logs import silence_libraries
from .options import Command
from .ranks import alone, group_config, settled_here
from .workers.group import WorkerGroup
from .workers.messages import Work
from .workers.process import ThisMachine
from .workers.video import make_video

EVERY = 3
"""Steps between checkpoints."""
_DAY = 86_400.0


@dataclasses.dataclass(kw_only=True)
class Attack:
    """One loss, and what became of it.

    Attributes:
        signal: SIGKILL or SIGSTOP.
        rank: that was lost.
        at: steps that were done.
        wait: whether to wait for the standby process before.
        standby: whether it was ready.
        cause: as it was noticed.
        resumed_at: steps that did not have to be done again.
        to_notice, to_next_step: seconds.
        whole: whether every step was done, and the latents are those of an unbroken job bit for bit.
    """

    signal: str
    rank: int
    at: int
    wait: bool
    standby: bool = False
    cause: str = ""
    resumed_at: int = 0
    to_notice: float | None = None
    to_next_step: float | None = None
    whole: bool = False
    struck: float = 0.0

    def strike(self, group: WorkerGroup) -> None:
        """Lose the rank."""
        self.standby = group.standby_ready
        os.kill(group.pids[self.rank], getattr(signal, self.signal))
        self.struck = time.monotonic()

    def lost_seconds(self, step: float) -> float:
        """What it cost: the wait, and the steps that were done again, of which the wait has one."""
        assert self.to_next_step is not None
        return max(self.to_next_step + (self.at - self.resumed_at - 1) * step, 0.0)


def bench_recovery(
    settings: RecoverySettings, files: ResultFiles, command: Command, said: Sequence[str], progress: Progress
) -> int:
    """Run the command; returns the exit code.

    Args:
        settings: what is done to the ranks.
        files: where the result goes.
        command: the model, the video, and its ranks.
        said: the command's arguments.
        progress: shows how far it is.

    Raises:
        HeterostepError: a setting, the model or the request is wrong, or a job was given up.
    """
    silence_libraries(downloads=progress.shown)
    request = resolve(command.request, read_facts(command.engine.model))
    attacks = planned(settings, command.ranks.size, request.num_inference_steps)
    warmup = "one unbroken job, with whose latents the others are compared"
    result = new_result("recovery", said, settings, command, [request], warmup)
    result["settings"]["checkpoint_every"] = EVERY
    measurement = Measurement(files, result, progress)
    done: list[Attack] = []
    steps: list[float] = []
    with measurement.finishing(), tempfile.TemporaryDirectory() as temporary:
        try:
            with _group(settings, command, progress) as group:
                work, folder = Work(request=command.request, checkpoint_every=EVERY), Path(temporary)
                progress.stage("an unbroken job")
                wanted, _ = _job(group, work, folder / "unbroken", None, steps)
                for number, attack in enumerate(attacks, 1):
                    while attack.wait and group.config.standby and not group.standby_ready:
                        group.watch()
                        time.sleep(0.2)
                    progress.stage(f"job {number} of {len(attacks)}: {attack.signal} at step {attack.at}")
                    latents, whole = _job(group, work, folder / str(number), attack, steps)
                    attack.whole = whole and torch.equal(latents, wanted)
                    done.append(attack)
        finally:
            if done:
                measurement.add(*rows(done, statistics.median(steps), settings.deaths))
    return 0


def planned(settings: RecoverySettings, ranks: int, steps: int) -> list[Attack]:
    """An attack on each job, where nothing else is said at a random step of a random rank.

    Raises:
        ConfigError: there is no such rank or step.
    """
    if settings.rank is not None and settings.rank >= ranks:
        raise ConfigError(f"--rank {settings.rank}: {ranks} rank(s) have numbers from 0 to {ranks - 1}")
    if steps < 4 or (settings.at is not None and settings.at > steps - 2):
        raise ConfigError(f"--at must leave two of the {steps} steps, of which there must be 4; ask for more --steps")
    rng = random.Random(settings.trial_seed)
    kinds = ["SIGSTOP"] * settings.freezes + ["SIGKILL"] * (settings.kills - settings.freezes)
    waits = [number >= settings.rapid for number in range(settings.kills)]
    rng.shuffle(kinds)
    rng.shuffle(waits)
    return [
        Attack(
            signal=kind,
            rank=rng.randrange(ranks) if settings.rank is None else settings.rank,
            at=rng.randint(1, steps - 3) if settings.at is None else settings.at,
            wait=wait,
        )
        for kind, wait in zip(kinds, waits, strict=True)
    ]


@contextlib.contextmanager
def _group(settings: RecoverySettings, command: Command, progress: Progress) -> Iterator[WorkerGroup]:
    """A group on this machine, or of Ray's actors."""
    engine, reason = settled_here(command)
    progress.say(reason or "1 rank")
    standby = engine.device == "cpu" and command.ranks.size > 1 and not engine.shard_weights
    config = dataclasses.replace(group_config(command, engine, standby), frozen_after=settings.frozen_after)
    with contextlib.ExitStack() as held:
        if command.ranks.ray:
            from .workers.ray_cluster import RayCluster, connected

            held.enter_context(connected(None, config.size, engine.device))
            group = WorkerGroup(config, alone(engine), RayCluster(engine.device != "cpu"))
        else:
            group = WorkerGroup(config, alone(engine), ThisMachine())
        yield held.enter_context(contextlib.closing(group))


def _job(
    group: WorkerGroup, work: Work, folder: Path, attack: Attack | None, seconds: list[float]
) -> tuple[torch.Tensor, bool]:
    """Make the video while it is attacked; its latents, and whether every step was done.

    `seconds` takes the time of each step of an unbroken job.
    """
    current: Attack | None = None
    steps: set[int] = set()

    def lost(loss: RankLost) -> None:
        if current is None:
            raise loss
        current.to_notice, current.cause = time.monotonic() - current.struck, loss.cause

    run = make_video(group, work, folder, lost)
    while True:
        try:
            event = next(run)
        except StopIteration as end:
            output = end.value.output
            return output.latents, steps == set(range(1, output.request.num_inference_steps + 1))
        if isinstance(event, Started) and current is not None:
            current.resumed_at = event.resumed_at or 0
        elif isinstance(event, StepDone):
            steps.add(event.step)
            if attack is None and event.step > 1:
                seconds.append(event.seconds)
            if current is not None and current.to_notice is not None and current.to_next_step is None:
                current.to_next_step = time.monotonic() - current.struck
            if attack is not None and current is None and event.step == attack.at:
                current = attack
                current.strike(group)


def rows(done: Sequence[Attack], step: float, deaths: float) -> list[dict[str, Any]]:
    """Rows of a result: of all losses, of each kind, and the goodput at a rate of losses a day.

    Goodput is the share of time in which a job makes progress: 1 - rate x what a loss costs.
    """
    kinds = dict.fromkeys((attack.signal, attack.standby) for attack in done)
    groups = [("all", "", list(done))] + [
        (kind, "ready" if ready else "not ready", [a for a in done if (a.signal, a.standby) == (kind, ready)])
        for kind, ready in sorted(kinds)
    ]
    found = []
    for kind, standby, chosen in groups:
        waits = [a.to_next_step for a in chosen if a.to_next_step is not None]
        metrics: dict[str, Any] = {
            "jobs": len(chosen),
            "whole_and_same_bits": sum(a.whole for a in chosen),
            "seconds_to_notice": [a.to_notice for a in chosen if a.to_notice is not None],
            "seconds_to_next_step": waits,
            "steps_repeated": [a.at - a.resumed_at for a in chosen],
        }
        made = {name: results.metric(values) for name, values in metrics.items() if values != []}
        found.append(results.row({"loss": kind, "standby": standby}, made))
    found[0]["losses"] = [dataclasses.asdict(attack) | {"struck": None} for attack in done]
    costs = [attack.lost_seconds(step) for attack in done if attack.to_next_step is not None]
    if costs:
        goodput = max(1 - deaths / _DAY * statistics.fmean(costs), 0.0)
        metrics = {"step_seconds": step, "seconds_lost_each": results.metric(costs), "goodput": goodput}
        found.append(results.row({"deaths_per_day": deaths}, metrics))
    return found
