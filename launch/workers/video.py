"""One video through a worker group, whatever becomes of its ranks; and the one rule for when it is given up."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path

from ...engine.media.files import LATENTS_NAME, RESULT_NAME, checkpoint_steps, no_room
from ...engine.request import Event
from ...errors import RankFailure, RankLost
from .group import Grown, WorkerGroup
from .messages import Outcome, Work, read_copies, write_copies

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


def make_video(
    group: WorkerGroup, work: Work, folder: Path | None, on_loss: Callable[[RankLost], None]
) -> Generator[Event, None, Outcome]:
    """Make a video, and resume it where it was saved when ranks are lost.

    Args:
        group: recovers here, as often as need be.
        work: what to make.
        folder: of the job, on this machine; None where no step is saved.
        on_loss: told of every loss after which the video is resumed.

    Returns:
        The engine's events but for the `VideoOutput`, which is in the generator's value; a new `Started` after each
        loss.

    Raises:
        ConfigError: a rank refuses the settings or the model.
        RequestError: the request cannot be served, or fails alike on every rank.
        Cancelled: after a stop request.
        RankFailure: too many losses.
    """
    saved: list[int] = []
    while True:
        try:
            group.recover(work)
            return (yield from run_once(group, work, folder))
        except RankLost as lost:
            saved.append(saved_step(folder))
            reason = reason_to_give_up(saved)
            if reason is not None:
                raise RankFailure(f"given up after {reason}; the last time, {lost}") from lost
            on_loss(lost)


def run_once(group: WorkerGroup, work: Work, folder: Path | None) -> Generator[Event, None, Outcome]:
    """One attempt, in which ranks that come back are let in."""
    while True:
        try:
            return (yield from _run(group, work, folder))
        except Grown:
            group.recover(work)


def _run(group: WorkerGroup, work: Work, folder: Path | None) -> Generator[Event, None, Outcome]:
    """Run the group; what rank 0 saves on another machine is copied to `folder`."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        near = group.near
        work = replace(work, folder=str(folder.absolute())) if near else replace(work, copies=read_copies(folder))
    kept: list[str] = list(work.copies or ())
    with contextlib.closing(group.run(work)) as run:
        while True:
            try:
                progress = next(run)
            except StopIteration as end:
                outcome: Outcome = end.value
                return outcome
            if folder is not None and progress.copies:
                try:
                    kept = write_copies(folder, progress.copies, kept)
                except OSError as error:
                    if not no_room(error):
                        raise
                    # The video continues without being saved.
            if progress.event is not None:
                yield progress.event


def saved_step(folder: Path | None) -> int:
    """How many steps of an unfinished job need not be done again; all of them, where its folder has what they gave."""
    if folder is None or not folder.is_dir():
        return 0
    for name in (RESULT_NAME, LATENTS_NAME):  # there may be no checkpoints any more
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            step = json.loads((folder / f"{name}.json").read_bytes())["step"]
            if isinstance(step, int):
                return step
    return next(iter(checkpoint_steps(folder)), 0)
