"""`ParallelConfig`: how many ranks make one video, and along which axes they share the work."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..settings import check as check_settings
from ..settings import setting

RING_CACHES = ("auto", "gathered", "sharded")
KERNELS = ("auto", "sdpa", "flash", "flash3", "xfuser")
CUTS = ("equal", "measured")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Degrees of the three axes, and how attention is placed on them.

    ``ring_cache`` says what a rank keeps where ring > 1: ``gathered``, the K/V of all tokens (least traffic, ring times
    the memory), or ``sharded``, those of its own range of tokens (queries travel). ``auto`` takes ``gathered`` where
    `choose.resolve` found it to fit into memory. With ``cut="measured"`` sums are rounded otherwise from run to run, so
    two runs agree to rounding only.

    Raises:
        ConfigError: a value is out of range or of the wrong type.
    """

    cfg: int = setting(
        1, least=1, metavar="C", help="number of groups of ranks, each of which runs its share of the guidance branches"
    )
    ring: int = setting(1, least=1, metavar="R", help="number of ranks that share the tokens of a layer")
    ulysses: int = setting(
        1,
        least=1,
        metavar="U",
        help="number of ranks that share the attention heads of a layer; must divide the number of heads",
    )
    ring_cache: str = setting(
        "auto",
        choices=RING_CACHES,
        help="gathered keeps all keys and values on every ring rank, sharded keeps a part on each",
    )
    kernel: str = setting("auto", choices=KERNELS, help="attention kernel")
    cut: str = setting(
        "equal",
        choices=CUTS,
        help="how tokens are cut into slices: equal, or measured, which gives faster ranks more tokens",
    )
    weights: tuple[float, ...] | None = setting(
        None, flag="", help="relative speeds of the ring * ulysses ranks of a sequence group, ring-major"
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.weights is not None:
            object.__setattr__(self, "weights", _speeds(self.weights, self.ring * self.ulysses))
            if self.cut != "equal":
                raise ConfigError(f"weights with cut={self.cut!r}: only the cut 'equal' can follow the ranks' speeds.")

    @property
    def world_size(self) -> int:
        """Ranks in all: cfg * ring * ulysses."""
        return self.cfg * self.ring * self.ulysses

    @property
    def sequence_size(self) -> int:
        """Ranks that share the tokens of one branch: ring * ulysses."""
        return self.ring * self.ulysses


def check(config: ParallelConfig, *, world_size: int, num_heads: int, num_branches: int) -> None:
    """Refuse degrees that this job or this model cannot have.

    Args:
        config: what was asked for.
        world_size: ranks of the job.
        num_heads: attention heads of a layer.
        num_branches: guidance branches: 1 without guidance, 2 for cond and uncond.

    Raises:
        ConfigError: with the valid choices.
    """
    if num_branches % config.cfg:
        raise ConfigError(
            f"cfg={config.cfg} with {num_branches} guidance branch(es): it must divide their number, "
            f"so one of {_listed(divisors(num_branches))}."
        )
    if num_heads % config.ulysses:
        raise ConfigError(
            f"ulysses={config.ulysses} with {num_heads} attention heads: it must divide their number, "
            f"so one of {_listed(divisors(num_heads))}; ring takes any degree."
        )
    if config.world_size != world_size:
        valid = ", ".join(
            f"{c} x {r} x {u}"
            for c, r, u in degrees(world_size=world_size, num_heads=num_heads, num_branches=num_branches)
        )
        raise ConfigError(
            f"cfg {config.cfg} x ring {config.ring} x ulysses {config.ulysses} makes {config.world_size} rank(s) "
            f"of a job of {world_size}: the product must be equal to it, so one of {valid}."
        )


def degrees(*, world_size: int, num_heads: int, num_branches: int) -> Iterator[tuple[int, int, int]]:
    """Yield every valid (cfg, ring, ulysses) for a job, the largest cfg and then the largest ulysses first."""
    for cfg in reversed(divisors(math.gcd(world_size, num_branches))):
        ranks = world_size // cfg
        for ulysses in reversed(divisors(math.gcd(ranks, num_heads))):
            yield cfg, ranks // ulysses, ulysses


def divisors(number: int) -> list[int]:
    """Return all divisors of a positive number, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _speeds(weights: Any, count: int) -> tuple[float, ...]:
    """Return weights as floats, or refuse them."""
    try:
        speeds = tuple(float(w) for w in weights)
    except (TypeError, ValueError):
        raise ConfigError(f"weights={weights!r}: a tuple of numbers is needed, one for each rank.") from None
    if len(speeds) != count:
        raise ConfigError(f"weights={weights!r}: ring * ulysses = {count} number(s) are needed, one for each rank.")
    if not all(math.isfinite(w) and w > 0.0 for w in speeds):
        raise ConfigError(f"weights={weights!r}: speeds are finite and above 0.")
    return speeds


def _listed(numbers: list[int]) -> str:
    """Return "1, 2, 4"."""
    return ", ".join(str(n) for n in numbers)
