"""The command `heterostep`: its flags, and what people see when something is wrong."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from ..errors import TOO_LARGE, ConfigError, HeterostepError, RequestError, is_out_of_memory
from .signals import JobStopped

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_SAVED = 75
"""EX_TEMPFAIL of sysexits.h: the same command goes on later."""
EXIT_INTERRUPTED = 130

_EPILOG = """\
examples:
  heterostep generate --prompt "a red disc moves right" --compute 0.5
  heterostep generate --prompt "a cat on a beach" --model ./Wan2.1-T2V-1.3B-Diffusers --output cat.mp4
  heterostep generate --prompt "it jumps" --image cat.jpg --model ./Wan2.2-TI2V-5B-Diffusers --output cat.mp4
  heterostep info --model demo
  heterostep serve --no-ray --data-dir ./videos

`heterostep COMMAND --help` explains the flags of a command.
"""

_GENERATE_EPILOG = """\
examples:
  half of the work, and a picture of where it went:
    heterostep generate --prompt "a red disc moves right" --compute 0.5 --output v.mp4 --heatmap h.mp4
  what does it save, and what does it cost?
    heterostep generate --prompt "a red disc moves right" --compute 0.33 --compare-dense --report r.json
  on two ranks of this machine:
    heterostep generate --prompt "a red disc moves right" --nproc 2 --ulysses 2 --output two.mp4
  on a gang of ranks that replaces those that die:
    heterostep generate --prompt "a red disc moves right" --ray --nproc 2 --output two.mp4
  a long one, to be given again after whatever broke it off:
    heterostep generate --prompt "a red disc moves right" --job-dir disc --output disc.mp4

Whatever is left out takes the model's own default; `heterostep info --model M` shows them.
"""


_SERVE_EPILOG = """\
examples:
  on this machine, without Ray: API and web page at http://127.0.0.1:8000/
    heterostep serve --no-ray --data-dir ./videos
  two replicas of one GPU each on Ray Serve, for everybody who has a key:
    heterostep serve --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --replicas 2 --gpus-per-replica 1 \\
        --host 0.0.0.0 --api-key-file keys.txt --data-dir /srv/videos

