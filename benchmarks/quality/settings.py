"""What `bench quality` is told: its flags, the prompts, and presets with the settings of published tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...engine.facts import ModelFacts
from ...errors import ConfigError, RequestError
from ...hsa.config import POLICIES
from ...settings import check, setting

METHODS = (
    "euler", "unipc", "unipc-placed", "first-block", "magcache", "taylorseer", "pab", "teacache", "easycache",
    "spectrum", "dpcache", "cache-dit",
)  # fmt: skip
"""Keys of `baselines.KINDS`, which would import PyTorch for `--help`."""
PROMPTS = (
    "A cat walks across a wooden floor towards the camera, soft morning light from a window",
    "Waves break on a rocky beach at sunset, foam runs back over wet stones",
    "A street in the rain at night, people with umbrellas walk past lit shop windows",
    "A red vintage car drives along a winding mountain road, seen from above",
    "A chef slices vegetables on a wooden board in a busy kitchen, close-up of the hands",
    "Two children fly a kite on a green hill, clouds drift over a blue sky",
    "A steam train crosses a stone bridge in the mountains, smoke trails behind it",
    "A woman in a yellow coat turns her head and smiles, shallow depth of field",
    "Leaves fall from a maple tree beside a still lake, the mountains are reflected in the water",
    "A robot arm sorts coloured blocks on a white table, static camera",
    "A flock of birds turns in the evening sky over a city skyline",
    "A candle burns on a dark table, smoke rises, the camera slowly moves closer",
)
"""For models that were trained on videos of the world."""
DEMO_PROMPTS = tuple(
    f"a {colour} {shape} {motion}"
    for colour, shape, motion in (
        ("red", "disc", "moves right"),
        ("blue", "square", "moves left"),
        ("green", "triangle", "moves up"),
        ("yellow", "disc", "moves down"),
        ("red", "square", "moves right"),
        ("blue", "triangle", "moves left"),
        ("green", "disc", "moves up"),
        ("yellow", "square", "stays still"),
        ("red", "triangle", "moves down"),
        ("blue", "disc", "moves left"),
        ("green", "square", "moves up"),
        ("yellow", "triangle", "stays still"),
    )
)
"""For the demo model, which knows little else."""


class Published(NamedTuple):
    """A row of a published table: closeness to the dense video of the same seed."""

    method: str
    speedup: float
    psnr: float
    ssim: float | None
    lpips: float | None
    source: str


class Preset(NamedTuple):
    """The settings of a published table, and its figures.

    Attributes:
        model: that it is about.
        request: fields of a request.
        scheduler, shift: of the pipeline.
        published: rows; papers that do not agree stand beside each other.
    """

    model: str
    request: Mapping[str, Any]
    scheduler: str
    shift: float
    published: Sequence[Published]


_480P = {"width": 832, "height": 480, "num_frames": 81, "num_inference_steps": 50, "guidance_scale": 6.0, "seed": 0}
PRESETS: Mapping[str, Preset] = {
    "magcache": Preset(
        "Wan2.1-T2V-1.3B",
        _480P,
        "unipc",
        8.0,
        (
            Published("fewer steps, 20 of 50", 2.5, 14.50, 0.523, 0.437, "ScalingCache, README"),
            Published("TaylorSeer", 1.9, 13.52, 0.510, 0.447, "ScalingCache, README"),
            Published("PAB", 1.72, 18.84, 0.648, 0.301, "EasyCache, README"),
            Published("TeaCache .08", 2.00, 22.57, 0.806, 0.128, "EasyCache, README"),
            Published("TeaCache slow", 1.59, 23.35, 0.803, 0.126, "MagCache, table 1"),
            Published("TeaCache fast", 2.14, 18.14, 0.657, 0.241, "MagCache, table 1"),
            Published("MagCache slow (K 2, .12)", 2.14, 23.42, 0.813, 0.121, "MagCache, table 1"),
            Published("MagCache fast (K 4, .12)", 2.68, 21.54, 0.749, 0.175, "MagCache, table 1"),
            Published("ERTACache .08", 2.17, 23.77, 0.820, 0.110, "ERTACache"),
            Published("EasyCache", 2.54, 25.24, 0.834, 0.095, "EasyCache, README"),
        ),
    ),
    "magcache-14b": Preset(
        "Wan2.1-T2V-14B",
        _480P,
        "unipc",
        8.0,
        (
            Published("half of the steps", 2.0, 15.82, 0.696, 0.336, "ScalingCache, README"),
            Published("TeaCache .14", 1.5, 18.60, 0.688, 0.244, "ScalingCache, README"),
            Published("MixCache", 1.8, 23.45, 0.814, 0.124, "ScalingCache, README"),
            Published("ScalingCache", 2.5, 25.63, 0.861, 0.083, "ScalingCache, README"),
            Published("TaylorSeer N 4", 3.01, 19.46, 0.660, None, "Spectrum"),
            Published("Spectrum .75 (14 evaluations)", 3.40, 22.78, 0.749, None, "Spectrum"),
            Published("Spectrum 3.0 (10 evaluations)", 4.67, 21.24, 0.694, None, "Spectrum"),
        ),
    ),
}


@dataclass(frozen=True, kw_only=True)
class QualitySettings:
    """What `bench quality` measures, and where it keeps it.

    Raises:
        ConfigError: a value is not one of these.
    """

    output: str = setting(
        "bench-quality",
        metavar="DIR",
        help="folder of videos, results and reports, created if needed; the same command continues there",
    )
    prompts: str | None = setting(
        None,
        metavar="FILE",
        help="text file with a prompt in each line; a line in braces is JSON with prompt, and perhaps negative_prompt, "
        "image and seed; left out, twelve prompts of ours",
    )
    count: int | None = setting(None, least=1, metavar="N", help="number of prompts to use, the first ones")
    policies: str = setting("joint", metavar="P,P", help=f"policies to measure, of {', '.join(POLICIES)}")
    computes: str = setting("0.5,0.33,0.25", metavar="C,C", help="shares of the dense work to measure them at")
    baselines: str = setting(
        "",
        metavar="B,B",
        help=f"other methods at the same shares, tuned on one more prompt, on one rank: {', '.join(METHODS)}",
    )
    preset: str | None = setting(
        None,
        choices=tuple(PRESETS),
        metavar="P",
        help="settings of a published table, whose figures the report shows beside; a flag that is given goes before",
    )
    scheduler: str | None = setting(
        None,
        choices=("euler", "unipc"),
        metavar="S",
        help="scheduler of the pipeline, dense and not; left out, the model's own",
    )
    shift: float | None = setting(
        None, above=0, metavar="S", help="shift of its noise levels; left out, the model's own"
    )
    lpips: str | None = setting(
        None, metavar="FILE", help="TorchScript file of LPIPS, which is then measured too; nothing is downloaded"
    )
    compare: str | None = setting(
        None, metavar="OLD.json", help="report.json of an older folder: what changed beyond the noise is said"
    )
    estimate: bool = setting(False, help="say how long it would take, and stop")

    def __post_init__(self) -> None:
        check(self)
        for name, known in (("policies", POLICIES), ("baselines", METHODS)):
            for item in listed(getattr(self, name)):
                if item not in known:
                    raise ConfigError(
                        f"--{name} must be names of {', '.join(known)}, separated by commas, not {item!r}"
                    )
        if not all(0 < share <= 1 for share in self.shares):
            raise ConfigError(f"--computes must be shares above 0 and at most 1, not {self.computes!r}")
        if not listed(self.policies) and not listed(self.baselines):
            raise ConfigError("--policies and --baselines are both empty; name what is to be measured")

    @property
    def shares(self) -> list[float]:
        """The computes, as numbers."""
        try:
            shares = [float(item) for item in listed(self.computes)]
        except ValueError:
            shares = []
        if not shares:
            raise ConfigError(
                f"--computes must be numbers separated by commas, such as 0.5,0.25, not {self.computes!r}"
            )
        return shares


class Prompt(NamedTuple):
    """One video to make.

    Attributes:
        name: stands in the names of its files.
        fields: of a request: ``prompt``, and perhaps ``negative_prompt``, ``image`` and ``seed``.
    """

    name: str
    fields: Mapping[str, Any]


def listed(text: str) -> list[str]:
    """The items of a list with commas."""
    return [item.strip() for item in text.split(",") if item.strip()]


def read_prompts(settings: QualitySettings, facts: ModelFacts, image: str | None) -> list[Prompt]:
    """The prompts to measure with.

    Args:
        settings: may name a file.
        facts: of the model.
        image: that a prompt starts from which names none.

    Raises:
        ConfigError: the file cannot be read, or one of its lines.
        RequestError: the model needs an image, and there is none.
    """
    if settings.prompts is None:
        found = [{"prompt": text} for text in (DEMO_PROMPTS if facts.name == "demo" else PROMPTS)]
    else:
        found = _read(Path(settings.prompts))
    found = found[: settings.count]
    for fields in found:
        if image is not None:
            fields.setdefault("image", image)
        if facts.image == "required" and "image" not in fields:
            raise RequestError(
                f"model {facts.name!r} makes videos from an image, and the prompt {fields['prompt'][:40]!r} has none: "
                'give one for all with --image FILE, or one for each in lines of --prompts such as {"prompt": "...", '
                '"image": "..."}'
            )
    return [Prompt(f"{number:03d}", fields) for number, fields in enumerate(found)]


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--prompts {path}: the file cannot be read ({error})") from error
    found = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        fields: Any = {"prompt": text}
        if text.startswith("{"):
            try:
                fields = json.loads(text)
            except ValueError as error:
                raise ConfigError(f"--prompts {path}, line {number}: not valid JSON ({error})") from error
            if not {"prompt"} <= set(fields) <= {"prompt", "negative_prompt", "image", "seed"}:
                raise ConfigError(
                    f"--prompts {path}, line {number}: prompt is needed, and only negative_prompt, image and seed may "
                    f"stand beside it; the line has {', '.join(fields)}"
                )
        found.append(fields)
    if not found:
        raise ConfigError(f"--prompts {path} holds no prompt; write one in each line")
    return found
