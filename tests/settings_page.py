"""The page docs/settings.md: every setting, as its field declares it. `python tests/settings_page.py` writes it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from heterostep.benchmarks.quality.settings import QualitySettings
from heterostep.benchmarks.serving.settings import LoadSettings
from heterostep.benchmarks.speed.settings import (
    CalibrateSettings,
    OfflineSettings,
    RecoverySettings,
    ResultFiles,
    ScalingSettings,
    StepSettings,
)
from heterostep.engine.config import EngineConfig
from heterostep.engine.request import GenerateRequest, JobConfig
from heterostep.hsa.config import HSAConfig
from heterostep.launch.options import Batch, Outputs, Ranks, Serving
from heterostep.launch.plan import PlanSettings
from heterostep.launch.service.settings import ServiceSettings
from heterostep.parallel.config import ParallelConfig
from heterostep.settings import Setting, settings_of

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
_HEAD = """# Settings

Each setting is declared once, at a dataclass field. This page, the flags, the checks and the HTTP API are generated
from these declarations: `python tests/settings_page.py` writes the page, and a test compares it. In Python, a setting
has the name of its field; on the command line, the name of its flag. A request of the HTTP API has the fields of
`GenerateRequest`. A default of "deduced" is the model's own value, or follows from the run.
"""
SECTIONS = (
    (GenerateRequest, "One video, for `generate` and for `POST /v1/videos`. `--size WxH` sets `width` and `height`."),
    (HSAConfig, "How the work is spread over steps and tokens, for `generate` and `serve`."),
    (EngineConfig, "What is loaded and where it runs, for `generate` and `serve`. `info` takes `--model` only."),
    (ParallelConfig, "How ranks share a video, for `generate` and `serve`. Degrees that are left out are chosen."),
    (JobConfig, "A job that survives its process, for `generate`."),
    (Batch, "Several videos of one command, for `generate`."),
    (Ranks, "The processes that `generate` starts."),
    (Outputs, "What `generate` writes and prints."),
    (QualitySettings, "What `bench quality` measures; [benchmarks.md](benchmarks.md) describes it."),
    (LoadSettings, "What `bench serving` sends, and where; [benchmarks.md](benchmarks.md) describes it."),
    (ResultFiles, "Where the results of the verbs below go."),
    (OfflineSettings, "What `bench offline` and `bench single-stream` measure."),
    (ScalingSettings, "What `bench scaling` measures."),
    (StepSettings, "What `bench step` measures."),
    (RecoverySettings, "What `bench recovery` does to ranks."),
    (CalibrateSettings, "How `bench calibrate` measures a device."),
    (PlanSettings, "What `plan` is asked; [planning.md](planning.md) describes it."),
    (Serving, "Where `serve` listens, and which processes it starts."),
    (ServiceSettings, "The service, for `serve`."),
)  # fmt: skip


def page() -> str:
    """The page as it should be."""
    return "\n".join([_HEAD, *(f"## {cls.__name__}\n\n{about}\n\n{_table(cls)}" for cls, about in SECTIONS)])


def _table(cls: type) -> str:
    rows = ["| field | flag | values | default | meaning |", "|---|---|---|---|---|"]
    for item in settings_of(cls):
        flag = f"`--{item.flag}`" if item.flag else ""
        values = item.rule if item.kind in ("int", "float", "bool") or item.choices else ""
        rows.append(f"| `{item.name}` | {flag} | {values} | {_default(item)} | {item.help} |")
    return "\n".join(rows) + "\n"


def _default(item: Setting) -> str:
    value = item.default
    if value is dataclasses.MISSING:
        return "needed"
    if value is None:  # a name or a file that is left out stays out
        return "deduced" if item.choices or item.kind in ("int", "float", "bool") else "none"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value!s}`" if value not in ("", ()) else "none"


if __name__ == "__main__":
    PAGE.write_text(page())
