"""What users have on a pipeline beside HSA: attention kernels, compiled blocks, tiles, and a request's LoRA weights."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError, RequestError, is_out_of_memory
from .facts import ModelFacts, first_line
from .lora import Lora, locate_lora, parse_lora
from .memory import ORDER

if TYPE_CHECKING:
    from .config import EngineConfig
    from .models import Adapter

# By the name of the setting: what diffusers calls it, and the package that it needs.
_KERNELS = {
    "native": ("native", None),
    "cudnn": ("_native_cudnn", None),
    "efficient": ("_native_efficient", None),
    "math": ("_native_math", None),
    "flash": ("flash", "flash_attn"),
    "flash3": ("_flash_3", "flash_attn_interface"),
    "sage": ("sage", "sageattention"),
    "xformers": ("xformers", "xformers"),
    "flex": ("flex", None),
    "flash_hub": ("flash_hub", "kernels"),
    "flash3_hub": ("_flash_3_hub", "kernels"),
    "sage_hub": ("sage_hub", "kernels"),
}
_ON_CPU = ("native", "math")
# Their functions take no mask, and LTX-2 masks the prompt.
_WITHOUT_MASK = ("flash", "sage")
_OURS = "heterostep_"
_COMPILERS = ("g++", "c++", "clang++")


def check_features(config: EngineConfig, facts: ModelFacts, device: torch.device) -> None:
    """Refuse what the model, the device or the installation cannot do, before the model is loaded.

    Raises:
        ConfigError: likewise.
    """
    name = config.attention
    if name is not None:
        if device.type == "cpu" and name not in _ON_CPU:
            raise ConfigError(
                f"attention={name!r} needs a GPU; on the CPU take {' or '.join(_ON_CPU)}, or leave it out"
            )
        package = _KERNELS[name][1]
        if package is not None and find_spec(package) is None:
            raise ConfigError(f"attention={name!r} needs the Python package {package}, which is not installed")
        if facts.audio_heads and name.startswith(_WITHOUT_MASK):
            raise ConfigError(
                f"attention={name!r} does not take the masks of {facts.family}; take native, cudnn or efficient"
            )
    if config.quantize != "none" and find_spec("torchao") is None:
        raise ConfigError(
            f"quantize={config.quantize!r} needs torchao, which is not installed; pip install 'heterostep[quantize]'"
        )
    if config.compile and not any(map(shutil.which, _COMPILERS)):
        raise ConfigError(
            f"compile needs a C++ compiler on this machine ({', '.join(_COMPILERS)}); install one, or leave it out"
        )


def quantization(config: EngineConfig) -> Any:
    """Diffusers' settings with which a transformer is loaded; None: as it is."""
    if config.quantize == "none":
        return None
    from diffusers import TorchAoConfig
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig() if config.quantize == "int8" else Float8WeightOnlyConfig())


def place(pipeline: Any, adapter: Adapter, device: torch.device, offload: str) -> None:
    """Put a pipeline on a device, or what of it is in use.

    Args:
        pipeline: with all its weights in host memory.
        adapter: of its model.
        device: where it computes.
        offload: as the setting, but for auto.
    """
    if offload == "none":
        pipeline.to(device)
    elif offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        _offload_groups(pipeline, adapter, device)


class Offload:
    """Where the weights of a loaded pipeline wait that are not in use.

    Attributes:
        mode: one of `memory.ORDER`.
    """

    def __init__(self, pipeline: Any, adapter: Adapter, device: torch.device, mode: str) -> None:
        """Begin as the pipeline was loaded."""
        self._pipeline, self._adapter, self._device, self.mode = pipeline, adapter, device, mode

    @property
    def cheaper(self) -> str | None:
        """The next mode, which takes less memory and more time; None after the last."""
        return ORDER[ORDER.index(self.mode) + 1] if self.mode != ORDER[-1] else None

    def need(self, mode: str) -> None:
        """Change to a mode if it takes less memory; groups stay groups."""
        if ORDER.index(mode) <= ORDER.index(self.mode):
            return
        if self.mode == "model":
            self._pipeline.remove_all_hooks()
        if mode == "group":
            self._pipeline.to("cpu")
        place(self._pipeline, self._adapter, self._device, mode)
        self.mode = mode


