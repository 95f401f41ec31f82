"""`ServiceSettings`: everything that `heterostep serve` can be told, checked before anything starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ...engine.facts import ModelFacts
from ...errors import ConfigError
from ...hsa.config import HSAConfig
from .security import is_path_prefix

# A request may ask for this many times the model's default of pixels, frames or steps, unless a setting says otherwise.
_GENEROSITY = 4


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """Settings of the service.

    Attributes:
        data_dir: folder of the job store and of the results; made if it is not there.
        model: `"demo"`, a folder, or a hub id.
        compute: share of the dense work for requests that do not say.
        policy: how it is spent, as in `HSAConfig`.
        dtype: as in `EngineConfig`.
        device: likewise; `"auto"` gives each replica a GPU of its own, as far as they go.
        replicas: processes with a model each, in this service process.
        ranks: processes that make each video together, of every replica; more than one only on Ray.
        threads: of each rank on CPUs; None shares the cores of a machine among its ranks.
        checkpoint_every: denoising steps after which a job is saved, to go on there after whatever ends its runner.
        api_key_file: text file with a line for each key; None serves everybody who can connect.
        allowed_hosts: names under which browsers may reach the service; empty allows all.
        root_path: path of the site under which clients reach the service, such as `/video`; empty is the site's root,
            or what a proxy says.
        max_queue: jobs that may wait; more are answered 429.
        max_prompt: characters of prompt and of negative prompt.
        max_pixels: width x height x frames of a video; None is four times the model's default.
        max_frames: None likewise.
        max_steps: None likewise.
        keep_days: finished jobs are removed when they are older.
        keep_gib: and, oldest first, while results take more than this.

    Raises:
        ConfigError: a value is out of range, or data_dir cannot be written.
    """

    data_dir: Path
    model: str = "demo"
    compute: float = 0.5
    policy: str = "joint"
    dtype: str = "auto"
    device: str = "auto"
    replicas: int = 1
    ranks: int = 1
    threads: int | None = None
    checkpoint_every: int = 5
    api_key_file: Path | None = None
    allowed_hosts: tuple[str, ...] = ()
    root_path: str = ""
    max_queue: int = 100
    max_prompt: int = 4000
    max_pixels: int | None = None
    max_frames: int | None = None
    max_steps: int | None = None
    keep_days: float = 30.0
    keep_gib: float = 20.0

    def __post_init__(self) -> None:
        HSAConfig(compute=self.compute, policy=self.policy)  # says what is wrong with them
        for name in (
            "replicas",
            "ranks",
            "threads",
            "checkpoint_every",
            "max_queue",
            "max_prompt",
            "max_pixels",
            "max_frames",
            "max_steps",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value!r}")
        for name in ("keep_days", "keep_gib"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be a number above 0, not {value!r}")
        object.__setattr__(self, "root_path", self.root_path.rstrip("/"))
        if self.root_path and not is_path_prefix(self.root_path):
            raise ConfigError(
                f"root_path must be a path such as /video, of letters, digits and . _ ~ -, not {self.root_path!r}"
            )
        object.__setattr__(self, "data_dir", Path(self.data_dir).expanduser().absolute())
        try:
            for folder in (self.data_dir, self.results, self.state, self.leases):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            probe = self.leases / ".probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(f"data-dir {str(self.data_dir)!r} cannot be written ({error.strerror})") from error

    @property
    def database(self) -> Path:
        """The job store."""
        return self.data_dir / "jobs.sqlite3"

    @property
    def results(self) -> Path:
        """A folder for each finished job."""
        return self.data_dir / "results"

    @property
    def state(self) -> Path:
        """A folder for each job that can go on where it stopped."""
        return self.data_dir / "state"

    @property
    def leases(self) -> Path:
        """A locked file for each living process."""
        return self.data_dir / "leases"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for."""

    prompt: int
    pixels: int
    frames: int
    steps: int


def limits_for(settings: ServiceSettings, facts: ModelFacts) -> Limits:
    """The limits that the settings give, or the model's defaults imply."""
    defaults = facts.defaults
    frames = _GENEROSITY * (defaults.num_frames - 1) + 1
    pixels = _GENEROSITY * defaults.width * defaults.height * defaults.num_frames
    return Limits(
        prompt=settings.max_prompt,
        pixels=settings.max_pixels or pixels,
        frames=settings.max_frames or frames,
        steps=settings.max_steps or _GENEROSITY * defaults.num_inference_steps,
    )


def public_name(model: str) -> str:
    """What the API calls a model: of a local folder only its own name, for paths are nobody's business."""
    return Path(model).expanduser().resolve().name if Path(model).expanduser().is_dir() else model
