"""`heterostep bench serving`: measures a running service, says what came out, and writes it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from ..benchmarks.results import result as results
from ..benchmarks.serving.report import result, table
from ..benchmarks.serving.run import measure
from ..benchmarks.serving.settings import LoadSettings
from ..engine.progress import Progress
from ..errors import HeterostepError


def bench_serving(settings: LoadSettings, said: Sequence[str], progress: Progress) -> int:
    """Run the command; returns the exit code.

    Args:
        settings: the service and the requests.
        said: the command's arguments, which the result names.
        progress: shows how far it is.

    Raises:
        ConfigError: a file that the settings name cannot be used.
        HeterostepError: no request was completed; the result is printed and written nevertheless.
        KeyboardInterrupt: it was stopped; the same holds.
    """
    files, environment = results.Files(settings.output_file, settings.compare), results.environment()
    command = shlex.join(["heterostep", *said])
    found = result(settings, measure(settings, progress.say), command, environment)
    print(table(found))
    written = files.finish(found)
    for line in (*results.said_changes(found), *(f"wrote {path}" for path in written)):
        progress.say(line)
    if found["interrupted"]:
        raise KeyboardInterrupt("; the result has what was measured until then")
    if not found["completed_requests"]:
        raise HeterostepError(f"no request was completed: {', '.join(found['errors'])}")
    return 0
