"""`StepPlanner`: which tokens are active at which step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .cache import fill_rows, gather_rows, write_rows
from .config import HSAConfig, Schedule, required_full, spared_counts
from .distance import Distance
from .hindsight import Residual
from .policies import Policy, TokenState, gap_costs, policy_for, unknown_tokens, velocity_change_rate


class StepPlanner:
    """Plans one run after the other: `begin`, then per step `plan` and, where evaluated, `observe`.

    A user's own planner needs only `plan`; `begin`, `observe`, `reason` and `counts` are used where they
    exist. `begin` may be called again before the first step, with more steps that are to be full. `state` and
    `restore` are needed for runs that can be resumed.
    """

    max_age_default = 8

    def __init__(self, config: HSAConfig | None = None, policy: Policy | None = None) -> None:
        """Create a planner for `config`; `policy` replaces the one that it names (for tuning)."""
        self.config = config or HSAConfig()
        self.policy = policy or policy_for(self.config)
        self.max_age = self.config.max_age or self.max_age_default
        self.counts: list[int] = []
        self._schedule: Schedule | None = None
        self._batch_size = 1
        self._switches: frozenset[int] = frozenset()
        self._tokens: TokenState | None = None
        self._velocity: Tensor | None = None
        self._jumped = False
        self._others: Tensor | None = None
        self._given: Tensor | None = None
        self._distance: Distance | None = None

    @property
    def adapts(self) -> bool:
        """Whether the plan follows what evaluations show (`adapt`), until a promised quality is met."""
        return self.config.quality is not None

    def begin(
        self,
        sigmas: Sequence[float],
        num_tokens: int,
        batch_size: int = 1,
        forced_full: frozenset[int] = frozenset({0}),
        switches: frozenset[int] | None = None,
        conditioned: Tensor | None = None,
    ) -> None:
        """Start a run and fix the number of tokens of every step (`counts`).

        Args:
            sigmas: T + 1 falling noise levels.
            num_tokens: N.
            batch_size: samples; with more than one each gets its own active set, all of one size.
            forced_full: steps at which everything is active.
            switches: those of them at which another expert begins; None: perhaps all.
            conditioned: int64 [C], tokens whose velocity is never used; None: there are none. Policies that leave out
                tokens evaluate them on full steps only, the others evaluate whole steps anyway.

        Raises:
            ConfigError: no plan meets ``config.compute``; the message names the least possible.
        """
        if len(sigmas) < 2 or num_tokens < 1:
            raise ConfigError(
                f"{len(sigmas)} sigmas and {num_tokens} tokens: at least one step and one token are needed."
            )
        schedule = Schedule(sigmas=tuple(sigmas), num_tokens=num_tokens, forced_full=forced_full | {0})
        self._set_conditioned(num_tokens, conditioned)
        if self.adapts:
            longest = max(12, -(-schedule.num_steps // 3))
            self._schedule = schedule
            self._distance = Distance(gap_costs(schedule.sigmas, self.config, longest))
            self.adapt(1, [0], [], None)
        else:
            self.counts = self._count(schedule)
        self._schedule, self._batch_size = schedule, batch_size
        self._switches = schedule.forced_full if switches is None else switches
        self._tokens = self._velocity = None
        self._jumped = False

    def adapt(self, start: int, evaluated: Sequence[int], measured: Sequence[Residual], span: float | None) -> None:
        """Plan all steps from `start` on anew: as few as keep the promised quality.

        Args:
            start: the next step.
            evaluated: whole steps so far, ascending.
            measured: the residuals that they showed.
            span: largest less least value of the clean latents; None: not known yet.
        """
        assert self._schedule is not None and self._distance is not None, "begin() comes first"
        assert self.config.quality is not None, "a quality was promised"
        required = required_full(self._schedule, self.config)
        full = set(self._distance.plan(self.config.quality, span, evaluated, measured, start, required))
        self.counts = [self._schedule.num_tokens if i in full else 0 for i in range(self._schedule.num_steps)]

    def _count(self, schedule: Schedule) -> list[int]:
        if self.config.compute == 1.0:
            return [schedule.num_tokens] * schedule.num_steps
        if self._given is not None and self.policy.leaves_out():
            spared = spared_counts(self.policy.counts, schedule, self.config, len(self._given))
            if spared is not None:
                return spared
            self._set_conditioned(schedule.num_tokens, None)
        return self.policy.counts(schedule, self.config)

    def _set_conditioned(self, num_tokens: int, conditioned: Tensor | None) -> None:
        self._given = self._others = None
        if conditioned is not None and 0 < len(conditioned) < num_tokens:
            kept = torch.ones(num_tokens, dtype=torch.bool, device=conditioned.device)
            kept[conditioned] = False
            self._given, self._others = conditioned, kept.nonzero()[:, 0]

    def plan(self, step: int, num_steps: int, sigma: float, num_tokens: int) -> Tensor | None:
        """Choose the active tokens of a step.

        Returns:
            None for all; an empty int64 tensor for none; int64 indices [A] (one sample) or [B, A], ascending.
        """
        assert self._schedule is not None, "begin() comes first"
        assert num_steps == self._schedule.num_steps, "another run was begun"
        assert num_tokens == self._schedule.num_tokens, "another run was begun"
        count = self.counts[step]
        if count == num_tokens:
            return None
        if count == 0:
            return torch.empty(0, dtype=torch.int64)
        tokens = self._tokens or unknown_tokens(
            self._batch_size, num_tokens, torch.device("cpu"), self._schedule.sigmas[0]
        )
        active = self._select(step, sigma, count, tokens)
        return active[0] if self._batch_size == 1 else active

    def _select(self, step: int, sigma: float, count: int, tokens: TokenState) -> Tensor:
        """Let the policy choose, of conditioned tokens only what the others leave over: [B, count], ascending."""
        if self._others is None or self._given is None:
            return self.policy.select(step, sigma, count, tokens, self.max_age)
        others, given = (indices.to(tokens.rate.device) for indices in (self._others, self._given))
        if count >= len(others):
            chosen = torch.cat([others, given[: count - len(others)]]).sort().values
            return chosen.expand(self._batch_size, -1)
        state = TokenState(rate=tokens.rate[:, others], last=tokens.last[:, others], age=tokens.age[:, others])
        return others[self.policy.select(step, sigma, count, state, self.max_age)]

    def observe(self, step: int, sigma: float, velocity: Tensor, active: Tensor | None) -> None:
        """Learn from an evaluated step.

        Args:
            step: its number.
            sigma: its noise level.
            velocity: guided velocities [B, N, D]; only the rows of the active tokens are read.
            active: what `plan` returned: None, [A] or [B, A]. An empty set teaches nothing.
        """
        assert self._schedule is not None, "begin() comes first"
        if active is not None and active.numel() == 0:
            return
        if self._tokens is None or self._velocity is None:
            batch, n = velocity.shape[:2]
            self._tokens = unknown_tokens(batch, n, velocity.device, sigma)
            self._velocity = velocity.clone()
            return
        tokens = self._tokens
        # Across a change of experts, or of the prompt, velocities jump for reasons that say nothing about the tokens:
        # keep the rates.
        learn, self._jumped = step not in self._switches and not self._jumped, False
        if active is None or 4 * active.shape[-1] > velocity.shape[1]:
            self._observe_many(sigma, velocity, active, learn)
        else:
            fresh = gather_rows(velocity, active)
            if learn:
                old, since = gather_rows(self._velocity, active), gather_rows(tokens.last, active)
                write_rows(tokens.rate, active, velocity_change_rate(fresh, old, sigma, since))
            write_rows(self._velocity, active, fresh)
        fill_rows(tokens.last, active, sigma)
        tokens.age += 1
        fill_rows(tokens.age, active, 0)

    def jump(self) -> None:
        """Say that velocities jump before the next `observe`, because the prompt or the model is another now."""
        self._jumped = True

    def _observe_many(self, sigma: float, velocity: Tensor, active: Tensor | None, learn: bool) -> None:
        """Update when many tokens are active: one pass over all is then faster than gathering."""
        tokens, kept = self._tokens, self._velocity
        assert tokens is not None
        assert kept is not None
        if learn:
            rate = velocity_change_rate(velocity, kept, sigma, tokens.last)
            write_rows(tokens.rate, active, gather_rows(rate, active))
        if active is None:
            kept.copy_(velocity)
            return
        chosen = torch.zeros_like(tokens.age, dtype=torch.bool)
        fill_rows(chosen, active, True)
        torch.where(chosen[..., None], velocity.to(kept.dtype), kept, out=kept)

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, as it is at the end of a step: nested dicts of plain values and tensors."""
        tokens = self._tokens
        return {
            "tokens": None if tokens is None else {"rate": tokens.rate, "last": tokens.last, "age": tokens.age},
            "velocity": self._velocity,
            "jumped": self._jumped,
            "policy": self.policy.state(),
        }

    def restore(self, state: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        """Resume where another planner was when it gave its `state`; `begin` comes first, with the same arguments."""
        assert self._schedule is not None, "begin() comes first"
        self._tokens = self._velocity = None
        if state["tokens"] is not None:
            self._tokens = TokenState(**{name: tensor.to(device) for name, tensor in state["tokens"].items()})
            self._velocity = state["velocity"].to(device)
        self._jumped = state.get("jumped", False)
        self.policy.restore(state["policy"], device)

    def reason(self, step: int) -> str:
        """Say in a word why a step has the size it has: "full", "partial" or "skipped"."""
        assert self._schedule is not None, "begin() comes first"
        count = self.counts[step]
        return "full" if count == self._schedule.num_tokens else "partial" if count else "skipped"


def check_resumable(planner: Any) -> None:
    """Refuse a planner whose runs could not be resumed.

    Raises:
        ConfigError: it has no `state` and `restore`.
    """
    if not all(callable(getattr(planner, name, None)) for name in ("state", "restore")):
        raise ConfigError(
            f"{type(planner).__name__} has no methods state() and restore(state, device), so that a run planned by it "
            "could not be resumed: add them, or run without checkpoints."
        )
