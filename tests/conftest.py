"""Makes the builders in this folder importable and keeps every test offline and single-threaded."""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import pytest
import torch

# A shell ignores Ctrl-C for what it starts in the background, and children inherit that: tests of it would wait.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

sys.path.insert(0, str(Path(__file__).parent))  # tests/tiny.py, tests/reference.py


@pytest.fixture(autouse=True, scope="session")
def _quiet_single_thread():
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
