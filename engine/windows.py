"""How long a video is, and what is asked of one beyond the model's own length: its windows, its prompts over time."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import RequestError
from .facts import ModelFacts

_SETTINGS = ("window", "overlap", "roll_windows", "shared_noise")
_OVERLAP = 3 / 8
"""Of a window: 30 of Wan's 81 frames."""
_LINE = re.compile(r"\s*(\d+(?:\.\d+)?s?)\s*-\s*(\d+(?:\.\d+)?s?)?\s*:\s*(\S.*?)\s*")


class Scene(NamedTuple):
    """A prompt for the frames from `start` to before `stop`."""

    start: float
    stop: float
    prompt: str


def own_frames(facts: ModelFacts, fps: int) -> int:
    """Frames of the longest video that a model makes in one piece, at a frame rate."""
    longest = int((facts.longest_seconds * fps - 1) // facts.frame_step) * facts.frame_step + 1
    return max(facts.defaults.num_frames, longest)


def frames_in(seconds: float, facts: ModelFacts, fps: int) -> int:
    """The number of frames that a model can make which is nearest to a time."""
    return max(round(seconds * fps / facts.frame_step), 0) * facts.frame_step + 1


def fill(values: Mapping[str, Any], facts: ModelFacts, *, image: bool) -> dict[str, Any]:
    """Deduce what is left out of the settings of a long video; a video without windows has none but `window`.

    Args:
        values: fields of a request, filled in but for these.
        facts: of the model.
        image: whether the video starts from an image.

    Raises:
        RequestError: windows for a video from an image, a window that the model cannot make or of one frame, an overlap
            as long as the window, or a schedule of prompts that cannot be read.
    """
    filled = dict(values)
    frames, fps = filled["num_frames"], filled["fps"]
    scenes = read_scenes(filled["prompt_schedule"], fps) if filled["prompt_schedule"] is not None else []
    given = [name for name in (*_SETTINGS, "prompt_schedule") if filled[name] is not None]
    if image and given:
        raise RequestError(
            f"{given[0]} is for videos from text alone, and this one starts from an image or a video; leave it out"
        )
    window = filled["window"] or own_frames(facts, fps)
    if image or frames <= window:
        prompt = next((scene.prompt for scene in scenes if scene.start <= frames / 2 < scene.stop), filled["prompt"])
        # A window that was asked for stays: read again, the request must mean the same.
        return {**filled, **dict.fromkeys((*_SETTINGS[1:], "prompt_schedule")), "prompt": prompt}
    if (window - 1) % facts.frame_step:
        raise RequestError(
            f"window={window} does not fit model {facts.name!r}: it must be a multiple of {facts.frame_step}, plus 1; "
            f"the nearest is {frames_in((window - 1) / fps, facts, fps)}"
        )
    if window == 1:
        raise RequestError(f"window=1 leaves no room for an overlap; the smallest window is {1 + facts.frame_step}")
    overlap = round(window * _OVERLAP) if filled["overlap"] is None else filled["overlap"]
    if math.ceil(overlap / facts.frame_step) > (window - 1) // facts.frame_step:
        raise RequestError(f"overlap={overlap} is as long as a window of {window} frames; take a smaller one")
    deduced = {"window": window, "overlap": overlap, "roll_windows": False, "shared_noise": True}
    return {**filled, **{name: value for name, value in deduced.items() if filled[name] is None}}


def read_scenes(text: str, fps: int) -> list[Scene]:
    """Read a schedule of prompts: lines such as ``0-40: a red disc`` or ``2.5s-: a blue one``.

    Raises:
        RequestError: a line is of another form, or two of them are about the same frames.
    """
    scenes: list[Scene] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        if found is None:
            raise RequestError(
                f"line {number} of the schedule of prompts is {line.strip()[:60]!r}; it must be FROM-TO: PROMPT, in "
                "frames (0-40: a red disc) or seconds (2.5s-5s: a blue disc)"
            )
        first, last, prompt = found.groups()
        start = _frame(first, fps)
        # Frames are counted, the last one with the others; times are not.
        stop = math.inf if last is None else _frame(last, fps) + (0 if last.endswith("s") else 1)
        if stop <= start:
            raise RequestError(f"line {number} of the schedule of prompts ends at {last}, before it begins at {first}")
        if any(start < scene.stop and scene.start < stop for scene in scenes):
            raise RequestError(f"line {number} of the schedule of prompts is about frames that have a prompt already")
        scenes.append(Scene(start, stop, prompt))
    if not scenes:
        raise RequestError("the schedule of prompts is empty; write lines such as 0-40: a red disc moves right")
    return scenes


def _frame(text: str, fps: int) -> float:
    return float(text[:-1]) * fps if text.endswith("s") else float(text)
