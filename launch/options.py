"""Settings on the command line: each field that declares a setting becomes a flag, and flags become settings again."""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..engine.config import EngineConfig
from ..engine.request import GenerateRequest, JobConfig
from ..errors import ConfigError
from ..hsa.config import HSAConfig
from ..parallel.config import ParallelConfig
from ..settings import Setting, check, setting, settings_of
from .service.settings import ServiceSettings
from .workers.messages import threads_asked

_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_PLACE = re.compile(r"\{(index|seed)\}")
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What `generate` writes and prints."""

    output: str = setting(
        "video.mp4",
        metavar="FILE",
        help="mp4 file of the video; {index} and {seed} in the name of any file stand for the video's number, from 1 "
        "on, and its seed",
    )
    heatmap: str | None = setting(
        None, metavar="FILE", help="mp4 file of the video beside a map of evaluations per token"
    )
    latents: str | None = setting(None, metavar="FILE", help="safetensors file of the final latents")
    report: str | None = setting(
        None, metavar="FILE", help="JSON file of settings, versions, times, steps and evaluations"
    )
    overwrite: bool = setting(False, help="replace existing files without a message")
    no_clobber: bool = setting(False, help="refuse to replace existing files, before any work starts")
    scale: int = setting(1, least=1, help="enlarge the pixels of the video N times")
    compare_dense: bool = setting(False, help="make the dense video too; print the speed-up and the quality")
    quiet: bool = setting(False, help="print errors only")
    json: bool = setting(False, help="print progress to stdout as JSON, one object on each line, for programs")

    def __post_init__(self) -> None:
        check(self)
        if self.quiet and self.json:
            raise ConfigError("--quiet and --json contradict each other; give one of them")
        if self.overwrite and self.no_clobber:
            raise ConfigError("--overwrite and --no-clobber contradict each other; give one of them")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """How many videos `generate` makes; with a job's folder, each is a job in a folder of its own in there."""

    prompts: Path | None = setting(
        None, metavar="FILE", help="text file with one prompt on each line, in place of --prompt: a video for each"
    )
    count: int = setting(
        1, least=1, most=1000, help="number of videos of each prompt, the first with --seed, each other with the next"
    )

    def __post_init__(self) -> None:
        check(self)

    @property
    def several(self) -> bool:
        """Whether there may be more than one video; a file of prompts can grow."""
        return self.prompts is not None or self.count > 1


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Which processes `generate` starts."""

    nproc: int | None = setting(None, least=1, metavar="P", help="number of ranks to start on a machine (default 1)")
    nnodes: int | None = setting(
        None, least=1, metavar="N", help="number of machines, on each of which this command is given (default 1)"
    )
    master: str | None = setting(
        None,
        metavar="HOST[:PORT]",
        help="the machine that keeps the job and writes the files, by its name or address in the network of all",
    )
    min_nnodes: int | None = setting(
        None, least=1, metavar="M", help="number of machines without which a job waits (default 1)"
    )
    cluster_key_file: Path | None = setting(
        None, metavar="F", help="file with a secret, the same on all machines, that keeps strangers out"
    )
    ray: bool = setting(False, help="start the ranks as Ray actors")
    ray_address: str | None = setting(
        None, metavar="A", help="start the ranks on a running Ray cluster; auto or HOST:PORT"
    )

    def __post_init__(self) -> None:
        check(self)
        on_ray = self.ray or self.ray_address is not None
        if on_ray and find_spec("ray") is None:
            raise ConfigError("ray is not installed; pip install '.[ray]' in heterostep's folder, or leave out --ray")
        if self.machines > 1 and self.master is None:
            raise ConfigError(f"--nnodes {self.nnodes} needs --master HOST: the machine that keeps the job")
        if self.machines > 1 and on_ray:
            raise ConfigError("--nnodes with --ray: Ray knows its machines itself; leave out one of them")
        for name in ("master", "min_nnodes", "cluster_key_file"):
            if self.machines == 1 and getattr(self, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} needs several machines; say how many with --nnodes")
        if (self.min_nnodes or 1) > self.machines:
            raise ConfigError(f"--min-nnodes {self.min_nnodes} is more than --nnodes {self.nnodes}")

    @property
    def machines(self) -> int:
        """How many machines take part; with Ray, that is Ray's."""
        return self.nnodes or 1

    @property
    def size(self) -> int:
        """How many ranks there are on all of them."""
        return self.machines * (self.nproc or 1)


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Where `serve` listens, and which processes it starts."""

    host: str = setting("127.0.0.1", metavar="H", help="address to listen on")
    port: int = setting(8000, least=0, most=65535, help="port to listen on; 0 takes any free port")
    allow_host: tuple[str, ...] = setting(
        (),
        metavar="NAME",
        help="another host name that browsers may use, for a loopback address without keys; may be repeated",
    )
    remove_unknown: bool = setting(
        False,
        help="delete the folders in data-dir that belong to no video, list them, and exit; without it they are kept",
    )
    no_ray: bool = setting(False, help="run one service process with its workers, without Ray")
    ray_address: str | None = setting(
        None,
        metavar="A",
        help="running Ray cluster to use, auto or HOST:PORT; left out, one is started on this machine",
    )
    gpus_per_replica: int | None = setting(
        None,
        least=0,
        metavar="W",
        help="on Ray: GPUs of each replica (default 1 if there are any); from 2 on, that many ranks make each video",
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class Command:
    """Everything that `heterostep generate` was told, of one video.

    Attributes:
        request: the video.
        engine: the model and how to compute, without degrees.
        degrees: the settings of `ParallelConfig` that were given; the others are chosen.
        shard_weights: whether ranks share the weights; `EngineConfig` takes it only together with degrees.
        job: where the job is kept; None for a video that does not survive its process.
        outputs: what is written.
        ranks: which processes are started.
        place: the number of the video, from 1 on, and how many there are.
    """

    request: GenerateRequest
    engine: EngineConfig
    degrees: Mapping[str, Any]
    shard_weights: bool
    job: JobConfig | None
    outputs: Outputs
    ranks: Ranks
    place: tuple[int, int] = (1, 1)

    @property
    def label(self) -> str:
        """What the steps of its video are called."""
        number, of = self.place
        return "denoising" if of == 1 else f"denoising video {number} of {of}"


def commands_of(arguments: argparse.Namespace) -> list[Command]:
    """Turn the parsed flags of `generate` into settings, for each of its videos.

    They differ in prompt, seed, and the names of files and folders.

    Raises:
        ConfigError: flags that do not fit each other, or a file of prompts that cannot be read.
        RequestError: a request that no model can serve.
    """
    given_flags = vars(arguments)
    outputs, batch = Outputs(**given(Outputs, given_flags)), Batch(**given(Batch, given_flags))
    asked = _request(given_flags)
    width, height = given_flags.get("size", (None, None))
    asked |= {"width": width, "height": height}
    first, job = asked.pop("seed", 0), _job(given(JobConfig, given_flags), outputs)
    common: dict[str, Any] = {
        "engine": engine_of(given_flags),
        "degrees": given(ParallelConfig, given_flags),
        "shard_weights": given_flags.get("shard_weights", False),
        "ranks": Ranks(**given(Ranks, given_flags)),
    }
    if batch.count > 1 and asked.get("noise") is not None:
        raise ConfigError(
            f"--noise gives all videos of a prompt the same initial noise, so the {batch.count} of --count would be "
            "alike; leave out one of them"
        )
    each = [(prompt, first + n) for prompt in _prompts(batch, asked.pop("prompt", None)) for n in range(batch.count)]
    return [
        Command(
            request=GenerateRequest(prompt=prompt, seed=seed, **asked),
            job=_own_folder(job, index) if job is not None and batch.several else job,
            outputs=_named(outputs, index, seed, batch.several),
            place=(index, len(each)),
            **common,
        )
        for index, (prompt, seed) in enumerate(each, 1)
    ]


def _prompts(batch: Batch, prompt: str | None) -> list[str]:
    """What the videos show."""
    if batch.prompts is None:
        if prompt is None:
            raise ConfigError("nothing says what the video shows; give --prompt TEXT, or --prompts FILE")
        return [prompt]
    if prompt is not None:
        raise ConfigError("--prompt and --prompts both say what the videos show; give one of them")
    try:
        text = batch.prompts.expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompts {str(batch.prompts)!r} is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"--prompts {str(batch.prompts)!r} cannot be read ({error.strerror})") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"--prompts {str(batch.prompts)!r} holds no prompt; write one on each line")
    return lines


def _own_folder(job: JobConfig, index: int) -> JobConfig:
    return dataclasses.replace(job, folder=Path(job.folder) / f"{index:04}")


def _named(outputs: Outputs, index: int, seed: int, several: bool) -> Outputs:
    """The outputs with index and seed in the names; where there are several and no name says which, at the end."""
    names = {item.name: getattr(outputs, item.name) for item in settings_of(Outputs) if item.metavar == "FILE"}

    def named(name: str) -> str:
        if several and not _PLACE.search(name):
            path = Path(name)
            name = str(path.with_name(f"{path.stem}-{{index}}{path.suffix}")) if path.name else name
        return _PLACE.sub(lambda found: str(index if found[1] == "index" else seed), name)

    changes: dict[str, Any] = {key: named(name) for key, name in names.items() if name is not None}
    return dataclasses.replace(outputs, **changes)


def engine_of(given_flags: Mapping[str, Any]) -> EngineConfig:
    """The model and how to compute, without what several ranks are needed for."""
    engine = given(EngineConfig, given_flags)
    engine.pop("shard_weights", None)
    hsa = given(HSAConfig, given_flags)
    if {"compute", "quality"} <= hsa.keys():
        raise ConfigError("--compute and --quality both say how much work to spend; give one of them")
    return EngineConfig(hsa=HSAConfig(**hsa), **engine)


def service_settings(given_flags: Mapping[str, Any]) -> ServiceSettings:
    """The settings of a service from the flags of `serve`.

    Raises:
        ConfigError: what is wrong with them.
    """
    serving = Serving(**given(Serving, given_flags))
    settings = given(ServiceSettings, given_flags)
    hosts: tuple[str, ...] = ()
    if is_loopback(serving.host) and "api_key_file" not in settings:
        # A page that calls itself by a name of its own could otherwise send jobs to this machine.
        hosts = (*_LOOPBACK, *(name.lower() for name in serving.allow_host))
    settings.setdefault("ranks", max(1, serving.gpus_per_replica or 1))
    return ServiceSettings(
        engine=engine_of(given_flags),
        degrees=given(ParallelConfig, given_flags),
        shard_weights=given_flags.get("shard_weights", False),
        allowed_hosts=hosts,
        threads=threads_asked(),
        **settings,
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def read_settings(values: Mapping[str, Any], *classes: type) -> dict[str, Any]:
    """Settings from flags by name and text, as `given_flags` holds them: for programs that start heterostep.

    Args:
        values: flags without dashes before them, and their values.
        classes: the dataclasses that declare them.

    Raises:
        ConfigError: a name that is not a flag, or a value that it does not allow.
    """
    known = {item.flag: item for cls in classes for item in settings_of(cls) if item.flag}
    read: dict[str, Any] = {}
    for name, text in values.items():
        item = known.get(name.replace("_", "-"))
        if item is None:
            raise ConfigError(f"{name!r} is not a setting; it must be one of {', '.join(sorted(known))}")
        try:
            value = value_of(item)(str(text))
        except argparse.ArgumentTypeError as error:
            raise ConfigError(f"{name}: {error}") from None
        read[item.name] = (value,) if item.kind.startswith("tuple") else value
    return read


def _request(given_flags: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a request, with the content of the file that a flag names."""
    settings = given(GenerateRequest, given_flags)
    if "prompt_schedule" in settings:
        name = settings["prompt_schedule"]
        try:
            settings["prompt_schedule"] = Path(name).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise ConfigError(f"--prompt-schedule {name!r} cannot be read ({reason})") from error
    return settings


