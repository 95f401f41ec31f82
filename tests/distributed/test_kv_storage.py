"""Two ranks that keep keys and values in 8 bits, and in host memory."""

from __future__ import annotations

import subprocess

import pytest
import torch
from safetensors.torch import load_file

import forked
from folders import complete_pipeline
from heterostep.launch.cli import main


@pytest.mark.parametrize("degrees", [("--ulysses", "2"), ("--ring", "2", "--ring-cache", "sharded")])
def test_two_ranks_keep_them_as_one_does(tmp_path, monkeypatch, degrees):
    monkeypatch.setattr(subprocess, "Popen", forked.Popen)
    complete_pipeline().save_pretrained(tmp_path / "model")
    flags = ["--prompt", "x", "--model", str(tmp_path / "model"), "--device", "cpu", "--size", "64x48", "--frames", "9"]
    flags += ["--steps", "8", "--policy", "tokens", "--compute", "0.7", "--output", str(tmp_path / "v.mp4")]

    def run(name, *more):
        path = tmp_path / f"{name}.safetensors"
        assert main(["generate", *flags, "--latents", str(path), *more]) == 0
        return load_file(path)["latents"]

    one = run("one", "--kv-dtype", "int8")
    plain = run("plain", "--nproc", "2", *degrees)
    host = run("host", "--nproc", "2", *degrees, "--kv-host")
    small = run("small", "--nproc", "2", *degrees, "--kv-dtype", "int8")
    assert torch.equal(plain, host)
    assert not torch.equal(plain, small)
    # Sums are rounded otherwise on two ranks, and a value that is rounded to 8 bits then can be a whole unit away: the
    # two are as far from each other as either is from keys and values that are not rounded.
    assert (small - one).norm() < 1.5 * (one - plain).norm() < 0.15 * one.norm()
