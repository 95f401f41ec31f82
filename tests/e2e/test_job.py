"""Jobs as a person or a cluster runs them: killed, told to go, and given again (`signals.py`)."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import forked
from heterostep.engine.facts import DEMO_MODEL
from said import errors

FLAGS = ["--prompt", "a red disc moves right", "--frames", 5, "--seed", 3, "--policy", "tokens"]
STEPS = 48
LONG = 500
"""More steps than a test waits for."""
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

needs_demo = pytest.mark.skipif(
    not (DEMO_MODEL / "model_index.json").is_file(), reason="no demo model in this checkout"
)


def start(folder, *more, steps=STEPS):
    command = ["-m", "heterostep", "generate", *FLAGS, "--steps", steps, "--job-dir", "job", "--checkpoint-every", 5]
    return forked.Popen(
        [sys.executable, *map(str, (*command, *more))],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def progress(folder):
    path = folder / "job" / "progress.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def after_step(process, folder, step):
    """Wait until a run has done a step."""
    while len(progress(folder)) <= step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def while_decoding(process, folder):
    """Wait until a run has saved its final latents."""
    while not (folder / "job" / "latents.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def finish(process, timeout=120):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


@needs_demo
def test_killed_at_a_step_and_while_decoding_gives_the_same_bits_and_is_found_again(tmp_path):
    files = ["--output", "v.mp4", "--latents", "l.safetensors", "--report", "r.json"]
    whole = tmp_path / "whole"
    whole.mkdir()
    assert finish(start(whole, *files))[0] == 0
    for wait in (functools.partial(after_step, step=7), while_decoding):
        process = start(tmp_path, *files)
        wait(process, tmp_path)
        process.kill()
        assert finish(process)[0] == -signal.SIGKILL
    assert not (tmp_path / "v.mp4").exists() and not (tmp_path / "job" / "result.json").exists()
    status, out, err = finish(start(tmp_path, *files))
    assert (status, errors(err)) == (0, "") and f"resuming after step {STEPS} of {STEPS}" in out
    for name in ("l.safetensors", "v.mp4"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    assert [json.loads(line)["step"] for line in progress(tmp_path)] == list(range(1, STEPS + 1))

    names = ("v.mp4", "l.safetensors", "r.json")
    made = {name: (tmp_path / name).read_bytes() for name in names}
    for name in names:
        (tmp_path / name).unlink()
    status, out, err = finish(start(tmp_path, *files))
    assert (status, errors(err)) == (0, "") and "the job in job is finished; nothing was computed" in out
    for name in names:
        assert (tmp_path / name).read_bytes() == made[name], name


@needs_demo
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_told_to_go(tmp_path, number):
    process = start(tmp_path, steps=LONG)
    after_step(process, tmp_path, 6)
    process.send_signal(number)
    status, _, err = finish(process)
    assert status == 75
    sentence = r"heterostep: stopped after step (\d+) of 500; step \1 is saved in 'job', .*\n"
    assert re.fullmatch(sentence, errors(err)), err
    step = len(progress(tmp_path))
    assert (tmp_path / "job" / f"checkpoint-{step:06d}.json").exists()


@needs_demo
def test_ctrl_c_saves_a_job(tmp_path):
    process = start(tmp_path, steps=LONG)
    after_step(process, tmp_path, 2)
    process.send_signal(signal.SIGINT)
    status, _, err = finish(process)
    assert status == 130
    assert errors(err) == "heterostep: interrupted; the same command resumes the job in job\n"
    saved = [path.name for path in (tmp_path / "job").glob("checkpoint-*.json")]
    assert saved and max(saved) >= "checkpoint-000003.json"


# Forks a run of a job that saves every step, kills it at a random moment, and again, until one comes through.
_KILLED = """
import os, random, shutil, signal, sys, time
import torch
import heterostep as hs
from heterostep.launch.logs import silence_libraries

silence_libraries()
torch.set_num_threads(1)
model, folder, tries = sys.argv[1], sys.argv[2], int(sys.argv[3])
engine = hs.Engine(hs.EngineConfig(model=model, device="cpu"))
request = hs.GenerateRequest(prompt="x", width=64, height=48, num_frames=9, num_inference_steps=10, compute=0.6)
job = hs.JobConfig(folder=folder, checkpoint_every=1)
start = time.perf_counter()
want = engine.generate(request, job)
alone = time.perf_counter() - start
moments, kills = random.Random(0), 0
for attempt in range(tries):
    shutil.rmtree(folder)
    patience = 0.7 * alone
    while True:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                output = engine.generate(request, job)
                status = 0 if torch.equal(output.latents, want.latents) else 3
            finally:
                os._exit(status)
        deadline = time.perf_counter() + moments.uniform(0.02, patience)
        patience *= 1.2  # on a machine that is busy, a life may be too short for a step
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done or time.perf_counter() > deadline:
                break
            time.sleep(0.001)
        if done:
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
    assert os.waitstatus_to_exitcode(status) == 0, (attempt, status)
print(kills)
"""


def test_killed_at_any_moment(tiny_model, tmp_path):
    command = [sys.executable, "-c", _KILLED, str(tiny_model), str(tmp_path / "job"), "4"]
    done = forked.run(command, env=ENVIRONMENT, timeout=250)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 4
    assert "is skipped" not in done.stderr  # what a kill leaves behind never looks like a checkpoint
