"""Commands on several ranks, as a user gives them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from heterostep.launch.cli import main

PROMPT = ("--prompt", "a red disc moves right", "--seed", "7", "--steps", "8")
GENERATE = (sys.executable, "-m", "heterostep", "generate", *PROMPT)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


def run(command, *flags, cwd, timeout=240, **settings):
    return subprocess.run(
        [*command, *map(str, flags)], cwd=cwd, timeout=timeout, capture_output=True, text=True, check=False, **settings
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Latents of one rank."""
    folder = tmp_path_factory.mktemp("alone")
    done = run(GENERATE, "--output", "v.mp4", "--latents", "l.safetensors", cwd=folder)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "l.safetensors")["latents"]


@pytest.mark.parametrize(
    "degrees",
    [
        ("--nproc", 2, "--ulysses", 2),
        ("--nproc", 2, "--ring", 2, "--ring-cache", "sharded", "--shard-weights"),
    ],
    ids=lambda degrees: " ".join(map(str, degrees)),
)
def test_many_ranks_make_the_video_of_one(alone, tmp_path, degrees):
    done = run(
        GENERATE, *degrees, "--output", "v.mp4", "--latents", "l.safetensors", "--report", "r.json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    latents = load_file(tmp_path / "l.safetensors")["latents"]
    assert (latents - alone).abs().max() < 1e-4
    report = json.loads((tmp_path / "r.json").read_text())
    assert len(report["ranks"]) == degrees[1]
    assert all(rank["weight_bytes"] > 0 and rank["peak_bytes"] > 0 for rank in report["ranks"])
    evaluated = [step for step in report["steps"] if step["active"]]
    assert all(step["parallel"]["imbalance"] < 1.1 and step["parallel"]["sent"] for step in evaluated)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--nproc", 3, "--ulysses", 3), "one of 1, 2, 4"),
        (("--nproc", 2, "--ulysses", 4), "product must be equal"),
        (("--ulysses", 2), "job of 1"),
        (("--shard-weights",), "several ranks"),
        (("--nproc", 2, "--cfg", 2, "--guidance", 1), "cfg=2 with 1 guidance branch"),
        (("--nproc", 2, "--kernel", "flash"), "flash"),
        (("--nproc", 2, "--ring-cache", "everywhere"), "one of auto, gathered, sharded"),
        (("--nproc", 2, "--size", "13x17"), "multiple"),
        (("--nproc", 2, "--model", "no/such/folder"), "no/such/folder"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, capsys, flags, says):
    # Said before any rank is started.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("heterostep.launch.generate.run_ranks", lambda *_, **__: pytest.fail("ranks were started"))
    assert main(["generate", *PROMPT, *map(str, flags)]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_bad_input_under_torchrun_ends_all_ranks(tmp_path):
    started = time.monotonic()
    done = run(
        TORCHRUN, "--nproc-per-node", 2, "-m", "heterostep.launch.torchrun", *PROMPT, "--ulysses", 4, cwd=tmp_path
    )
    assert done.returncode != 0
    assert done.stderr.count("heterostep: cfg 1 x ring 1 x ulysses 4") == 1
    assert time.monotonic() - started < 120


def rank_of(parent, rank):
    """Process number of a rank below `parent`; None while there is none."""
    for folder in Path("/proc").iterdir():
        try:
            environ = (folder / "environ").read_bytes().split(b"\0") if folder.name.isdigit() else []
        except OSError:
            continue
        if f"RANK={rank}".encode() in environ and f"HETEROSTEP_TEST={parent}".encode() in environ:
            return int(folder.name)
    return None


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="ranks are found in /proc")
def test_a_killed_rank_is_replaced(tmp_path):
    job = ("--job-dir", "job", "--checkpoint-every", "2", "--latents", "l.safetensors", "--output", "v.mp4")
    steps = ("--prompt", "a red disc moves right", "--seed", "7", "--steps", "30")
    command = (*TORCHRUN, "--nproc-per-node", "2", "--max-restarts", "3", "-m", "heterostep.launch.torchrun", *steps)
    whole = run((*command, *job), cwd=_folder(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr

    folder = _folder(tmp_path / "broken")
    name = str(time.time_ns())
    process = subprocess.Popen([*command, *job], cwd=folder, env=os.environ | {"HETEROSTEP_TEST": name})
    progress = folder / "job" / "progress.jsonl"
    while not progress.exists() or len(progress.read_text().splitlines()) < 9:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(rank_of(name, 1), signal.SIGKILL)
    assert process.wait(240) == 0
    assert torch.equal(
        load_file(folder / "l.safetensors")["latents"], load_file(tmp_path / "whole" / "l.safetensors")["latents"]
    )
    lines = [json.loads(line) for line in progress.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(30))


def _folder(path):
    path.mkdir()
    return path


FAILING = """
import os, sys
import heterostep.hsa.velocity as velocity
original = velocity.VelocityCache.merged
calls = []
def merged(self, *arguments):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) > 5:
        raise ArithmeticError("a fault of one rank")
    return original(self, *arguments)
velocity.VelocityCache.merged = merged
from heterostep.launch.torchrun import main
sys.exit(main())
"""


def test_an_exception_of_one_rank_ends_all(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    done = run((*TORCHRUN, "--nproc-per-node", "2", "failing.py", *PROMPT), cwd=tmp_path)
    assert done.returncode != 0
    found = re.search(r"rank 1 of 2 failed after \d+ steps: ArithmeticError: a fault of one rank", done.stderr)
    assert found, done.stderr
    assert "rank 0 ends: rank 1 of 2 failed" in done.stderr or "rank 0 stops: rank 1 of 2 failed" in done.stderr


LONG = ("--prompt", "a red disc moves right", "--seed", "7", "--steps", "30", "--output", "v.mp4")
LONG += ("--latents", "l.safetensors", "--job-dir", "job", "--checkpoint-every", "3")


def begun(folder, name, *degrees, lines=8):
    """Start a job on ranks, and wait until some steps are done."""
    process = subprocess.Popen(
        [sys.executable, "-m", "heterostep", "generate", *LONG, *map(str, degrees)],
        cwd=folder, env=os.environ | {"HETEROSTEP_TEST": name}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    progress = folder / "job" / "progress.jsonl"
    while not progress.exists() or len(progress.read_text().splitlines()) < lines:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    return process


def test_a_stopped_job_goes_on_with_other_degrees(tmp_path):
    degrees = ("--nproc", 2, "--cfg", 2)
    whole = run([sys.executable, "-m", "heterostep", "generate", *LONG], cwd=_folder(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    folder = _folder(tmp_path / "broken")
    process = begun(folder, "", *degrees)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "it was saved at step" in err
    done = run([sys.executable, "-m", "heterostep", "generate", *LONG], cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "going on after step" in done.stdout
    latents = [load_file(path / "l.safetensors")["latents"] for path in (folder, tmp_path / "whole")]
    assert (latents[0] - latents[1]).abs().max() < 1e-4
    lines = [json.loads(line) for line in (folder / "job" / "progress.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(30))
    again = run([sys.executable, "-m", "heterostep", "generate", *LONG, *map(str, degrees)], cwd=folder)
    assert again.returncode == 0 and "finished; nothing was computed" in again.stdout


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="ranks are found in /proc")
def test_local_ranks_start_again_after_a_kill(tmp_path):
    name = str(time.time_ns())
    process = begun(tmp_path, name, "--nproc", 2, "--ring", 2)
    os.kill(rank_of(name, 0), signal.SIGKILL)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "starting again" in err
    whole = run(
        [sys.executable, "-m", "heterostep", "generate", *LONG, "--nproc", "2", "--ring", "2"],
        cwd=_folder(tmp_path / "whole"),
    )
    assert whole.returncode == 0, whole.stderr
    assert torch.equal(*(load_file(path / "l.safetensors")["latents"] for path in (tmp_path, tmp_path / "whole")))
