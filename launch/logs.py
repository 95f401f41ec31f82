"""Logs: the libraries' hints are turned off in a terminal; the service writes one JSON object a line.

A line of the service bears the job's id wherever there is one.
"""

from __future__ import annotations

import datetime
import json
import logging
import sys
import warnings
from importlib import import_module
from typing import Any


def silence_libraries(*names: str, downloads: bool = True) -> None:
    """Turn off what the libraries say.

    Args:
        names: of libraries whose hints are turned off, and which are imported for it; all of them without any.
        downloads: whether the bars of the hub's downloads are shown.
    """
    warnings.simplefilter("ignore")
    for name in names or ("diffusers", "huggingface_hub", "transformers"):
        import_module(f"{name}.utils.logging").set_verbosity_error()
    if not downloads:
        import_module("huggingface_hub.utils").disable_progress_bars()


LOGGER = "heterostep.service"


class JsonLines(logging.Formatter):
    """A record as one line of JSON: time, level, event, and whatever `say` was given."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname.lower(), "event": record.getMessage()}
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_json_lines() -> None:
    """Send the service's and the web server's records to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    # All libraries: a warning of one must not come as a line of plain text in between.
    logging.getLogger().handlers = [handler]
    for name in (LOGGER, "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
    # One line for each connection that opens and closes says nothing.
    logging.getLogger("uvicorn.access").disabled = True


def say(event: str, level: int = logging.INFO, *, exc_info: bool = False, **fields: Any) -> None:
    """Log an event. Prompts and keys have no business here: ids, numbers and reasons only."""
    logging.getLogger(LOGGER).log(level, event, exc_info=exc_info, extra={"fields": fields})
