"""What a job is: everything that decides its result, so that no other work is ever taken for it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...hsa.config import HSAConfig
from ...version import __version__
from ..facts import ModelFacts
from ..request import ResolvedRequest

_MODEL_FILES = (".json", ".safetensors", ".model", ".txt")
# Of a large file this many blocks, evenly spread, stand for the whole: fine-tunes of a model differ everywhere.
_BLOCKS, _BLOCK = 16, 1 << 16
_VALUES = 8
_WORDS = {
    "request.image": "the image it starts from",
    "model.files": "the model's files",
    "pipeline.scheduler": "the pipeline's scheduler",
    "pipeline.weights": "the weights in memory (LoRA?)",
    "pipeline.adapters": "its adapters (which LoRAs, at what strength, on or off)",
    "pipeline.config": "the settings of the pipeline's parts",
}
_TRANSFORMERS = ("transformer", "transformer_2")
_NO_ADAPTERS = "none"
# Without an image, these parts see nothing but final latents.
_DECODERS = {f"pipeline.parts.{name}" for name in ("vae", "audio_vae", "vocoder")}
_CUTS = ("use_tiling", "use_slicing", "use_framewise_decoding")
# Of these an older version may not have written all; what is not known is not different.
_MAY_BE_UNKNOWN = ("model", "pipeline", "versions")


def identity_of(
    facts: ModelFacts, request: ResolvedRequest, hsa: HSAConfig | None, dtype: torch.dtype, pipeline: Any = None
) -> dict[str, Any]:
    """Describe a job; cheap, no file is read whole and no process asked.

    Args:
        facts: of the model. Where it lies does not count, what its files hold does.
        request: every value counts.
        hsa: the allocation; None is the dense run.
        dtype: of the transformer. The device does not count.
        pipeline: if it is loaded already; else it will have no adapters, and no more is known of it.

    Returns:
        Plain data for JSON, to be compared by `differences`.
    """
    asked = dataclasses.asdict(request)
    del asked["compute"]  # the allocation has it
    return {
        "heterostep": __version__,
        "diffusers": version("diffusers"),
        "request": asked,
        "hsa": dataclasses.asdict(hsa if hsa is not None else HSAConfig(compute=1.0)),
        "dtype": str(dtype).removeprefix("torch."),
        "model": {"pipeline": facts.pipeline, "family": facts.family, "files": _files(facts.location)},
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "pipeline": {"adapters": _NO_ADAPTERS} if pipeline is None else _pipeline(pipeline),
    }


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], *, finished: bool = True) -> list[str]:
    """Say what differs between two identities, one phrase each; nothing differs where one of them says None.

    Args:
        saved: of the job in the folder.
        now: of the job that is asked for.
        finished: whether the job has its video. Until then it does not depend on what only decodes: a VAE that was
            mended decodes what was denoised.
    """
    found = []
    before, after = _flat(saved), _flat(now)
    decoded_later = set() if finished or after.get("request.image") is not None else _DECODERS
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if old == new or key in decoded_later or (key.split(".")[0] in _MAY_BE_UNKNOWN and None in (old, new)):
            continue
        if key in _WORDS:
            found.append(_WORDS[key])
        elif key.startswith("pipeline.parts."):
            found.append(f"the weights of the {key.rpartition('.')[2]}")
        else:
            found.append(f"{key.rpartition('.')[2]} ({_short(old)}, now {_short(new)})")
    return found


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return flat


def _short(value: Any) -> str:
    text = "unset" if value is None else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _files(location: str) -> str:
    """Identity of a model's files: a hub id's commit, a folder's hash of names, sizes and samples of the contents."""
    folder = Path(location)
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download

        return f"{location}@{Path(hf_hub_download(location, 'model_index.json')).parent.name}"
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    parts = sorted(path for name in index if (folder / name).is_dir() for path in (folder / name).rglob("*"))
    digest = hashlib.sha256((folder / "model_index.json").read_bytes())
    for path in parts:
        if path.suffix in _MODEL_FILES and path.is_file():
            digest.update(f"\n{path.relative_to(folder)} {path.stat().st_size}\n".encode())
            _sample(path, digest)
    return digest.hexdigest()


def _sample(path: Path, digest: Any) -> None:
    """Hash a file's content, of a large one the first, the last and some blocks between."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size <= _BLOCKS * _BLOCK:
            digest.update(file.read())
            return
        for i in range(_BLOCKS):
            file.seek(i * (size - _BLOCK) // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK))


def _pipeline(pipeline: Any) -> dict[str, Any]:
    """What a loaded pipeline's results depend on: a phrase of `differences` for each item."""
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {
        "scheduler": f"{type(pipeline.scheduler).__name__} {_hash(_config(pipeline.scheduler))[:16]}",
        "config": _hash({name: _config(part) for name, part in {"pipeline": pipeline, **parts}.items()}),
        "adapters": _adapters(parts),
        "weights": _weights([parts[name] for name in _TRANSFORMERS if name in parts]),
        "parts": {name: _weights([part]) for name, part in parts.items() if name not in _TRANSFORMERS},
    }


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()


def _config(part: Any) -> dict[str, Any]:
    """Settings of what diffusers made, and whether a VAE cuts its videos; of other libraries' parts the files tell."""
    config = part.config.items() if hasattr(part, "register_to_config") else ()
    # Of a pipeline's config without where its parts come from.
    named = getattr(part, "components", {})
    settings = {key: value for key, value in config if not key.startswith("_") and key not in named}
    return settings | {cut: getattr(part, cut) for cut in _CUTS if hasattr(part, cut)}


def _adapters(parts: Mapping[str, torch.nn.Module]) -> str:
    """Hash of which adapters are on which layers, active or not, merged or not, and of their strengths."""
    found = [
        [name, layer, list(module.active_adapters), module.disable_adapters, list(module.merged_adapters), scaling]
        for name, part in parts.items()
        for layer, module in part.named_modules()
        # A layer of PEFT's; models have methods of this name.
        if isinstance(getattr(module, "disable_adapters", None), bool)
        for scaling in [dict(getattr(module, "scaling", {}))]
    ]
    if not found:
        return _NO_ADAPTERS
    return _hash(found)


def _weights(parts: Iterable[torch.nn.Module]) -> str | None:
    """Hash of a few values of every weight: a LoRA, fused or not, or a replaced part changes it.

    None where they are not here whole: sharded over ranks, or offloaded.
    """
    digest, values = hashlib.sha256(), []
    for part in parts:
        for name, weight in part.named_parameters():
            if type(weight.data) is not Tensor or weight.is_meta:
                return None
            flat = weight.detach().reshape(-1)
            values.append(flat[:: max(1, len(flat) // _VALUES)][:_VALUES].to("cpu", torch.float32))
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
    if values:
        digest.update(torch.cat(values).numpy().tobytes())
    return digest.hexdigest()
