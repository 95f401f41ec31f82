"""`HSAConfig`: how much to compute and, for those who want to say so, how; and how many tokens each step evaluates.

The counts are pure functions from sigmas and a target. They never depend on the data, so the running time is known
beforehand and few different shapes occur.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import ConfigError
from ..settings import check, setting

POLICIES = ("joint", "tokens", "groups", "steps")
SOLVERS = ("euler", "unipc", "dpm++")
FORECASTS = ("hold", "taylor", "ab2", "none")
KV_DTYPES = ("float32", "bfloat16", "float16", "int8", "fp8")
SMALL_KV = ("int8", "fp8")


@dataclass(frozen=True, kw_only=True)
class HSAConfig:
    """Settings of heterogeneous step allocation. Every field that is ``None`` is deduced.

    The cost of a step is linear in its active tokens, so ``compute=0.5`` halves the denoising time. ``profile`` is an
    exponent a: the share of a step's tokens (``tokens``) or the density of evaluated steps (``steps``) is proportional
    to (sigma_i - sigma_next)^a. ``correct`` is deduced as true where the policy works by whole
    steps (``joint``, ``steps``) and the forecast is ``taylor`` or ``ab2``. ``kv_forecast`` above 0 doubles the cache.

    With ``quality`` there is no share to choose: the run adds whole steps until its expected distance from the dense
    run of the same solver is what was promised.

    Raises:
        ConfigError: a value is out of range or of the wrong type, or does not work with ``quality``.
    """

    compute: float = setting(
        0.5, above=0, most=1, metavar="C", help="share of the dense denoising work to spend; 1 is the stock pipeline"
    )
    quality: float | None = setting(
        None,
        least=30,
        most=80,
        words=(("draft", 45.0), ("high", 55.0)),
        metavar="DB",
        help="in place of compute: spend what it takes to come so near to the dense video, estimated as the run goes "
        "(PSNR of the latents in dB); draft is 45, high is 55",
    )
    policy: str = setting(
        "joint",
        choices=POLICIES,
        help="how the share is spent: joint places whole steps, and adds a partial step where they miss the target; "
        "tokens ranks single tokens at every evaluated step; groups follows the paper (step divisors 1, 2, 4, 8); "
        "steps evaluates whole steps only",
    )
    warmup: int | None = setting(None, least=1, help="number of first steps at which all tokens are active")
    cooldown: int | None = setting(None, least=0, help="number of last steps at which all tokens are active")
    profile: float | None = setting(
        None,
        least=-4,
        most=4,
        help="for tokens and steps: exponent of the share over the sigma steps; below 0 spends more on early steps",
    )
    solver: str | None = setting(
        None, choices=SOLVERS, help="scheduler to use in place of the pipeline's; left out, the pipeline's own stays"
    )
    forecast: str | None = setting(
        None,
        choices=FORECASTS,
        help="velocity of a skipped token: hold keeps its last one (the paper); taylor extrapolates it in sigma; ab2 "
        "follows the exact solution of the flow, by the solver euler; none leaves skipped steps out, so that the "
        "solver takes fewer, longer ones; deduced: taylor, or none where too few steps are left for a forecast",
    )
    correct: bool | None = setting(
        None,
        help="take skipped steps again once the next evaluation shows what they should have moved by; deduced: for "
        "whole steps",
    )
    kv_forecast: float | None = setting(
        None, least=0, most=1, help="damping of the linear forecast of stale keys and values; 0 is off"
    )
    max_age: int | None = setting(
        None,
        least=1,
        help="for tokens: evaluated steps after which a skipped token is evaluated again, if the budget allows",
    )
    kv_dtype: str | None = setting(
        None,
        choices=KV_DTYPES,
        help="data type of cached keys and values; int8 and fp8 halve the memory of 16 bits; left out, the type in "
        "which they are computed",
    )
    kv_host: bool = setting(
        False, help="keep keys and values in host memory, and bring those of a layer while the layer before computes"
    )

    def __post_init__(self) -> None:
        check(self)
        if self.kv_dtype in SMALL_KV and self.kv_forecast:
            raise ConfigError(
                f"kv_forecast does not work with kv_dtype={self.kv_dtype!r}: take 16 bits, or leave it out"
            )
        if self.quality is None:
            return
        if self.compute != HSAConfig.compute:
            raise ConfigError(
                f"quality={self.quality:g} and compute={self.compute:g} say two things about the work; give one of them"
            )
        if self.policy != "joint" or self.forecast not in (None, "taylor") or self.correct is False:
            raise ConfigError(
                f'quality={self.quality:g} works with policy="joint" and the forecast "taylor", corrected in '
                "hindsight: only these show how far the run is from the dense one; leave out the others, or quality"
            )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What a plan is made for.

    Attributes:
        sigmas: T + 1 noise levels, falling; the last one is where sampling ends.
        num_tokens: N.
        forced_full: steps at which every token must be active (first step, change of experts, some after a checkpoint).
    """

    sigmas: tuple[float, ...]
    num_tokens: int
    forced_full: frozenset[int] = frozenset({0})

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.sigmas) - 1

    def gaps(self, steps: Sequence[int]) -> list[float]:
        """Distance in sigma from each of `steps` to the next one of them (the last: to the end)."""
        ends = [*steps[1:], self.num_steps]
        return [max(self.sigmas[a] - self.sigmas[b], 1e-9) for a, b in zip(steps, ends, strict=True)]


