"""The image that a video starts from: what is taken, what is refused, and that it reaches the stock pipeline."""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image

import heterostep as hs
from heterostep.engine.defaults import DEFAULTS
from heterostep.engine.denoise.preview import Preview
from heterostep.engine.facts import read_facts
from heterostep.engine.loading import as_pipeline
from heterostep.engine.media.image import MAX_BYTES, fingerprint, fit_image, png, read_image, size_for
from heterostep.engine.request import StepDone, prepare, resolve
from tiny import IMAGE_KINDS, picture

PROMPT = "a red disc moves right"


def saved(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def bomb(width=60_000, height=60_000):
    """A PNG of a few bytes whose header promises billions of pixels."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def animation(kind):
    first, *rest = (picture(seed=seed) for seed in range(3))
    return saved(first, kind, save_all=True, append_images=rest, duration=50)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_files_bytes_and_images_are_taken(tmp_path, kind):
    image = picture(40, 24)
    path = tmp_path / "picture"  # no ending: the content decides
    path.write_bytes(saved(image, kind))
    decoded = read_image(path)
    assert decoded.mode == "RGB" and decoded.size == (40, 24)
    assert read_image(str(path)) == decoded == read_image(path.read_bytes())
    assert fingerprint(read_image(decoded)) == fingerprint(decoded)
    if kind == "PNG":
        assert np.array_equal(decoded, image) and fingerprint(read_image(png(image))) == fingerprint(image)


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA", "1", "CMYK"])
def test_other_modes_become_rgb(mode):
    assert read_image(picture().convert(mode)).mode == "RGB"


def test_a_photograph_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the scene is at the right
    image = picture(48, 32)
    turned = read_image(saved(image, "PNG", exif=exif))
    assert turned.size == (32, 48)
    assert fingerprint(turned) == fingerprint(image.transpose(Image.Transpose.ROTATE_270))


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", "is not a PNG, JPEG or WebP image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not a PNG, JPEG or WebP image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "is not a PNG, JPEG or WebP image"),
        (saved(picture(), "GIF"), "is not a PNG, JPEG or WebP image"),
        (saved(picture(), "PNG")[:-200], "truncated or damaged"),
        (saved(picture(), "JPEG")[:-300], "truncated or damaged"),
        (saved(picture(), "PNG")[:20], "is not a PNG, JPEG or WebP image"),
        (animation("WEBP"), "an animation of 3 pictures"),
        (animation("PNG"), "an animation of 3 pictures"),
        (bomb(), "more than 50 million pixels"),
        (bomb(9000, 9000), "9000x9000 pixels, but the limit is 50 million"),
        (saved(picture(15, 64), "PNG"), "15x64 pixels, but each side needs at least 16"),
        (saved(Image.fromarray(np.full((32, 32), 40_000, np.uint16)), "PNG"), "more than 8 bits"),
        (b"\0" * (MAX_BYTES + 1), "larger than 64 MiB"),
    ],
)
def test_what_is_no_image_to_start_from(content, rule):
    with pytest.raises(hs.RequestError, match=rule) as caught:
        read_image(content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("absent.png", "does not exist"),
        (".", "is not a file"),
        ("x" * 300, "cannot be read"),
        ("~nobody-of-this-name/x.png", "cannot be read|does not exist"),
        ("a\0b", "cannot be read|does not exist"),
    ],
)
def test_paths_that_lead_to_no_image(name, rule, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(hs.RequestError, match=rule) as caught:
        read_image(name)
    assert len(str(caught.value)) < 250


def test_a_file_that_may_not_be_read(tmp_path):
    path = tmp_path / "p.png"
    path.write_bytes(saved(picture(), "PNG"))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(hs.RequestError, match="Permission denied"):
        read_image(path)


@pytest.mark.parametrize("image", [5, b"bytes", "", np.zeros((4, 4, 3))])
def test_a_request_takes_paths_and_images(image):
    with pytest.raises(hs.RequestError, match="path of a file or a Pillow image"):
        hs.GenerateRequest(prompt=PROMPT, image=image)


@pytest.mark.parametrize(
    ("size", "area", "step", "video"),
    [
        ((1280, 720), 832 * 480, (16, 16), (832, 464)),
        ((720, 1280), 832 * 480, (16, 16), (464, 832)),
        ((1000, 1000), 1280 * 704, (32, 32), (928, 928)),
        ((3000, 30), 4096, (16, 16), (640, 16)),
    ],
)
def test_the_size_follows_the_image(size, area, step, video):
    assert size_for(Image.new("RGB", size), area, step) == video


def test_an_image_of_another_shape_shows_its_middle():
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = 255
    assert np.asarray(fit_image(Image.fromarray(pixels), 40, 40)).min() > 250
    image = picture(32, 32)
    assert fit_image(image, 32, 32) is image


def request(**changes):
    fields = {"prompt": PROMPT, "negative_prompt": "blurry", "num_frames": 5, "seed": 3, "num_inference_steps": 4}
    return hs.GenerateRequest(**{**fields, **changes})


def stock(cls, folder, **arguments):
    """What diffusers alone makes of the same, uint8 [F, H, W, 3], and its latents."""
    pipe = cls.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    given = {"prompt": PROMPT, "negative_prompt": "blurry", "num_frames": 5, "num_inference_steps": 4, "height": 48,
             "width": 64, "guidance_scale": DEFAULTS["Wan small"].guidance_scale, **arguments}  # fmt: skip
    frames, latents = (
        pipe(**given, generator=torch.Generator().manual_seed(3), output_type=kind).frames for kind in ("np", "latent")
    )
    return (frames[0] * 255).round().astype(np.uint8), latents


@pytest.mark.parametrize(
    ("kind", "image", "cls"),
    [*((kind, True, WanImageToVideoPipeline) for kind in (*IMAGE_KINDS, "ti2v5b")),
     ("ti2v5b", False, WanPipeline), ("ti2v5b i2v", False, WanPipeline)],
)  # fmt: skip
def test_dense_is_the_stock_pipeline(image_models, tmp_path, kind, image, cls):
    path = tmp_path / "start.png"
    picture(60, 45).save(path)
    engine = hs.Engine(hs.EngineConfig(model=str(image_models[kind]), device="cpu"))
    # 60 x 45 pixels have the proportions of 64 x 48, the size nearest below the model's area.
    start = {"image": path} if image else {"width": 64, "height": 48}
    output = engine.generate(request(compute=1.0, **start))
    fitted = {"image": fit_image(picture(60, 45), 64, 48)} if image else {}
    frames, latents = stock(cls, image_models[kind], **fitted)
    assert torch.equal(output.latents, latents)
    assert (output.frames == frames).all() and output.frames.shape == (5, 48, 64, 3)
    assert output.request.image == (fingerprint(fitted["image"]) if image else None)


def test_partial_runs_previews_and_both_uses_of_one_engine(image_models):
    engine = hs.Engine(
        hs.EngineConfig(model=str(image_models["ti2v5b"]), device="cpu", hsa=hs.HSAConfig(policy="tokens"))
    )
    preview, taken, outputs = Preview(engine.pipeline, budget=1e9), 0, []
    for image in (picture(), None):
        for event in engine.stream(request(image=image, num_frames=9, num_inference_steps=10)):
            taken += isinstance(event, StepDone) and preview.take() is not None
        outputs.append(event)
    assert [output.report.conditioned for output in outputs] == [16, 0]
    assert taken >= 10
    assert type(engine.pipeline) is WanPipeline and engine.pipeline.progress_bar(range(1)).disable
    twin = as_pipeline(engine.pipeline, "WanImageToVideoPipeline")
    assert twin.transformer is engine.pipeline.transformer and twin.config.expand_timesteps
    with pytest.raises(hs.RequestError, match="does not exist"):
        engine.generate(request(image="absent.png"))


def test_an_image_must_fit_the_model(image_models, tiny_model):
    with pytest.raises(hs.RequestError, match="makes videos from text alone; leave out the image"):
        resolve(request(image=picture()), read_facts(str(tiny_model)))
    facts = read_facts(str(image_models["wan21 i2v"]))
    with pytest.raises(hs.RequestError, match=r"makes videos from an image; give one \(--image FILE\)"):
        resolve(request(), facts)
    assert (facts.image, facts.sees_image) == ("required", True)
    assert (read_facts(str(image_models["wan22 i2v"])).sees_image, read_facts(str(image_models["ti2v5b"])).image) == (
        False,
        "optional",
    )
    resolved, sources = prepare(request(image=picture(100, 100), width=32, height=64), facts)
    assert sources.image.size == (32, 64) == (resolved.width, resolved.height)


def test_the_image_is_part_of_a_job(image_models, tmp_path):
    engine = hs.Engine(hs.EngineConfig(model=str(image_models["ti2v5b"]), device="cpu"))
    job = hs.JobConfig(folder=tmp_path / "job", checkpoint_every=2)
    (tmp_path / "a.png").write_bytes(saved(picture(), "PNG"))
    (tmp_path / "b.webp").write_bytes(saved(picture(), "WEBP", lossless=True))
    first = engine.generate(request(image=tmp_path / "a.png"), job)
    again = engine.generate(request(image=tmp_path / "b.webp"), job)  # the same picture in another file
    assert torch.equal(first.latents, again.latents) and again.report.conditioned == first.report.conditioned == 16
    with pytest.raises(hs.ConfigError, match="differs in the image it starts from"):
        engine.generate(request(image=picture(seed=4)), job)


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_a_job_goes_on_bit_for_bit(image_models, tmp_path, monkeypatch, kind):
    engine = hs.Engine(hs.EngineConfig(model=str(image_models[kind]), device="cpu", hsa=hs.HSAConfig(policy="tokens")))
    wanted = request(image=picture(), num_inference_steps=10)
    whole = engine.generate(wanted, hs.JobConfig(folder=tmp_path / "whole", checkpoint_every=3))
    job, step, steps = hs.JobConfig(folder=tmp_path / "broken", checkpoint_every=3), engine.pipeline.scheduler.step, []

    def fail_at_the_eighth(*args, **kwargs):
        steps.append(1)
        if len(steps) == 8:
            raise RuntimeError("power failure")
        return step(*args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="power failure"):
        patched.setattr(engine.pipeline.scheduler, "step", fail_at_the_eighth)
        engine.generate(wanted, job)
    started, *_, resumed = engine.stream(wanted, job)
    assert started.resumed_at == 6
    assert torch.equal(resumed.latents, whole.latents)
    assert torch.equal(resumed.report.evaluations, whole.report.evaluations)
