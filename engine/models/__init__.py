"""The supported models, one adapter file each."""

from __future__ import annotations

from typing import Any

from ...errors import ConfigError
from .base import Adapter, Site
from .ltx2 import LTX2Adapter
from .wan import WanAdapter, WanVACEAdapter

__all__ = ["Adapter", "LTX2Adapter", "Site", "WanAdapter", "WanVACEAdapter", "adapter_for", "adapter_named"]

_ADAPTERS: tuple[type[Adapter], ...] = (WanAdapter, WanVACEAdapter, LTX2Adapter)


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
