from __future__ import annotations

import ctypes
import errno
import math
import os
import weakref
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from heterostep import ConfigError, RequestError
from heterostep.engine.media.files import check_writable, place, replacing, write_json
from heterostep.engine.media.video import Audio, check_mp4, write_mp4
from heterostep.engine.record import psnr, relative_l2, ssim


def clip(num_frames=5, height=32, width=48):
    """A smooth gradient with a moving red square."""
    y, x = np.mgrid[:height, :width]
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    frames[..., 1] = (x * 3 + y) % 200
    for k in range(num_frames):
        frames[k, 8:20, 4 + 3 * k : 16 + 3 * k] = (220, 40, 30)
    return frames


def read(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        return frames, float(stream.average_rate), stream.codec_context.name, stream.codec_context.pix_fmt


def test_mp4_is_h264_and_shows_the_frames(tmp_path):
    frames = clip()
    write_mp4(tmp_path / "v.mp4", frames, 8)
    back, fps, codec, pix_fmt = read(tmp_path / "v.mp4")
    assert (back.shape, fps, codec, pix_fmt) == (frames.shape, 8.0, "h264", "yuv420p")
    assert psnr(back, frames) > 28  # chroma is halved
    # The colour of a flat area survives: RGB -> BT.709 -> RGB, with the file saying so.
    assert np.abs(back[0, 10:18, 7:13].mean((0, 1)) - (220, 40, 30)).max() < 6
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]


@pytest.mark.parametrize(("height", "width"), [(15, 17), (16, 31), (33, 32)])
def test_odd_sizes_are_padded_to_even(tmp_path, height, width):
    write_mp4(tmp_path / "v.mp4", clip(2, 48, 48)[:, :height, :width], 8)
    back, *_ = read(tmp_path / "v.mp4")
    assert back.shape == (2, height + height % 2, width + width % 2, 3)


def test_scale_enlarges_pixels(tmp_path):
    write_mp4(tmp_path / "v.mp4", clip(2, 16, 16), 8, scale=4)
    assert read(tmp_path / "v.mp4")[0].shape == (2, 64, 64, 3)


def test_a_single_frame_is_a_video_too(tmp_path):
    write_mp4(tmp_path / "v.mp4", clip(1), 24)
    assert len(read(tmp_path / "v.mp4")[0]) == 1


M_PERTURB = -6


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="fills fresh memory by glibc's mallopt")
@pytest.mark.parametrize("side", [48, 320])
def test_the_same_frames_are_the_same_file(tmp_path, side):
    # Whatever the process did before: an encoder must not read what it did not write.
    frames = clip(9, side, side)
    sound = Audio(samples=np.sin(np.arange(16000, dtype=np.float32) / 20)[None], sample_rate=16000)
    files = set()
    try:
        for fill in (0, 85, 170):
            ctypes.CDLL(None).mallopt(M_PERTURB, fill)
            write_mp4(tmp_path / "v.mp4", frames, 8, audio=sound)
            files.add((tmp_path / "v.mp4").read_bytes())
    finally:
        ctypes.CDLL(None).mallopt(M_PERTURB, 0)
    assert len(files) == 1


@pytest.mark.parametrize(
    ("frames", "fps", "scale"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), 8, 1),
        (np.zeros((8, 8, 3), np.uint8), 8, 1),
        (np.zeros((0, 8, 8, 3), np.uint8), 8, 1),
        (np.zeros((2, 8, 8, 3), np.uint8), 0, 1),
        (np.zeros((2, 8, 8, 3), np.uint8), 8, 0),
    ],
)
def test_wrong_frames_are_refused(tmp_path, frames, fps, scale):
    with pytest.raises(RequestError, match="must be"):
        write_mp4(tmp_path / "v.mp4", frames, fps, scale=scale)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scale", [1, 3])
