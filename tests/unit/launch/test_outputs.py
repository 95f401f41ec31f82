"""Files of `heterostep generate`: names, what is there already, and what becomes of a video that cannot be written."""

from __future__ import annotations

import errno
import json
import os

import pytest

from heterostep.engine.engine import Engine
from heterostep.engine.media.video import MAX_SIDE
from heterostep.launch.cli import main


@pytest.fixture
def command(tiny_model, tmp_path, monkeypatch, capsys):
    """Runs `generate` in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        what = ["generate", "--prompt", "a b", "--size", "64x48", "--frames", "5", "--steps", "2", "--device", "cpu"]
        status = main([*what, "--compute", "1", "--model", str(tiny_model), *flags])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def no_work(monkeypatch):
    monkeypatch.setattr(Engine, "__init__", lambda *_: pytest.fail("work began"))


def test_what_exists_is_replaced_with_a_word(command, tmp_path):
    assert "replaced" not in command()[1]
    old = (tmp_path / "video.mp4").stat().st_mtime_ns
    status, out, _ = command("--report", "r.json")
    assert status == 0 and out.startswith("video.mp4 will be replaced (--no-clobber refuses this")
    assert (tmp_path / "video.mp4").stat().st_mtime_ns > old
    assert "will be replaced" not in command("--overwrite", "--report", "r.json")[1]
    assert command("--quiet")[1:] == ("", "")


@pytest.mark.usefixtures("no_work")
def test_no_clobber_refuses_before_the_work(command, tmp_path):
    (tmp_path / "h.mp4").write_text("mine")
    status, out, err = command("--no-clobber", "--heatmap", "h.mp4")
    assert (status, out) == (2, "") and err.startswith("heterostep: h.mp4 already exists, and --no-clobber")
    status, _, err = command("--no-clobber", "--overwrite")
    assert status == 2 and "contradict" in err
    assert (tmp_path / "h.mp4").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_job_may_replace_its_own_files_only(command, tmp_path):
    job = ("--no-clobber", "--job-dir", "job", "--report", "r.json")
    assert command(*job)[0] == 0
    status, out, _ = command(*job)
    assert status == 0 and "nothing was computed" in out and "replaced" not in out
    (tmp_path / "r.json").write_text("{}")  # somebody else's
    status, _, err = command(*job)
    assert status == 2 and "r.json already exists" in err and (tmp_path / "r.json").read_text() == "{}"


def test_a_full_job_folder_hides_nothing_of_the_files(command, tmp_path, monkeypatch, caplog):
    def full(path, record):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("heterostep.launch.outputs.write_json", full)
    status, out, _ = command("--job-dir", "job")
    assert status == 0 and "video.mp4" in out and (tmp_path / "video.mp4").stat().st_size > 0
    assert "could not note which files are its own (No space left" in caplog.text


@pytest.mark.parametrize("job", [(), ("--job-dir", "job")])
def test_a_video_that_cannot_be_written_lies_elsewhere(command, tmp_path, monkeypatch, job):
    replace = os.replace

    def refuse(source, target):
        if os.path.basename(target) in ("v.mp4", "r.json", "l.safetensors", "h.mp4"):
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    names = {"--output": "v.mp4", "--report": "r.json", "--latents": "l.safetensors", "--heatmap": "h.mp4"}
    status, out, err = command(*(word for pair in names.items() for word in pair), *job)
    assert status == 73 and "Traceback" not in err
    err = err.splitlines()[-1]  # after the lines of progress
    for name in names.values():
        assert f"{name} could not be written (Input/output error); the finished file is " in err
        assert not (tmp_path / name).exists()
    assert ("--output writes it again from job" in err) == bool(job)
    made = {path.suffix: path for path in tmp_path.glob("heterostep-*")}
    assert set(made) == {".mp4", ".json", ".safetensors"} and len(list(tmp_path.glob("heterostep-*.mp4"))) == 2
    assert json.loads(made[".json"].read_text())["compute"] == 1.0 and str(made[".json"].name) in out


def test_a_name_taken_while_the_work_went_on_is_kept(command, tmp_path, monkeypatch):
    generate = Engine.stream

    def slow(self, *args, **kwargs):
        (tmp_path / "v.mp4").write_text("mine")
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "stream", slow)
    status, _, err = command("--no-clobber", "--output", "v.mp4")
    assert status == 73 and "v.mp4 could not be written (File exists)" in err
    assert (tmp_path / "v.mp4").read_text() == "mine" and len(list(tmp_path.glob("heterostep-*.mp4"))) == 1


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (["--output", "out/"], "is a folder"),
        (["--output", "v"], "must end in .mp4, such as v.mp4"),
        (["--output", "v.mkv"], "must end in .mp4"),
        (["--output", f"{'x' * 300}.mp4"], "File name too long"),
        (["--scale", "300"], "would be 19200x14400, larger than the 16384 pixels"),
        (["--heatmap", "h.mp4", "--size", "1024x16"], "h.mp4' would be 2108x"),
    ],
)
def test_what_could_not_be_written_is_refused_before_the_work(command, tmp_path, monkeypatch, flags, rule):
    monkeypatch.setattr("heterostep.engine.media.video.MAX_SIDE", 2100 if "--heatmap" in flags else MAX_SIDE)
    status, out, err = command(*flags)
    assert (status, out) == (2, "") and rule in err and err.count("\n") == 1 and not list(tmp_path.iterdir())
