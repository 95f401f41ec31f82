"""The peak memory of decoding and encoding does not grow with the number of frames."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[3] / "benchmarks" / "decoding.py"


@pytest.mark.parametrize("kind", ["tiny", "ltx2"])
def test_peak_memory_does_not_grow_with_length(kind):
    # Otherwise glibc keeps freed blocks, some 100 MiB more or less by the order of calls.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    command = [sys.executable, str(SCRIPT), "--here", "--vae", kind, "--frames", "65", "257"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=250, env=environment)
    short, long = (json.loads(line)["peak_mib"] for line in done.stdout.splitlines())
    assert long <= 1.15 * short
