"""Windows: parts of a long video that the model evaluates one by one, each as a video of its own.

The pipeline steps one long latent. At each step the transformer is called once for each window, with positions from 0,
and the velocities are blended where windows overlap. Frames are frames of tokens here, not of the video.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import ConfigError

Span = tuple[int, int]
"""First index, and the one after the last."""

_TURN = (math.sqrt(5.0) - 1.0) / 2.0


class Window(NamedTuple):
    """One window of a step: its number, and its frames from `start` to before `stop`."""

    number: int
    start: int
    stop: int


class Text(NamedTuple):
    """A prompt of its own for a part of the video.

    Attributes:
        start: first frame of that part, of which fractions count.
        stop: where it ends.
        arguments: what the transformer gets for this prompt instead of the pipeline's, for one video, by name.
    """

    start: float
    stop: float
    arguments: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How a long video is cut.

    Attributes:
        length: frames of a window; the whole video if it has no more.
        overlap: frames that neighbouring windows share at least.
        roll: whether the windows begin elsewhere at each step, so that no seam stands still.
        anchor: whether the model takes its first frame for a shorter piece of time than all others, as those of causal
            VAEs do. Windows in the middle of the video then only look at their first frame, and give it no velocity.
        texts: prompts for parts of the video; a window gets that of its middle.

    Raises:
        ConfigError: the overlap is not shorter than the window.
    """

    length: int
    overlap: int
    roll: bool = False
    anchor: bool = True
    texts: Sequence[Text] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.overlap < self.length:
            raise ConfigError(
                f"windows of {self.length} latent frames cannot overlap by {self.overlap}: the overlap must be from 1 "
                f"to {self.length - 1} latent frames"
            )

    def cut(self, frames: int) -> bool:
        """Whether a video is longer than a window."""
        return frames > self.length

    def of(self, frames: int, step: int = 0) -> list[Window]:
        """The windows of a video at a step, in the order of their starts; all of them have `length` frames."""
        last, stride = frames - self.length, self.length - self.overlap
        if last <= 0:
            return [Window(0, 0, frames)]
        if self.roll:
            # Of all numbers the golden ratio leaves the least room between its multiples.
            offset = 1 + int(math.fmod(step * _TURN, 1.0) * stride)
            starts = [0, *range(offset, last, stride), last]
        else:
            count = math.ceil(last / stride)
            starts = [round(i * last / count) for i in range(count + 1)]
        return [Window(i, start, start + self.length) for i, start in enumerate(starts)]

    def text(self, window: Window) -> int | None:
        """Number of the window's own prompt among `texts`; None: it has the pipeline's."""
        middle = (window.start + window.stop) / 2
        found = (i for i, text in enumerate(self.texts) if text.start <= middle < text.stop)
        return next(found, None)

    def worded(self, arguments: Mapping[str, Any], units: Sequence[str], window: Window) -> dict[str, Any]:
        """The arguments of a call for `units` with the window's own prompt in all of them but "uncond"."""
        number, worded = self.text(window), dict(arguments)
        if number is None:
            return worded
        for name, own in self.texts[number].arguments.items():
            parts = list(arguments[name].chunk(len(units)))
            for i, unit in enumerate(units):
                if unit != "uncond":
                    parts[i] = own.to(parts[i]).expand_as(parts[i])
            worded[name] = torch.cat(parts)
        return worded


def ramps(spans: Sequence[Span], size: int, *, anchor: bool = False) -> list[Tensor]:
    """Weights with which overlapping spans are blended: float32 [span] for each, which sum to 1 at every index.

    They rise from a span's ends to its middle, so that one span takes over from another linearly.

    Args:
        spans: cover `size`.
        size: what they cover.
        anchor: give the first index of a span no weight, but at the very beginning.
    """
    weights, total = [], torch.zeros(size)
    for low, high in spans:
        count = high - low
        rising = torch.arange(count) + (0 if anchor and low > 0 else 1)
        weights.append(torch.minimum(rising, torch.arange(count, 0, -1)).float())
        total[low:high] += weights[-1]
    return [weight / total[low:high] for weight, (low, high) in zip(weights, spans, strict=True)]


