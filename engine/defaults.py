"""What a request gets for everything that it leaves out: the values that the models' makers publish."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Defaults(NamedTuple):
    """What a request gets for everything that it leaves out."""

    width: int
    height: int
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float | None = None
    negative_prompt: str = ""


# What Wan's makers advise for all their models.
_WAN_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
    "背景人很多，倒着走"
)


# The values that the models' makers publish; for small models, those of the demo model.
DEFAULTS: Mapping[str, Defaults] = {
    "Wan small": Defaults(64, 64, 17, 8, 40, 1.5),
    "Wan 1.3B": Defaults(832, 480, 81, 16, 50, 5.0),
    "Wan 14B": Defaults(832, 480, 81, 16, 50, 5.0),
    "Wan 1.3B I2V": Defaults(832, 480, 81, 16, 40, 5.0),
    "Wan 14B I2V": Defaults(832, 480, 81, 16, 40, 5.0),
    "Wan 2.2 A14B": Defaults(1280, 720, 81, 16, 40, 4.0, 3.0),
    "Wan 2.2 A14B I2V": Defaults(1280, 720, 81, 16, 40, 3.5, 3.5),
    "Wan 2.2 TI2V 5B": Defaults(1280, 704, 121, 24, 50, 5.0),
    "LTX-2 small": Defaults(64, 64, 17, 8, 40, 3.0),
    "LTX-2": Defaults(768, 512, 121, 24, 40, 4.0),
    "LTX-2.3": Defaults(768, 512, 121, 24, 30, 3.0),
    "LTX-2.5": Defaults(768, 512, 121, 24, 30, 3.0),
}


def negative_prompt(family: str) -> str:
    """What the model's makers advise against; small models are nobody's."""
    if family.endswith("small"):
        return ""
    if family.startswith("Wan"):
        return _WAN_NEGATIVE
    from diffusers.pipelines.ltx2.utils import DEFAULT_NEGATIVE_PROMPT  # takes seconds, and only these models need it

    return str(DEFAULT_NEGATIVE_PROMPT)
