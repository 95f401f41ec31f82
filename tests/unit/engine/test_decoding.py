"""Videos are decoded a few frames at a time, in bounded memory, and are those of the VAE's own decoding.

Of `engine/vae/`, `pieces.py`, `wan.py` and `ltx2.py` are tested here; so are `engine/decoding.py`, `engine/stored.py`,
and the `decode.py` of the command line.
"""

from __future__ import annotations

import contextlib
import json
import threading

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLLTX2Video, AutoencoderKLWan
from safetensors.torch import save_file

import heterostep as hs
import tiny
import tiny_ltx2
from heterostep.engine.decoding import VideoDecoder
from heterostep.engine.media.feeding import feed
from heterostep.engine.models import LTX2Adapter, WanAdapter
from heterostep.engine.record import Comparison, psnr, ssim
from heterostep.engine.request import FrameSink, StepDone, VideoResult
from heterostep.engine.stored import read_latents
from heterostep.engine.vae.pieces import cuts, decode_pieces
from heterostep.launch.cli import main

TILE, STRIDE = 64, 48


def build_vae(kind):
    torch.manual_seed(0)
    if kind == "wan21":
        vae = tiny.tiny_pipeline().vae
    elif kind == "wan22":  # of TI2V-5B: pixels are packed into patches
        sizes = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
        patches = {"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
        statistics = {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
        vae = AutoencoderKLWan(
            temperal_downsample=[False, True, True], is_residual=True, **sizes, **patches, **statistics
        ).eval()
    else:
        told, causal = kind == "ltx2 told", kind == "ltx2 causal"
        config = {**tiny_ltx2.tiny_ltx2().vae.config, "timestep_conditioning": told, "decoder_causal": causal}
        vae = AutoencoderKLLTX2Video.from_config(config).eval()
    vae.tile_sample_min_height = vae.tile_sample_min_width = TILE
    vae.tile_sample_stride_height = vae.tile_sample_stride_width = STRIDE
    return vae


def latents_of(vae, frames, height=96, width=128):
    ratio = vae.spatial_compression_ratio
    channels = vae.config.get("latent_channels") or vae.config.z_dim
    generator = torch.Generator().manual_seed(3)
    return torch.randn(1, channels, frames, height // ratio, width // ratio, generator=generator)


@pytest.mark.parametrize("kind", ["wan21", "wan22", "ltx2", "ltx2 told", "ltx2 causal"])
@pytest.mark.parametrize("tiling", [False, True])
@torch.no_grad()
def test_pieces_are_the_whole(kind, tiling):
    vae = build_vae(kind)
    vae.use_tiling = tiling
    adapter = LTX2Adapter if kind.startswith("ltx2") else WanAdapter
    pieces = adapter.pieces(vae)
    for frames in (1, 2, 9):
        latents = latents_of(vae, frames)
        want = adapter.decode(vae, latents)
        for at_once in (1, 4):
            cut = cuts(pieces, latents, shared=False)[0]._replace(frames=at_once, park=at_once == 1)
            found = list(decode_pieces(pieces, latents, cut, None, lambda video: video))
            got = torch.cat(found, dim=2)
            assert got.shape == want.shape
            if adapter is WanAdapter:  # each latent frame is what the VAE's own loop gives its decoder
                assert torch.equal(got, want) and len(found) == frames
            else:  # the same sums, of which a convolution of another length may change the order
                assert (got - want).abs().max() < 1e-5
                assert frames < 9 or len(found) > 2


def test_a_vae_that_cannot_be_cut_decodes_all_at_once():
    vae = build_vae("ltx2")
    vae.use_framewise_decoding = True  # in its own way, with seams
    pieces = LTX2Adapter.pieces(vae)
    latents = latents_of(vae, 5)
    assert len(cuts(pieces, latents, shared=True)) == 1
    (video,) = decode_pieces(pieces, latents, cuts(pieces, latents, shared=False)[0], None, lambda video: video)
    assert torch.equal(video, vae.decode(latents).sample)


@pytest.fixture(scope="module")
def engine(tiny_model):
    return hs.Engine(hs.EngineConfig(model=str(tiny_model), device="cpu"))


def request(**changes):
    values = {"prompt": "a red disc", "width": 64, "height": 48, "num_frames": 17, "seed": 3, "compute": 1.0}
    return hs.GenerateRequest(**{**values, "num_inference_steps": 2, **changes})


class Taken(FrameSink):
    """Takes the frames as they come; `do` is called before each."""

    def __init__(self, do=lambda count: None):
        self.frames, self.passes, self._do = [], 0, do

    def pending(self, video):
        return () if self.frames else (self.take,)

    def take(self, frames):
        self.passes += 1
        taken = []
        for frame in frames:
            self._do(len(taken))
            taken.append(frame.copy())
        self.frames = taken


def stream(engine, sink, folder=None, **changes):
    job = None if folder is None else hs.JobConfig(folder=folder, checkpoint_every=1)
    return list(engine.stream(request(**changes), job, sink))


@pytest.fixture(scope="module")
def whole(engine):
    return engine.generate(request())


def test_frames_go_to_a_sink_while_later_ones_are_decoded(engine, whole, monkeypatch):
    decoded, seen = [], []
    stock = engine.pipeline.vae.decoder.forward
    monkeypatch.setattr(engine.pipeline.vae.decoder, "forward", lambda *a, **o: (decoded.append(1), stock(*a, **o))[1])
    sink = Taken(lambda count: seen.append((count, len(decoded))))
    video = stream(engine, sink)[-1]
    assert type(video) is VideoResult and video.shape == whole.frames.shape and video.seconds["decode"] > 0
    assert (np.stack(sink.frames) == whole.frames).all() and torch.equal(video.latents, whole.latents)
    # Of five latent frames at most one is decoded ahead, one waits, and one is being read.
    assert all(ahead <= -(-count // 4) + 3 for count, ahead in seen)


@contextlib.contextmanager
def short_of_memory(vae, most):
    """No memory for more than so many latents along a side at once."""
    stock = vae.decoder.forward

    def forward(hidden, *args, **options):
        if max(hidden.shape[-2:]) > most:
            raise MemoryError
        return stock(hidden, *args, **options)

    vae.decoder.forward = forward
    try:
        yield
    finally:
        del vae.decoder.forward


@pytest.mark.parametrize("array", [False, True])
def test_smaller_tiles_where_memory_is_too_small(engine, whole, caplog, monkeypatch, array):
    vae, sink = engine.pipeline.vae, Taken()
    monkeypatch.setattr(vae, "tile_sample_min_width", TILE)
    monkeypatch.setattr(vae, "tile_sample_stride_width", STRIDE)
    with short_of_memory(vae, 6):
        frames = engine.generate(request()).frames if array else (stream(engine, sink), np.stack(sink.frames))[1]
    assert caplog.text.count("it is decoded in smaller tiles") >= 1 and (array or sink.passes >= 1)
    assert frames.shape == whole.frames.shape and psnr(frames, whole.frames) > 20 and (frames != whole.frames).any()
    with short_of_memory(vae, 2), pytest.raises(MemoryError):
        engine.generate(request())
    assert (engine.generate(request()).frames == whole.frames).all()


def poisoned(vae, piece):
    """A hook that makes one latent frame of those that are decoded not a number."""
    calls = []

    def poison(module, inputs, output):
        calls.append(1)
        return output * float("nan") if len(calls) == piece else output

    return vae.decoder.register_forward_hook(poison)


def test_a_late_piece_that_is_not_finite_refuses_the_video(engine, tmp_path):
    handle = poisoned(engine.pipeline.vae, 4)
    with pytest.raises(hs.RequestError, match="the VAE produced values that are not finite"):
        stream(engine, Taken())
    handle.remove()
    assert stream(engine, Taken())


def test_a_job_lost_in_decoding_goes_on_there(engine, whole, tmp_path):
    def lose(count):
        if count == 7:
            raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        stream(engine, Taken(lose), tmp_path, compute=0.6, num_inference_steps=20)
    assert (tmp_path / "latents.json").exists() and not (tmp_path / "result.json").exists()
    sink = Taken()
    events = stream(engine, sink, tmp_path, compute=0.6, num_inference_steps=20)
    assert not any(isinstance(event, StepDone) for event in events)
    want = engine.generate(request(compute=0.6, num_inference_steps=20), hs.JobConfig(folder=tmp_path))
    assert (np.stack(sink.frames) == want.frames).all()  # what is kept
    assert (want.frames == engine.generate(request(compute=0.6, num_inference_steps=20)).frames).all()
    again = Taken()
    started, _ = stream(engine, again, tmp_path, compute=0.6, num_inference_steps=20)
    assert started.resumed_at == 20 and (np.stack(again.frames) == want.frames).all()
    assert not (tmp_path / "latents.json").exists()


def test_readers_do_not_hinder_each_other():
    runs = [np.full((2, 2, 2, 3), k, np.uint8) for k in range(5)]
    taken, ended = [], threading.Event()

    def fail(frames):
        next(iter(frames))
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        feed(runs, [fail, lambda frames: taken.extend(int(frame.max()) for frame in frames)])
    assert taken == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]

    def broken():
        yield runs[0]
        raise KeyError("source")

    def careful(frames):
        try:
            list(frames)
        except Exception:
            pytest.fail("it is no failure of its own")
        finally:
            ended.set()

    with pytest.raises(KeyError):
        feed(broken(), [careful, lambda frames: None])
    assert ended.is_set()
    feed([], [careful])


def test_two_videos_are_compared_frame_by_frame(engine, whole):
    other = engine.generate(request(seed=4))
    with Comparison() as comparison:
        sink = Taken()
        stream(engine, comparison.first(sink))
        assert (np.stack(sink.frames) == whole.frames).all()
        stream(engine, comparison, seed=4)
        assert comparison.quality.psnr == pytest.approx(psnr(whole.frames, other.frames))
        assert comparison.quality.ssim == pytest.approx(ssim(whole.frames, other.frames))


@pytest.fixture
def command(tiny_model, tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    what = ["--prompt", "a red disc", "--size", "64x48", "--frames", "17", "--steps", "2", "--compute", "1"]

    def run(name, *flags):
        given = [*what, "--seed", "3", "--model", str(tiny_model)] if name == "generate" else []
        status = main([name, *given, "--device", "cpu", *flags])
        return status, *capsys.readouterr()

    return run


def test_decode_makes_the_file_again(command, tmp_path):
    assert command("generate", "--output", "v.mp4", "--latents", "l.safetensors", "--job-dir", "job")[0] == 0
    want = (tmp_path / "v.mp4").read_bytes()
    for source in ("l.safetensors", "job"):
        status, out, _ = command("decode", source, "--output", "again.mp4", "--overwrite")
        assert status == 0 and "again.mp4: 17 frames of 64x48, 8 per second" in out
        assert (tmp_path / "again.mp4").read_bytes() == want
    status, out, _ = command("decode", "job", "--output", "fast.mp4", "--fps", "30", "--scale", "2")
    assert status == 0 and "30 per second" in out


def test_what_cannot_be_decoded_is_refused(command, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    (tmp_path / "folder").mkdir()
    for name, latents, facts in (
        ("empty", torch.zeros(1, 8, 0, 4, 4), {}),
        ("whole", torch.zeros(1, 8, 1, 4, 4, dtype=torch.int32), {}),
        ("rate", torch.zeros(1, 8, 1, 4, 4), {"model": "demo", "request": {"fps": "fast"}}),
        ("model", torch.zeros(1, 8, 1, 4, 4), {"model": 5}),
    ):
        save_file({"latents": latents}, tmp_path / f"{name}.safetensors", {"heterostep": json.dumps(facts)})
    for source, says in (
        ("empty.safetensors", "holds no tensor"),
        ("whole.safetensors", "of floating-point numbers"),
        ("rate.safetensors", "fps must be"),
        ("model.safetensors", "model"),
        ("x.safetensors", "cannot be read as"),
        ("no", "cannot be read"),
        ("folder", "is not the folder"),
    ):
        status, out, err = command("decode", source)
        assert (status, out) == (2, "") and says in err and err.splitlines()[-1].startswith("heterostep: ")


def test_a_request_of_another_version_is_no_reason_not_to_decode(command, tmp_path):
    facts = {"heterostep": json.dumps({"model": "demo", "request": {}})}
    save_file({"latents": torch.zeros(1, 8, 1, 4, 4)}, tmp_path / "l.safetensors", facts)
    assert command("decode", "l.safetensors", "--output", "v.mp4")[0] == 0


def test_what_was_denoised_is_kept_where_it_cannot_be_decoded(command, tmp_path, monkeypatch):
    decode = VideoDecoder.decode

    def fail(self, read):
        raise MemoryError

    monkeypatch.setattr(VideoDecoder, "decode", fail)
    status, _, err = command("generate", "--output", "v.mp4")
    assert status == 1 and "memory is too small" in err and "`heterostep decode v.safetensors --output FILE`" in err
    assert not (tmp_path / "v.mp4").exists() and read_latents(tmp_path / "v.safetensors").facts["request"]["seed"] == 3
    monkeypatch.setattr(VideoDecoder, "decode", decode)
    assert command("decode", "v.safetensors", "--output", "v.mp4")[0] == 0
    assert command("generate", "--output", "w.mp4")[0] == 0
    assert (tmp_path / "v.mp4").read_bytes() == (tmp_path / "w.mp4").read_bytes()
