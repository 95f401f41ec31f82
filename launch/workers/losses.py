"""The one rule for losses: when a video whose workers were lost is tried again, and when it is given up."""

from __future__ import annotations

from collections.abc import Sequence

MAX_LOSSES = 20
"""A video is given up at this loss of its workers, whatever was saved between the losses."""
MAX_RESTARTS = 10
"""And at this restart of a service that died while the video was being made: it may be the cause."""


def reason_to_give_up(saved: Sequence[int]) -> str | None:
    """Say why a video is not tried again; None while it is.

    Args:
        saved: for each loss so far, the last one included, how many steps need not be done again after it.
    """
    if len(saved) > 1 and saved[-1] <= saved[-2]:
        return "two losses in a row without a new step saved"
    return f"{MAX_LOSSES} losses" if len(saved) >= MAX_LOSSES else None


def reason_to_give_up_restarts(restarts: int) -> str | None:
    """Say why a video is not begun again after `restarts` deaths of the whole service; None while it is."""
    return f"{MAX_RESTARTS} restarts of the service" if restarts >= MAX_RESTARTS else None
