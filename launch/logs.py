"""What the libraries print, kept off a screen that has messages and a progress bar of its own."""

from __future__ import annotations

import warnings
from importlib import import_module


def silence_libraries(*names: str, downloads: bool = True) -> None:
    """Turn off what the libraries say.

    Args:
        names: of libraries whose hints are turned off, and which are imported for it; all of them without any.
        downloads: whether the bars of the hub's downloads are shown.
    """
    warnings.simplefilter("ignore")
    for name in names or ("diffusers", "huggingface_hub", "transformers"):
        import_module(f"{name}.utils.logging").set_verbosity_error()
    if not downloads:
        import_module("huggingface_hub.utils").disable_progress_bars()
