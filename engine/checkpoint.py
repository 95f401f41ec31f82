"""Saved states: a safetensors file and a JSON manifest that proves it, whole or not at all; and whose they are.

A saved state called NAME is two files: NAME-HASH.safetensors with all tensors, and NAME.json, the manifest. It is
written last and holds everything else: format, kind, step, noise level, the identity of the job, size and SHA-256 of
the tensors' file, and the SHA-256 of itself. A file with a byte missing or wrong is refused.

The identity of a job is everything that decides its result, so that no other work is ever taken for it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..errors import Damaged
from ..hsa.config import HSAConfig
from ..version import __version__
from .config import EngineConfig
from .facts import ModelFacts, first_line
from .lora import lora_identity
from .media.files import checkpoint_name, write_durably
from .noise import noise_identity
from .request import ResolvedRequest
from .sources import Sources

FORMAT = "heterostep saved state"
VERSION = 4
"""Rises with every change of what a state holds: another version's files are not read."""

# A tensor in a tree of plain data, and a number that JSON has no word for.
_TENSOR, _NUMBER = "$tensor", "$number"
_OURS = re.compile(r"\.?(checkpoint-\d+|latents|frames|result)(-[0-9a-f]+)?(\.[0-9a-f]+)?\.(json|safetensors)")
# A manifest has some hundred bytes a step; reading more than this is reading something else.
_MAX_MANIFEST = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a manifest and its tensors hold.

    Attributes:
        kind: `"checkpoint"`, `"latents"`, `"frames"` or `"result"`.
        step: number of steps done.
        sigma: noise level after them.
        job: identity of the job (`identity`).
        content: dicts with string keys, lists, numbers, strings, None and tensors.
    """

    kind: str
    step: int
    sigma: float
    job: Mapping[str, Any]
    content: Mapping[str, Any]


def write_saved(folder: Path, name: str, saved: Saved) -> None:
    """Write a state; a reader finds it whole, or what was there before.

    Raises:
        OSError: such as a full disk; everything that was there is still there.
    """
    tensors: dict[str, Tensor] = {}
    tree = _split(saved.content, "", tensors)
    data = save(tensors)
    digest = hashlib.sha256(data).hexdigest()
    file = f"{name}-{digest[:8]}.safetensors"
    write_durably(folder / file, data)
    write_manifest(folder, name, saved, tree, {"name": file, "bytes": len(data), "sha256": digest})


def write_manifest(folder: Path, name: str, saved: Saved, tree: Any, file: Mapping[str, Any]) -> None:
    """Write the manifest of a state whose tensors are written: `file` is their file's name, bytes and SHA-256."""
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "kind": saved.kind,
        "step": saved.step,
        "sigma": saved.sigma,
        "job": saved.job,
        "file": file,
        "content": tree,
    }
    write_durably(folder / f"{name}.json", _sealed(manifest))


def read_saved(folder: Path, name: str, kind: str) -> Saved:
    """Read a state that `write_saved` wrote under that name.

    Raises:
        Damaged: it is not whole, was altered, or is of another kind or version.
    """
    manifest = read_manifest(folder / f"{name}.json")
    file = manifest["file"]
    path = folder / file["name"]
    data = _read(path, file["bytes"])
    if hashlib.sha256(data).hexdigest() != file["sha256"]:
        raise Damaged(f"{path.name} was altered")
    if manifest["kind"] != kind or (kind == "checkpoint" and checkpoint_name(manifest["step"]) != name):
        raise Damaged(f"it is the {manifest['kind']} of step {manifest['step']}, under another name")
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise Damaged(f"{path.name} is not a safetensors file ({first_line(error)})") from error
    return Saved(
        kind=kind,
        step=manifest["step"],
        sigma=manifest["sigma"],
        job=manifest["job"],
        content=_join(manifest["content"], tensors),
    )


def remove_others(folder: Path, kept: Collection[str]) -> None:
    """Remove all saved states but those of the given names, and what broken-off writes left; no other file.

    Raises:
        OSError: a file cannot be removed.
    """
    starts = tuple(f"{name}{end}" for name in kept for end in (".json", "-"))
    names = [path.name for path in folder.iterdir() if _OURS.fullmatch(path.name)]
    # Manifests first: without its manifest a state does not exist.
    for name in sorted(names, key=lambda name: not name.endswith(".json")):
        if not name.startswith(starts):
            (folder / name).unlink(missing_ok=True)


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as bytes, with its own hash."""
    return _encoded({**manifest, "sha256": hashlib.sha256(_encoded(manifest)).hexdigest()})


def _encoded(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1, allow_nan=False) + "\n").encode()


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest, whose tensors' file is not looked at.

    Raises:
        Damaged: it is not whole, was altered, or is of another version.
    """
    data = _read(path)
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path.name} is not valid JSON") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or "version" not in manifest:
        raise Damaged(f"{path.name} is not a manifest of heterostep")
    try:
        # The very bytes that were written: nothing is hashed that could be said in two ways.
        intact = _sealed({key: value for key, value in manifest.items() if key != "sha256"}) == data
    except (ValueError, RecursionError):
        intact = False
    if not intact:
        raise Damaged(f"{path.name} was altered")
    if manifest["version"] != VERSION:
        raise Damaged(f"{path.name} is of version {manifest['version']}, and this program reads version {VERSION}")
    return manifest


