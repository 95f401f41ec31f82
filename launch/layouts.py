"""Ways to use a number of GPUs: replicas, each of which makes a video of its own, times the ranks that share one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..engine.devices import GIB
from ..engine.estimate import Case, Estimate, estimate
from ..errors import ConfigError
from ..parallel.config import ParallelConfig, check, degrees, divisors

SWEEP = tuple(2**i for i in range(11))
"""1 to 1,024 GPUs."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """So many videos at a time, each on the same degrees.

    Attributes:
        replicas: videos at a time.
        estimate: what a rank of one of them does.
    """

    replicas: int
    estimate: Estimate

    @property
    def ranks(self) -> int:
        """Ranks that share a video."""
        return self.estimate.config.world_size

    @property
    def gpus(self) -> int:
        """GPUs in all."""
        return self.replicas * self.ranks

    @property
    def per_hour(self) -> float:
        """Videos per hour."""
        return self.replicas * 3600 / self.estimate.video

    @property
    def per_gpu_hour(self) -> float:
        """Videos per GPU and hour."""
        return self.per_hour / self.gpus

    @property
    def degrees(self) -> str:
        """Cfg x ring x ulysses."""
        config = self.estimate.config
        return f"{config.cfg} x {config.ring} x {config.ulysses}"


def layouts(case: Case, gpus: int, given: Mapping[str, Any]) -> list[Layout]:
    """Every way to use the GPUs, the fewest ranks first; for each number of ranks the fastest degrees first.

    Args:
        case: the video and the machine.
        gpus: their number.
        given: settings of `ParallelConfig` that hold for all.

    Raises:
        ConfigError: the model or the number of GPUs does not allow the given degrees.
    """
    found = []
    for ranks in divisors(gpus):
        here = [
            Layout(replicas=gpus // ranks, estimate=estimate(case, config)) for config in _configs(case, ranks, given)
        ]
        least = min((layout.estimate.video for layout in here), default=1.0)
        # Of degrees within a per cent of each other the engine's own choice, which `degrees` yields first.
        found += sorted(here, key=lambda layout: round(layout.estimate.video / least, 2))
    if not found:
        facts, branches = case.sizes.facts, case.video.branches
        asked = ParallelConfig(**given)
        check(asked, world_size=asked.world_size, num_heads=facts.shared_heads, num_branches=branches)
        raise ConfigError(f"degrees of {asked.world_size} rank(s) need a multiple of so many GPUs, not {gpus}")
    return found


def _configs(case: Case, ranks: int, given: Mapping[str, Any]) -> Iterator[ParallelConfig]:
    """Valid degrees of so many ranks that agree with the given ones."""
    heads, branches = case.sizes.facts.shared_heads, case.video.branches
    for cfg, ring, ulysses in degrees(world_size=ranks, num_heads=heads, num_branches=branches):
        chosen = {"cfg": cfg, "ring": ring, "ulysses": ulysses}
        if all(given.get(name, degree) == degree for name, degree in chosen.items()):
            yield ParallelConfig(**{**given, **chosen})


def by_ranks(found: list[Layout]) -> list[Layout]:
    """For each number of ranks the fastest degrees that fit, or the fastest."""
    ranks = sorted({layout.ranks for layout in found})
    here = [[layout for layout in found if layout.ranks == number] for number in ranks]
    return [next((layout for layout in same if layout.estimate.fits), same[0]) for same in here]


def most(found: list[Layout]) -> Layout | None:
    """The layout that fits with the most videos per hour; None if none fits."""
    return max((layout for layout in found if layout.estimate.fits), key=lambda layout: layout.per_hour, default=None)


def soonest(found: list[Layout]) -> Layout | None:
    """The layout that fits whose video is ready first; of equal ones that with the fewest ranks."""
    fitting = (layout for layout in by_ranks(found) if layout.estimate.fits)
    return min(fitting, key=lambda layout: (layout.estimate.video, layout.ranks), default=None)


def sweep(case: Case, given: Mapping[str, Any]) -> list[tuple[int, Layout | None, Layout | None]]:
    """For 1 to 1,024 GPUs: their number, the layout with the most videos per hour, and the soonest."""
    rows = []
    for gpus in SWEEP:
        try:
            found = layouts(case, gpus, given)
        except ConfigError:  # fewer GPUs than the given degrees need
            continue
        rows.append((gpus, most(found), soonest(found)))
    return rows


def uneven(case: Case, gpus: int, given: Mapping[str, Any]) -> str:
    """Say why a number of GPUs suits one video badly, and which numbers would do; empty where it suits."""
    heads, branches = case.sizes.facts.shared_heads, case.video.branches

    def even(number: int) -> tuple[int, int, int] | None:
        found = degrees(world_size=number, num_heads=heads, num_branches=branches)
        return next((d for d in found if d[1] == 1), None)

    if gpus > heads * branches or even(gpus) or given.get("ring", 1) > 1:
        return ""
    near = [n for n in (*range(gpus - 1, 0, -1), *range(gpus + 1, heads * branches + 1)) if even(n)]
    below, above = max((n for n in near if n < gpus), default=None), min((n for n in near if n > gpus), default=None)
    would = [
        f"{n} (cfg {cfg} x ulysses {ulysses})"
        for n in (below, above)
        if n is not None and n > 1
        for cfg, _, ulysses in [even(n) or (1, 1, n)]
    ]
    listed = ", ".join(str(n) for n in divisors(heads))
    return (
        f"{gpus} GPUs do not divide one video evenly: cfg takes {' or '.join(str(n) for n in divisors(branches))} and "
        f"ulysses one of {listed}, so ring must take a share and sends more; {' or '.join(would)} GPUs would do, "
        f"or {gpus} replicas on one GPU each"
    )


def advice(case: Case, gpus: int, given: Mapping[str, Any]) -> str:
    """Say what would fit where none of the layouts does."""
    found = layouts(case, gpus, given)
    nearest = min(found, key=lambda layout: layout.estimate.peak)
    ways = []
    for what, changed in _changes(case):
        fitting = [layout for layout in layouts(changed, gpus, given) if layout.estimate.fits]
        if fitting:
            ways.append(f"{what} on {fitting[0].ranks} rank(s)")
    free = {name: value for name, value in given.items() if name not in ("cfg", "ring", "ulysses")}
    for more in SWEEP:
        fitting = [layout for layout in layouts(case, more, free) if layout.estimate.fits and layout.replicas == 1]
        if more > gpus and fitting:
            ways.append(f"{more} ranks (cfg x ring x ulysses = {fitting[0].degrees})")
            break
    would = f"; {' or '.join(ways)} would fit" if ways else "; a smaller size or fewer frames would"
    needed, room = nearest.estimate.peak / GIB, case.device.memory / GIB
    return f"nothing fits: a rank needs at least {needed:.1f} GiB of {room:.0f} GiB{would}"


def _changes(case: Case) -> Iterator[tuple[str, Case]]:
    if not case.shard_weights:
        yield "--shard-weights", dataclasses.replace(case, shard_weights=True)
    if case.allotment.partial and case.hsa.policy != "steps":
        whole = dataclasses.replace(case.hsa, policy="steps")
        yield "--policy steps, which keeps no keys and values,", dataclasses.replace(case, hsa=whole)