def _job(settings: dict[str, Any], outputs: Outputs) -> JobConfig | None:
    if "folder" in settings and outputs.compare_dense:
        raise ConfigError("--compare-dense makes two videos, but a job holds one; leave out --job-dir to compare")
    if settings and "folder" not in settings:
        raise ConfigError(f"--{next(iter(settings)).replace('_', '-')} needs a job; name its folder with --job-dir")
    return JobConfig(**settings) if settings else None


def size_of(text: str) -> tuple[int, int]:
    """Width and height in pixels from text such as 832x480, for argparse."""
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT in pixels, such as 832x480, not {text!r}")
    return int(width), int(height)


def add_flags(
    parser: argparse._ActionsContainer,
    cls: type,
    *,
    required: bool = True,
    defaults: bool = True,
    leave_out: Collection[str] = (),
    only: Collection[str] | None = None,
) -> None:
    """Add a flag for each setting of a dataclass.

    A flag that is not given leaves no trace in the namespace, so that the dataclass's own default stands.

    Args:
        parser: a parser, or a group of one.
        cls: the dataclass.
        required: whether a setting without a default must be given.
        defaults: whether `--help` shows the dataclass's defaults; not where the command deduces what is left out.
        leave_out: names of fields that get no flag.
        only: names of the fields that get one; None: all.
    """
    for item in settings_of(cls):
        if item.flag and item.name not in leave_out and (only is None or item.name in only):
            _add_flag(parser, item, required and item.default is dataclasses.MISSING, defaults)


