"""Memory before work: what fits, what is chosen, what is refused; and what becomes of a run that runs out all the same.

No figure of free memory here is real.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import heterostep as hs
from heterostep.engine import memory
from heterostep.engine.estimate import estimate
from heterostep.engine.facts import read_facts
from heterostep.engine.features import place
from heterostep.engine.memory import GIB, Room, expected_seconds, need_of
from heterostep.engine.published import sizes_of
from heterostep.engine.request import resolve
from heterostep.errors import RequestError
from heterostep.hsa.config import HSAConfig
from heterostep.launch.cli import main
from heterostep.launch.plan import PlanSettings, case_of
from heterostep.launch.service.bodies import CreateVideo
from heterostep.launch.service.requests import Asked
from heterostep.launch.service.service import VideoService
from heterostep.launch.service.settings import ServiceSettings
from heterostep.parallel.config import ParallelConfig

LARGE = "wan2.1-14b"


def large(**changes):
    """Facts and request of a 14B model of which nothing is here."""
    facts = read_facts(LARGE, sizes_of(LARGE))
    asked = {"prompt": "x", "width": 832, "height": 480, "num_frames": 81, **changes}
    return facts, resolve(hs.GenerateRequest(**asked), facts)


def settle(free, offload="auto", hsa=None, **changes):
    config = hs.EngineConfig(model=LARGE, offload=offload, hsa=hsa or HSAConfig())
    return Room("cuda", None if free is None else round(free * GIB)).settle(config, *large(**changes))


def test_auto_takes_the_fastest_that_fits():
    facts, request = large()
    need = need_of(hs.EngineConfig(model=LARGE), facts, request, device="cuda")
    none, model, group = (need.peak(mode) / GIB for mode in memory.ORDER)
    assert none > model > group and 25 < model < 45 and group < 24
    assert (settle(none + 1), settle(model + 0.01), settle(group + 0.1)) == (
        "none",
        "model" if model < none else "none",
        "group",
    )
    assert settle(None) == "none"  # nobody knows
    assert settle(8 * none, "group") == "group"  # what is set stays
    with pytest.raises(RequestError, match=r"needs about .* GiB of memory, and 2\.0 GiB are free .*transformer"):
        settle(2)


def test_the_sentence_says_what_would_do():
    tokens = HSAConfig(policy="tokens")
    with pytest.raises(RequestError, match="--policy joint would do"):
        settle(24, hsa=tokens)
    with pytest.raises(RequestError, match="--offload auto"):
        settle(24, "none")
    with pytest.raises(RequestError, match="smaller size"):
        settle(1)


def test_ranks_share_and_quantized_weights_are_smaller():
    facts, request = large()
    config = hs.EngineConfig(model=LARGE, hsa=HSAConfig(policy="tokens"))
    one, two = (need_of(config, facts, request, device="cuda", ranks=ranks) for ranks in (1, 2))
    assert two.kv == pytest.approx(one.kv / 2, rel=0.01) and two.transformers == one.transformers
    host, whole = (
        need_of(hs.EngineConfig(model=LARGE, hsa=HSAConfig(policy="tokens", kv_host=on)), facts, request, device="cuda")
        for on in (True, False)
    )
    assert host.kv == pytest.approx(whole.kv / 2 * 2 / facts.num_layers, rel=0.01)  # two layers, of one branch of two
    small = need_of(hs.EngineConfig(model=LARGE, quantize="int8"), facts, request, device="cuda")
    assert small.transformers < 0.6 * one.transformers


def test_the_command_refuses_before_it_loads(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "host_bytes", lambda: 1 << 20)
    monkeypatch.setattr("heterostep.engine.loading._load_networks", lambda *_: pytest.fail("it was loaded"))
    flags = ["--prompt", "x", "--model", str(tiny_model), "--device", "cpu", "--output", str(tmp_path / "v.mp4")]
    assert main(["generate", *flags]) == 2
    said = capsys.readouterr().err
    assert "of memory, and 1.0 MiB are free" in said and len(said.splitlines()) == 1


def test_the_command_says_which_offload_it_took(tiny_model, tmp_path, monkeypatch, capsys):
    need = need_of(hs.EngineConfig(model=str(tiny_model)), *_usual(tiny_model), device="cuda")
    monkeypatch.setattr(memory.Room, "here", lambda device, shares: Room("cuda", need.peak("group")))
    flags = ["--prompt", "x", "--model", str(tiny_model), "--device", "cpu", "--output", str(tmp_path / "v.mp4")]
    seen = []
    monkeypatch.setattr("heterostep.engine.loading.place", lambda *args: seen.append(args[3]) or place(*args))
    assert main(["generate", *flags, "--size", "64x64", "--steps", "3", "--frames", "17", "--compute", "1"]) == 0
    assert "offload" in capsys.readouterr().out and seen[0] in ("model", "group")


def _usual(model):
    facts = read_facts(str(model))
    return facts, resolve(hs.GenerateRequest(prompt="x"), facts)


def test_the_service_refuses_what_cannot_fit(tiny_model, tmp_path):
    settings = ServiceSettings(data_dir=tmp_path, engine=hs.EngineConfig(model=str(tiny_model), device="cpu"))
    for free, fits in ((1 << 20, False), (1 << 40, True)):
        service = VideoService(settings, room=Room("cpu", free))
        try:
            asked = Asked(CreateVideo(prompt="x"), "0" * 64)
            if fits:
                service.submit(asked, "", None)
            else:
                with pytest.raises(RequestError, match="are free"):
                    service.submit(asked, "", None)
        finally:
            service.close()


class OutOfMemoryError(RuntimeError):
    """As PyTorch's own, by its name."""


