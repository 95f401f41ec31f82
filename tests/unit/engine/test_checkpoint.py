"""Saved states come back whole or not at all: every byte of them is flipped or cut off here."""

from __future__ import annotations

import json
import math
import os
import random
import shutil

import pytest
import torch

import heterostep as hs
from heterostep.engine.checkpoint import VERSION, Saved, read_saved, remove_others, write_saved
from heterostep.engine.job import Job, JobConfig
from heterostep.engine.media import files
from heterostep.engine.media.files import checkpoint_name, checkpoint_steps
from heterostep.errors import Damaged
from tiny import generate, tiny_pipeline

NAME = checkpoint_name(4)


def saved(step=4, content=None, **changes):
    values = {"kind": "checkpoint", "step": step, "sigma": 0.5, "job": {"seed": 3}, "content": content or {"x": 1}}
    return Saved(**{**values, **changes})


def alike(a, b):
    """Whether two trees are equal, bit for bit; NaN equals NaN, a tuple a list."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list) and len(a) == len(b) and all(alike(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return type(a) is type(b) and a == b


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """What a run with guidance, partial steps and a multistep scheduler saves after four steps."""
    folder, pipe = tmp_path_factory.mktemp("original"), tiny_pipeline("unipc")
    session = hs.apply(pipe, hs.HSAConfig(compute=0.6, policy="groups"))
    session.save_every(2)

    def on_step_end(pipe, step, timestep, tensors):
        if step == 3:
            write_saved(folder, NAME, saved(content=session.state(tensors["latents"])))
        pipe._interrupt = step == 3
        return {}

    generate(pipe, steps=20, callback_on_step_end=on_step_end)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A folder with that checkpoint in it."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    return tmp_path


def parts(folder):
    """The manifest and the tensors of the checkpoint in a folder."""
    (tensors,) = folder.glob(f"{NAME}-*.safetensors")
    return folder / f"{NAME}.json", tensors


def test_everything_comes_back(tmp_path):
    timesteps = torch.arange(6)
    content = {
        "none": None, "yes": True, "int": 2**60, "float": 0.1 + 0.2, "tiny": 5e-324, "text": 'ü\n"\u2028', "empty": {},
        "numbers": [math.inf, -math.inf, math.nan, -0.0], "tuple": (1, (2.5, "x")), "list": [],
        "tensors": {
            "half": torch.randn(2, 3).bfloat16(), "scalar": torch.tensor(7.0, dtype=torch.float64),
            "none": torch.empty(0, 4), "bytes": torch.arange(5, dtype=torch.uint8), "mask": torch.tensor([True, False]),
            "nan": torch.tensor([1.0, math.inf]), "turned": torch.arange(6).view(2, 3).T,
        },
        "shared": [timesteps, timesteps[1:], timesteps[3], None],
    }  # fmt: skip
    write_saved(tmp_path, NAME, saved(content=content))
    got = read_saved(tmp_path, NAME, "checkpoint")
    assert alike(content, got.content)
    assert math.copysign(1, got.content["numbers"][3]) == -1
    assert (got.kind, got.step, got.sigma, got.job) == ("checkpoint", 4, 0.5, {"seed": 3})
    got.content["tensors"]["half"].add_(1)  # a run writes into what it got back


def test_the_manifest_is_json_that_says_what_is_there(folder):
    manifest, tensors = parts(folder)
    content = json.loads(manifest.read_text())
    assert content["format"] == "heterostep saved state" and content["version"] == VERSION
    assert content["step"] == 4 and content["sigma"] == 0.5
    assert content["file"]["name"] == tensors.name and content["file"]["bytes"] == tensors.stat().st_size
    assert len(content["file"]["sha256"]) == len(content["sha256"]) == 64
    assert manifest.stat().st_mode == tensors.stat().st_mode


def outcome(folder, want):
    """Read the checkpoint: what was written, or a refusal in one line."""
    try:
        got = read_saved(folder, NAME, "checkpoint")
    except Damaged as error:
        return "refused" if str(error) and "\n" not in str(error) else f"unclear: {error}"
    known = all(getattr(want, name) == getattr(got, name) for name in ("kind", "step", "sigma", "job"))
    return "whole" if known and alike(want.content, got.content) else "another"


def spoil_bytes(path, flips):
    """Change one byte after the other, in place: yields (position, what the byte is xored with)."""
    data = path.read_bytes()
    with open(path, "r+b", buffering=0) as file:
        for i, flip in flips:
            os.pwrite(file.fileno(), bytes([data[i] ^ flip]), i)
            yield i, flip
            os.pwrite(file.fileno(), data[i : i + 1], i)


def cut(path, lengths):
    """Cut a file to one length after the other, from long to short, and make it whole again: yields the lengths."""
    data = path.read_bytes()
    for length in sorted(lengths, reverse=True):
        os.truncate(path, length)
        yield length
    path.write_bytes(data)


def test_bytes_of_the_manifest(folder):
    manifest, _ = parts(folder)
    want, data = read_saved(folder, NAME, "checkpoint"), manifest.read_bytes()
    bits = random.Random(0)
    everywhere = [(i, 1 << bits.randrange(8)) for i in range(0, len(data), 2)]
    letters = [(i, 0x20) for i in range(1, len(data), 2) if chr(data[i]).isalpha()]  # upper case to lower: still JSON
    for place in spoil_bytes(manifest, everywhere + letters):
        assert outcome(folder, want) == "refused", place
    for length in cut(manifest, range(0, len(data), 3)):
        assert outcome(folder, want) == "refused", length
    for more in (b"\n", b" ", b"{}"):
        manifest.write_bytes(data + more)
        assert outcome(folder, want) == "refused"
    manifest.write_bytes(data)
    assert outcome(folder, want) == "whole"


def test_bytes_of_the_tensors(folder):
    _, tensors = parts(folder)
    want, data = read_saved(folder, NAME, "checkpoint"), tensors.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    rest = (len(data) - header) // 100
    places = [*range(64), *range(64, header, 5), *range(header, len(data), rest), len(data) - 1]
    bits = random.Random(0)
    for place in spoil_bytes(tensors, [(i, 1 << bits.randrange(8)) for i in places]):
        assert outcome(folder, want) == "refused", place
    for length in cut(tensors, places):
        assert outcome(folder, want) == "refused", length
    assert outcome(folder, want) == "whole"


def test_every_length_of_small_tensors(tmp_path):
    write_saved(tmp_path, NAME, saved(content={"x": torch.arange(40.0), "y": [torch.arange(3)]}))
    _, tensors = parts(tmp_path)
    want, data = read_saved(tmp_path, NAME, "checkpoint"), tensors.read_bytes()
    for place in spoil_bytes(tensors, [(i, 1 << bit) for i in range(len(data)) for bit in range(8)]):
        assert outcome(tmp_path, want) == "refused", place
    for length in cut(tensors, range(len(data))):
        assert outcome(tmp_path, want) == "refused", length
    tensors.write_bytes(data + data)
    assert outcome(tmp_path, want) == "refused"


def reseal(manifest, **changes):
    """Change a manifest and make its hash right again, as another program or version might."""
    from heterostep.engine.checkpoint import _sealed

    content = json.loads(manifest.read_text())
    del content["sha256"]
    manifest.write_bytes(_sealed({**content, **changes}))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda m, t: t.unlink(), "cannot be read"),
        (lambda m, t: m.unlink(), "cannot be read"),
        (lambda m, t: (m.unlink(), m.mkdir()), "Is a directory"),
        (lambda m, t: m.write_text("[" * 100_000), "not valid JSON"),
        (lambda m, t: m.write_bytes(b"\xff\xfe"), "not valid JSON"),
        (lambda m, t: m.write_text("1" * 10_000), "not valid JSON"),
        (lambda m, t: m.write_text("[]"), "not a manifest of heterostep"),
        (lambda m, t: m.write_text('{"format": "other"}'), "not a manifest of heterostep"),
        (lambda m, t: m.write_text('{"format": "heterostep saved state"}'), "not a manifest of heterostep"),
        (lambda m, t: m.write_text('{"format": "heterostep saved state", "version": NaN}'), "altered"),
        (lambda m, t: m.write_text(m.read_text().replace("\n", "")), "altered"),
        (lambda m, t: reseal(m, version=1), f"version 1, and this program reads version {VERSION}"),
        (lambda m, t: reseal(m, step=9), "checkpoint of step 9, under another name"),
        (lambda m, t: reseal(m, kind="result"), "result of step 4, under another name"),
        (lambda m, t: m.write_bytes(bytes(1 << 27)), "too large"),
    ],
)  # fmt: skip
def test_what_is_no_checkpoint(folder, spoil, says):
    spoil(*parts(folder))
    with pytest.raises(Damaged, match=says):
        read_saved(folder, NAME, "checkpoint")


def test_the_newest_whole_one_wins(tmp_path, caplog):
    config = JobConfig(folder=tmp_path)
    with Job(config, {"seed": 3}) as job:
        for step in (5, 10, 15):
            assert job.save(step, 0.5, {"x": torch.full((3,), float(step))})
    assert checkpoint_steps(tmp_path) == [15, 10]  # the two newest are kept
    assert not caplog.records

    def newest():
        caplog.clear()
        with Job(config, {"seed": 3}) as job:
            found = job.newest()
        return found.step if found else None

    assert newest() == 15
    (tensors,) = tmp_path.glob("checkpoint-000015-*")
    tensors.write_bytes(tensors.read_bytes()[:-1])
    assert newest() == 10
    (line,) = caplog.messages
    assert "checkpoint-000015" in line and "is skipped" in line and "\n" not in line
    (tmp_path / "checkpoint-000010.json").write_text("{}")
    assert newest() is None
    assert len(caplog.messages) == 2


def test_what_is_skipped_goes_with_the_next_checkpoint(tmp_path):
    with Job(JobConfig(folder=tmp_path), {}) as job:
        job.save(5, 0.5, {"x": torch.ones(1)})
        job.save(10, 0.5, {"x": torch.ones(1)})
    (tmp_path / "checkpoint-000010.json").write_text("{}")
    (tmp_path / ".checkpoint-000012-0123abcd.77.safetensors").write_bytes(b"left by a kill")
    (tmp_path / "notes.txt").write_text("not ours")
    (tmp_path / "checkpoint-of-mine.json").write_text("not ours")
    with Job(JobConfig(folder=tmp_path), {}) as job:
        assert job.newest().step == 5
        job.save(7, 0.5, {"x": torch.ones(1)})
        assert checkpoint_steps(tmp_path) == [7, 5]
        assert len(list(tmp_path.glob("*.safetensors"))) == 2 and not list(tmp_path.glob(".checkpoint*"))
        remove_others(tmp_path, ())
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "checkpoint-of-mine.json", "notes.txt"]


class FullDisk:
    """Lets so many writes through, and fails with the one after."""

    def __init__(self, after):
        self.left = after

    def __call__(self, path, content):
        self.left -= 1
        if self.left < 0:
            raise OSError(28, "No space left on device")
        files.write_durably(path, content)


@pytest.mark.parametrize("after", [0, 1])  # at the tensors, at the manifest
def test_a_full_disk_leaves_the_older_checkpoint(tmp_path, monkeypatch, caplog, after):
    with Job(JobConfig(folder=tmp_path), {}) as job:
        assert job.save(5, 0.5, {"x": torch.ones(1)})
        monkeypatch.setattr("heterostep.engine.checkpoint.write_durably", FullDisk(after))
        assert not job.save(10, 0.5, {"x": torch.zeros(1000)})
        assert not job.save(15, 0.5, {"x": torch.zeros(1000)})
        assert job.saved == 5
        (line,) = caplog.messages  # the second says nothing new
        assert (
            "the checkpoint of step 10 could not be written (No space left on device); that of step 5 is there" in line
        )
        assert len(list(tmp_path.glob("*.safetensors"))) == 1  # nothing half written fills the disk
        monkeypatch.undo()
        assert job.save(10, 0.5, {"x": torch.zeros(1000)})
        assert job.newest().step == 10


def test_a_write_that_fails_midway_changes_nothing(tmp_path, monkeypatch):
    target = tmp_path / "file.bin"
    files.write_durably(target, b"old")
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):
        files.write_durably(target, b"new")
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]
