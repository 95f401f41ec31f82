"""Structured logs: one JSON object a line, with the job's id wherever there is one."""

from __future__ import annotations

import datetime
import json
import logging
import sys
from typing import Any

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
