"""LoRA weights: how a request names them, and where their files are."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import RequestError
from .facts import ModelFacts, first_line

EXPERTS = ("high", "low")
"""Words for the experts of a model with two: that of high noise comes first."""
_SUFFIX = ".safetensors"
# What diffusers calls the file where it saves LoRA weights itself.
_HUB_FILE = "pytorch_lora_weights.safetensors"
_FORM = (
    "it has the form FILE_OR_ID[:SCALE[:EXPERT]], such as a.safetensors:0.8 or, with two experts, a.safetensors:1:high"
)


class Lora(NamedTuple):
    """One set of LoRA weights as a request asks for it.

    Attributes:
        source: a safetensors file, or ``owner/name`` or ``owner/name/file`` on the Hugging Face Hub; over HTTP the
            name that the service has for it.
        scale: strength.
        expert: 0 for that of high noise, 1 for that of low noise; None: every transformer of the model.
    """

    source: str
    scale: float = 1.0
    expert: int | None = None


def parse_lora(text: str) -> Lora:
    """Read ``FILE_OR_ID[:SCALE[:EXPERT]]``.

    Raises:
        RequestError: it has another form.
    """
    source, expert, scale = text, None, None
    head, colon, tail = source.rpartition(":")
    if colon and tail in EXPERTS:
        source, expert = head, EXPERTS.index(tail)
    head, colon, tail = source.rpartition(":")
    if colon:
        scale = _number(tail)
        source = head
    if not source.strip() or (colon and scale is None):
        raise RequestError(f"lora {text[:80]!r} cannot be read: {_FORM}")
    return Lora(source, 1.0 if scale is None else scale, expert)


def check_loras(texts: Iterable[str], facts: ModelFacts) -> None:
    """Refuse an expert for a model without two.

    Raises:
        RequestError: likewise.
    """
    for text in texts:
        lora = parse_lora(text)
        if lora.expert is not None and facts.experts == 1:
            raise RequestError(
                f"lora {text[:80]!r} names an expert, but model {facts.name!r} has one transformer; leave out "
                f":{EXPERTS[lora.expert]}"
            )


def locate_lora(lora: Lora) -> Path:
    """The local file of LoRA weights; a file of the hub is downloaded unless it is in the cache.

    Raises:
        RequestError: there is none, or it holds no LoRA weights.
    """
    path = Path(lora.source).expanduser()
    parts = lora.source.split("/")
    if not path.exists() and len(parts) >= 2 and all(parts) and parts[0] not in (".", "..", "~"):
        path = _fetch(lora.source, f"{parts[0]}/{parts[1]}", "/".join(parts[2:]) or _HUB_FILE)
    if not path.is_file():
        raise RequestError(
            f"there is no LoRA file {lora.source[:200]!r}; name a {_SUFFIX} file, or a hub id (owner/name/file)"
        )
    if path.suffix != _SUFFIX:
        raise RequestError(f"LoRA weights must be a {_SUFFIX} file (others can run code), not {path.name!r}")
    _check_content(path)
    return path


def lora_identity(texts: Iterable[str]) -> list[list[Any]] | None:
    """What decides the effect of LoRA weights: the content of each file, scale, expert; None where there are none."""
    found = [[_digest(locate_lora(lora)), lora.scale, lora.expert] for lora in map(parse_lora, texts)]
    return found or None


def lora_label(text: str) -> str:
    """The same without the folders of its file, for records that others may see."""
    lora = parse_lora(text)
    name = Path(lora.source).name.removesuffix(_SUFFIX)
    return f"{name}:{lora.scale:g}" + ("" if lora.expert is None else f":{EXPERTS[lora.expert]}")


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _fetch(source: str, repository: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name))
    except Exception as error:  # the hub client raises some twenty types of several libraries
        raise RequestError(
            f"LoRA {source[:200]!r} is not a local file, and {name} of {repository} could not be downloaded from the "
            f"Hugging Face Hub ({type(error).__name__}); check the name and the network, or name a local file"
        ) from error


def _check_content(path: Path) -> None:
    """Refuse a file that holds something else; its header alone is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = file.keys()
            known = any("lora" in name for name in names)
    except (OSError, SafetensorError) as error:
        raise RequestError(f"LoRA file {path.name!r} cannot be read ({first_line(error)})") from error
    if not known:
        raise RequestError(f"file {path.name!r} holds no LoRA weights: none of its tensors has lora in its name")


def _digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
