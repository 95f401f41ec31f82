"""First Block Cache as diffusers has it."""

from __future__ import annotations

from diffusers import FirstBlockCacheConfig

from .baseline import DiffusersCache


class FirstBlock(DiffusersCache):
    """Runs the first block at every step; if its residual changed by less than `threshold`, the rest is
    reused.

    A model of L blocks so never costs less than 1 / L of the dense work.
    """

    name = "first-block"

    def __init__(self, dense_steps: int, *, threshold: float) -> None:
        super().__init__(dense_steps, threshold=threshold)

    def _config(self, steps: range) -> FirstBlockCacheConfig:
        return FirstBlockCacheConfig(threshold=self.settings["threshold"])