def test_a_stream_of_frames_makes_the_same_file(tmp_path, scale):
    frames = clip(9, 33, 47)
    write_mp4(tmp_path / "whole.mp4", frames, 8, scale=scale)
    write_mp4(tmp_path / "stream.mp4", (frame.copy() for frame in frames), 8, scale=scale)
    large = frames.repeat(scale, 1).repeat(scale, 2)
    sides = [side % 2 for side in large.shape[1:3]]
    padded = np.pad(large, ((0, 0), (0, sides[0]), (0, sides[1]), (0, 0)), mode="edge")
    write_mp4(tmp_path / "padded.mp4", padded, 8)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_the_file_does_not_depend_on_the_number_of_processors(tmp_path):
    write_mp4(tmp_path / "v.mp4", clip(2, 320, 320), 8)
    assert b" threads=4 " in (tmp_path / "v.mp4").read_bytes()  # x264 writes its settings into the file


def test_a_stream_is_never_in_memory_as_a_whole(tmp_path):
    alive, most = weakref.WeakSet(), 0

    class Frame(np.ndarray):
        __hash__ = object.__hash__

    def frames():
        nonlocal most
        for frame in clip(60, 32, 32):
            frame = frame.copy().view(Frame)
            alive.add(frame)
            most = max(most, len(alive))
            yield frame

    write_mp4(tmp_path / "v.mp4", frames(), 8)
    assert most < 10


def test_frames_of_two_sizes_are_refused(tmp_path):
    with pytest.raises(RequestError, match="of one size"):
        write_mp4(tmp_path / "v.mp4", [clip(1, 32, 32)[0], clip(1, 32, 48)[0]], 8)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "r.json"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="midway"), replacing(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError("midway")
    with pytest.raises(ValueError, match="nan"):
        write_json(target, {"x": math.nan})
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_output_checks(tmp_path):
    assert check_writable(tmp_path / "v.MP4", ".mp4").name == "v.MP4"
    (tmp_path / "d.mp4").mkdir()
    os.mkfifo(tmp_path / "fifo.mp4")
    for path, rule in [
        (tmp_path / "v.avi", "must end in .mp4"),
        (tmp_path / "absent" / "v.mp4", "does not exist"),
        (tmp_path / "d.mp4", "is a folder"),
        (tmp_path / f"{'v' * 300}.mp4", "cannot be written"),
        ("/proc/v.mp4", "cannot be written"),
        (f"{tmp_path}/", "is a folder; name a file in it"),
        (f"{tmp_path}/v.mp4/", "is a folder"),
        (tmp_path / "v", "must end in .mp4, such as v.mp4"),
        ("", "must end in .mp4"),
        (tmp_path / "fifo.mp4", "is not a file"),
        (tmp_path / "nul\0.mp4", "cannot be written"),
    ]:
        with pytest.raises(ConfigError, match=rule):
            check_writable(path, ".mp4")
    with replacing(tmp_path / f"{'v' * 248}.mp4") as temporary:  # as long as a name may be
        temporary.touch()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.mp4", "fifo.mp4", f"{'v' * 248}.mp4"]


def test_a_full_disk_is_found_before_the_work(tmp_path, monkeypatch):
    def full(self, data):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ConfigError, match=r"cannot be written \(No space left on device\)"):
        check_writable(tmp_path / "v.mp4", ".mp4")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["10:30.mp4", "a:b/c.mp4", "file:x.mp4", "50%d.mp4", "a|b.mp4", "\udcff.mp4"])
