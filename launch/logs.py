"""What the libraries print, kept off a screen that has messages and a progress bar of its own."""

from __future__ import annotations

import warnings


def silence_libraries() -> None:
    """Turn off the hints and loading bars of the model libraries; the hub's download bars stay."""
    import diffusers
    import huggingface_hub
    import transformers

    warnings.simplefilter("ignore")
    for library in (diffusers, huggingface_hub, transformers):
        library.utils.logging.set_verbosity_error()
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
