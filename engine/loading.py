"""A stock diffusers pipeline from a folder or hub id; whatever is wrong with it becomes one sentence."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError, is_out_of_memory
from ..parallel.mesh import ParallelMesh, shard_weights
from .denoise.checks import TRANSFORMERS
from .facts import ModelFacts, first_line
from .features import check_features, place, put_on, quantization
from .models import adapter_for

if TYPE_CHECKING:
    from .config import EngineConfig

# Absent tensors that a message names; a wrong folder can lack hundreds.
_NAMED = 3


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
        raise ConfigError(
            f"device {name!r} does not exist: PyTorch sees {found} CUDA devices; use 'auto' or another device"
        )
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn a dtype's name into the dtype; `"auto"` is bfloat16 on a GPU and float32 on the CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


_TEXT = ("text_encoder", "tokenizer")
_IMAGE = ("image_encoder", "image_processor")
# Of 2.5: they write longer prompts, and choose a length.
_UNUSED = ("processor", "prompt_enhancer", "duration_head")
_AUDIO = ("connectors", "audio_vae", "vocoder")
# What a pipeline that only decodes does without.
_DENOISER = ("transformer", "transformer_2", "connectors", *_TEXT, *_IMAGE)
# Small parts in which rounding shows, or is heard. LTX-2's VAE is not among them: its pipeline gives it images in the
# transformer's type.
_FLOAT32 = ("image_encoder", "audio_vae", "vocoder")


def load_pipeline(
    facts: ModelFacts,
    config: EngineConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    text: bool = True,
    offload: str = "none",
    shards: ParallelMesh | None = None,
) -> Any:
    """Load a model's stock pipeline, from safetensors alone: other weight files can run code when they are opened.

    Wan's VAE, and what is small in others, is kept in float32.

    Args:
        facts: says where the model is.
        config: what else is asked for.
        device: where all its parts go.
        dtype: of text encoder and transformer.
        text: whether to load tokenizer and text encoder; a rank that is given embeddings needs neither.
        offload: where weights wait that are not in use, as the setting, but for auto.
        shards: ranks that each keep a part of the transformers' weights; None: all of them are kept.

    Returns:
        The diffusers pipeline, its own progress bar off.

    Raises:
        ConfigError: a part is missing, torn, or does not fit its config, or `config` asks for what is not here.
    """
    check_features(config, facts, device)
    pipeline = _assembled(facts, config, dtype, () if text else _TEXT)
    adapter = adapter_for(pipeline)
    if shards is not None:
        for _, transformer in adapter.transformers(pipeline):
            shard_weights(transformer, adapter.blocks(transformer), shards)
    place(pipeline, adapter, device, offload)
    put_on(config, pipeline, adapter)
    return pipeline


def load_decoder(facts: ModelFacts, config: EngineConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a model's stock pipeline without what makes latents: it can only decode them. As `load_pipeline` else."""
    pipeline = _assembled(facts, config, dtype, _DENOISER)
    if config.vae_tiling:
        pipeline.vae.enable_tiling()
    return pipeline.to(device)


