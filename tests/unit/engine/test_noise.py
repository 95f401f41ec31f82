"""Initial noise from a file (`engine/noise.py`)."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

import heterostep as hs
from heterostep.engine.facts import read_facts
from heterostep.engine.noise import check_noise, noise_identity, read_noise
from heterostep.engine.record import acting_request
from heterostep.engine.request import GenerateRequest, resolve
from heterostep.errors import RequestError

SIZE = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 3, "guidance_scale": 1.0}


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed))


def test_the_noise_of_a_seed_gives_its_video(tiny_model, tmp_path):
    engine = hs.Engine(hs.EngineConfig(model=str(tiny_model), device="cpu", hsa=None))
    torch.save(drawn(7, 1, 16, 2, 4, 4), tmp_path / "noise.pt")
    save_file({"latents": drawn(7, 1, 16, 2, 4, 4)}, tmp_path / "noise.safetensors")
    wanted = engine.generate(GenerateRequest(prompt="a", seed=7, **SIZE), progress=False)
    for name in ("noise.pt", "noise.safetensors"):
        found = engine.generate(GenerateRequest(prompt="a", noise=str(tmp_path / name), **SIZE), progress=False)
        assert torch.equal(found.latents, wanted.latents)
    assert found.request.noise == str(tmp_path / name)
    assert acting_request(found, 1)["noise"] == name  # a record does not say where files are
    save_file({"latents": drawn(7, 1, 4, 2, 4, 4)}, tmp_path / "narrow.safetensors")
    with pytest.raises(RequestError, match=r"noise has 4 channels, but the latents of .* have 16"):
        engine.generate(GenerateRequest(prompt="a", noise=str(tmp_path / "narrow.safetensors"), **SIZE), progress=False)


def test_what_is_no_noise_of_a_video(tiny_model, tmp_path):
    facts = read_facts(str(tiny_model))
    torch.save(drawn(0, 1, 16, 3, 4, 4), tmp_path / "long.pt")
    torch.save({"a": 1}, tmp_path / "dictionary.pt")
    torch.save(torch.zeros(3, dtype=torch.int64), tmp_path / "whole.pt")
    torch.save(torch.full((1, 16, 2, 4, 4), torch.inf), tmp_path / "endless.pt")
    (tmp_path / "torn.pt").write_bytes(b"no tensor")
    (tmp_path / "video.mp4").touch()
    says = {
        "long.pt": r"has the shape \[1, 16, 3, 4, 4\], but 5 frames of 32x32 need \[1, channels, 2, 4, 4\]",
        "dictionary.pt": "must be a tensor of finite floating-point numbers",
        "whole.pt": "must be a tensor of finite floating-point numbers",
        "endless.pt": "must be a tensor of finite floating-point numbers",
        "torn.pt": "cannot be read as one tensor",
        "video.mp4": r"there is no file of noise .*; name one that ends in .safetensors or .pt",
        "absent.pt": "there is no file of noise",
    }
    for name, text in says.items():
        with pytest.raises(RequestError, match=text):
            resolve(GenerateRequest(prompt="a", noise=str(tmp_path / name), **SIZE), facts)
    with pytest.raises(RequestError, match="noise is for Wan"):
        check_noise(str(tmp_path / "long.pt"), dataclasses.replace(facts, audio_rate=25.0), None)


def test_code_in_a_file_is_not_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    torch.save(Harm(), tmp_path / "harm.pt")
    with pytest.raises(RequestError, match="cannot be read as one tensor"):
        read_noise(tmp_path / "harm.pt")
    assert not (tmp_path / "harm").exists()


def test_noise_is_part_of_a_jobs_identity(tmp_path):
    assert noise_identity(None) is None
    for name, seed in (("a.pt", 0), ("b.pt", 0), ("c.pt", 1)):
        torch.save(drawn(seed, 2), tmp_path / name)
    a, c = (noise_identity(str(tmp_path / name)) for name in ("a.pt", "c.pt"))
    assert a != c
    with pytest.raises(RequestError, match="is gone"):
        noise_identity(str(tmp_path / "d.pt"))