def _offload_groups(pipeline: Any, adapter: Adapter, device: torch.device) -> None:
    from diffusers.hooks import apply_group_offloading

    transformers = [transformer for _, transformer in adapter.transformers(pipeline)]
    streams = device.type == "cuda"
    for part in pipeline.components.values():
        if not isinstance(part, torch.nn.Module):
            continue
        # The next block comes while one computes. Other parts run once a video, and some without their own forward.
        blocks = any(part is transformer for transformer in transformers)
        how: dict[str, Any] = {"offload_type": "leaf_level"}
        if blocks:
            how = {"offload_type": "block_level", "num_blocks_per_group": 1, "use_stream": streams}
        apply_group_offloading(part, onload_device=device, offload_device=torch.device("cpu"), **how)


def put_on(config: EngineConfig, pipeline: Any, adapter: Adapter) -> None:
    """Give a loaded pipeline what the settings ask for.

    Raises:
        ConfigError: diffusers cannot use the attention kernel here.
    """
    transformers = [transformer for _, transformer in adapter.transformers(pipeline)]
    if config.attention is not None:
        for transformer in transformers:
            _choose_kernel(transformer, config.attention)
    if config.compile:
        for transformer in transformers:
            # One graph for all tokens and one for any smaller number of them.
            transformer.compile_repeated_blocks(dynamic=True)
    if config.vae_tiling:
        pipeline.vae.enable_tiling()


def _choose_kernel(transformer: Any, name: str) -> None:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    # diffusers also makes it the default of all models in this process, which are not ours to change.
    before, _ = _AttentionBackendRegistry.get_active_backend()
    try:
        transformer.set_attention_backend(_KERNELS[name][0])
    except (RuntimeError, ValueError, ImportError, OSError) as error:
        raise ConfigError(f"attention={name!r} cannot be used here ({error})") from error
    finally:
        _AttentionBackendRegistry.set_active_backend(before)


class Loras:
    """The LoRA weights that requests ask for, on a pipeline's transformers: those of one request at a time.

    What users loaded into the pipeline themselves stays untouched.
    """

    def __init__(self, adapter: Adapter, pipeline: Any, device: torch.device) -> None:
        """Begin with none; the pipeline computes on `device`."""
        self._adapter, self._pipeline, self._device = adapter, pipeline, device
        self._on: list[tuple[Lora, Path, int, int]] = []

    def put_on(self, texts: Sequence[str]) -> None:
        """Load what a request asks for, in place of what the request before had.

        Raises:
            RequestError: a file cannot be found, does not fit the model, or other LoRA weights are loaded already.
        """
        wanted = [(lora, path, *_stamp(path)) for lora in map(parse_lora, texts) for path in [locate_lora(lora)]]
        if wanted == self._on:
            return
        with self._in_place():
            self._change(wanted)

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        """Stop offloading whole parts for a while: diffusers would go on with another device."""
        offloads = bool(getattr(self._pipeline, "_all_hooks", None))
        if offloads:
            self._pipeline.remove_all_hooks()
        try:
            yield
        finally:
            if offloads:
                self._pipeline.enable_model_cpu_offload(device=self._device)

    def _change(self, wanted: list[tuple[Lora, Path, int, int]]) -> None:
        self._take_off()
        if not wanted:
            return
        if any(names for names in self._pipeline.get_list_adapters().values()):
            raise RequestError(
                "LoRA weights were loaded into the pipeline by hand: unload them, or leave lora out of the request"
            )
        self._on = wanted
        try:
            self._load([(lora, path) for lora, path, *_ in wanted])
        except Exception as error:
            self._take_off()
            if isinstance(error, RequestError) or is_out_of_memory(error):
                raise
            # diffusers and PEFT raise whatever a foreign file leads them to.
            raise RequestError(f"the LoRA weights cannot be loaded into this model ({first_line(error)})") from error

    def _load(self, loras: Sequence[tuple[Lora, Path]]) -> None:
        for number, (lora, path) in enumerate(loras):
            name = f"{_OURS}{number}"
            for expert, transformer in self._adapter.transformers(self._pipeline):
                if lora.expert not in (None, expert):
                    continue
                second = {"load_into_transformer_2": True} if expert else {}
                folder, file = str(path.parent), path.name
                self._pipeline.load_lora_weights(folder, weight_name=file, adapter_name=name, **second)
                if name not in getattr(transformer, "peft_config", {}):
                    raise RequestError(f"LoRA {path.name!r} has no weights for this model's layers")
        for expert, transformer in self._adapter.transformers(self._pipeline):
            mine = {f"{_OURS}{n}": lora.scale for n, (lora, _) in enumerate(loras) if lora.expert in (None, expert)}
            if mine:
                transformer.set_adapters(list(mine), list(mine.values()))

    def _take_off(self) -> None:
        if self._on:
            self._on = []
            self._pipeline.unload_lora_weights()


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size
