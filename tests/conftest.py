"""Makes the builders in this folder importable and keeps every test offline and single-threaded."""

import gc
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

import feature_table


def pytest_addoption(parser):
    parser.addoption("--write-feature-table", action="store_true", help="write the table of docs/models.md")


def pytest_configure(config):
    gc.disable()
    config.addinivalue_line("markers", "feature(name): a row of the table of docs/models.md; needs a parameter family")
    config.addinivalue_line("markers", "slow: on a Ray cluster, or long; `make test` leaves it to `make test-slow`")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    feature_table.note_collected(config, items)


def pytest_collection_finish():
    # A million objects of libraries live as long as the tests: to search them for garbage took an eighth of the time.
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    feature_table.note_outcome(item, report)
    return report


def pytest_sessionfinish(session, exitstatus):
    # Each worker of pytest-xdist sees only a part of what ran.
    outcomes = session.config.stash.get(feature_table.OUTCOMES, {})
    if session.config.getoption("--write-feature-table") and exitstatus == 0 and outcomes:
        assert not hasattr(session.config, "workerinput"), "--write-feature-table needs one process: leave out -n"
        feature_table.write(outcomes)


@pytest.fixture(autouse=True, scope="session")
def _quiet_single_thread():
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