docs/serving.md describes the API, the settings, and what is lost when.
"""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, without a page of usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"heterostep: {message}; see `{self.prog} --help`\n")


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text!r}")
        return value

    return parse


def _share(text: str) -> float:
    value = _float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1 (1 is dense), not {text!r}")
    return value


def _scale(text: str) -> float:
    value = _float(text)
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"must be a finite number of at least 0, not {text!r}")
    return value


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None


def _size(text: str) -> tuple[int, int]:
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT in pixels, such as 832x480, not {text!r}")
    return int(width), int(height)


class _Version(argparse.Action):
    """Looks the version up when it is asked for, not at every start."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("heterostep")
        except PackageNotFoundError:  # a checkout on the path, not installed
            number = "of this checkout"
        print("heterostep", number)
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; it imports nothing heavy, so that `--help` is quick."""
    parser = _Parser(
        prog="heterostep",
        description="Make videos sooner: every token gets its own number of denoising steps.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_info(commands)
    _add_serve(commands)
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
    command = _add_command(
        commands, "generate", "make a video from a text, or from a text and an image", _GENERATE_EPILOG
    )
    what = command.add_argument_group("what to make")
    what.add_argument("--prompt", required=True, metavar="TEXT", help="what the video shows")
    what.add_argument("--image", metavar="FILE", help="png, jpg or webp that it starts from, for models that take one")
    what.add_argument("--negative-prompt", default="", metavar="TEXT", help="what it should not show")
    what.add_argument("--size", type=_size, metavar="WxH", help="width and height in pixels, such as 832x480")
    what.add_argument("--frames", type=_whole(1), metavar="N", help="number of frames (for Wan 4k + 1)")
    what.add_argument("--fps", type=_whole(1), metavar="N", help="frames per second of the file")
    what.add_argument("--steps", type=_whole(1), metavar="N", help="denoising steps")
    what.add_argument("--guidance", type=_scale, metavar="G", help="guidance scale; 1 or less is without guidance")
    what.add_argument("--seed", type=_whole(0), default=0, metavar="N", help="seed of the initial noise (default 0)")

    how = command.add_argument_group("how to compute it")
    how.add_argument("--model", default="demo", metavar="M", help="'demo' (default), a folder, or a hub id")
    how.add_argument(
        "--compute",
        type=_share,
        default=0.5,
        metavar="C",
        help="share of dense work, above 0 to 1 (default 0.5)",
    )
    how.add_argument("--policy", metavar="P", help="how the share is spent: joint (default), tokens, groups or steps")
    how.add_argument("--solver", metavar="S", help="euler, unipc or dpm++ (default: the model's own scheduler)")
    how.add_argument(
        "--forecast",
        metavar="F",
        help="what skipped steps assume: taylor (default) follows the dense run, ab2 (with euler) the exact solution, "
        "hold is the paper's",
    )
    how.add_argument("--dtype", default="auto", metavar="T", help="auto (default), float32, bfloat16 or float16")
    how.add_argument("--device", default="auto", metavar="D", help="auto (default), cpu, cuda or cuda:N")

    ranks = command.add_argument_group(
        "on how many ranks",
        "A rank is a process, with a GPU of its own where there are any. Degrees that are left out are chosen.",
    )
    ranks.add_argument("--nproc", type=_whole(1), metavar="P", help="start P ranks on this machine (default 1)")
    ranks.add_argument(
        "--ray",
        action="store_true",
        help="start them as a gang of Ray actors, in which a rank that dies is replaced and the video goes on",
    )
    ranks.add_argument(
        "--ray-address", metavar="A", help="the same on a running Ray cluster, such as auto or HOST:PORT"
    )
    ranks.add_argument("--ulysses", type=_whole(1), metavar="U", help="ranks that share the heads; must divide them")
    ranks.add_argument("--ring", type=_whole(1), metavar="R", help="ranks that share the tokens; any number")
    ranks.add_argument("--cfg", type=_whole(1), metavar="C", help="2: one guidance branch for each half of the ranks")
    ranks.add_argument(
        "--ring-cache",
        metavar="F",
        help="gathered: every ring rank keeps all K/V; sharded: its own range, queries travel; auto (default)",
    )
    ranks.add_argument("--cut", metavar="C", help="equal (default), or measured: faster ranks get more tokens")
    ranks.add_argument(
        "--shard-weights",
        action="store_true",
        help="each rank keeps a part of the weights: less memory, more traffic",
    )
    ranks.add_argument("--kernel", metavar="K", help="attention: auto (default), sdpa, flash, flash3 or xfuser")

    out = command.add_argument_group("what to write")
    out.add_argument("--output", default="video.mp4", metavar="FILE", help="the video (default video.mp4)")
    out.add_argument("--heatmap", metavar="FILE", help="mp4: the video beside a map of evaluations per token")
    out.add_argument("--latents", metavar="FILE", help="safetensors: the final latents")
    out.add_argument("--report", metavar="FILE", help="json: settings, versions, times, steps, evaluations")
    out.add_argument(
        "--scale",
        type=_whole(1),
        default=1,
        metavar="N",
        help="enlarge the pixels of the video N times (default 1)",
    )
    out.add_argument(
        "--compare-dense",
        action="store_true",
        help="make the dense video too; say what was saved and what it cost",
    )
    out.add_argument("--quiet", action="store_true", help="print nothing but errors")

    job = command.add_argument_group("how to survive a break", "SIGTERM and SIGUSR1 then save and exit with 75.")
    job.add_argument("--job-dir", metavar="DIR", help="keep checkpoints here; the same command goes on where it was")
    job.add_argument("--checkpoint-every", type=_whole(1), metavar="K", help="steps between checkpoints (default 5)")
    job.add_argument(
        "--resume", metavar="R", help="auto (default): go on where DIR's newest checkpoint is; never: begin anew"
    )
    command.set_defaults(run=_generate, rank=None)


def _add_info(commands: argparse._SubParsersAction[_Parser]) -> None:
    purpose = "show versions, devices, and the sizes and defaults of a model"
    command = _add_command(commands, "info", purpose, "No weights are loaded.")
    command.add_argument("--model", default="demo", metavar="M", help="'demo' (default), a folder, or a hub id")
    command.add_argument("--size", type=_size, metavar="WxH", help="count tokens for this size")
    command.add_argument("--frames", type=_whole(1), metavar="N", help="count tokens for this many frames")
    command.set_defaults(run=_info)


def _add_serve(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = _add_command(commands, "serve", "serve videos over HTTP, with a web page", _SERVE_EPILOG)
    what = command.add_argument_group("what to serve")
    what.add_argument("--model", default="demo", metavar="M", help="'demo' (default), a folder, or a hub id")
    what.add_argument(
        "--compute", type=_share, default=0.5, metavar="C", help="share of dense work where a request says none (0.5)"
    )
    what.add_argument("--policy", default="joint", metavar="P", help="how it is spent: joint, tokens, groups or steps")
    what.add_argument("--dtype", default="auto", metavar="T", help="auto (default), float32, bfloat16 or float16")
    what.add_argument("--device", default="auto", metavar="D", help="auto (default), cpu, cuda or cuda:N")

    where = command.add_argument_group("where")
    where.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen on (default: this machine)")
    where.add_argument("--port", type=_whole(0), default=8000, metavar="N", help="port (default 8000; 0 takes any)")
    where.add_argument(
        "--root-path", default="", metavar="P", help="behind a proxy: path of the site, such as /video (default: none)"
    )
    where.add_argument(
        "--data-dir", default="heterostep-data", metavar="DIR", help="jobs and results (default ./heterostep-data)"
    )
    where.add_argument("--replicas", type=_whole(1), default=1, metavar="R", help="models at work at once (default 1)")
    where.add_argument("--no-ray", action="store_true", help="one service process with its workers, without Ray")
    where.add_argument("--ray-address", metavar="A", help="a running Ray cluster, such as auto; else one is started")
    where.add_argument(
        "--gpus-per-replica",
        type=_whole(0),
        metavar="W",
        help="on Ray: GPUs for each (default 1 where there are any); from 2 on W ranks make each video together, on "
        "CPUs where there are no GPUs",
    )
    where.add_argument(
        "--checkpoint-every",
        type=_whole(1),
        default=5,
        metavar="K",
        help="steps after which a job is saved (default 5)",
    )

    who = command.add_argument_group("who, and how much")
    who.add_argument("--api-key-file", metavar="F", help="a key a line, with a name before it; else everybody may call")
    who.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="on a loopback address without keys: a further name that browsers may use; may be repeated",
    )
    who.add_argument("--max-queue", type=_whole(1), default=100, metavar="N", help="videos in the queue (default 100)")
    who.add_argument("--max-prompt", type=_whole(1), default=4000, metavar="N", help="characters (default 4000)")
    who.add_argument(
        "--max-pixels", type=_whole(1), metavar="N", help="width x height x frames (default: 4 x the model's)"
    )
    who.add_argument("--max-frames", type=_whole(1), metavar="N", help="frames (default 4 x the model's)")
    who.add_argument("--max-steps", type=_whole(1), metavar="N", help="denoising steps (default 4 x the model's)")
    who.add_argument("--keep-days", type=_scale, default=30.0, metavar="N", help="finished videos stay (default 30)")
    who.add_argument("--keep-gib", type=_scale, default=20.0, metavar="N", help="as long as all fit into (default 20)")
    command.set_defaults(run=_serve)


def _generate(arguments: argparse.Namespace) -> int:
    from .generate import generate

    return generate(arguments)


def _info(arguments: argparse.Namespace) -> int:
    from .info import info

    return info(arguments)


def _serve(arguments: argparse.Namespace) -> int:
    from .serve import serve

    return serve(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments without the program's name; None takes those of the process.

    Returns:
        0 on success, 2 for bad input, 75 for a job that was saved and can go on, 130 after Ctrl-C, 1 for any other
        foreseen failure; each of these but 0 with one sentence on stderr.
    """
    # Read when PyTorch is imported, which no command has done yet. Threads that wait spinning take the processor from
    # the ones that they wait for, and beside any other busy program a small model is fifty times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        given = sys.argv[1:] if argv is None else list(argv)
        arguments = build_parser().parse_args(given)
        arguments.given = given[1:]
        status: int = arguments.run(arguments)
        return status
    except BaseException as error:
        said = explain(error)
        if said is None:
            raise
        return _fail(*said)


def explain(error: BaseException) -> tuple[str, int] | None:
    """Return the sentence and the exit code for a foreseen error; None for one that nobody foresaw."""
    if isinstance(error, ConfigError | RequestError):
        return str(error), EXIT_BAD_INPUT
    if isinstance(error, JobStopped):
        return str(error), EXIT_SAVED
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted{error}", EXIT_INTERRUPTED
    if is_out_of_memory(error):
        return TOO_LARGE, EXIT_FAILED
    if isinstance(error, HeterostepError | OSError):
        return str(error) or type(error).__name__, EXIT_FAILED
    return None


def _fail(message: str, status: int) -> int:
    print(f"heterostep: {' '.join(message.split())}", file=sys.stderr)
    return status
