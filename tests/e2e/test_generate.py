"""The command as a person runs it: in a process of its own, from any folder, with Ctrl-C."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

import forked
from heterostep.engine.facts import DEMO_MODEL
from said import errors


def start(*argv, cwd, python=("-m", "heterostep"), popen=forked.Popen):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return popen(
        [sys.executable, *python, *map(str, argv)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_from_prompt_to_files(tiny_model, tmp_path):
    process = start(
        "generate", "--prompt", "a red disc moves right", "--model", tiny_model, "--steps", 20,
        "--compute", 0.5, "--output", "v.mp4", "--heatmap", "h.mp4", "--report", "r.json",
        "--latents", "l.safetensors", cwd=tmp_path,
    )  # fmt: skip
    out, err = process.communicate(timeout=120)
    assert (process.returncode, errors(err)) == (0, "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["h.mp4", "l.safetensors", "r.json", "v.mp4"]
    assert "v.mp4: 17 frames of 64x64" in out
    assert json.loads((tmp_path / "r.json").read_text())["compute"] == pytest.approx(0.5, abs=0.02)


# Presses Ctrl-C half a second into denoising.
_INTERRUPTED = """
import os, signal, sys, threading
from heterostep.engine.engine import Engine
from heterostep.launch.cli import main

def denoise(self, *arguments, stock=Engine._denoise):
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    return stock(self, *arguments)

Engine._denoise = denoise
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_stops_the_run(tiny_model, tmp_path):
    # Enough steps to last for minutes: it must be the signal that ends it.
    flags = ["--prompt", "x", "--model", tiny_model, "--steps", 100_000, "--compute", 1]
    process = start("generate", *flags, cwd=tmp_path, python=["-c", _INTERRUPTED])
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert errors(err) == "heterostep: interrupted\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not (DEMO_MODEL / "model_index.json").is_file(), reason="no demo model in this checkout")
def test_the_demo_model(tmp_path):
    # As `make demo` starts it, in a fresh process.
    process = start(
        "generate", "--prompt", "a red disc moves right", "--seed", 3, "--compute", 0.5,
        "--frames", 9, "--steps", 30, "--output", "demo.mp4", "--heatmap", "demo-steps.mp4", "--report", "demo.json",
        "--compare-dense", cwd=tmp_path, popen=subprocess.Popen,
    )  # fmt: skip
    out, err = process.communicate(timeout=180)
    assert (process.returncode, errors(err)) == (0, "")
    report = json.loads((tmp_path / "demo.json").read_text())
    assert report["compute"] == pytest.approx(0.5, abs=0.02)
    assert report["against_dense"]["psnr"] > 20
    assert "times as fast" in out


# What is loaded before the first sign of life, and what a command needs none of.
_HEAVY = {"torch", "numpy", "tqdm", "diffusers", "transformers", "av"}
_UNUSED = {"matplotlib", "ray", "fastapi", "uvicorn", "pydantic_core"}


@pytest.mark.parametrize(
    ("what", "unwanted"),
    [
        ("from heterostep.launch.cli import main", _HEAVY | _UNUSED),
        ("from heterostep.launch.cli import main; main(['info'])", {"av"} | _UNUSED),
        ("import heterostep.launch.generate, heterostep.engine.media.video, heterostep.engine.media.video", _UNUSED),
    ],
)
def test_only_what_is_used_is_imported(tmp_path, what, unwanted):
    code = f"{what}; import sys; print(*sys.modules, file=sys.stderr)"
    _, loaded = start(cwd=tmp_path, python=["-c", code], popen=subprocess.Popen).communicate(timeout=120)
    assert "heterostep" in loaded and not unwanted & set(loaded.split())


def test_the_first_sign_of_life_comes_before_the_imports(tmp_path):
    # PyTorch is one that ends the process: whatever was said then was said before.
    (tmp_path / "torch.py").write_text("raise SystemExit(9)")
    process = start("generate", "--prompt", "x", cwd=tmp_path, popen=subprocess.Popen)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (9, "", "loading PyTorch ...\n")


def test_a_log_file_gets_lines_while_the_command_runs(tiny_model, tmp_path):
    flags = ["--prompt", "x", "--model", tiny_model, "--steps", 20, "--compute", 1, "--output", "v.mp4"]
    with start("generate", *flags, cwd=tmp_path) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "encoding" in line:  # said, and read here, before any file is there
                assert not (tmp_path / "v.mp4").exists()
        process.communicate(timeout=100)
    assert [line for line in lines if "step " not in line] == [
        f"loading model {tiny_model} ...\n",
        "encoding the prompt, then denoising in 20 steps ...\n",
        "decoding ...\n",
    ]


@pytest.mark.parametrize("size", [(0, 0), (24, 80), (50, 200)])
def test_a_terminal_gets_a_bar(tiny_model, tmp_path, size):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    flags = ["--prompt", "x", "--model", str(tiny_model), "--steps", "20", "--compute", "1"]
    process = forked.Popen(
        [sys.executable, "-m", "heterostep", "generate", *flags],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    text = shown.decode()
    assert "20/20 steps" in text and "\u2588" * 10 in text and "more hidden" not in text
    assert text.count("\n") == 0  # all of it passes
    assert "Loading" not in text
    assert out.startswith(b"video.mp4: 17 frames")