def required_full(schedule: Schedule, config: HSAConfig) -> set[int]:
    """Steps that are full whatever the policy: the forced ones and the windows the user asked for."""
    steps = schedule.num_steps
    full = {0} | {i for i in schedule.forced_full if 0 <= i < steps}
    full |= set(range(min(config.warmup or 0, steps)))
    return full | set(range(max(steps - (config.cooldown or 0), 0), steps))


def affordable_full(schedule: Schedule, config: HSAConfig) -> set[int]:
    """Return `required_full`.

    Raises:
        ConfigError: they alone cost more than ``config.compute``; the message names the least possible
            compute.
    """
    full = required_full(schedule, config)
    refuse_below(len(full) / schedule.num_steps, schedule, config, "the steps that must evaluate every token")
    return full


def refuse_below(least: float, schedule: Schedule, config: HSAConfig, what: str) -> None:
    """Raise a ConfigError if ``config.compute`` is below `least`, which `what` costs."""
    if config.compute < least - 1e-9:
        raise ConfigError(
            f"compute={config.compute:g} cannot be met with {schedule.num_steps} step{'s' * (schedule.num_steps > 1)}: "
            f"{what} alone cost {least:.4f} of the dense work; ask for at least compute={round_up(least):g}, "
            "more steps or smaller windows."
        )