def test_names_that_ffmpeg_reads_otherwise(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("a:b").mkdir()
    check_mp4(name, 32, 48, 8)
    assert [path.name for path in tmp_path.rglob("*")] == ["a:b"]
    write_mp4(name, clip(2), 8)
    assert len(read(tmp_path / name)[0]) == 2


def test_temporary_names_are_unique_among_machines(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)  # in every container
    with replacing(tmp_path / "v.mp4") as one, replacing(tmp_path / "v.mp4") as other:
        assert one != other and one.parent == other.parent == tmp_path
        one.touch(), other.touch()


@pytest.mark.parametrize(("height", "width", "rule"), [(16386, 32, "16384 pixels"), (32, 20000, "16384 pixels")])
def test_videos_that_the_encoder_does_not_take(tmp_path, height, width, rule):
    with pytest.raises(ConfigError, match=rule):
        check_mp4(tmp_path / "v.mp4", height, width, 8)
    assert not list(tmp_path.iterdir())


def test_an_encoder_that_does_not_open_is_found_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("heterostep.engine.media.video.MAX_SIDE", 1 << 20)
    with pytest.raises(ConfigError, match="no video of 48x16386 at 8 frames per second can be written"):
        check_mp4(tmp_path / "v.mp4", 16386, 48, 8)
    assert not list(tmp_path.iterdir())


def test_a_file_is_placed_where_there_is_a_place(tmp_path, monkeypatch):
    """At its name; else under another beside it, in the current folder, or in the one for temporary files."""
    folders = [tmp_path / name for name in ("target", "current", "temporary")]
    for folder in folders:
        folder.mkdir()
    monkeypatch.chdir(folders[1])
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(folders[2]))
    target = folders[0] / "v.mp4"

    def write(path, refused):
        if path.parent in refused or (path.name.startswith(".v.") and None in refused):
            raise OSError(errno.EROFS, "Read-only file system")
        path.write_text("video")

    assert place(target, lambda path: write(path, ())) == (target, None)
    for refused, folder in (({None}, folders[0]), ({folders[0]}, folders[1]), (set(folders[:2]), folders[2])):
        path, reason = place(target, lambda path, refused=refused: write(path, refused))
        assert path.absolute().parent == folder and path != target and path.read_text() == "video"
        assert reason == "Read-only file system" and path.suffix == ".mp4"
    with pytest.raises(OSError, match=r"could not be written anywhere \(Read-only file system\)"):
        place(target, lambda path: write(path, folders))
    assert target.read_text() == "video" and not list(tmp_path.rglob(".*"))


def test_a_file_that_appeared_meanwhile_is_kept(tmp_path):
    target = tmp_path / "v.txt"
    target.write_text("mine")
    path, reason = place(target, lambda path: path.write_text("new"), overwrite=False)
    assert target.read_text() == "mine" and path.read_text() == "new" and reason == "File exists"


def test_psnr():
    a = clip()
    assert psnr(a, a) == math.inf
    assert psnr(np.zeros((1, 4, 4, 3)), np.full((1, 4, 4, 3), 0.1)) == pytest.approx(20.0)
    assert psnr(a, 255 - a) == pytest.approx(psnr(a / 255.0, 1 - a / 255.0))
    with pytest.raises(ValueError, match="one shape"):
        psnr(a, a[:1])
    with pytest.raises(ValueError, match="uint8 or float"):
        psnr(a.astype(np.int32), a.astype(np.int32))


def test_ssim_equals_a_plain_implementation():
    a = clip().astype(np.float64) / 255
    b = np.clip(a + np.random.default_rng(0).normal(0, 0.1, a.shape), 0, 1)
    weights = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights /= weights.sum()

    def blur(x):
        x = np.lib.stride_tricks.sliding_window_view(x, 11, axis=1) @ weights
        return np.lib.stride_tricks.sliding_window_view(x, 11, axis=2) @ weights

    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
    expected = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    assert ssim(a, b) == pytest.approx(expected.mean(), abs=1e-9)
    assert ssim(a, a) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="at least 11"):
        ssim(a[:, :10], b[:, :10])


def test_relative_l2():
    x = torch.randn(1, 4, 3, 5, 5)
    assert relative_l2(x, x) == 0.0
    assert relative_l2(1.1 * x, x) == pytest.approx(0.1, rel=1e-5)
    with pytest.raises(ValueError, match="one shape"):
        relative_l2(x, x[:, :2])
