"""The policies: how a budget is spent over steps, and which tokens a partial step evaluates.

All of them have one interface. `Policy.counts` is pure (data-independent); `Policy.select` ranks tokens.
Every number a policy is tuned by is a field of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .config import (
    HSAConfig,
    Schedule,
    affordable_full,
    bucket_of,
    fit_counts,
    place_steps,
    profile_weights,
    refuse_below,
    required_full,
)
from .placement import GapCosts, add_steps, best_steps


@dataclass
class TokenState:
    """What is known about the tokens when a step is planned.

    Attributes:
        rate: kappa, the rate of velocity change between the two last evaluations, [B, N]; 0 where unknown.
        last: sigma of the last evaluation, [B, N].
        age: evaluated steps since then, [B, N], int32.
    """

    rate: Tensor
    last: Tensor
    age: Tensor

    def priority(self, sigma: float) -> Tensor:
        """Expected velocity error of tokens not evaluated now: kappa * (sigma_last - sigma), [B, N]."""
        # The small constant ranks tokens by the time since their evaluation as long as no rate is known.
        return (self.rate + 1e-6) * (self.last - sigma).clamp_min(0.0)


class Policy(Protocol):
    """How to spend a budget."""

    def leaves_out(self) -> bool:
        """Whether steps leave out tokens by design, and not only to meet a budget to the last per cent."""
        ...

    def counts(self, schedule: Schedule, config: HSAConfig) -> list[int]:
        """Tokens per step, T numbers from 0 to N; pure."""
        ...

    def select(self, step: int, sigma: float, count: int, tokens: TokenState, max_age: int) -> Tensor:
        """Choose `count` tokens per sample for a partial step: int64 [B, count], ascending."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what `select` remembers between steps: numbers, None and tensors."""
        ...

    def restore(self, state: Mapping[str, Any], device: torch.device | str) -> None:
        """Remember what another policy gave as its `state`; `counts` comes first."""
        ...


class _Ranked:
    """Selection shared by `tokens`, `joint` and `steps`: the largest expected velocity errors."""

    def leaves_out(self) -> bool:
        """Whether steps leave out tokens by design."""
        return False

    def select(self, step: int, sigma: float, count: int, tokens: TokenState, max_age: int) -> Tensor:
        """Take the top tokens by kappa * (sigma_last - sigma); those of `max_age` and older come first."""
        return top_tokens(tokens.priority(sigma), count, first=tokens.age >= max_age)

    def state(self) -> dict[str, Any]:
        """Nothing: every step has its own ranking."""
        return {}

    def restore(self, state: Mapping[str, Any], device: torch.device | str) -> None:
        """Nothing to remember."""


@dataclass(frozen=True, kw_only=True)
class TokensPolicy(_Ranked):
    """A shortened schedule whose steps evaluate most tokens (measured best of the pure token policies).

    T' = compute * T / mean_share steps are evaluated, evenly placed; of these the first tenth and the last
    one are full, the others get a share of tokens in proportion to d_sigma^exponent.
    """

    mean_share: float = 0.77
    warmup_share: float = 0.1
    exponent: float = -0.5

    def leaves_out(self) -> bool:
        """All but the full ones do."""
        return True

    def counts(self, schedule: Schedule, config: HSAConfig) -> list[int]:
        """See the class."""
        steps, full = schedule.num_steps, affordable_full(schedule, config)
        budget = config.compute * steps
        wanted = max(round(budget / self.mean_share), math.ceil(budget - 1e-6))
        chosen = place_steps([1.0] * steps, min(wanted, steps), full)
        warmup = max(2, round(self.warmup_share * len(chosen)))
        windows = [] if config.warmup is not None else chosen[1:warmup]
        full = add_windows(full, windows, [] if config.cooldown is not None else chosen[-1:], 0.6 * budget)
        exponent = self.exponent if config.profile is None else config.profile
        # Gaps of the full grid, not of the chosen steps: those alternate where T' does not divide T.
        weights = profile_weights(schedule.gaps(range(steps)), exponent)
        return fit_counts(schedule, config.compute, full, {i: weights[i] for i in chosen})


@dataclass(frozen=True, kw_only=True)
class StepsPolicy(_Ranked):
    """Whole steps only; the others run no transformer at all.

    They are placed where the expected error is least (`placement`), or, if ``config.profile`` is given, with a
    density of d_sigma^profile. Whole steps are as fine as it gets: the target is met to within half a step (1 / 2T).
    """

    def counts(self, schedule: Schedule, config: HSAConfig) -> list[int]:
        """See the class."""
        steps, full = schedule.num_steps, affordable_full(schedule, config)
        # Halves round down: rather a little below the target than above.
        count = max(math.ceil(config.compute * steps - 0.5 - 1e-9), len(full), 1)
        if config.profile is None:
            chosen = set(best_steps(_gap_costs(schedule, config, count, full), count, full))
        else:
            chosen = set(place_steps(profile_weights(schedule.gaps(range(steps)), config.profile), count, full))
        return [schedule.num_tokens if i in chosen else 0 for i in range(steps)]


