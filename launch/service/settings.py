"""`ServiceSettings`: everything that `heterostep serve` can be told, checked before anything starts."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...engine.config import EngineConfig, check_with_ranks
from ...engine.facts import ModelFacts
from ...engine.noise import SUFFIXES
from ...engine.request import JobConfig
from ...errors import ConfigError
from ...parallel.config import degrees, listed_degrees
from ...settings import check, like, setting

# A request may ask for this many times the model's default of pixels, frames or steps, unless a setting says otherwise.
_GENEROSITY = 4
# It becomes part of links: no host, no query, no dots that climb.
_PREFIX = re.compile(r"(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+")
_MAX_PREFIX = 200


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """Settings of the service.

    Attributes:
        engine: the model and how to compute; device `"auto"` gives each replica a GPU of its own, as far as they go.
        degrees: the settings of `ParallelConfig` that each video's ranks shall have; the others are chosen.
        threads: of each rank on CPUs; None shares the cores of a machine among its ranks.
        allowed_hosts: names under which browsers may reach the service; empty allows all.

    Raises:
        ConfigError: a value is out of range, or data_dir cannot be written.
    """

    data_dir: Path = setting(Path("heterostep-data"), metavar="DIR", help="folder for jobs and results")
    engine: EngineConfig = field(default_factory=EngineConfig)
    degrees: Mapping[str, Any] = field(default_factory=dict)
    shard_weights: bool = like(EngineConfig, "shard_weights", flag="")
    replicas: int = setting(1, least=1, metavar="R", help="number of models loaded, each making one video at a time")
    ranks: int = setting(1, least=1, metavar="W", help="number of ranks in each replica that make a video together")
    threads: int | None = setting(None, least=1, flag="", help="number of threads of each rank on CPUs")
    checkpoint_every: int = like(JobConfig, "checkpoint_every")
    lora_dir: Path | None = setting(
        None,
        metavar="DIR",
        help="folder of LoRA weights (*.safetensors) that requests may name, each by its file name without the ending",
    )
    noise_dir: Path | None = setting(
        None,
        metavar="DIR",
        help="folder of initial noise (*.safetensors, *.pt) that MLPerf's clients may name in latent_path",
    )
    api_key_file: Path | None = setting(
        None,
        metavar="F",
        help="text file with one API key on each line, after a name if wanted; left out, no key is needed",
    )
    allowed_hosts: tuple[str, ...] = ()
    root_path: str = setting(
        "",
        metavar="P",
        help="path under which a proxy serves the site, such as /video; left out, X-Forwarded-Prefix or /",
    )
    max_queue: int = setting(
        100, least=1, help="maximum number of videos in the queue; further requests are answered 429"
    )
    max_prompt: int = setting(4000, least=1, help="maximum length of a prompt in characters")
    max_pixels: int | None = setting(
        None, least=1, help="maximum width x height x frames of a video (default 4 x the model's)"
    )
    max_frames: int | None = setting(
        None, least=1, help="maximum number of frames of a video (default 4 x the model's)"
    )
    max_steps: int | None = setting(None, least=1, help="maximum number of denoising steps (default 4 x the model's)")
    openai_statuses: bool = setting(
        False,
        help="answer `failed` with the code `cancelled` for cancelled videos, for clients that know no other statuses "
        "than OpenAI's, such as benchmarks, and would wait forever",
    )
    keep_days: float = setting(30.0, above=0, help="delete finished videos after X days")
    keep_gib: float = setting(20.0, above=0, help="delete the oldest finished videos when together they exceed X GiB")

    def __post_init__(self) -> None:
        check(self)
        if self.ranks > 1:
            check_with_ranks(self.engine, self.shard_weights)
        object.__setattr__(self, "root_path", self.root_path.rstrip("/"))
        if self.root_path and not is_path_prefix(self.root_path):
            raise ConfigError(
                f"root_path must be a path such as /video, of letters, digits and . _ ~ -, not {self.root_path!r}"
            )
        if self.lora_dir is not None:
            object.__setattr__(self, "lora_dir", Path(self.lora_dir).expanduser().absolute())
            if not self.lora_dir.is_dir():
                raise ConfigError(f"lora-dir {str(self.lora_dir)!r} is not a folder; name one that holds LoRA weights")
        if self.noise_dir is not None:
            object.__setattr__(self, "noise_dir", Path(self.noise_dir).expanduser().absolute())
            if not self.noise_dir.is_dir():
                raise ConfigError(f"noise-dir {str(self.noise_dir)!r} is not a folder; name one with files of noise")
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
    def loras(self) -> dict[str, Path]:
        """Files of the LoRA weights that there are now, by the names for requests."""
        if self.lora_dir is None:
            return {}
        found = {path.stem: path for path in sorted(self.lora_dir.glob("*.safetensors"))}
        # A colon stands between a name and its strength.
        return {name: path for name, path in found.items() if ":" not in name}

    @property
    def noises(self) -> dict[str, Path]:
        """Files of initial noise that there are now, by their names."""
        if self.noise_dir is None:
            return {}
        return {path.name: path for path in sorted(self.noise_dir.iterdir()) if path.suffix in SUFFIXES}

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
        """A folder for each job that can resume where it stopped."""
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


def check_degrees(settings: ServiceSettings, facts: ModelFacts) -> None:
    """Refuse degrees that no video's ranks can have, with guidance or without; ConfigError."""
    inside, rest = divmod(settings.ranks, settings.degrees.get("windows", 1))
    valid = functools.partial(degrees, world_size=inside, num_heads=facts.shared_heads, num_branches=2)
    if rest or not any(valid(asked=settings.degrees)):
        given = " x ".join(f"{axis} {degree}" for axis, degree in settings.degrees.items() if isinstance(degree, int))
        may = "none, as windows must divide their number" if rest else listed_degrees(valid())
        raise ConfigError(f"{given} on {settings.ranks} rank(s) for each video: cfg x ring x ulysses may be {may}")


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
    """What the API calls a model: of a local folder only its own name, since paths are private."""
    return Path(model).expanduser().resolve().name if Path(model).expanduser().is_dir() else model


def is_path_prefix(text: str) -> bool:
    """Whether a text is a path such as "/video", without a slash at its end, that links may begin with."""
    return len(text) <= _MAX_PREFIX and _PREFIX.fullmatch(text) is not None
