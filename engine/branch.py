"""What a run remembers of one guidance branch: velocities, and keys and values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..hsa.cache import KVCache
from ..hsa.rows import fill_rows
from ..hsa.velocity import TokenClock, VelocityCache
from .attention import TextKV
from .models import Adapter


class Branch:
    """Caches of one guidance branch; two experts share them, but for the prompt's K/V, `text`.

    Attributes:
        velocity: of the video's tokens.
        layers: keys and values, by site.
        others: velocities of whatever else the model returns, such as sound: fresh at every step with active tokens.
        begun: whether the velocities have their shapes: from the first evaluation of a run, or after a restart, on.
        text: the prompt's keys and values, by expert.
    """

    def __init__(
        self,
        num_sites: int,
        *,
        sigmas: Sequence[float],
        forecast: str,
        correct: bool,
        dtype: torch.dtype | None,
        history: bool,
    ) -> None:
        """Allocate nothing yet.

        Args:
            num_sites: places with a K/V cache.
            sigmas: of the run.
            forecast: of velocities.
            correct: whether they are corrected in hindsight.
            dtype: of keys and values; None: as computed.
            history: whether the K/V before the last are kept too.
        """
        self._sigmas, self._settings = sigmas, (forecast, correct)
        self.velocity = self._made()
        self.layers = [KVCache(dtype, history=history) for _ in range(num_sites)]
        self.others: list[VelocityCache] = []
        self.begun = False
        self.text: dict[int, list[TextKV]] = {}

    def velocities(self, num_others: int | None = None) -> list[VelocityCache]:
        """All velocity caches, the tokens' first; those of `num_others` other outputs are made on first use."""
        while len(self.others) < (num_others or 0):
            self.others.append(self._made())
        return [self.velocity, *self.others]

    def begin(self, sigmas: Sequence[float]) -> None:
        """Start a run: forget what an earlier one left behind, and keep the buffers."""
        self._sigmas = sigmas
        for velocity in self.velocities():
            velocity.follow(sigmas)
        self.restart()
        for cache in self.layers:
            cache.reset()

    def restart(self) -> None:
        """Forget what depends on the prompt, the guidance and the weights; a full step comes next."""
        self.begun = False
        self.text.clear()
        self.forget()

    def forget(self) -> None:
        """Forget when tokens were evaluated, as at a switch of experts."""
        for velocity in self.velocities():
            if velocity.clock is not None:
                velocity.reset()

    def _made(self) -> VelocityCache:
        cache = VelocityCache(*self._settings)
        cache.follow(self._sigmas)
        return cache


def tiled(active: Tensor | None, units: int) -> Tensor | None:
    """Active tokens of B videos -> those of a batch that has each video `units` times: [A], or [units * B, A]."""
    return active.repeat(units, 1) if active is not None and active.ndim == 2 else active


def fresh_weight(
    clock: TokenClock | None,
    sigma: float,
    active: Tensor | None,
    batch: int,
    damping: float,
    since: float = math.inf,
    conditioned: Tensor | None = None,
) -> Tensor | None:
    """Weight [batch, N] of the damped K/V forecast at noise level `sigma`; None if off.

    It is 0 for the `active` tokens, [A] or [batch, A], whose rows are fresh; for `conditioned` ones, whose age has no
    bound; and for those whose evaluation before the last one was above the noise level `since`: a resumed run would not
    know that one.
    """
    if damping == 0.0 or clock is None:
        return None
    weight = clock.weight(sigma)[:batch] * damping
    if math.isfinite(since):
        weight.masked_fill_(clock.prev[:batch] > since, 0.0)
    fill_rows(weight, active, 0.0)
    if conditioned is not None:
        fill_rows(weight, conditioned, 0.0)
    return weight


def guided_velocity(adapter: Adapter, pipe: Any, expert: int, entered: Mapping[str, Branch]) -> Tensor:
    """Mix the fresh velocities of a step's branches as the pipeline's guidance does: [B, N, D].

    Not taken from the difference of two latents: those reach the model in its own type, and in bfloat16 a step of sigma
    is no larger than their rounding.
    """
    fresh: dict[str, Tensor] = {}
    for name, branch in entered.items():
        units, rows = adapter.units(pipe, name), branch.velocity.last
        assert rows is not None
        fresh |= zip(units, rows.chunk(len(units)), strict=True)
    weights = adapter.guidance(pipe, sorted(fresh), expert)
    guided: Tensor | None = None
    for unit in sorted(fresh):
        rows, weight = fresh[unit], weights[unit]
        guided = rows * weight if guided is None else guided.add_(rows, alpha=weight)
    assert guided is not None
    return guided