def shared_noise(noise: Tensor, windows: Windows, generator: torch.Generator, patch: int = 1) -> Tensor:
    """Rearrange the initial noise of a long video: all windows begin with the same, in another order (FreeNoise).

    Windows that begin with noise of their own become videos of their own, and what is blended of them drifts.

    Args:
        noise: independent, [B, C, F, Y, X].
        windows: of the video.
        generator: draws the order.
        patch: frames of latents in one of tokens.

    Returns:
        [B, C, F, Y, X] of the same distribution at every frame.
    """
    noise = noise.unflatten(2, (-1, patch)).clone()
    still = dataclasses.replace(windows, roll=False).of(noise.shape[2])
    for before, window in itertools.pairwise(still):
        # What a window has more than the one before is what that one had more.
        count = window.start - before.start
        order = before.start + torch.randperm(count, generator=generator).to(noise.device)
        noise[:, :, before.stop : window.stop] = noise[:, :, order]
    return noise.flatten(2, 3)


class Blend:
    """Sums up what the windows of one call answer, weighted.

    Attributes:
        windows: of the step.
        places: for each window, which of the call's active tokens are in it.
        parts: for each window, its part of whatever else the model returns.
        dtype: of the answers.
        rows: of the active tokens, float32 [B, A, D], as far as they were added; None before the first.
        others: what else the model returns, float32, as far as it was added.
    """

    def __init__(
        self,
        windows: Sequence[Window],
        size: tuple[int, int],
        active: Tensor | None,
        parts: Sequence[Sequence[Span]],
        *,
        anchor: bool,
    ) -> None:
        """Begin with nothing.

        Args:
            windows: of the step.
            size: frames of the video, and tokens of a frame.
            active: int64 [A], ascending; None for all tokens.
            parts: for each window, a span of each other output along its second dimension.
            anchor: as in `Windows`.

        Raises:
            ConfigError: several videos have active tokens of their own.
        """
        frames, self._tokens = size
        self.windows, self.parts, self._active = windows, parts, active
        if active is None:
            self.places = [(window.start * self._tokens, window.stop * self._tokens) for window in windows]
        elif active.ndim == 1:
            edges = torch.tensor([window[1:] for window in windows], device=active.device) * self._tokens
            self.places = [(low, high) for low, high in torch.searchsorted(active, edges).tolist()]
        else:
            raise ConfigError(
                "Steps that leave out tokens of several videos at once do not work with windows: make one video at a "
                'time, or use policy="steps".'
            )
        self.dtype = torch.float32
        self.rows: Tensor | None = None
        self.others: list[Tensor] = []
        self._weights = ramps([(window.start, window.stop) for window in windows], frames, anchor=anchor)
        self._sizes = [max(high for _, high in spans) for spans in zip(*parts, strict=True)]
        self._ramps = [ramps(spans, size) for spans, size in zip(zip(*parts, strict=True), self._sizes, strict=True)]

    def active(self, window: Window) -> Tensor | None:
        """The window's own active tokens, counted from its first one; None: all."""
        if self._active is None:
            return None
        low, high = self.places[window.number]
        size = (window.stop - window.start) * self._tokens
        return None if high - low == size else self._active[low:high] - window.start * self._tokens

    def reach(self, numbers: range, other: int | None = None) -> Span:
        """Which of the active tokens, or of an `other` output, neighbouring windows have together."""
        spans = self.places if other is None else [part[other] for part in self.parts]
        return spans[numbers[0]][0], spans[numbers[-1]][1]

    def start(self, rows: Tensor, others: Sequence[Tensor]) -> None:
        """Begin with zeros for answers of the batch, the widths and the device of these."""
        if self.rows is not None:
            return
        self.dtype = rows.dtype
        count = self.places[-1][1] if self._active is None else len(self._active)
        self.rows = rows.new_zeros(rows.shape[0], count, rows.shape[2], dtype=torch.float32)
        self.others = [
            other.new_zeros(other.shape[0], size, other.shape[2], dtype=torch.float32)
            for other, size in zip(others, self._sizes, strict=True)
        ]

    def add(self, window: Window, rows: Tensor, others: Sequence[Tensor]) -> None:
        """Add a window's answer: rows [B, n, D] of its active tokens, or of one where it has none, and all else."""
        self.start(rows, others)
        assert self.rows is not None
        (low, high), weight = self.places[window.number], self._weights[window.number].to(rows.device)
        if self._active is None:
            weight = weight.repeat_interleave(self._tokens)
        else:
            weight = weight[self._active[low:high].to(rows.device) // self._tokens - window.start]
        self.rows[:, low:high] += rows[:, : high - low] * weight[:, None]
        for sums, other, weights, (start, stop) in zip(
            self.others, others, self._ramps, self.parts[window.number], strict=True
        ):
            sums[:, start:stop] += other * weights[window.number].to(other.device)[:, None]
