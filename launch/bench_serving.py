"""`heterostep bench serving`: measures a running service, says what came out, and writes it."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from ..benchmarks.serving.report import result, table
from ..benchmarks.serving.run import measure
from ..benchmarks.serving.settings import LoadSettings
from ..engine.progress import Progress
from ..errors import ConfigError, HeterostepError


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
    output = None if settings.output_file is None else Path(settings.output_file)
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise ConfigError(f"output_file {settings.output_file!r} must be a file in an existing folder")
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    found = {"command": shlex.join(["heterostep", *said])} | result(settings, measure(settings, progress.say), load)
    print(table(found))
    if output is not None:
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        progress.say(f"wrote {output}")
    if found["interrupted"]:
        raise KeyboardInterrupt("; the result has what was measured until then")
    if not found["completed_requests"]:
        raise HeterostepError(f"no request was completed: {', '.join(found['errors'])}")
    return 0
