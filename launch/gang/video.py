"""One video through a gang, whatever becomes of its ranks: what `heterostep generate --ray` does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

from ...engine.files import checkpoint_steps
from ...engine.request import Event
from ...errors import RankFailure
from .copies import read_copies, write_copies
from .gang import Gang
from .messages import Outcome, RankLost, Work

MAX_LOSSES = 20
"""Ranks that a video may lose in all."""


class Losses:
    """Whether it is worth trying again: not after two losses in a row between which nothing new was saved."""

    def __init__(self, most: int = MAX_LOSSES) -> None:
        """Allow `most` losses in all."""
        self._left, self._saved = most, -1

    def bear(self, lost: RankLost, saved: int) -> None:
        """Take note of a loss after which `saved` steps need not be done again.

        Raises:
            RankFailure: it is one too many.
        """
        self._left -= 1
        if saved <= self._saved:
            raise RankFailure(f"given up after two losses in a row without a new step saved; the last time, {lost}")
        if self._left <= 0:
            raise RankFailure(f"given up after {MAX_LOSSES} losses; the last time, {lost}")
        self._saved = saved


def make_video(
    gang: Gang, work: Work, folder: Path | None, on_loss: Callable[[RankLost], None]
) -> Generator[Event, None, Outcome]:
    """Make a video, and go on where it was saved when ranks are lost.

    Args:
        gang: healed here, as often as need be.
        work: what to make.
        folder: of the job, on this machine; None where no step is saved.
        on_loss: told of every loss.

    Returns:
        The engine's events but for the `VideoOutput`, which is in the generator's value; a new `Started` after each
        loss.

    Raises:
        ConfigError: every rank refuses the settings or the model.
        RequestError: the request cannot be served, or fails alike on every rank.
        Cancelled: after `gang.wish`.
        RankFailure: too many losses.
    """
    losses = Losses()
    while True:
        try:
            gang.heal(work)
            if folder is None:
                return (yield from _events(gang, work, None))
            folder.mkdir(parents=True, exist_ok=True)
            if gang.near:
                return (yield from _events(gang, replace(work, state=str(folder.absolute())), None))
            return (yield from _events(gang, replace(work, copies=read_copies(folder)), folder))
        except RankLost as lost:
            on_loss(lost)
            losses.bear(lost, next(iter(checkpoint_steps(folder)), 0) if folder is not None else 0)


def _events(gang: Gang, work: Work, folder: Path | None) -> Generator[Event, None, Outcome]:
    """One attempt; `folder` gets the copies of what rank 0 saves elsewhere."""
    kept: list[str] = list(work.copies or ())
    with contextlib.closing(gang.run(work)) as run:
        while True:
            try:
                progress = next(run)
            except StopIteration as end:
                outcome: Outcome = end.value
                return outcome
            if folder is not None and progress.copies:
                kept = write_copies(folder, progress.copies, kept)
            if progress.event is not None:
                yield progress.event
