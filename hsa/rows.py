"""Reading and writing the rows of active tokens, one set for the batch or one per sample."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_rows(tokens: Tensor, active: Tensor | None) -> Tensor:
    """Take the rows of the active tokens.

    Args:
        tokens: [B, N, ...].
        active: int64 indices [A] shared by the batch, [B, A] one set per sample, or None for all.

    Returns:
        [B, A, ...]; `tokens` itself for None.
    """
    if active is None:
        return tokens
    if active.ndim == 1:
        return tokens.index_select(1, active)
    return tokens[_sample_ids(active), active]


def write_rows(tokens: Tensor, active: Tensor | None, rows: Tensor) -> None:
    """Overwrite the rows of the active tokens in place: the inverse of `gather_rows`.

    Args:
        tokens: [B, N, ...], changed in place.
        active: as in `gather_rows`.
        rows: [B, A, ...]; converted to the type of `tokens`.
    """
    if active is None:
        tokens.copy_(rows)
    elif active.ndim == 1:
        tokens.index_copy_(1, active, rows.to(tokens.dtype))
    else:
        tokens[_sample_ids(active), active] = rows.to(tokens.dtype)


def fill_rows(tokens: Tensor, active: Tensor | None, value: float | bool) -> None:
    """Set the rows of the active tokens to one number, in place; arguments as in `write_rows`."""
    if active is None:
        tokens.fill_(value)
    elif active.ndim == 1:
        tokens.index_fill_(1, active, value)
    else:
        tokens[_sample_ids(active), active] = value


def _sample_ids(active: Tensor) -> Tensor:
    """Return [B, 1] sample numbers that broadcast against `active` [B, A]."""
    return torch.arange(active.shape[0], device=active.device)[:, None]
