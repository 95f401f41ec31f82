"""What a user's planner may return, and what it becomes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError


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
