"""The command `heterostep`: its flags, and what people see when something is wrong."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ..benchmarks.quality.settings import QualitySettings
from ..benchmarks.serving.settings import LoadSettings
from ..benchmarks.speed.settings import (
    PRESETS,
    CalibrateSettings,
    OfflineSettings,
    RecoverySettings,
    ResultFiles,
    ScalingSettings,
    StepSettings,
)
from ..engine.config import EngineConfig
from ..engine.facts import read_facts
from ..engine.progress import JsonProgress, Progress
from ..engine.request import GenerateRequest, JobConfig
from ..errors import (
    TOO_LARGE,
    ConfigError,
    HeterostepError,
    JobStopped,
    OutputElsewhere,
    RequestError,
    is_out_of_memory,
)
from ..hsa.config import HSAConfig
from ..parallel.config import ParallelConfig
from ..version import __version__
from .examples import BENCH, DECODE, GENERATE, HETEROSTEP, LOAD, PLAN, SERVE, SPEED
from .options import Batch, Outputs, Ranks, Serving, add_flags, commands_of, given, service_settings, size_of
from .plan import PlanSettings, plan
from .serve import serve
from .service.settings import ServiceSettings

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_ELSEWHERE = 73
"""EX_CANTCREAT of sysexits.h: the video is made, but could not be written to the path that was asked for."""
EXIT_SAVED = 75
"""EX_TEMPFAIL of sysexits.h: the same command resumes later."""
EXIT_INTERRUPTED = 130

_PROMPT = "a red disc moves right"
"""Of a video that has none of its own; the demo model knows it."""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, without a page of usage before it."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Refuse what is unknown here, where the help is, and not in the parser of all commands."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"heterostep: {message}; see `{self.prog} --help`\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; it imports nothing heavy, so that `--help` is quick."""
    parser = _Parser(
        prog="heterostep",
        description="Make videos faster with Wan and LTX-2: compute a share of the denoising work, forecast the rest.",
        epilog=HETEROSTEP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="version", version=f"heterostep {__version__}", help="show the version and exit"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_decode(commands)
    _add_info(commands)
    _add_plan(commands)
    _add_serve(commands)
    _add_bench(commands)
    return parser


def _add_command(commands: argparse._SubParsersAction[_Parser], name: str, purpose: str, epilog: str) -> _Parser:
    return commands.add_parser(
        name,
        help=purpose,
        description=f"{purpose[0].upper()}{purpose[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_generate(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = _add_command(commands, "generate", "make a video from a text, or from a text and an image", GENERATE)
    what = command.add_argument_group("what to make")
    add_flags(what, GenerateRequest, required=False)
    add_flags(what, Batch)
    _add_size(what, "width and height in pixels, such as 832x480")
    how = command.add_argument_group("how to compute it")
    add_flags(how, EngineConfig, leave_out=["shard_weights"])
    add_flags(how, HSAConfig)
    ranks = command.add_argument_group(
        "on how many ranks",
        "A rank is one process, with its own GPU if there are GPUs. Degrees that are left out are chosen.",
    )
    add_flags(ranks, Ranks)
    add_flags(ranks, ParallelConfig, defaults=False)
    add_flags(ranks, EngineConfig, only=["shard_weights"])
    add_flags(command.add_argument_group("what to write"), Outputs)
    job = command.add_argument_group(
        "how to survive interruptions", "With a job, SIGTERM and SIGUSR1 save the current step and exit with code 75."
    )
    add_flags(job, JobConfig, required=False)
    command.set_defaults(run=_generate)


def _add_size(parser: argparse._ActionsContainer, purpose: str) -> None:
    parser.add_argument("--size", type=size_of, default=argparse.SUPPRESS, metavar="WxH", help=purpose)


def _add_decode(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = _add_command(commands, "decode", "make the file of a video from its final latents", DECODE)
    command.add_argument("source", metavar="LATENTS_OR_JOB", help="file of --latents, or folder of --job-dir")
    add_flags(command, GenerateRequest, only=["fps"])
    add_flags(command, EngineConfig, defaults=False, only=["model", "dtype", "device", "vae_tiling"])
    add_flags(command, Outputs, only=["output", "overwrite", "no_clobber", "scale", "quiet"])
    command.set_defaults(run=_decode)


def _add_info(commands: argparse._SubParsersAction[_Parser]) -> None:
    purpose = "show versions, devices, and the sizes and defaults of a model"
    command = _add_command(commands, "info", purpose, "No weights are loaded.")
    add_flags(command, EngineConfig, only=["model"])
    _add_size(command, "count tokens for this size")
    command.add_argument("--frames", type=int, metavar="N", help="count tokens for this many frames")
    command.set_defaults(run=_info)


def _add_plan(commands: argparse._SubParsersAction[_Parser]) -> None:
    purpose = "estimate memory, time and videos per hour on any number of GPUs"
    command = _add_command(commands, "plan", purpose, PLAN)
    add_flags(command.add_argument_group("what for"), PlanSettings)
    _add_size(command, "width and height in pixels, such as 832x480")
    spread = command.add_argument_group("how the work is spread")
    add_flags(spread, HSAConfig, leave_out=["quality"])  # whose work nobody knows beforehand
    ranks = command.add_argument_group("how ranks share a video", "Degrees that are left out are all tried.")
    add_flags(ranks, ParallelConfig, defaults=False, leave_out=["windows", "kernel", "cut"])
    command.set_defaults(run=_plan)


def _add_serve(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = _add_command(commands, "serve", "serve videos over HTTP, with a web page", SERVE)
    what = command.add_argument_group("what to serve, and how to compute it")
    add_flags(what, EngineConfig)
    add_flags(what, HSAConfig)
    add_flags(what, ParallelConfig, defaults=False)
    add_flags(command.add_argument_group("where"), Serving)
    add_flags(command.add_argument_group("who, and how much"), ServiceSettings)
    command.set_defaults(run=_serve)


def _add_bench(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = _add_command(commands, "bench", "measure on your own weights and machine", BENCH)
    kinds = command.add_subparsers(dest="bench", metavar="WHAT", required=True)
    purpose = "compare videos at a share of the work with the dense ones of the same prompts"
    quality = _add_command(kinds, "quality", purpose, BENCH)
    add_flags(quality.add_argument_group("what to measure"), QualitySettings)
    _add_videos(quality, without=["policy", "compute", "quality"], ranks=["nproc"])
    quality.set_defaults(run=_bench)
    serving = _add_command(kinds, "serving", "put load on a running service of OpenAI's video API", LOAD)
    add_flags(serving, LoadSettings)
    serving.set_defaults(run=_bench_serving)
    for verb, purpose, settings in _VIDEO_VERBS:
        _add_video_verb(_add_command(kinds, verb, purpose, SPEED), verb, settings)
    for verb, purpose, settings in _MODEL_VERBS:
        command = _add_command(kinds, verb, purpose, SPEED)
        add_flags(command, settings)
        add_flags(command, ResultFiles)
        command.set_defaults(run=_bench_model, settings=settings)


_VIDEO_VERBS: tuple[tuple[str, str, type], ...] = (
    ("offline", "make videos one after the other: videos per hour and GPU-hour, GPU seconds, joules", OfflineSettings),
    ("single-stream", "the same with one video at a time: the time of a video", OfflineSettings),
    ("scaling", "divide GPUs in all ways, into replicas and into ranks that share a video", ScalingSettings),
    ("recovery", "kill or freeze ranks in the midst of jobs: time to the next step, goodput", RecoverySettings),
)
_MODEL_VERBS: tuple[tuple[str, str, type], ...] = (
    ("step", "time a random model's steps against the share of active tokens, and by part", StepSettings),
    ("calibrate", "measure this device's constants for `plan --gpu FILE`", CalibrateSettings),
)


def _add_video_verb(command: _Parser, verb: str, settings: type) -> None:
    add_flags(command.add_argument_group("what to measure"), settings)
    add_flags(command.add_argument_group("what to write"), ResultFiles)
    without = [] if verb == "recovery" else ["compute", "quality"]
    _add_videos(command, without, ranks={"scaling": [], "recovery": ["nproc", "ray"]}.get(verb, ["nproc"]))
    command.set_defaults(run=_bench_videos, verb=verb, settings=settings)


def _add_videos(command: _Parser, without: Sequence[str], ranks: Sequence[str]) -> None:
    """Flags of what a benchmark's videos have in common: `without` these of `HSAConfig`, and these of `Ranks` alone."""
    what = command.add_argument_group("what all videos have in common")
    add_flags(what, GenerateRequest, leave_out=["prompt"])
    _add_size(what, "width and height in pixels, such as 832x480")
    how = command.add_argument_group("how to compute them")
    add_flags(how, EngineConfig, leave_out=["shard_weights"])
    add_flags(how, HSAConfig, leave_out=without)
    several = command.add_argument_group("on how many ranks")
    add_flags(several, Ranks, only=ranks)
    add_flags(several, ParallelConfig, defaults=False)
    add_flags(several, EngineConfig, only=["shard_weights"])


def _generate(arguments: argparse.Namespace) -> int:
    commands = commands_of(arguments)
    with progress_for(commands[0].outputs) as progress:
        if "torch" not in sys.modules:
            progress.stage("loading PyTorch")
        from .generate import generate

        try:
            return generate(commands, progress)
        except BaseException as error:
            if said := explain(error):
                progress.tell("error", text=said[0], exit_code=said[1])
            raise


def progress_for(outputs: Outputs, leads: bool = True) -> Progress:
    """What shows how far `generate` is; nothing on a rank that does not lead."""
    if outputs.json and leads:
        return JsonProgress()
    return Progress(leads and not outputs.quiet and not outputs.json)


def _decode(arguments: argparse.Namespace) -> int:
    given_flags = vars(arguments)
    outputs = Outputs(**given(Outputs, given_flags))
    with Progress(not outputs.quiet) as progress:
        progress.stage("loading PyTorch")
        from .decode import decode

        return decode(given_flags, outputs, progress)


def _info(arguments: argparse.Namespace) -> int:
    from .info import info

    config = EngineConfig(**given(EngineConfig, vars(arguments)))
    return info(config.model, getattr(arguments, "size", None), arguments.frames)


def _bench(arguments: argparse.Namespace) -> int:
    given_flags = vars(arguments)
    settings = QualitySettings(**given(QualitySettings, given_flags))
    # Every prompt takes the place of this one.
    asked = {name: value for name, value in given_flags.items() if name not in ("prompts", "count")}
    (command,) = commands_of(argparse.Namespace(**{**asked, "prompt": "-", "output": Outputs.output}))
    with Progress(True) as progress:
        progress.stage("loading PyTorch")
        from .bench import bench_quality

        return bench_quality(settings, command, arguments.said, progress)


def _bench_serving(arguments: argparse.Namespace) -> int:
    from .bench_serving import bench_serving

    settings = LoadSettings(**given(LoadSettings, vars(arguments)))
    with Progress(True) as progress:
        return bench_serving(settings, arguments.said, progress)


def _bench_videos(arguments: argparse.Namespace) -> int:
    given_flags = vars(arguments)
    verb, settings = arguments.verb, arguments.settings(**given(arguments.settings, given_flags))
    files = ResultFiles(**given(ResultFiles, given_flags))
    asked = {name: value for name, value in given_flags.items() if name not in ("prompts", "count")}
    preset = dict(PRESETS.get(getattr(settings, "preset", None) or "", {}))
    if preset:
        asked.setdefault("size", (preset.pop("width"), preset.pop("height")))
        if "seconds" in asked:
            preset.pop("num_frames")
        if read_facts(asked.get("model", EngineConfig.model)).experts == 1:  # which the result then says
            preset.pop("guidance_scale_2")
    (command,) = commands_of(argparse.Namespace(**{**preset, **asked, "prompt": _PROMPT, "output": Outputs.output}))
    with Progress(True) as progress:
        progress.stage("loading PyTorch")
        if verb == "recovery":
            from .bench_recovery import bench_recovery

            return bench_recovery(settings, files, command, arguments.said, progress)
        from .bench_speed import bench_offline, bench_scaling

        if verb == "scaling":
            return bench_scaling(settings, files, command, arguments.said, progress)
        return bench_offline(settings, files, command, arguments.said, progress, verb)


def _bench_model(arguments: argparse.Namespace) -> int:
    given_flags = vars(arguments)
    settings = arguments.settings(**given(arguments.settings, given_flags))
    files = ResultFiles(**given(ResultFiles, given_flags))
    with Progress(True) as progress:
        progress.stage("loading PyTorch")
        from .bench_step import bench_calibrate, bench_step

        if arguments.settings is StepSettings:
            return bench_step(settings, files, arguments.said, progress)
        return bench_calibrate(settings, files, arguments.said, progress)


def _plan(arguments: argparse.Namespace) -> int:
    given_flags = vars(arguments)
    settings, hsa = PlanSettings(**given(PlanSettings, given_flags)), HSAConfig(**given(HSAConfig, given_flags))
    return plan(settings, hsa, given(ParallelConfig, given_flags), getattr(arguments, "size", None))


def _serve(arguments: argparse.Namespace) -> int:
    given_flags = vars(arguments)
    return serve(service_settings(given_flags), Serving(**given(Serving, given_flags)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments without the program's name; None takes those of the process.

    Returns:
        0 on success, 2 for bad input, 73 for a video that could not be written where it was asked to be, 75 for a job
        that was saved and can resume, 130 after Ctrl-C, 1 for any other foreseen failure; each of these but 0 with one
        sentence on stderr.
    """
    # Must be set before PyTorch is imported. Busy-waiting OpenMP threads starve the others: on a loaded machine small
    # models ran fifty times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        given = sys.argv[1:] if argv is None else list(argv)
        arguments = build_parser().parse_args(given)
        arguments.said = given
        status: int = arguments.run(arguments)
        return status
    except BaseException as error:
        said = explain(error)
        if said is None:
            raise
        return fail(*said)


def explain(error: BaseException) -> tuple[str, int] | None:
    """Return the sentence and the exit code for a foreseen error; None for an unforeseen one."""
    if isinstance(error, ConfigError | RequestError):
        return str(error), EXIT_BAD_INPUT
    if isinstance(error, OutputElsewhere):
        return str(error), EXIT_ELSEWHERE
    if isinstance(error, JobStopped):
        return str(error), EXIT_SAVED
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted{error}", EXIT_INTERRUPTED
    if is_out_of_memory(error):
        return TOO_LARGE, EXIT_FAILED
    if isinstance(error, HeterostepError | OSError):
        return str(error) or type(error).__name__, EXIT_FAILED
    return None


def fail(message: str, status: int) -> int:
    """Print a sentence to stderr, and return the exit code."""
    print(f"heterostep: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return status
