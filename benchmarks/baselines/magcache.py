"""MagCache as diffusers has it, with a calibration run on the model at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import MagCacheConfig
from diffusers.hooks.hooks import StateManager
from diffusers.hooks.mag_cache import MagCacheBlockHook, MagCacheHeadHook, MagCacheState

from .baseline import DiffusersCache, hooked, transformers_of
from .models import LTX2, model_of

_BLOCK_HOOK = "mag_cache_block_hook"


class MagCache(DiffusersCache):
    """Skips steps as long as the error that calibrated residual magnitudes imply stays below `threshold`.

    Diffusers keeps the residual of one stream alone; that of LTX-2's sound is kept here.

    Args:
        dense_steps: as in `Baseline`.
        threshold: bound on the accumulated error.
        ratios: calibrated magnitude ratio of every step; see `magnitude_ratios`.
        max_skip: consecutive steps that may be skipped (K).
        retention: share of first steps that are never skipped.
    """

    name = "magcache"

    def __init__(
        self,
        dense_steps: int,
        *,
        threshold: float,
        ratios: Sequence[float],
        max_skip: int = 3,
        retention: float = 0.2,
    ) -> None:
        super().__init__(dense_steps, threshold=threshold, ratios=list(ratios), max_skip=max_skip, retention=retention)

    def _config(self, steps: range) -> MagCacheConfig:
        s = self.settings
        return MagCacheConfig(
            threshold=s["threshold"],
            max_skip_steps=s["max_skip"],
            retention_ratio=s["retention"],
            num_inference_steps=len(steps),
            mag_ratios=list(s["ratios"][steps.start : steps.stop]),
        )

    @contextmanager
    def _attached(self, pipe: Any) -> Iterator[None]:
        if model_of(pipe.transformer) is not LTX2:
            with super()._attached(pipe):
                yield
            return
        config, states = self._config(range(self.steps)), StateManager(MagCacheState)
        first, *others, last = LTX2.blocks(pipe.transformer)
        hooks = [
            (first, _Head(states, config)),
            *((block, MagCacheBlockHook(states, config=config)) for block in others),
            (last, _Tail(states, is_tail=True, config=config)),
        ]
        with hooked(pipe.transformer, hooks, _BLOCK_HOOK):
            yield

    def predicted_compute(self, experts: Sequence[range] | None = None) -> float:
        """The share of steps that will be evaluated: the rule reads the ratios alone, so it needs no run.

        Args:
            experts: the steps of each transformer, each of which begins anew; None: there is one.
        """
        own = [self._evaluated(self.settings["ratios"][r.start : r.stop]) for r in experts or [range(self.dense_steps)]]
        return sum(own) / self.dense_steps

    def _evaluated(self, ratios: Sequence[float]) -> int:
        s = self.settings
        evaluated, ratio, error, skipped = 0, 1.0, 0.0, 0
        for step, scale in enumerate(ratios):
            if step >= int(s["retention"] * len(ratios) + 0.5):
                ratio, skipped = ratio * scale, skipped + 1
                error += abs(1.0 - ratio)
                if step and error <= s["threshold"] and skipped <= s["max_skip"]:
                    continue
                ratio, error, skipped = 1.0, 0.0, 0
            evaluated += 1
        return evaluated


class _Head(MagCacheHeadHook):
    """Diffusers' hook of the first block, which adds what the other stream gained too."""

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = super().new_forward(module, *args, **kwargs)
        state, entering = self.state_manager.get_state(), kwargs[LTX2.streams[1]]
        if not state.should_compute:
            return out[0], entering + state.other_residual
        state.other_entering = entering
        return out


class _Tail(MagCacheBlockHook):
    """Diffusers' hook of the last block, which keeps what the other stream gained too."""

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = super().new_forward(module, *args, **kwargs)
        state = self.state_manager.get_state()
        if state.should_compute:
            state.other_residual = out[1] - state.other_entering
        return out


def magnitude_ratios(pipe: Any, run: Callable[[], Any], steps: int) -> dict[str, list[float]]:
    """Calibrate: one dense run, in which diffusers measures the residuals' magnitudes.

    Args:
        pipe: the pipeline.
        run: calls it once with `steps` steps.
        steps: denoising steps.

    Returns:
        Guidance branch -> ratio |residual_i| / |residual_{i-1}| for every step (the first of each expert is 1).
    """
    found: dict[str, list[float]] = {}
    with ExitStack() as stack:
        for transformer in transformers_of(pipe):
            # At the last step it knows of, the hook prints its ratios and forgets them: it is told of one step more.
            transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=steps + 1))
            stack.callback(transformer.disable_cache)
            last = model_of(transformer).blocks(transformer)[-1]
            states = last._diffusers_hook.get_hook(_BLOCK_HOOK).state_manager

            def copy_last(*_: Any, states: Any = states) -> None:
                found.setdefault(states.context.name, []).append(states.get_state().calibration_ratios[-1])

            stack.callback(transformer.register_forward_hook(copy_last).remove)
        run()
    return found
