"""Sound: what a model's vocoder makes, apart from the encoder, which only those who write files load."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Audio:
    """Samples as a model's vocoder makes them.

    Attributes:
        samples: float32 [channels, T], nominally from -1 to 1; one channel or two.
        sample_rate: samples per second.

    Raises:
        RequestError: another shape or type, or samples that are NaN or infinite.
    """

    samples: NDArray[np.float32]
    sample_rate: int

    def __post_init__(self) -> None:
        """Check shape and type."""
        samples = self.samples
        if samples.ndim != 2 or samples.shape[0] not in (1, 2) or samples.dtype != np.float32:
            raise RequestError(f"samples must be float32 [1 or 2, T], got {samples.dtype} {list(samples.shape)}")
        if not np.isfinite(samples).all():
            raise RequestError("the samples are not all finite numbers (NaN or infinity)")
        if self.sample_rate < 1:
            raise RequestError(f"sample_rate must be at least 1, got {self.sample_rate}")

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return self.samples.shape[1] / self.sample_rate

    def part(self, start: float, end: float) -> NDArray[np.float32]:
        """Samples [channels, t] from one time in seconds to another; consecutive parts are the whole."""
        first, last = (round(time * self.sample_rate) for time in (start, end))
        return np.clip(self.samples[:, first:last], -1.0, 1.0)
