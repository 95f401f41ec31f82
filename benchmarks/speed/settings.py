"""What the verbs of `bench` about speed are told, and MLPerf's settings; nothing here imports PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError
from ...settings import check, like, setting

SHAPES = ("small", "wan-1.3b", "wan-14b")

MLPERF_NEGATIVE = """\
vivid colors, overexposed, static, blurry details, subtitles, style,
work of art, painting, picture, still, overall grayish, worst quality,
low quality, JPEG artifacts, ugly, deformed, extra fingers, poorly drawn hands,
poorly drawn face, deformed, disfigured, deformed limbs, fused fingers,
static image, cluttered background, three legs, many people in the background,
walking backwards"""
"""The negative prompt of MLPerf's task, as its settings give it."""

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "mlperf-wan22": {
        "width": 1280,
        "height": 720,
        "num_frames": 81,
        "fps": 16,
        "num_inference_steps": 20,
        "guidance_scale": 4.0,
        "guidance_scale_2": 3.0,
        "seed": 42,
        "negative_prompt": MLPERF_NEGATIVE,
    },
}
"""Fields of a request by the name of a task: MLPerf Inference's text-to-video with Wan 2.2 T2V A14B."""
BOUNDARY: Mapping[str, float] = {"mlperf-wan22": 0.875}
"""Where the second expert begins in a task, which must be the model's own value."""


@dataclass(frozen=True, kw_only=True)
class ResultFiles:
    """Where a measurement goes, and what it is compared with."""

    output_file: str | None = setting(
        None, metavar="FILE", help="JSON file of the result; a Markdown file and a picture are written beside it"
    )
    compare: str | None = setting(
        None, metavar="OLD.json", help="an older result: what changed beyond the noise is said"
    )

    def __post_init__(self) -> None:
        check(self)


class _AtShares:
    """Settings with a list of computes."""

    computes: str

    def __post_init__(self) -> None:
        check(self)
        _ = self.shares

    @property
    def shares(self) -> list[float]:
        """The computes, as numbers."""
        return shares_of("computes", self.computes)


@dataclass(frozen=True, kw_only=True)
class OfflineSettings(_AtShares):
    """What `bench offline` and `bench single-stream` measure.

    Raises:
        ConfigError: a value is not one of these.
    """

    prompts: str | None = setting(
        None, metavar="FILE", help="text file with a prompt in each line, as for bench quality; left out, ours"
    )
    count: int | None = setting(None, least=1, metavar="N", help="number of prompts to use, the first ones")
    videos: int | None = setting(
        None, least=1, help="videos to make at each share; left out, 4 for each replica; prompts come again in turn"
    )
    replicas: int = setting(1, least=1, help="videos at a time, each on nproc ranks of its own")
    computes: str = setting("1", metavar="C,C", help="shares of the dense work to measure")
    warmup_videos: int = setting(1, least=0, metavar="N", help="videos that each replica makes before, at each share")
    preset: str | None = setting(
        None, choices=tuple(PRESETS), metavar="P", help="settings of a task; a flag that is given goes before"
    )
    save: str | None = setting(
        None, metavar="DIR", help="folder for the videos, named as VBench wants them; writing is not timed"
    )


@dataclass(frozen=True, kw_only=True)
class ScalingSettings(_AtShares):
    """What `bench scaling` measures.

    Raises:
        ConfigError: a value is not one of these.
    """

    gpus: int = setting(2, least=1, help="GPUs, or processes of a CPU, to divide")
    computes: str = like(OfflineSettings, "computes", default="1,0.5")
    videos: int = setting(3, least=1, help="videos that each replica makes at each share")
    gpu: str | None = setting(
        None, metavar="TYPE", help="h100, h200, cpu or a file, as for plan, whose estimate then stands beside"
    )
    warmup_videos: int = like(OfflineSettings, "warmup_videos")

    @property
    def layouts(self) -> list[tuple[int, int]]:
        """Replicas and ranks of each: one video on 1, 2 ... ranks, then all GPUs as replicas of fewer ranks."""
        ranks = [number for number in range(1, self.gpus + 1) if self.gpus % number == 0]
        alone = [(1, number) for number in ranks]
        return alone + [(self.gpus // number, number) for number in ranks if number < self.gpus]


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What `bench step` measures.

    Raises:
        ConfigError: a value is not one of these.
    """

    shape: str = setting("small", choices=SHAPES, metavar="S", help="sizes of the random model and of its video")
    shares: str = setting("1,0.5,0.25,0.1", metavar="A,A", help="shares of the tokens that a step evaluates")
    rounds: int = setting(3, least=1, help="repetitions of everything")
    repeats: int = setting(2, least=0, help="timed partial steps of a run; 0 measures whole loops only")
    loop_steps: int = setting(12, least=2, help="steps of the whole loops")
    nproc: int = setting(1, least=1, metavar="P", help="ranks that share each step")
    device: str = setting("auto", metavar="D", help="auto (the first GPU, else the CPU), cpu or cuda")

    def __post_init__(self) -> None:
        check(self)
        _ = self.active

    @property
    def active(self) -> list[float]:
        """The shares, as numbers."""
        return shares_of("shares", self.shares)


@dataclass(frozen=True, kw_only=True)
class RecoverySettings:
    """What `bench recovery` does to a job's ranks.

    Raises:
        ConfigError: a value is not one of these.
    """

    kills: int = setting(10, least=1, help="jobs, in each of which a rank is lost")
    freezes: int = setting(2, least=0, help="so many of these by freezing the rank in place of killing it")
    rapid: int = setting(0, least=0, help="so many of these before a new standby process is ready")
    rank: int | None = setting(None, least=0, help="which rank; left out, a random one")
    at: int | None = setting(None, least=1, metavar="K", help="after which step; left out, a random one")
    frozen_after: float = setting(10.0, above=0, unit="seconds", help="silence after which a rank is taken for frozen")
    deaths: float = setting(
        1.0, above=0, flag="deaths-per-day", help="rate of losses for which the goodput is computed"
    )
    trial_seed: int = setting(0, least=0, help="seed of ranks and steps")

    def __post_init__(self) -> None:
        check(self)
        if max(self.freezes, self.rapid) > self.kills:
            raise ConfigError(f"--freezes and --rapid are a part of the {self.kills} jobs of --kills; give fewer")


@dataclass(frozen=True, kw_only=True)
class CalibrateSettings:
    """How `bench calibrate` measures a device.

    Raises:
        ConfigError: a value is not one of these.
    """

    shape: str = like(StepSettings, "shape", help="sizes of the random model to measure with")
    rounds: int = setting(5, least=1, help="repetitions of each measurement")
    nproc: int = setting(1, least=1, metavar="P", help="ranks on this machine between which the link is measured")
    like: str | None = setting(
        None,
        metavar="TYPE",
        help="h100, h200, cpu or a file, for figures that are not measured here; left out, cpu or the nearest GPU",
    )
    device: str = setting("auto", metavar="D", help="auto (the first GPU, else the CPU), cpu or cuda")

    def __post_init__(self) -> None:
        check(self)


def shares_of(name: str, text: str) -> list[float]:
    """Shares above 0 and at most 1 from a list with commas.

    Raises:
        ConfigError: it is none.
    """
    try:
        found = [float(item) for item in text.split(",") if item.strip()]
    except ValueError:
        found = []
    if not found or not all(0 < share <= 1 for share in found):
        raise ConfigError(f"--{name} must be shares above 0 and at most 1, such as 1,0.5, not {text!r:.80}")
    return found
