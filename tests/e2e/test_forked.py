"""The harness itself: a forked process must be one, or what kills prove is nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

import forked

pytestmark = pytest.mark.skipif(not forked.WORKS, reason="processes are forked on Linux alone")

CODE = """
import os, subprocess, sys
own = os.getpid(), os.getsid(0), os.getcwd(), sorted(os.environ), sys.argv[1:], sys.stdin.read()
print(own, file=sys.stdout)
inner = subprocess.run([sys.executable, "-c", "import torch; print(7)"], capture_output=True)
print("torch" in sys.modules, inner.stdout, file=sys.stderr)
sys.exit(3)
"""


def test_it_has_its_own_of_everything(tmp_path):
    process = forked.Popen(
        [sys.executable, "-P", "-c", CODE, "a"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, cwd=tmp_path, env={"HOME": "/", "X": "1"}, start_new_session=True,
    )  # fmt: skip
    out, err = process.communicate("in", timeout=60)
    assert out == f"{(process.pid, process.pid, str(tmp_path), ['HOME', 'X'], ['a'], 'in')}\n"
    assert err == "True b'7\\n'\n"  # what it starts is forked too, with its output where it belongs
    assert process.returncode == 3


@pytest.mark.parametrize(
    ("code", "status", "says"),
    [
        ("", 0, ""),
        ("raise ValueError('salt')", 1, "ValueError: salt"),
        ("import sys; sys.exit('in words')", 1, "in words"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
    ],
)
def test_how_it_ends(code, status, says):
    done = forked.run([sys.executable, "-c", code], timeout=60)
    assert done.returncode == status and says in done.stderr


def test_signals_and_time_limits():
    process = forked.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env={"NAME": "sleeper"})
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    assert process.poll() is None and forked.find(NAME="sleeper") == process.pid and forked.find(NAME="other") is None
    process.terminate()
    assert process.wait(60) == -signal.SIGTERM and forked.find(NAME="sleeper") is None
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_any_other_command_is_run_as_usual():
    with forked.Popen(["sh", "-c", "echo $PPID"], stdout=subprocess.PIPE, text=True) as process:
        assert int(process.communicate()[0]) == os.getpid()
