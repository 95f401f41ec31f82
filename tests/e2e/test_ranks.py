"""Commands on several ranks, as a user gives them."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

import forked
from heterostep.launch.cli import main
from heterostep.launch.workers.process import ThisMachine

PROMPT = ("--prompt", "a red disc moves right", "--seed", "7", "--steps", "8")
GENERATE = (sys.executable, "-m", "heterostep", "generate")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
STEPS = 40
JOB = ("--prompt", "a red disc moves right", "--seed", "7", "--frames", "9", "--steps", str(STEPS), "--output", "v.mp4")
JOB += ("--latents", "l.safetensors", "--report", "r.json", "--job-dir", "job", "--checkpoint-every", "3")
ULYSSES = ("--ulysses", "2")
RING = ("--ring", "2", "--ring-cache", "sharded", "--shard-weights")
LAYOUTS = {"ulysses": ULYSSES, "ring": RING}


def run(command, *flags, cwd, popen=forked.Popen, timeout=240, **settings):
    process = popen([*command, *flags], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def latents(folder):
    return load_file(folder / "l.safetensors")["latents"]


def steps_done(folder):
    lines = (folder / "job" / "progress.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def whole(folder, *flags, **settings):
    """The folder of a job that nothing broke off."""
    folder.mkdir()
    (folder / "v.mp4").touch()
    done = run(GENERATE, *JOB, *flags, cwd=folder, **settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("v.mp4 will be replaced") == 1, "once, not once a rank"
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return whole(tmp_path_factory.mktemp("alone") / "job")


@pytest.fixture(scope="module")
def ulysses(tmp_path_factory):
    # Ranks as they start on a user's machine, in fresh processes.
    return whole(tmp_path_factory.mktemp("ulysses") / "job", "--nproc", "2", *ULYSSES, popen=subprocess.Popen)


@pytest.fixture(scope="module")
def ring(tmp_path_factory):
    return whole(tmp_path_factory.mktemp("ring") / "job", "--nproc", "2", *RING)


@pytest.mark.parametrize("layout", ["ulysses", "ring"])
def test_many_ranks_make_the_video_of_one(alone, layout, request):
    folder = request.getfixturevalue(layout)
    assert (latents(folder) - latents(alone)).abs().max() < 1e-4
    report = json.loads((folder / "r.json").read_text())
    assert len(report["ranks"]) == 2
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
    monkeypatch.setattr(ThisMachine, "start", lambda *_, **__: pytest.fail("ranks were started"))
    try:
        status = main(["generate", *PROMPT, *map(str, flags)])
    except SystemExit as end:  # argparse's own way
        status = end.code
    assert status == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_bad_input_under_torchrun_ends_all_ranks(tmp_path):
    done = run(TORCHRUN, "-m", "heterostep.launch.torchrun", *PROMPT, "--ulysses", "4", cwd=tmp_path, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("heterostep: cfg 1 x ring 1 x ulysses 4") == 1


def begun(folder, command, *flags, lines=8, popen=forked.Popen, **variables):
    """Start a job on ranks, and wait until some steps are done."""
    process = popen([*command, *JOB, *flags], cwd=folder, env=os.environ | variables, stderr=subprocess.PIPE, text=True)
    progress = folder / "job" / "progress.jsonl"
    while not progress.exists() or progress.read_text().count("\n") < lines:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    return process


needs_forks = pytest.mark.skipif(not forked.WORKS, reason="ranks are found among forks")


@needs_forks
def test_a_killed_rank_is_replaced(ulysses, tmp_path):
    command = (*TORCHRUN, "--max-restarts", "3", "-m", "heterostep.launch.torchrun")
    process = begun(tmp_path, command, *ULYSSES, HETEROSTEP_TEST="torchrun")
    os.kill(forked.find(HETEROSTEP_TEST="torchrun", RANK="1"), signal.SIGKILL)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "failed" in err  # of the first attempt
    assert torch.equal(latents(tmp_path), latents(ulysses))
    assert steps_done(tmp_path) == list(range(1, STEPS + 1))


@needs_forks
@pytest.mark.parametrize(
    ("layout", "number", "rank", "says"),
    [
        ("ring", signal.SIGKILL, "0", "rank 0 of 2 was killed by SIGKILL"),
        ("ulysses", signal.SIGSTOP, "1", "rank 1 of 2 was silent for"),
    ],
)
def test_a_rank_of_this_machine_is_replaced(tmp_path, request, layout, number, rank, says):
    whole, name = request.getfixturevalue(layout), f"local {layout}"
    process = begun(tmp_path, GENERATE, "--nproc", "2", *LAYOUTS[layout], HETEROSTEP_TEST=name)
    os.kill(forked.find(HETEROSTEP_TEST=name, RANK=rank), number)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert says in err and "starting again where the video was saved" in err
    assert torch.equal(latents(tmp_path), latents(whole))
    assert steps_done(tmp_path) == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_rank_on_ray_is_replaced(ulysses, tmp_path):
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    # A frozen one, on Ray: tests/workers/test_group.py.
    process = begun(tmp_path, GENERATE, "--ray", "--nproc", "2", *ULYSSES, popen=subprocess.Popen)
    family = psutil.Process(process.pid).children(recursive=True)
    # The third is the standby.
    ranks = [one for one in family if "WorkerActor" in " ".join(one.cmdline())]
    sorted(ranks, key=lambda one: sum(one.cpu_times()[:2]))[-1].kill()
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert err.count("starting again where the video was saved") == 1
    assert torch.equal(latents(tmp_path), latents(ulysses))
    assert steps_done(tmp_path) == list(range(1, STEPS + 1))


def test_a_stopped_job_goes_on_with_other_degrees(alone, tmp_path):
    degrees = ("--nproc", "2", "--cfg", "2")
    process = begun(tmp_path, GENERATE, *degrees)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "is saved in" in err
    done = run(GENERATE, *JOB, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stdout
    assert (latents(tmp_path) - latents(alone)).abs().max() < 1e-4
    assert steps_done(tmp_path) == list(range(1, STEPS + 1))
    again = run(GENERATE, *JOB, *degrees, cwd=tmp_path)
    assert again.returncode == 0 and "finished; nothing was computed" in again.stdout


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
    done = run(TORCHRUN, "failing.py", *PROMPT, cwd=tmp_path)
    assert done.returncode != 0
    found = re.search(r"rank 1 of 2 failed after \d+ steps: ArithmeticError: a fault of one rank", done.stderr)
    assert found, done.stderr
    assert "rank 0 ends: rank 1 of 2 failed" in done.stderr or "rank 0 stops: rank 1 of 2 failed" in done.stderr
