"""Which pipeline is calling a transformer: several may share one."""

from __future__ import annotations

import sys
from types import FrameType

from diffusers import DiffusionPipeline


def calling_pipeline() -> DiffusionPipeline | None:
    """Return the pipeline whose method is nearest on the stack of calls, or None if there is none.

    A transformer's forward is not told who calls it, and scheduler, guidance and number of steps are the caller's.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            owner = frame.f_locals.get("self")
            if isinstance(owner, DiffusionPipeline):
                return owner
        frame = frame.f_back
    return None