def _read(path: Path, size: int | None = None) -> bytes:
    """Bytes of a file that must have the given size."""
    try:
        found = path.stat().st_size
        if size is not None and found != size:
            raise Damaged(f"{path.name} has {found} bytes, not {size}")
        if size is None and found > _MAX_MANIFEST:
            raise Damaged(f"{path.name} is too large for a manifest")
        return path.read_bytes()
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read ({error.strerror})") from error


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Replace every tensor of a tree by its name, and collect copies of them on the host."""
    if isinstance(value, Tensor):
        # Copies: safetensors refuses tensors that share memory, as a scheduler's timesteps may.
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: path}
    if isinstance(value, Mapping):
        return {key: _split(item, f"{path}/{key}" if path else key, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_split(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {_NUMBER: str(value)}
    return value


def _join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `_split`, but for tuples, which come back as lists."""
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        if _NUMBER in value:
            return float(value[_NUMBER])
        return {key: _join(item, tensors) for key, item in value.items()}
    return [_join(item, tensors) for item in value] if isinstance(value, list) else value


_MODEL_FILES = (".json", ".safetensors", ".model", ".txt")
# Of a large file this many blocks, evenly spread, stand for the whole: fine-tunes of a model differ everywhere.
_BLOCKS, _BLOCK = 16, 1 << 16
_VALUES = 8
_WORDS = {
    "request.image": "the image it starts from",
    "request.last_image": "the image it ends with",
    "request.video": "the video it is made from",
    "request.lora": "its LoRA weights, or their strength",
    "request.noise": "its file of initial noise",
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
# Settings of the engine that change values, if only by rounding. None of them is on where it is left out.
_VALUED = ("attention", "compile", "quantize", "vae_tiling")
# Of these an older version may not have written all; what is not known is not different.
_MAY_BE_UNKNOWN = ("model", "pipeline", "versions")


def identity_of(
    facts: ModelFacts,
    request: ResolvedRequest,
    hsa: HSAConfig | None,
    dtype: torch.dtype,
    pipeline: Any = None,
    config: EngineConfig | None = None,
) -> dict[str, Any]:
    """Describe a job; cheap, no file is read whole and no process asked.

    Args:
        facts: of the model. Where it lies does not count, what its files hold does.
        request: every value counts.
        hsa: the allocation; None is the dense run.
        dtype: of the transformer. The device does not count.
        pipeline: if it is loaded already, with the request's LoRA weights; else no other adapters will be on it, and no
            more is known of it.
        config: of the engine; of it counts what changes values. Where the model is kept does not.

    Raises:
        RequestError: a file of LoRA weights is gone.

    Returns:
        Plain data for JSON, to be compared by `differences`.
    """
    asked = dataclasses.asdict(request)
    del asked["compute"]  # the allocation has it
    asked["lora"] = lora_identity(request.lora)
    allocated = dataclasses.asdict(hsa if hsa is not None else HSAConfig(compute=1.0))
    del allocated["kv_host"]  # the values are the same
    asked["noise"] = noise_identity(request.noise)
    absent = {"adapters": _NO_ADAPTERS if asked["lora"] is None else None}
    return {
        "heterostep": __version__,
        "diffusers": version("diffusers"),
        "request": asked,
        "hsa": allocated,
        "dtype": str(dtype).removeprefix("torch."),
        "model": {"pipeline": facts.pipeline, "family": facts.family, "files": _files(facts.location)},
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "pipeline": absent if pipeline is None else _pipeline(pipeline),
        # Left out is what an earlier version did not have.
        "engine": {name: _asked(getattr(config, name)) for name in _VALUED} if config is not None else {},
    }


def _asked(value: Any) -> Any:
    return None if value in (False, "none") else value


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
    decoded_later = set() if finished or any(after.get(f"request.{name}") for name in Sources._fields) else _DECODERS
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
