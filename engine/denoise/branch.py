"""What a run remembers of one guidance branch: velocities, and keys and values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...hsa.cache import KVCache, fill_rows
from ...hsa.kv_storage import make_caches
from ...hsa.velocity import TokenClock, VelocityCache
from ..models import Adapter
from ..models.base import Grid, TextKV
from .windows import Window, Windows
from .work_split import Share


class Branch:
    """Caches of one guidance branch; two experts share them, but for the prompt's K/V, `text`.

    Attributes:
        velocity: of the video's tokens.
        layers: keys and values, by window and site.
        others: velocities of whatever else the model returns, such as sound: fresh at every step with active tokens.
        begun: whether the velocities have their shapes: from the first evaluation of a run, or after a restart, on.
        text: the prompt's keys and values, by expert and the prompt's number.
    """

    def __init__(
        self,
        num_sites: int,
        *,
        forecast: str,
        dtype: str | None,
        history: bool,
        host: bool = False,
    ) -> None:
        """Allocate nothing yet.

        Args:
            num_sites: places with a K/V cache.
            forecast: of velocities.
            dtype: of keys and values, as `HSAConfig.kv_dtype`.
            history: whether the K/V before the last are kept too.
            host: whether they are in host memory.
        """
        self.velocity = VelocityCache(forecast)
        self.layers: dict[int, list[KVCache]] = {}
        self._caches = lambda: make_caches(num_sites, dtype, history=history, host=host)
        self.others: list[VelocityCache] = []
        self.begun = False
        self.text: dict[tuple[int, int | None], list[TextKV]] = {}

    def velocities(self, num_others: int | None = None) -> list[VelocityCache]:
        """All velocity caches, the tokens' first; those of `num_others` other outputs are made on first use."""
        while len(self.others) < (num_others or 0):
            self.others.append(VelocityCache(self.velocity.forecast))
        return [self.velocity, *self.others]

    def caches(self, window: int) -> list[KVCache]:
        """Keys and values of a window, by site; made on first use. Without windows the video is window 0."""
        if window not in self.layers:
            self.layers[window] = self._caches()
        return self.layers[window]

    @property
    def kv_bytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(cache.nbytes for layers in self.layers.values() for cache in layers)

    def begin(self) -> None:
        """Start a run: forget what an earlier one left behind, and keep the buffers."""
        self.restart()
        for layers in self.layers.values():
            for cache in layers:
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