@dataclass(frozen=True, kw_only=True)
class JointPolicy(_Ranked):
    """Over time and tokens: whole steps where the expected error is least without them, partial steps between them.

    ``token_budget`` of the budget buys partial steps of about ``partial_share`` of the tokens, the ones whose velocity
    changes most; each is put where it lowers the expected error most. The rest buys whole steps. It is 0 because that
    is what wins so far (benchmarks/LOG.md): stale keys and values cost more than the tokens that are left out are
    worth. A partial step then only makes up for what whole ones cannot meet to within ``tolerance``;
    without one no keys and values are kept at all. With ``whole`` there is none, and the target is met to within half
    a step.
    """

    token_budget: float = 0.0
    partial_share: float = 0.5
    tolerance: float = 0.02
    whole: bool = False

    def leaves_out(self) -> bool:
        """Where a part of the budget is set aside for it."""
        return self.token_budget > 0.0

    def counts(self, schedule: Schedule, config: HSAConfig) -> list[int]:
        """See the class."""
        steps, required = schedule.num_steps, affordable_full(schedule, config)
        budget = config.compute * steps + 1e-9
        tolerance = max(self.tolerance * steps, 0.5 if self.whole or config.forecast == "none" else 0.0)
        count = max(int((1 - self.token_budget) * budget), len(required), 1)
        if not self.token_budget and budget - count > tolerance >= count + 1 - budget:
            count += 1
        costs = _gap_costs(schedule, config, count, required)
        full = best_steps(costs, count, required)
        left = budget - len(full)
        if left <= tolerance and not self.token_budget:
            return [schedule.num_tokens if i in set(full) else 0 for i in range(steps)]
        partial = max(round(left / self.partial_share), math.ceil(left - 1e-6)) if self.token_budget else 1
        evaluated = add_steps(costs, full, partial)
        return fit_counts(schedule, config.compute, full, {i: 1.0 for i in evaluated if i not in set(full)})


def _gap_costs(schedule: Schedule, config: HSAConfig, count: int, required: set[int]) -> GapCosts:
    """Costs of all gaps that a good plan with `count` whole steps, among them the required ones, can have."""
    ends = sorted({*required, schedule.num_steps})
    widths = [b - a for a, b in itertools.pairwise(ends)]
    free, longest = count - len(required), 1
    # Required steps may stand so close together that the others can only be far apart.
    while sum(math.ceil(width / longest) - 1 for width in widths) > free:
        longest += 1
    return gap_costs(schedule.sigmas, config, max(12, 2 * longest, math.ceil(3 * schedule.num_steps / count)))


def gap_costs(sigmas: Sequence[float], config: HSAConfig, longest: int) -> GapCosts:
    """Costs of all gaps of up to `longest` steps, for what the settings do with skipped steps."""
    forecast = config.forecast or "taylor"
    correct = forecast != "hold" if config.correct is None else config.correct
    if forecast == "none":  # a multistep solver's long steps are much like those of ab2, corrected
        forecast, correct = "ab2", True
    return GapCosts(sigmas, forecast, correct, longest)


