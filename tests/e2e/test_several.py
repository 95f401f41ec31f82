"""Several videos of one command: one for each line of a file and for each seed, resumable as one job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import forked
from heterostep.engine.engine import Engine
from heterostep.launch.cli import main
from said import errors

PROMPTS = ("a red disc", "", "a blue disc", "  a green disc ", "a square", "a ring")
SMALL = ["--size", "64x48", "--frames", 5, "--device", "cpu"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def command(tiny_model, tmp_path, monkeypatch, capsys):
    """Runs `generate` in a folder with a file of prompts: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines.txt").write_text("\n".join(PROMPTS))

    def run(*flags):
        flags = ("generate", "--model", tiny_model, *SMALL, "--steps", 3, "--compute", 1, *flags)
        status = main([str(flag) for flag in flags])
        return status, *capsys.readouterr()

    return run


def start(model, folder, *more):
    command = ["-m", "heterostep", "generate", "--model", model, *SMALL, "--prompts", "lines.txt", "--job-dir", "many"]
    return forked.Popen(
        [sys.executable, *map(str, (*command, "--compute", 1, *more))],
        cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def steps_in(folder, index):
    path = folder / "many" / f"{index:04}" / "progress.jsonl"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("ranks", [(), ("--nproc", 2)])
def test_killed_at_the_third_of_five_makes_the_others_and_none_twice(tiny_model, tmp_path, ranks):
    (tmp_path / "lines.txt").write_text("\n".join(PROMPTS))
    flags = ("--steps", 16, "--output", "{index}-{seed}.mp4", "--seed", 7, "--checkpoint-every", 4, *ranks)
    process = start(tiny_model, tmp_path, *flags)
    while len(steps_in(tmp_path, 3)) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == ["1-7.mp4", "2-7.mp4"]
    made = {name: (tmp_path / name).read_bytes() for name in ("1-7.mp4", "2-7.mp4")}
    again = start(tiny_model, tmp_path, *flags)
    out, err = again.communicate(timeout=200)
    assert (again.returncode, errors(err)) == (0, "")
    assert out.count("nothing was computed") == 2 and "resuming after step" in out
    for index in range(1, 6):
        # Every step of each video was computed once.
        assert [json.loads(line)["step"] for line in steps_in(tmp_path, index)] == list(range(1, 17))
        assert (tmp_path / f"{index}-7.mp4").stat().st_size > 0
    for name, content in made.items():
        assert (tmp_path / name).read_bytes() == content


def test_a_signal_saves_the_video_that_is_made(tiny_model, tmp_path):
    (tmp_path / "lines.txt").write_text("\n".join(PROMPTS))
    process = start(tiny_model, tmp_path, "--steps", 500)
    while len(steps_in(tmp_path, 1)) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and "saved" in err


def tensors(*indices, first=5):
    return {f"l-{first + (n - 1) % 2}-{n}.safetensors" for n in indices}


def test_seeds_are_counted_up_and_names_say_which(command, tmp_path):
    latents = ("--latents", "l-{seed}-{index}.safetensors")
    assert command("--prompts", "lines.txt", "--count", 2, "--seed", 5, *latents)[0] == 0
    assert {path.name for path in tmp_path.glob("*.mp4")} == {f"video-{n}.mp4" for n in range(1, 11)}
    assert {path.name for path in tmp_path.glob("*.safetensors")} == tensors(*range(1, 11))
    # The fourth is the second prompt's second; alone it has the same bits.
    alone = ("--prompt", "a blue disc", "--seed", 6, "--output", "{seed}.mp4", "--latents", "alone.safetensors")
    assert command(*alone)[0] == 0 and (tmp_path / "6.mp4").exists()
    assert (tmp_path / "alone.safetensors").read_bytes() == (tmp_path / "l-6-4.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "give --prompt TEXT, or --prompts FILE"),
        (("--prompt", "x", "--prompts", "lines.txt"), "give one of them"),
        (("--prompts", "absent.txt"), "cannot be read"),
        (("--prompts", "empty.txt"), "holds no prompt"),
        (("--prompts", "latin.txt"), "not UTF-8"),
        (("--prompts", "lines.txt", "--output", "{seed}.mp4"), "with {index}"),
        (("--prompt", "x", "--count", 0), "at least 1"),
        (("--prompt", "x", "--count", 2, "--seed", 2**63 - 1), "seed must be"),
        (("--prompt", "x", "--quiet", "--json"), "contradict"),
        (("--prompt", "x", "--lora", "absent.safetensors"), "no LoRA file"),
        (("--prompt", "x", "--attention", "flash"), "needs a GPU"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(command, tmp_path, monkeypatch, flags, said):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    monkeypatch.setattr("heterostep.engine.loading._load_networks", lambda *_: pytest.fail("it was loaded"))
    try:
        status, _, err = command(*flags)
    except SystemExit as ended:  # argparse itself refuses
        status, err = ended.code, said
    assert status == 2 and said in err and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*.mp4"))


def test_programs_read_progress_line_by_line(command, monkeypatch, tmp_path):
    status, out, _ = command("--prompt", "a disc", "--count", 2, "--json", "--report", "r.json")
    events = [json.loads(line) for line in out.splitlines()]
    kinds = [event["event"] for event in events if event["event"] not in ("stage", "message")]
    assert status == 0 and kinds == 2 * ["started", "step", "step", "step", "decoding", "done"]
    done = [event for event in events if event["event"] == "done"]
    assert [event["files"] for event in done] == [{"output": f"video-{n}.mp4", "report": f"r-{n}.json"} for n in (1, 2)]
    assert [event["seed"] for event in done] == [0, 1] and done[0]["seconds"]["total"] > 0
    step = next(event for event in events if event["event"] == "step")
    assert (step["step"], step["steps"], step["active"]) == (1, 3, step["tokens"])
    monkeypatch.setattr(Engine, "stream", lambda *_, **__: (_ for _ in ()).throw(OSError("the disk is gone")))
    status, out, err = command("--prompt", "a disc", "--json")
    last = json.loads(out.splitlines()[-1])
    assert status == 1 and last == {"event": "error", "text": "the disk is gone", "exit_code": 1} and "the disk" in err
