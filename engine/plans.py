"""A call of the transformer, the step that it belongs to, and what a user's planner may return for one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..hsa.rows import fill_rows
from .sharding import Share
from .tokens import Grid

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
    """

    module: Any
    name: str
    expert: int
    arguments: Mapping[str, Any]
    units: tuple[str, ...]
    grid: Grid

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
    says that this is the step of one such branch.
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

    def whole_for(self, call: Call, evaluations: Tensor) -> Step:
        """The step of one branch alone, which needs all tokens anew after others have been answered as planned.

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
        for unit in call.units:
            self.answers.pop(unit, None)
        return replace(self, active=None, count=evaluations.shape[1], shares={}, answers={}, alone=True)

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