@dataclass(kw_only=True)
class GroupsPolicy:
    """The paper's reading: groups of tokens with step divisors 1, 2, 4, 8; slow tokens have large divisors.

    Groups are quantiles of kappa, formed again at every step that all of them have in common; fractions fall or
    rise geometrically so that the target is met. Nested: a token of divisor d is active when d divides the
    number of steps since the last full step outside the rhythm (the warm-up's last step, a forced one).
    """

    divisors: tuple[int, ...] = (1, 2, 4, 8)
    warmup_share: float = 0.1
    _ranking: Tensor | None = field(default=None, init=False, repr=False)
    _ranked_at: int = field(default=-1, init=False, repr=False)
    _counts: list[int] = field(default_factory=list, init=False, repr=False)

    def leaves_out(self) -> bool:
        """All steps between full ones do."""
        return True

    def counts(self, schedule: Schedule, config: HSAConfig) -> list[int]:
        """See the class."""
        steps, full = schedule.num_steps, required_full(schedule, config)
        what = f"windows and divisors up to {self.divisors[-1]}"
        refuse_below(self._least(schedule, full), schedule, config, what)
        warmup = range(1, max(2, round(self.warmup_share * steps))) if config.warmup is None else range(0)
        cooldown = [steps - 1] if config.cooldown is None else []
        wider = add_windows(full, list(warmup), cooldown, 0.4 * config.compute * steps)
        # Windows that nobody asked for must not be what makes a target unreachable.
        full = wider if self._least(schedule, wider) <= config.compute else full
        divisors = self._divisors(schedule, full)
        sizes = self._fit_sizes(schedule.num_tokens, divisors, config.compute)
        self._counts = [self._active(sizes, d) for d in divisors]
        self._ranking, self._ranked_at = None, -1
        return list(self._counts)

    def select(self, step: int, sigma: float, count: int, tokens: TokenState, max_age: int) -> Tensor:
        """Take the first `count` of the last full step's ranking: nested groups are its prefixes."""
        n = tokens.rate.shape[1]
        regrouped = max((i for i in range(step) if self._counts[i] == n), default=0)
        if self._ranking is None or self._ranked_at != regrouped:
            self._ranking, self._ranked_at = tokens.rate.clone(), regrouped
        return top_tokens(self._ranking, count)

    def state(self) -> dict[str, Any]:
        """The ranking, and the step before which it was made."""
        return {"ranking": self._ranking, "ranked_at": self._ranked_at}

    def restore(self, state: Mapping[str, Any], device: torch.device | str) -> None:
        """Rank as before."""
        self._ranked_at = state["ranked_at"]
        self._ranking = None if state["ranking"] is None else state["ranking"].to(device)

    def _divisors(self, schedule: Schedule, full: set[int]) -> list[int]:
        """For every step the largest divisor whose group is active (the largest of all on full steps)."""
        largest, anchor, found = self.divisors[-1], 0, []
        for i in range(schedule.num_steps):
            if i in full:
                anchor = i
            found.append(max(d for d in self.divisors if (i - anchor) % d == 0) if i not in full else largest)
        return found

    def _least(self, schedule: Schedule, full: set[int]) -> float:
        """Compute with all tokens in the slowest group."""
        return self._divisors(schedule, full).count(self.divisors[-1]) / schedule.num_steps

    def _active(self, sizes: list[int], divisor: int) -> int:
        """Tokens active where `divisor` is the largest one that is: all groups up to it."""
        return sum(size for size, d in zip(sizes, self.divisors, strict=True) if d <= divisor)

    def _fit_sizes(self, n: int, divisors: list[int], compute: float) -> list[int]:
        """Group sizes, geometric with one free ratio, that cost as much as possible up to `compute`."""
        target, bucket = compute * len(divisors) * n + 1e-6, bucket_of(n)
        groups = len(self.divisors)

        def cost(sizes: list[int]) -> int:
            return sum(self._active(sizes, d) for d in divisors)

        def sizes_at(log_ratio: float) -> list[int]:
            parts = [math.exp(-log_ratio * g) for g in range(groups)]
            inner = [round(n * sum(parts[: g + 1]) / sum(parts) / bucket) * bucket for g in range(groups - 1)]
            ends = [*(min(end, n) for end in inner), n]
            return [max(b - a, 0) for a, b in zip([0, *ends[:-1]], ends, strict=True)]

        low, high = -40.0, 40.0
        for _ in range(60):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if cost(sizes_at(middle)) <= target else (low, middle)
        sizes = sizes_at(low)
        # The ratio moves several buckets at once: the rest moves one by one from slow groups to the next
        # faster one.
        for g in range(groups - 1, 0, -1):
            while sizes[g] > 0:
                moved = min(bucket, sizes[g])
                trial = [s + moved * ((i == g - 1) - (i == g)) for i, s in enumerate(sizes)]
                if cost(trial) > target:
                    break
                sizes = trial
        return sizes


def add_windows(full: set[int], warmup: list[int], cooldown: list[int], at_most: float) -> set[int]:
    """Add deduced window steps to the full ones, the second and the last first, while few are full."""
    full = set(full)
    for step in [*warmup[:1], *cooldown, *warmup[1:]]:
        if step not in full and len(full) + 1 <= at_most:
            full.add(step)
    return full


def policy_for(config: HSAConfig) -> Policy:
    """Build the policy that ``config.policy`` names."""
    kinds: dict[str, type[TokensPolicy | StepsPolicy | JointPolicy | GroupsPolicy]] = {
        "joint": JointPolicy,
        "tokens": TokensPolicy,
        "groups": GroupsPolicy,
        "steps": StepsPolicy,
    }
    return kinds[config.policy]()