@pytest.mark.parametrize("kept", [True, False])
def test_a_run_goes_on_once_with_less(tiny_model, tmp_path, caplog, kept):
    engine = hs.Engine(hs.EngineConfig(model=str(tiny_model), device="cpu"))
    asked = hs.GenerateRequest(prompt="x", width=64, height=32, num_frames=5, num_inference_steps=8, compute=1.0)
    job = hs.JobConfig(folder=tmp_path / "job", checkpoint_every=2) if kept else None
    expected = engine.generate(asked).latents
    calls = []

    def before(*_):
        calls.append(1)
        if len(calls) == 9:  # in the fifth step, which has two branches
            raise OutOfMemoryError("CUDA out of memory")

    engine.pipeline.transformer.blocks[0].register_forward_pre_hook(before)
    made = list(engine.stream(asked, job))
    assert torch.equal(made[-1].latents, expected)
    assert "out of memory; going on with offload=model" in caplog.text and engine._offload.mode == "model"
    # The steps of the job that were saved are not made again.
    assert len(calls) == (9 + 8 if kept else 9 + 16)
    # The model stays, and works.
    assert torch.equal(engine.generate(asked).latents, expected)


def test_a_denoised_video_is_decoded_with_less_and_not_denoised_again(tiny_model):
    engine = hs.Engine(hs.EngineConfig(model=str(tiny_model), device="cpu"))
    asked = hs.GenerateRequest(prompt="x", width=64, height=32, num_frames=5, num_inference_steps=2, compute=1.0)
    expected = engine.generate(asked).frames
    calls = []

    def full(*_):
        if engine._offload.mode == "none":
            raise OutOfMemoryError("CUDA out of memory")

    engine.pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    engine.pipeline.vae.decoder.register_forward_pre_hook(full)
    assert (engine.generate(asked).frames == expected).all()
    assert engine._offload.mode == "model" and len(calls) == 4  # two branches


def test_a_run_that_never_fits_ends_and_the_engine_lives(tiny_model):
    engine = hs.Engine(hs.EngineConfig(model=str(tiny_model), device="cpu"))
    asked = hs.GenerateRequest(prompt="x", width=64, height=32, num_frames=5, num_inference_steps=2, compute=1.0)

    def never(*_):
        raise OutOfMemoryError("CUDA out of memory")

    hook = engine.pipeline.transformer.register_forward_pre_hook(never)
    with pytest.raises(OutOfMemoryError):
        engine.generate(asked)
    hook.remove()
    assert engine.generate(asked).frames.shape == (5, 32, 64, 3)


def test_the_time_of_denoising_is_known_before_the_first_step_on_known_gpus():
    config, request = hs.EngineConfig(model=LARGE, hsa=HSAConfig(compute=0.5)), large()[1]
    one, eight = (
        expected_seconds(replace(config, parallel=degrees), request, "NVIDIA H100 80GB HBM3", 2)
        for degrees in (None, ParallelConfig(cfg=2, ulysses=4))
    )
    case = case_of(PlanSettings(model=LARGE, gpu="h100"), config.hsa, (832, 480))
    assert one == pytest.approx(estimate(case, ParallelConfig()).denoise)  # as `plan` says it
    assert one / 9 < eight < one / 6
    assert expected_seconds(config, request, "NVIDIA RTX 4090", 2) is None
    assert expected_seconds(hs.EngineConfig(model="abc/unknown"), request, "NVIDIA H100", 2) is None
