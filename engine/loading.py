"""A stock diffusers pipeline from a folder or hub id; whatever is wrong with it becomes one sentence."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ConfigError
from .facts import ModelFacts, first_line


def pick_device(name: str) -> torch.device:
    """Turn `"auto"`, `"cpu"`, `"cuda"`, `"cuda:1"` ... into a device that is there, or raise ConfigError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', not {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', not {name!r}")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= found:
        raise ConfigError(f"device {name!r} is not there: this PyTorch sees {found} CUDA devices")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn a dtype's name into the dtype; `"auto"` is bfloat16 on a GPU and float32 on the CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def load_pipeline(facts: ModelFacts, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a model's stock pipeline.

    The VAE is kept in float32. Only safetensors are read: other weight files can run code when they are
    opened.

    Args:
        facts: says where the model is.
        device: where all its parts go.
        dtype: of text encoder and transformer.

    Returns:
        The diffusers pipeline, its own progress bar off.

    Raises:
        ConfigError: a part is missing, torn, or does not fit its config.
    """
    import diffusers

    try:
        pipeline = getattr(diffusers, facts.pipeline).from_pretrained(
            facts.location, dtype={"default": dtype, "vae": torch.float32}, use_safetensors=True
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a foreign or torn folder can raise anything: OSError, KeyError, SafetensorError ...
        raise ConfigError(f"model {facts.name!r} cannot be loaded ({first_line(error)})") from error
    for name in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"):
        if getattr(pipeline, name, None) is None:
            raise ConfigError(f"model {facts.name!r} has no {name}, so it cannot make a video")
    for name, part in pipeline.components.items():
        # diffusers only warns of weights that its files lack, and leaves them without a value.
        parameters = part.named_parameters() if isinstance(part, torch.nn.Module) else ()
        absent = [key for key, weight in parameters if weight.is_meta]
        if absent:
            raise ConfigError(
                f"model {facts.name!r}: the {name}'s files lack {len(absent)} weights, such as {absent[0]}"
            )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)