def round_up(share: float) -> float:
    """Round up to 4 digits, so that the number named in a message is accepted."""
    return min(1.0, -(-round(share * 1e6) // 100) / 1e4)


def bucket_of(num_tokens: int) -> int:
    """Granularity of partial counts: the largest power of two that is at most N / 32.

    At most 33 different shapes then occur, which compilers and CUDA graphs like, and the total is met to
    within 1 / 32 of one step.
    """
    return 1 << max((num_tokens // 32).bit_length() - 1, 0)


def fit_counts(schedule: Schedule, compute: float, full: Collection[int], weights: Mapping[int, float]) -> list[int]:
    """Spend what the full steps leave over on the partial steps, in proportion to their weights.

    Args:
        schedule: steps and tokens.
        compute: target share of T * N.
        full: steps with all tokens.
        weights: step -> positive weight of every partial step; all others are empty.

    Returns:
        T counts: N, a multiple of the bucket (or N minus less than one), or 0. Their sum is the largest such
        that does not exceed the target, to within one bucket, as long as the partial steps can hold it.
    """
    n, steps = schedule.num_tokens, schedule.num_steps
    full = set(full)
    partial = sorted(i for i in weights if i not in full)
    left = int(compute * steps * n + 1e-6) - n * len(full)
    shares = _water_fill([weights[i] for i in partial], left / n)
    counts = [n if i in full else 0 for i in range(steps)]
    bucket = bucket_of(n)
    for i, share in zip(partial, shares, strict=True):
        counts[i] = n if share >= 1.0 else int(share * n) // bucket * bucket
        left -= counts[i]
    # What rounding down left over goes, one bucket each, where the most was lost; early steps first among
    # equals.
    lost = {i: share * n - counts[i] for i, share in zip(partial, shares, strict=True)}
    for i in sorted(partial, key=lambda i: (-lost[i], i)):
        more = min(bucket, n - counts[i])
        if more <= left:
            counts[i] += more
            left -= more
    return counts


def _water_fill(weights: Sequence[float], total: float) -> list[float]:
    """Shares min(1, c * weight) that sum to `total` (or all 1 if it cannot be reached)."""
    if total >= len(weights):
        return [1.0] * len(weights)
    if total <= 0:
        return [0.0] * len(weights)
    low, high = 0.0, len(weights) / min(weights)
    for _ in range(100):
        c = 0.5 * (low + high)
        low, high = (c, high) if sum(min(1.0, c * w) for w in weights) <= total else (low, c)
    return [min(1.0, low * w) for w in weights]


def place_steps(weights: Sequence[float], count: int, required: Collection[int] = ()) -> list[int]:
    """Choose `count` of the steps so that their density follows the weights (all positive).

    Step j of the choice is where the running sum of the weights reaches j / count of its end: equal weights
    give an even spacing, that is a coarser schedule. Required steps replace the nearest chosen ones.

    Returns:
        Ascending steps, at least as many as are required.
    """
    steps = len(weights)
    count = min(max(count, len(set(required)), 1), steps)
    chosen: list[int] = []
    total, before = sum(weights), 0.0
    for i, weight in enumerate(weights):
        left, free = count - len(chosen), steps - i
        # The small slack keeps floating point from moving an evenly spaced choice by one.
        if left and (before >= len(chosen) * total / count - 1e-9 * total or left == free):
            chosen.append(i)
        before += weight
    kept = set(chosen)
    for step in sorted(set(required) - kept):
        nearest = min(kept - set(required), key=lambda i: (abs(i - step), i))
        kept = (kept - {nearest}) | {step}
    return sorted(kept)


def profile_weights(gaps: Sequence[float], exponent: float) -> list[float]:
    """Weights d_sigma^exponent, scaled to a mean of 1."""
    raw = [gap**exponent for gap in gaps]
    return [w * len(raw) / sum(raw) for w in raw]


Counts = Callable[[Schedule, HSAConfig], list[int]]


# Conditioned tokens are given, such as a first frame: clean from the start, and put back by the pipeline after every
# step. Their velocity is never used. But other tokens attend to their keys and values, which beyond the first layer
# follow what they see of the others: steps that evaluate some tokens leave them out, full ones renew them. To evaluate
# them at the first step alone was measured too, and was worse (benchmarks/LOG.md).


def spared_counts(counts: Counts, schedule: Schedule, config: HSAConfig, conditioned: int) -> list[int] | None:
    """Tokens per step where conditioned tokens are evaluated on full steps only.

    What is saved is spent on the others: the sum stays that of ``config.compute``. If there is more to spend than the
    others can take, more steps are full.

    Args:
        counts: the policy's, for any number of tokens.
        schedule: steps, and all N tokens.
        config: settings.
        conditioned: C, the number of conditioned tokens, 0 < C < N.

    Returns:
        T counts, to be taken from the N - C others first; None where the policy cannot work on these alone.

    Raises:
        ConfigError: the steps that must be full cost more than ``config.compute``.
    """
    required = affordable_full(schedule, config)
    n, steps = schedule.num_tokens, schedule.num_steps
    others, budget = n - conditioned, config.compute * steps * n + 1e-6

    def planned(num_full: int) -> list[int]:
        """Counts if `num_full` steps were full, on which conditioned tokens are paid for."""
        share = (budget - conditioned * num_full) / (steps * others)
        spared = counts(replace(schedule, num_tokens=others), replace(config, compute=min(max(share, 1e-9), 1.0)))
        return [n if count == others or i in required else count for i, count in enumerate(spared)]

    if budget >= others * steps + conditioned * len(required):
        full = set(place_steps([1.0] * steps, int((budget - others * steps) / conditioned), required))
        found = [n if i in full else others for i in range(steps)]
        return _topped_up(found, int(budget) - sum(found), n, bucket_of(n))
    # The more steps are paid for, the less is left and the fewer are full: the first number that is not exceeded.
    low, high = len(required), steps
    try:
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if planned(middle).count(n) <= middle else (middle + 1, high)
        found = planned(low)
    except ConfigError:  # its message would speak of another share than the one that was asked for
        return None
    return _topped_up(found, int(budget) - sum(found), others, bucket_of(n))


def _topped_up(counts: list[int], left: int, most: int, bucket: int) -> list[int]:
    """Spend what is left over on partial steps, the largest first, up to `most` tokens each."""
    for i in sorted(range(len(counts)), key=lambda i: (-counts[i], i)):
        if 0 < counts[i] < most:
            more = min(left, most - counts[i]) // bucket * bucket
            counts[i], left = counts[i] + more, left - more
    return counts
