"""What a runner reports of one video: the engine's events, then `Made`; and how it says that it cannot make it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...engine.request import Decoding, Started, StepDone
from ...errors import HeterostepError, RankFailure


@dataclass(frozen=True, kw_only=True)
class Made:
    """The task's folder holds every file of the result.

    Attributes:
        hsa: what was computed, for the response's block of that name.
        seconds: by stage: `encode_text`, `denoise`, `checkpoint`, `decode`, `write`, `total`.
        imbalances: of the evaluated steps on several ranks: the most tokens of a rank over their mean.
    """

    hsa: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    imbalances: Sequence[float] = ()


Event = Started | StepDone | Decoding | Made


class RunnerLost(RankFailure):
    """The process that made the video is gone, or no longer usable; the job can be tried again.

    Attributes:
        cause: one word for statistics: `died`, `frozen` or `error`; of a gang also `node`, `memory`, `timeout`.
    """

    def __init__(self, cause: str, message: str) -> None:
        """Say why in one word and in one sentence."""
        super().__init__(message)
        self.cause = cause


class Stopped(HeterostepError):
    """The run was broken off so that the service can stop; the job goes on when it starts again."""
