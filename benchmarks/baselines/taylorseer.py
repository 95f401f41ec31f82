"""TaylorSeer as diffusers has it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import TaylorSeerCacheConfig

from .baseline import Baseline, DiffusersCache

# The default identifiers match no module of Wan ("attn" must end the name), so that the cache would do
# nothing at all, and of LTX-2 two of eight.
_IDENTIFIERS = [
    r"blocks\.\d+\.(attn[12]|ffn)",
    r"transformer_blocks\.\d+\.((audio_)?(attn[12]|ff)|audio_to_video_attn|video_to_audio_attn)",
]


class TaylorSeer(DiffusersCache):
    """Evaluates every `interval`-th step after the first `warmup` ones; between, attention and FFN are
    extrapolated.

    Args:
        dense_steps: as in `Baseline`.
        interval: distance of evaluated steps.
        warmup: first steps that are all evaluated.
        order: of the Taylor expansion of every module's output.
    """

    name = "taylorseer"

    def __init__(self, dense_steps: int, *, interval: int, warmup: int, order: int = 1) -> None:
        super().__init__(dense_steps, interval=interval, warmup=warmup, order=order)

    def _config(self, steps: range) -> TaylorSeerCacheConfig:
        s = self.settings
        return TaylorSeerCacheConfig(
            cache_interval=s["interval"],
            disable_cache_before_step=s["warmup"],
            max_order=s["order"],
            taylor_factors_dtype=torch.float32,
            cache_identifiers=_IDENTIFIERS,
        )

    def predicted_compute(self, experts: Sequence[range] | None = None) -> float:
        """The share of steps that will be evaluated; `experts`: the steps of each transformer, each begins anew."""
        interval, warmup = self.settings["interval"], self.settings["warmup"]
        steps = [i for own in experts or [range(self.dense_steps)] for i in range(len(own))]
        return sum(i < warmup or (i - warmup - 1) % interval == 0 for i in steps) / self.dense_steps

    @classmethod
    def candidates(
        cls,
        dense_steps: int,
        compute: float,
        orders: tuple[int, ...] = (2,),
        experts: Sequence[range] | None = None,
    ) -> list[TaylorSeer]:
        """For every interval and order the warm-up nearest to `compute`, if it is within half a step of each expert."""
        found = []
        for interval in range(2, 11):
            # Below two evaluations there is nothing to extrapolate from.
            trials = [cls(dense_steps, interval=interval, warmup=w) for w in range(2, dense_steps)]
            best = min(trials, key=lambda t: abs(t.predicted_compute(experts) - compute))
            if abs(best.predicted_compute(experts) - compute) <= 0.5 * len(experts or [1]) / dense_steps + 1e-9:
                found += [cls(dense_steps, **{**best.settings, "order": order}) for order in orders]
        return found

    def refined(self) -> list[Baseline]:
        """The same steps with the line."""
        return [TaylorSeer(self.dense_steps, **{**self.settings, "order": 1})]
