"""The requests of a measurement, and when they arrive."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ..quality.settings import PROMPTS
from .settings import SHAPE, LoadSettings

Body = Mapping[str, Any]


def bodies(settings: LoadSettings) -> list[dict[str, Any]]:
    """The bodies of all requests, the same for the same seed.

    Raises:
        ConfigError: the file of prompts cannot be read or is empty.
    """
    chance = random.Random(settings.random_request_seed)
    lines = itertools.cycle(_lines(settings, chance))
    mix = settings.mix
    weights = [kind.get("weight", 1.0) for kind in mix]
    common: dict[str, Any] = {name: getattr(settings, name) for name in SHAPE}
    made = []
    for line in itertools.islice(lines, settings.num_prompts):
        kind = chance.choices(mix, weights)[0] if mix else {}
        body = common | {name: value for name, value in kind.items() if name != "weight"} | dict(line)
        made.append(_sent(settings, body))
    return made


def warmups(settings: LoadSettings, first: Body) -> list[dict[str, Any]]:
    """The bodies of the requests before the measurement: like its first one, with few steps."""
    steps = settings.warmup_inference_steps
    body = dict(first) | ({} if steps is None else {"num_inference_steps": steps})
    return [body] * settings.warmup_requests


def arrivals(settings: LoadSettings) -> list[float]:
    """Seconds from the start at which each request arrives: gaps of a gamma distribution with the rate's mean."""
    if math.isinf(settings.rate):
        return [0.0] * settings.num_prompts
    chance = random.Random(settings.random_request_seed)
    shape = settings.burstiness
    gaps = (chance.gammavariate(shape, 1 / (settings.rate * shape)) for _ in range(settings.num_prompts - 1))
    return [0.0, *itertools.accumulate(gaps)]


def units(body: Body) -> float | None:
    """What a request costs, in pixels times steps; None where it leaves out its size."""
    width, _, height = str(body.get("size", "")).partition("x")
    numbers = [width, height, *(body.get(name) for name in ("num_frames", "num_inference_steps"))]
    try:
        return math.prod(float(number) for number in numbers if number is not None)
    except ValueError:
        return None


def _sent(settings: LoadSettings, body: Mapping[str, Any]) -> dict[str, Any]:
    """A body as services take it: without what is not said, and with the size in one field."""
    fields = {name: value for name, value in body.items() if value is not None}
    width, height = fields.pop("width", None), fields.pop("height", None)
    if width is not None and height is not None:
        fields.setdefault("size", f"{width}x{height}")
    if settings.model is not None:
        fields["model"] = settings.model
    if settings.num_outputs_per_prompt > 1:
        fields["num_outputs_per_prompt"] = settings.num_outputs_per_prompt
    return fields | dict(settings.extra)


def _lines(settings: LoadSettings, chance: random.Random) -> list[Mapping[str, Any]]:
    if settings.dataset_path is None:
        return [{"prompt": prompt} for prompt in chance.sample(PROMPTS, len(PROMPTS))]
    try:
        text = Path(settings.dataset_path).read_text(encoding="utf-8")
        lines = _vbench(text) if settings.dataset == "vbench" else _manifest(text)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"dataset_path {settings.dataset_path!r} cannot be read: {error}") from error
    if not lines:
        raise ConfigError(f"dataset_path {settings.dataset_path!r} has no prompt")
    return lines


def _vbench(text: str) -> list[Mapping[str, Any]]:
    return [{"prompt": str(entry["prompt_en"])} for entry in json.loads(text)]


def _manifest(text: str) -> list[Mapping[str, Any]]:
    lines = [line.strip() for line in text.splitlines()]
    found = [json.loads(line) if line.startswith("{") else {"prompt": line} for line in lines if line]
    for fields in found:
        if not isinstance(fields.get("prompt"), str):
            raise ValueError(f"{fields!s:.60} has no prompt")
    return found