def unknown_tokens(batch_size: int, num_tokens: int, device: torch.device, sigma: float) -> TokenState:
    """State before any evaluation: rates unknown, everything last seen at `sigma`, the start."""
    shape = (batch_size, num_tokens)
    return TokenState(
        rate=torch.zeros(shape, dtype=torch.float32, device=device),
        last=torch.full(shape, sigma, dtype=torch.float32, device=device),
        age=torch.zeros(shape, dtype=torch.int32, device=device),
    )


SCORE_BITS = 4
"""Mantissa bits of a score that take part in the ranking: neighbours differ by about 6 %."""

NUM_LEVELS = 2 << (8 + SCORE_BITS)
"""Levels of rounded scores: 8 bits of exponent and the mantissa's, for preferred and for other tokens."""

_CHUNK = 8192


def velocity_change_rate(new: Tensor, old: Tensor, sigma_new: float, sigma_old: Tensor) -> Tensor:
    """Rate of velocity change kappa = mean_d |v_new - v_old| / (sigma_old - sigma_new).

    The absolute rate ranks tokens better than the relative one (measured; see the policy report). Cached
    Euler over a gap dsigma errs by about dsigma^2 / 2 * kappa, so kappa is what an evaluation is worth.

    Args:
        new: velocities [B, A, D] at the last evaluation.
        old: velocities [B, A, D] at the one before.
        sigma_new: noise level of the newer evaluation.
        sigma_old: noise level of the older one, per token [B, A].

    Returns:
        float32 [B, A], 0 where no noise level lies between the two.
    """
    # In pieces that stay in a processor's cache: three times as fast as whole tensors.
    change = torch.cat(
        [
            (a - b).abs_().mean(-1, dtype=torch.float32)
            for a, b in zip(new.split(_CHUNK, 1), old.split(_CHUNK, 1), strict=True)
        ],
        dim=1,
    )
    gap = sigma_old - sigma_new
    return torch.where(gap > 0, change / gap.clamp_min(1e-12), torch.zeros_like(change))


def score_levels(scores: Tensor, first: Tensor | None = None) -> Tensor:
    """Round scores to levels: integers below `NUM_LEVELS` that grow with the score.

    A score keeps `SCORE_BITS` mantissa bits, since floats differ in their last bits between numbers of ranks
    and a flipped order of two tokens would change the video.

    Args:
        scores: [B, N], not negative, finite.
        first: bool [B, N], tokens that come before all others; optional.

    Returns:
        int64 [B, N]; larger is better.
    """
    drop = 23 - SCORE_BITS
    # The bit pattern of a non-negative float grows with the float; adding half of the dropped part rounds to
    # nearest.
    levels = (scores.float().contiguous().view(torch.int32) + (1 << (drop - 1))) >> drop
    levels = levels.clamp(0, NUM_LEVELS // 2 - 1)  # a velocity that overflowed scores NaN, perhaps a negative one
    if first is not None:
        levels = levels + first.to(torch.int32) * (NUM_LEVELS // 2)
    return levels.long()


def top_tokens(scores: Tensor, count: int, first: Tensor | None = None) -> Tensor:
    """Take the `count` tokens with the largest rounded scores; ties go to the lower index.

    Args:
        scores: [B, N], not negative, finite.
        count: how many, 0 .. N.
        first: bool [B, N], tokens that come before all others; optional.

    Returns:
        int64 [B, count], ascending in every row.
    """
    batch, n = scores.shape
    if count == 0:
        return torch.empty(batch, 0, dtype=torch.int64, device=scores.device)
    if count == n:
        return torch.arange(n, device=scores.device).expand(batch, n)
    levels = score_levels(scores, first)
    # Levels are few, so a histogram finds the level at which the selection ends: linear in N, and insensitive
    # to the order of the scores, unlike any selection by comparison. At equal levels the first tokens fill up
    # what is left.
    counts = levels.new_zeros(batch, NUM_LEVELS).scatter_add_(1, levels, torch.ones_like(levels))
    at_least = counts.flip(1).cumsum(1).flip(1)
    last = (at_least >= count).sum(1, keepdim=True) - 1
    above, ties = levels > last, levels == last
    left = count - above.sum(1, keepdim=True)
    chosen = above | (ties & (ties.cumsum(1) <= left))
    # How many are chosen is known, so each is put in its place, and all others in one place too many: `nonzero` would
    # have the host wait for the device.
    place = (chosen.cumsum(1) - 1).masked_fill_(~chosen, count)
    tokens = torch.arange(n, device=scores.device).expand(batch, n)
    return levels.new_empty(batch, count + 1).scatter_(1, place, tokens)[:, :count]
