"""Saved states: a safetensors file and a JSON manifest that proves it, whole or not at all.

A saved state called NAME is two files: NAME-HASH.safetensors with all tensors, and NAME.json, the manifest. It is
written last and holds everything else: format, kind, step, noise level, the identity of the job, size and SHA-256 of
the tensors' file, and the SHA-256 of itself. A file with a byte missing or wrong is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ...errors import Damaged
from ..facts import first_line
from ..media.files import checkpoint_name, write_durably

FORMAT = "heterostep saved state"
VERSION = 1
"""Rises with every change of what a state holds: another version's files are not read."""

# A tensor in a tree of plain data, and a number that JSON has no word for.
_TENSOR, _NUMBER = "$tensor", "$number"
_OURS = re.compile(r"\.?(checkpoint-\d+|result)(-[0-9a-f]+)?(\.[0-9a-f]+)?\.(json|safetensors)")
# A manifest has some hundred bytes a step; reading more than this is reading something else.
_MAX_MANIFEST = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a manifest and its tensors hold.

    Attributes:
        kind: `"checkpoint"` or `"result"`.
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
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "kind": saved.kind,
        "step": saved.step,
        "sigma": saved.sigma,
        "job": saved.job,
        "file": {"name": file, "bytes": len(data), "sha256": digest},
        "content": tree,
    }
    write_durably(folder / file, data)
    write_durably(folder / f"{name}.json", _sealed(manifest))


def read_saved(folder: Path, name: str, kind: str) -> Saved:
    """Read a state that `write_saved` wrote under that name.

    Raises:
        Damaged: it is not whole, was altered, or is of another kind or version.
    """
    manifest = _read_manifest(folder / f"{name}.json")
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


def _read_manifest(path: Path) -> dict[str, Any]:
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
