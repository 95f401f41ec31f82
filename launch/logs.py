"""What the libraries print, kept off a screen that has messages and a progress bar of its own."""

from __future__ import annotations

import warnings
from importlib import import_module


def silence_libraries(*names: str) -> None:
    """Turn off the hints of the model libraries; of all of them, or of those that are named and so imported."""
    warnings.simplefilter("ignore")
    for name in names or ("diffusers", "huggingface_hub", "transformers"):
        import_module(f"{name}.utils.logging").set_verbosity_error()
