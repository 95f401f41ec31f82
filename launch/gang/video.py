"""One video through a gang, whatever becomes of its ranks: what `heterostep generate --ray` does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

from ...engine.media.files import checkpoint_steps
from ...engine.request import Event
from ...errors import RankFailure
from ..workers.losses import reason_to_give_up
from .copies import read_copies, write_copies
from .gang import Gang
from .messages import Outcome, RankLost, Work


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
    saved: list[int] = []
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
            saved.append(next(iter(checkpoint_steps(folder)), 0) if folder is not None else 0)
            reason = reason_to_give_up(saved)
            if reason is not None:
                raise RankFailure(f"given up after {reason}; the last time, {lost}") from lost


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
