"""Waiting for what other threads and processes do."""

from __future__ import annotations

import time


def until(condition, timeout: float = 30) -> object:
    """Wait until a function returns something true; returns it."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {timeout} s in vain"
        time.sleep(0.02)
    return value