def _add_flag(parser: argparse._ActionsContainer, item: Setting, required: bool, defaults: bool) -> None:
    common: dict[str, Any] = {"dest": item.name, "default": argparse.SUPPRESS, "help": _help(item, defaults)}
    if item.kind.startswith("tuple"):
        parser.add_argument(f"--{item.flag}", action="append", metavar=item.metavar, **common)
    elif item.kind == "bool":
        switch = argparse.BooleanOptionalAction if item.optional or item.default else "store_true"
        parser.add_argument(f"--{item.flag}", action=switch, **common)
    else:
        parser.add_argument(f"--{item.flag}", type=value_of(item), required=required, metavar=item.metavar, **common)


def value_of(item: Setting) -> Callable[[str], Any]:
    """A function that reads a setting from text, for argparse: it refuses what the setting does not allow."""

    def parse(text: str) -> Any:
        value: Any = text
        if item.kind in ("int", "float"):
            try:
                value = int(text) if item.kind == "int" else float(item.meant(text))
            except ValueError:
                value = None
        elif item.kind == "bool":
            value = _WORDS.get(text.lower())
        elif item.kind == "Path":
            value = Path(text)
        if (value is None) or not item.allows(value):
            raise argparse.ArgumentTypeError(f"must be {item.rule}, not {text!r}")
        return value

    return parse


def _help(item: Setting, defaults: bool) -> str:
    default = item.default
    if not defaults or default in (None, "", (), False) or default is dataclasses.MISSING:
        return item.help.replace("%", "%%")
    shown = f"{default:g}" if isinstance(default, float) else default
    return f"{item.help} (default {shown})".replace("%", "%%")


def given(cls: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a dataclass that were given on the command line, by field name."""
    return {item.name: arguments[item.name] for item in settings_of(cls) if item.flag and item.name in arguments}
