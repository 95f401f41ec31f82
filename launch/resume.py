"""A job that an earlier process may have begun, and may not quite have let go of."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

from ..engine.engine import Engine
from ..engine.request import Event, GenerateRequest, JobConfig
from ..errors import JobDiffers, JobInUse

# A process that was killed holds its job's folder until the system has cleared it away.
_TRIES, _PAUSE_SECONDS = 80, 0.25


def go_on(engine: Engine, request: GenerateRequest, job: JobConfig, *, anew: bool) -> Iterator[Event]:
    """Make a video and go on where it was saved, as `Engine.stream` does.

    On several ranks every rank calls this, and all come to the same decisions: what the job's folder says, they are
    told alike.

    Args:
        engine: idle.
        request: what to make.
        job: where it is kept.
        anew: whether to begin anew, instead of raising ConfigError, where the folder holds what other settings or
            another version of heterostep saved.
    """
    for left in reversed(range(_TRIES)):  # counted, not timed: every rank must count alike
        try:
            yield from engine.stream(request, job)
            return
        except JobInUse:
            if not left:
                raise
            time.sleep(_PAUSE_SECONDS)
        except JobDiffers:
            if not anew:
                raise
            job = dataclasses.replace(job, resume="never")
