"""heterostep: faster video diffusion by giving every token its own number of denoising steps.

The public names, nothing else. Each is imported on first use: `heterostep --help` must not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, HeterostepError, RankFailure, RequestError
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .engine.config import EngineConfig
    from .engine.denoise.session import HSASession, apply, remove
    from .engine.engine import Engine
    from .engine.report import HSAReport, StepRecord
    from .engine.request import GenerateRequest, JobConfig, VideoOutput
    from .hsa.config import HSAConfig
    from .hsa.planner import StepPlanner
    from .parallel.config import ParallelConfig
    from .parallel.mesh import ParallelMesh

_HOMES = {
    "Engine": ".engine.engine",
    "EngineConfig": ".engine.request",
    "GenerateRequest": ".engine.request",
    "HSAConfig": ".hsa.config",
    "HSAReport": ".engine.report",
    "HSASession": ".engine.denoise.session",
    "JobConfig": ".engine.request",
    "ParallelConfig": ".parallel.config",
    "ParallelMesh": ".parallel.mesh",
    "StepPlanner": ".hsa.planner",
    "StepRecord": ".engine.report",
    "VideoOutput": ".engine.request",
    "apply": ".engine.denoise.session",
    "remove": ".engine.denoise.session",
}

__all__ = [
    "ConfigError",
    "Engine",
    "EngineConfig",
    "GenerateRequest",
    "HSAConfig",
    "HSAReport",
    "HSASession",
    "HeterostepError",
    "JobConfig",
    "ParallelConfig",
    "ParallelMesh",
    "RankFailure",
    "RequestError",
    "StepPlanner",
    "StepRecord",
    "VideoOutput",
    "apply",
    "remove",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the lazy names too."""
    return sorted(__all__)
