"""One rank of `torchrun --nproc-per-node P -m heterostep.launch.torchrun ...`, which takes the flags of `generate`.

torchrun starts the ranks, and starts all of them again when one has failed: there is no driver. A rank that fails tells
the others why, and those that wait for it in a collective end themselves.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ..errors import ConfigError, RequestError
from .cli import EXIT_BAD_INPUT, EXIT_FAILED, build_parser, explain, fail, progress_for
from .options import commands_of


def main(argv: Sequence[str] | None = None) -> int:
    """Run as one rank.

    Returns:
        The exit code of `heterostep generate`. What is wrong for all ranks alike is said by rank 0 alone; what one rank
        alone meets, it tells the others, which then end too.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    try:
        commands = commands_of(build_parser().parse_args(["generate", *given]))
    except (ConfigError, RequestError) as error:
        # Alike on all ranks; that it is said once needs no meeting.
        return fail(str(error), EXIT_BAD_INPUT) if os.environ.get("RANK", "0") == "0" else EXIT_BAD_INPUT
    command, leads = commands[0], os.environ.get("RANK", "0") == "0"
    if command.ranks.nproc is not None:
        return fail("--nproc is for `heterostep generate`; torchrun itself starts the ranks", EXIT_BAD_INPUT)
    progress = progress_for(command.outputs, leads)
    with progress:
        progress.stage("loading PyTorch")
        from .generate import generate
        from .workers.rendezvous import joined

    try:
        with joined(command.engine.device) as rank:
            try:
                with progress:
                    return generate(commands, progress, rank)
            except BaseException as error:
                said = explain(error)
                if said:
                    progress.tell("error", text=said[0], exit_code=said[1])
                if isinstance(error, ConfigError | RequestError):
                    rank.fail(str(error))
                    return fail(*said) if rank.leads and said else EXIT_BAD_INPUT
                if isinstance(error, Exception):
                    # A connection that broke says only that some rank has ended: that one knows why.
                    reason = rank.wait_for_failure()
                    rank.fail(str(error) if said else f"rank {rank.rank}: {type(error).__name__}: {error}")
                    said = (f"rank {rank.rank} ends: {reason}", EXIT_FAILED) if reason else said
                if said is None:
                    raise
                return fail(*said)
    except ConfigError as error:
        return fail(str(error), EXIT_BAD_INPUT)


if __name__ == "__main__":
    sys.exit(main())
