"""`heterostep generate --nnodes`, as a user gives it on each machine; machines are lost and come back."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

import forked
from waiting import until

STEPS = 24
GENERATE = (sys.executable, "-m", "heterostep", "generate", "--prompt", "a red disc moves right", "--seed", "7")
GENERATE += (
    "--frames",
    "9",
    "--steps",
    str(STEPS),
    "--compute",
    "0.5",
    "--policy",
    "tokens",
    "--latents",
    "l.safetensors",
)
JOB = ("--job-dir", "job", "--checkpoint-every", "3")


@contextlib.contextmanager
def started(machine, *flags, command=GENERATE):
    """The command on a machine."""
    with machine.entered(), open(machine.folder / "log", "a") as log:
        process = forked.Popen([*map(str, command), *map(str, flags)], cwd=machine.folder, stdout=log, stderr=log)
    try:
        yield process
    finally:
        machine.kill()
        process.wait()


@pytest.fixture
def pair(bed):
    """Two machines with empty folders, and the flags that let them work together."""
    for machine in bed[:2]:
        subprocess.run(["rm", "-rf", machine.folder], check=True)
        machine.folder.mkdir()
    return *bed[:2], ("--nnodes", 2, "--master", bed[0].address)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    done = forked.run([*GENERATE, *JOB], cwd=folder)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "l.safetensors")["latents"]


def log(machine):
    return (machine.folder / "log").read_text()


def steps_done(machine):
    path = machine.folder / "job" / "progress.jsonl"
    if not path.exists():
        return []
    return [json.loads(line)["step"] for line in path.read_text().splitlines() if line.endswith("}")]


def ended(process, machine):
    assert process.wait(90) == 0, log(machine)


def test_two_machines_make_the_video_of_one_and_the_main_one_keeps_it(pair, alone):
    main, other, flags = pair
    with started(other, *flags, *JOB) as helper:
        time.sleep(0.5)  # the main machine may come later
        with started(main, *flags, *JOB, "--report", "r.json") as driver:
            ended(driver, main)
            ended(helper, other)
    assert (load_file(main.folder / "l.safetensors")["latents"] - alone).abs().max() < 1e-4
    assert {path.name for path in main.folder.iterdir()} == {"job", "l.safetensors", "log", "r.json", "video.mp4"}
    assert 0 < json.loads((main.folder / "r.json").read_text())["link"]["bytes_per_second"] < 1e9
    assert {path.name for path in other.folder.iterdir()} == {"log"}
    assert other.bytes_sent > 100_000


# The same command with less patience: 3 s for a machine that is silent, 1 s for one to come back.
HASTY = """
import dataclasses, sys
from heterostep.launch import ranks
from heterostep.launch.cli import main
from heterostep.launch.workers import network
network.SILENT_SECONDS = 3.0
usual = ranks.group_config
ranks.group_config = lambda *given: dataclasses.replace(usual(*given), patience=1.0)
sys.exit(main(sys.argv[1:]))
"""


def test_a_machine_that_dies_and_is_back_is_taken_again(pair, alone):
    main, other, flags = pair
    with started(main, *flags, *JOB) as driver, contextlib.ExitStack() as stack:
        stack.enter_context(started(other, *flags, *JOB))
        until(lambda: len(steps_done(main)) >= 7, 60)
        other.kill()
        until(lambda: "was lost" in log(main))
        helper = stack.enter_context(started(other, *flags, *JOB))
        ended(driver, main)
        ended(helper, other)
    assert steps_done(main) == list(range(1, STEPS + 1)) and "of 2 ranks instead" not in log(main)
    assert (load_file(main.folder / "l.safetensors")["latents"] - alone).abs().max() < 1e-4


def test_a_machine_that_is_cut_off_is_done_without_and_let_in_again(pair, tmp_path):
    main, other, flags = pair
    hasty = (sys.executable, "-c", HASTY, *GENERATE[3:], "--steps", 200, *JOB)
    with started(main, *flags, command=hasty) as driver, started(other, *flags, command=hasty) as helper:
        until(lambda: len(steps_done(main)) >= 7, 60)
        other.cut()
        until(lambda: "resuming with 1 of 2 ranks" in log(main))
        other.mend()
        until(lambda: "going on with 2 of 2 ranks instead of 1" in log(main), 60)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(30) == 75, log(main)
        assert helper.wait(30) == 75, log(other)
    assert "was lost with its machine" in log(main) and "the main machine was lost" in log(other)
    done = steps_done(main)
    assert done == list(range(1, len(done) + 1))


def test_the_main_machine_is_lost_and_finds_its_job_again(pair, alone):
    main, other, flags = pair
    with started(other, *flags, *JOB) as helper:
        with started(main, *flags, *JOB):
            until(lambda: len(steps_done(main)) >= 7, 60)
            main.kill()
        until(lambda: "the main machine was lost" in log(other))
        with started(main, *flags, *JOB) as driver:
            ended(driver, main)
            ended(helper, other)
    assert "resuming after step" in log(main) and steps_done(main) == list(range(1, STEPS + 1))
    assert (load_file(main.folder / "l.safetensors")["latents"] - alone).abs().max() < 1e-4


def test_the_secret_keeps_strangers_out(pair, tmp_path):
    main, other, flags = pair
    key = tmp_path / "key"
    key.write_text("a secret\n")
    with started(main, *flags, "--cluster-key-file", key), started(other, *flags) as stranger:
        assert stranger.wait(30) == 2
    assert "give all machines the same --cluster-key-file" in log(other)
    assert os.path.exists(key)
