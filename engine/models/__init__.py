"""The supported models, one adapter file each."""

from __future__ import annotations

from typing import Any

from ...errors import ConfigError
from .adapter import Adapter, Site
from .ltx2 import LTX2Adapter
from .ltx2_recipe import LTX2Recipe
from .recipe import Recipe
from .wan import WanAdapter
from .wan_recipe import WanRecipe

__all__ = ["Adapter", "LTX2Adapter", "Recipe", "Site", "WanAdapter", "adapter_for", "adapter_named", "recipe_for"]

_ADAPTERS: tuple[type[Adapter], ...] = (WanAdapter, LTX2Adapter)
_RECIPES: tuple[tuple[type[Adapter], type[Recipe]], ...] = ((WanAdapter, WanRecipe), (LTX2Adapter, LTX2Recipe))


def adapter_for(pipe: Any) -> Adapter:
    """Return the adapter of a diffusers pipeline.

    Raises:
        ConfigError: no adapter knows the pipeline or its transformer; the message lists the supported ones.
    """
    for adapter in _ADAPTERS:
        if adapter.recognises(pipe):
            return adapter()
    known = ", ".join(name for adapter in _ADAPTERS for name in adapter.pipelines)
    raise ConfigError(f"{type(pipe).__name__} is not supported: HSA works with {known} and their stock transformers.")


def adapter_named(pipeline: str) -> Adapter:
    """Return the adapter of a pipeline by its class name, one of `facts.SUPPORTED_PIPELINES`."""
    return next(adapter() for adapter in _ADAPTERS if pipeline in adapter.pipelines)


def recipe_for(pipeline: str) -> Recipe:
    """Return the recipe of a pipeline by its class name, one of `facts.SUPPORTED_PIPELINES`."""
    return next(recipe() for adapter, recipe in _RECIPES if pipeline in adapter.pipelines)
