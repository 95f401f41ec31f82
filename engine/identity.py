"""What a job is: everything that decides its result, so that no other work is ever taken for it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..hsa.config import HSAConfig
from .facts import ModelFacts
from .request import ResolvedRequest

_MODEL_FILES = (".json", ".safetensors", ".model", ".txt")
# Of a large file this many blocks, evenly spread, stand for the whole: fine-tunes of a model differ everywhere.
_BLOCKS, _BLOCK = 16, 1 << 16
_VALUES = 8
_WORDS = {
    "request.image": "the image it starts from",
    "model.files": "the model's files",
    "pipeline.scheduler": "the pipeline's scheduler",
    "pipeline.weights": "the weights in memory (LoRA?)",
}


def identity_of(
    facts: ModelFacts, request: ResolvedRequest, hsa: HSAConfig | None, dtype: torch.dtype, pipeline: Any = None
) -> dict[str, Any]:
    """Describe a job; cheap, no file is read whole and no process asked.

    Args:
        facts: of the model. Where it lies does not count, what its files hold does.
        request: every value counts.
        hsa: the allocation; None is the dense run.
        dtype: of the transformer. The device does not count.
        pipeline: if it is loaded already; else `"pipeline"` is None, unknown.

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
        "pipeline": None if pipeline is None else {"scheduler": _scheduler(pipeline), "weights": _weights(pipeline)},
    }


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say what differs between two identities, one phrase each; nothing differs where one of them says None."""
    found = []
    before, after = _flat(saved), _flat(now)
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if old == new or (key.split(".")[0] in ("model", "pipeline") and None in (old, new)):
            continue
        if key in _WORDS:
            found.append(_WORDS[key])
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


def _scheduler(pipeline: Any) -> str:
    settings = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    text = json.dumps(settings, sort_keys=True, default=repr)
    return f"{type(pipeline.scheduler).__name__} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _weights(pipeline: Any) -> str | None:
    """Hash of a few values of every weight of the transformers: a LoRA, fused or not, or a replaced part changes it.

    None where they are not here whole: sharded over ranks, or offloaded.
    """
    digest, values = hashlib.sha256(), []
    for part in (pipeline.transformer, getattr(pipeline, "transformer_2", None)):
        for name, weight in part.named_parameters() if part is not None else ():
            if type(weight.data) is not Tensor or weight.is_meta:
                return None
            flat = weight.detach().reshape(-1)
            values.append(flat[:: max(1, len(flat) // _VALUES)][:_VALUES].to("cpu", torch.float32))
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
    digest.update(torch.cat(values).numpy().tobytes())
    return digest.hexdigest()
