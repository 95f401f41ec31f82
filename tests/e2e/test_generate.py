"""The command as a person runs it: in a process of its own, from any folder, with Ctrl-C."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import forked
from heterostep.engine.facts import DEMO_MODEL


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
    assert (process.returncode, err) == (0, "")
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
    assert err == "heterostep: interrupted\n"
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
    assert (process.returncode, err) == (0, "")
    report = json.loads((tmp_path / "demo.json").read_text())
    assert report["compute"] == pytest.approx(0.5, abs=0.02)
    assert report["against_dense"]["psnr"] > 20
    assert "times as fast" in out
