"""cache-dit's DBCache with its TaylorSeer calibrator, at planned steps; the package is an extra of the benchmark."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .baseline import Baseline, steps_of_experts
from .models import LTX2, model_of

UNFIT = "cache-dit 1.5.3 does not know the arguments that diffusers 0.42 gives the transformer of LTX-2."
MISSING = "cache-dit is not installed: pip install -c constraints.txt -e '.[peers]'"


class CacheDiT(Baseline):
    """Evaluates given steps; at the others the first block runs, and what the rest adds is extrapolated.

    The package needs the first block at every step (``Fn_compute_blocks`` 0 is refused). Of a model with L blocks a
    skipped step so costs 1 / L of a full one: little for 40 blocks, much for 6.

    Args:
        dense_steps: as in `Baseline`.
        evaluated: steps that run all blocks; the first is 0.
        order: of the Taylor expansion; 0 repeats the last residual.
    """

    name = "cache-dit"

    def __init__(self, dense_steps: int, *, evaluated: Sequence[int], order: int = 1) -> None:
        super().__init__(dense_steps, evaluated=list(evaluated), order=order)

    @contextmanager
    def _attached(self, pipe: Any) -> Iterator[None]:
        reason = self.unfit(pipe)
        if reason is not None:
            raise ValueError(reason)
        with _quietly():
            package = importlib.import_module("cache_dit")
        order = self.settings["order"]
        calibrator = package.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
        configs = [self._config(package.DBCacheConfig, own) for own in steps_of_experts(pipe, self.dense_steps) if own]
        # Two experts count their steps each for itself.
        each = [package.ParamsModifier(cache_config=config) for config in configs] if len(configs) > 1 else None
        with _quietly():
            package.enable_cache(pipe, cache_config=configs[0], calibrator_config=calibrator, params_modifiers=each)
        try:
            yield
        finally:
            with _quietly():
                package.disable_cache(pipe)

    @staticmethod
    def unfit(pipe: Any) -> str | None:
        """Why the package cannot be used with a pipeline; None: it can."""
        if importlib.util.find_spec("cache_dit") is None:
            return MISSING
        return UNFIT if model_of(pipe.transformer) is LTX2 else None

    def _config(self, cls: Any, own: range) -> Any:
        """The package's config for a transformer that does the steps `own`."""
        # A transformer's first step has nothing to repeat.
        mask = [int(step == own.start or step in set(self.settings["evaluated"])) for step in own]
        return cls(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=1,
            num_inference_steps=len(own),
            steps_computation_mask=mask,
            steps_computation_policy="static",
        )

    @classmethod
    def candidates(cls, dense_steps: int, count: int, placed: Sequence[Sequence[int]]) -> list[CacheDiT]:
        """Masks with `count` full steps.

        Args:
            dense_steps: as in `Baseline`.
            count: of full steps.
            placed: more masks, such as the levels of `PlacedSteps`.
        """
        masks = {tuple(mask) for mask in placed}
        for warmup in {max(count // 4, 1), max(count // 2, 1)}:
            # Dense at first, then even to the end.
            gap = (dense_steps - warmup) / (count - warmup + 1)
            rest = [round(warmup - 1 + (k + 1) * gap) for k in range(count - warmup)]
            masks.add(tuple(sorted({*range(warmup), *rest})))
        return [cls(dense_steps, evaluated=mask) for mask in sorted(masks)]

    def refined(self) -> list[Baseline]:
        """The same steps with the parabola."""
        return [CacheDiT(self.dense_steps, **{**self.settings, "order": 2})]


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the package's eight lines of log for each change."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