CHANGED = "inputs changed"
"""Why a step is full that was not planned so: the pipeline now asks for something else."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of the transformer by its pipeline.

    Attributes:
        module: the transformer.
        name: the branch.
        expert: number of the transformer, as the pipeline counts it.
        arguments: by name.
        units: the guidance units that are stacked in the batch.
        grid: tokens of the video.
        window: of a long video, whose arguments and grid these are; None: the call is for the whole video.
    """

    module: Any
    name: str
    expert: int
    arguments: Mapping[str, Any]
    units: tuple[str, ...]
    grid: Grid
    window: Window | None = None

    def inside(self, window: Window, windows: Windows, adapter: Adapter) -> Call:
        """The call for one window."""
        arguments = adapter.window(self.module, self.arguments, window.start, window.stop)
        grid = self.grid._replace(frames=window.stop - window.start)
        arguments = windows.worded(arguments, self.units, window)
        return replace(self, arguments=arguments, grid=grid, window=window)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the latents, and so of velocities."""
        dtype: torch.dtype = self.arguments["hidden_states"].dtype
        return dtype

    def unit(self, index: int) -> dict[str, Any]:
        """The arguments of one of the units alone."""
        count, batch = len(self.units), self.arguments["hidden_states"].shape[0]
        if count == 1:
            return dict(self.arguments)
        return {
            name: value.chunk(count)[index] if isinstance(value, Tensor) and value.shape[:1] == (batch,) else value
            for name, value in self.arguments.items()
        }

    def asked(self, moving: Sequence[str]) -> dict[str, Any]:
        """The arguments that describe what is asked for, all but the `moving` ones."""
        return {name: value for name, value in self.arguments.items() if name not in moving}


@dataclass(kw_only=True)
class Step:
    """One step while it runs: `active` is None (all), an empty tensor (none), [A] or [B, A].

    On many ranks also this rank's `shares` of it, by the number of guidance units in the batch, and the `answers` by
    unit (rows of velocity, and all else) that are known before their branch asks. `units` are the guidance units of
    branches that came so far, `whole` those of branches that needed all tokens though the step leaves out some; `alone`
    says that this is the step of one such branch. Of a video in windows `sizes` are the tokens of each rank, and
    `parts` the same step of single windows, each of which knows the step that it is `part_of`.
    """

    index: int
    sigma: float
    sigma_next: float
    expert: int
    active: Tensor | None
    count: int
    reason: str
    started: float
    entered: set[str] = field(default_factory=set)
    shares: dict[int, Share] = field(default_factory=dict)
    answers: dict[str, tuple[Tensor, tuple[Tensor, ...]]] = field(default_factory=dict)
    units: set[str] = field(default_factory=set)
    whole: set[str] = field(default_factory=set)
    alone: bool = False
    left: int = 0
    seconds: float = 0.0
    recorded: bool = False
    sizes: list[int] = field(default_factory=list)
    parts: dict[int, Step] = field(default_factory=dict)
    part_of: Step | None = None

    def inside(self, window: Window, active: Tensor | None, num_tokens: int) -> Step:
        """The step of one window, with its own active tokens of `num_tokens`; the same for all branches."""
        if window.number not in self.parts:
            count = num_tokens if active is None else active.shape[-1]
            self.parts[window.number] = replace(
                self, active=active, count=count, shares={}, answers={}, parts={}, part_of=self
            )
        return self.parts[window.number]

    def whole_for(self, call: Call, evaluations: Tensor) -> Step:
        """The step of one branch alone, which needs all tokens again after others have been answered as planned.

        What it evaluates is added to `evaluations` [B, N].
        """
        if self.active is not None:
            if not self.whole:
                more = torch.ones_like(evaluations)
                if self.count:
                    fill_rows(more, self.active, 0)
                evaluations += more
            self.whole.update(call.units)
        # What another group of ranks may have answered beforehand is no longer asked.
        for step in (self, *self.parts.values()):
            for unit in call.units:
                step.answers.pop(unit, None)
        return replace(self, active=None, count=evaluations.shape[1], shares={}, answers={}, parts={}, alone=True)

    def work(self, num_tokens: int) -> int:
        """Evaluated tokens per sample, the mean over the guidance units where these differ."""
        share = len(self.whole) / max(len(self.units), 1)
        return self.count + round((num_tokens - self.count) * share)


def checked(active: Any, num_tokens: int, batch_size: int) -> Tensor | None:
    """Bring a user's plan into its normal form: None (all), empty [0] (none), or ascending int64 [A] or [B, A].

    All of it on the host, where most plans are made: of one on a device the host needs a copy, and waits for it.

    Raises:
        ConfigError: it is none of these, or holds an index twice or out of range.
    """
    if active is None:
        return None
    if not isinstance(active, Tensor) or active.dtype != torch.int64 or active.ndim not in (1, 2):
        raise ConfigError("A plan must be None (all tokens) or an int64 tensor of indices [A] or [B, A].")
    if active.ndim == 2 and active.shape[0] != batch_size:
        raise ConfigError(f"A plan for {active.shape[0]} samples was given, but the batch has {batch_size}.")
    if active.numel() == 0:
        return active.new_empty(0)
    active = active.cpu().sort(-1).values
    if active.shape[-1] > 1 and bool((active.diff(dim=-1) <= 0).any()):
        raise ConfigError("A plan holds a token twice: every index may occur once.")
    if int(active.min()) < 0 or int(active.max()) >= num_tokens:
        raise ConfigError(
            f"A plan holds an index out of range: with {num_tokens} tokens they lie between 0 and {num_tokens - 1}."
        )
    return None if active.shape[-1] == num_tokens else active


def fresh_elements(step: Step, velocity: Tensor, *, adapter: Adapter, pipe: Any, grid: Grid) -> Tensor | None:
    """Which elements of the video's velocity, as its scheduler gets it, were evaluated at a step; None for all."""
    if step.active is None or step.whole:
        return None
    rows = torch.zeros(len(velocity), grid.num_tokens, dtype=torch.bool, device=velocity.device)
    fill_rows(rows, step.active, True)
    return adapter.spread(adapter.transformers(pipe)[0][1], grid, rows, velocity)