def _assembled(facts: ModelFacts, config: EngineConfig, dtype: torch.dtype, without: tuple[str, ...]) -> Any:
    """A model's pipeline on the host, without some parts."""
    import diffusers

    cls = getattr(diffusers, facts.pipeline)
    try:
        folder = facts.location
        if not Path(folder).is_dir():
            folder = str(cls.download(folder, use_safetensors=True))
        parts = cls.load_config(folder)
        left_out = (*_UNUSED, *without)
        index = {name: entry for name, entry in parts.items() if name not in left_out}
        with _without_bars():
            networks = _load_networks(facts, Path(folder), index, dtype, quantization(config))
            networks |= dict.fromkeys(name for name in left_out if name in parts)
            # Of parts with code of the pipeline's own diffusers warns that it cannot tell their type: they come later.
            own = {name: part for name, part in networks.items() if ".pipelines." in type(part).__module__}
            pipeline = cls.from_pretrained(folder, dtype=dtype, use_safetensors=True, **networks | dict.fromkeys(own))
        pipeline.register_modules(**own)
    except Exception as error:  # a foreign or torn folder can raise anything: OSError, KeyError, SafetensorError ...
        if isinstance(error, ConfigError) or is_out_of_memory(error):
            raise
        raise ConfigError(f"model {facts.name!r} cannot be loaded ({first_line(error)})") from error
    _check_parts(pipeline, facts, without)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _check_parts(pipeline: Any, facts: ModelFacts, without: tuple[str, ...]) -> None:
    """Refuse a pipeline that lacks what a video needs, but for parts that it does without."""
    more = (*_TEXT, *(_IMAGE if facts.sees_image else ()), *(_AUDIO if facts.audio_heads else ()))
    for name in [name for name in ("transformer", "vae", "scheduler", *more) if name not in without]:
        if getattr(pipeline, name, None) is None:
            raise ConfigError(f"model {facts.name!r} has no {name}, so it cannot make a video")


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Keep the libraries' loading bars off the screen; afterwards these are as users of the libraries had set them."""
    import diffusers
    import transformers
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
    )

    switches = [library.utils.logging for library in (diffusers, transformers)]
    shown = [switch for switch in switches if switch.is_progress_bar_enabled()]
    # The switch of transformers is also that of the hub's downloads.
    hub_disabled = are_progress_bars_disabled()
    for switch in shown:
        switch.disable_progress_bar()
    try:
        yield
    finally:
        for switch in shown:
            switch.enable_progress_bar()
        if hub_disabled:
            disable_progress_bars()


def as_pipeline(pipeline: Any, name: str) -> Any:
    """A pipeline of class `name` that shares all its parts with `pipeline`; `pipeline` itself if it is one."""
    import diffusers

    if type(pipeline).__name__ == name:
        return pipeline
    cls = getattr(diffusers, name)
    taken = inspect.signature(cls.__init__).parameters.keys() - set(_IMAGE)
    options = {key: pipeline.config[key] for key in ("boundary_ratio", "expand_timesteps") if key in pipeline.config}
    twin = cls(**{key: part for key, part in (pipeline.components | options).items() if key in taken})
    twin.set_progress_bar_config(disable=True)
    return twin


def _load_networks(
    facts: ModelFacts, folder: Path, index: Mapping[str, Any], dtype: torch.dtype, quantized: Any
) -> dict[str, Any]:
    """Load a pipeline's networks one by one: only then do the libraries say what the files lack.

    They fill absent tensors at random, or leave them without a value, and the pipeline's own loading drops that news.

    Args:
        facts: for messages.
        folder: has one folder for each network.
        index: content of model_index.json, (library, class) by name.
        dtype: of all networks but VAE and image encoder.
        quantized: diffusers' settings for the transformers' weights, or None.

    Returns:
        The networks by name; the pipeline loads what else it needs.
    """
    import diffusers
    import transformers

    libraries = {"diffusers": diffusers, "transformers": transformers}
    float32 = _FLOAT32 if facts.audio_heads else (*_FLOAT32, "vae")
    networks = {}
    for name, entry in index.items():
        library, kind = entry if isinstance(entry, list | tuple) and len(entry) == 2 else (None, None)
        # A part of one pipeline alone is named by the folder of that pipeline's code, such as ltx2.
        module = libraries.get(str(library)) or getattr(diffusers.pipelines, str(library), None)
        cls = getattr(module, str(kind), None)
        if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
            continue  # a tokenizer, a scheduler, a setting; what is wrong with it the pipeline says
        if not (folder / name).is_dir():  # the libraries would take the path for a hub id
            raise ConfigError(f"model {facts.name!r} has no folder {name}, so it is incomplete")
        networks[name], info = cls.from_pretrained(  # type: ignore[attr-defined]
            folder / name,
            dtype=torch.float32 if name in float32 else dtype,
            use_safetensors=True,
            output_loading_info=True,
            **({"quantization_config": quantized} if quantized is not None and name in TRANSFORMERS else {}),
        )
        tensors = networks[name].state_dict()
        # Of sharded files diffusers believes the index; what no file holds is then left without a value.
        absent = sorted({*info["missing_keys"], *(key for key, tensor in tensors.items() if tensor.is_meta)})
        if absent:
            more = ", ..." if len(absent) > _NAMED else ""
            raise ConfigError(
                f"model {facts.name!r}: its {name} files are missing {len(absent)} of {len(tensors)} tensors "
                f"({', '.join(absent[:_NAMED])}{more}); download or copy that folder again"
            )
    return networks
