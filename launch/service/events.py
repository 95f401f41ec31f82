"""What a runner says while it makes one video, and how it says that it cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import HeterostepError, RankFailure


@dataclass(frozen=True, kw_only=True)
class Began:
    """Work begins.

    Attributes:
        num_steps: denoising steps of the whole run.
        num_tokens: N, tokens of the video.
        step: steps that an earlier attempt has done already.
    """

    num_steps: int
    num_tokens: int
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """A denoising step is done.

    Attributes:
        step: how many are done.
        num_steps: of the whole run.
        active: share of the tokens that went through the transformer, 0 to 1.
        seconds: that this step took.
        eta_seconds: estimate of the time left for denoising.
        preview: a WebP picture of the middle frame as it would be now, where there is a new one.
    """

    step: int
    num_steps: int
    active: float
    seconds: float
    eta_seconds: float
    preview: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Denoising is done; the VAE makes frames, and the files are written."""

    seconds: float


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


Event = Began | Stepped | Decoding | Made


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
