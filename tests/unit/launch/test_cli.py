"""The commands `generate`, `info` (launch/info.py) and `serve`: their flags, messages and exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import av
import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from safetensors.torch import load_file

from heterostep.engine.decoding import VideoDecoder
from heterostep.engine.engine import Engine
from heterostep.errors import TOO_LARGE
from heterostep.launch import cli
from said import errors
from tiny import IMAGE_KINDS, picture

PROMPT = ["--prompt", "a red disc moves right"]


def run(capsys, *argv):
    """Exit code, stdout and stderr of a command, in this process; without its progress."""
    try:
        status = cli.main([str(a) for a in argv])
    except SystemExit as exit_:
        status = exit_.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err if "--quiet" in argv else errors(captured.err)


def frames_of(path):
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.fixture
def no_model_loaded(monkeypatch):
    """Fails the test when anything is loaded: a bad request must be refused before that."""
    from heterostep.engine import engine

    def refuse(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(engine, "load_pipeline", refuse)


def test_generate_writes_every_file(capsys, tiny_model, tmp_path):
    status, out, err = run(
        capsys, "generate", *PROMPT, "--model", tiny_model, "--seed", 3, "--compute", 0.5, "--steps", 20,
        "--size", "64x48", "--frames", 9, "--fps", 6, "--guidance", 2, "--negative-prompt", "blurry",
        "--output", tmp_path / "v.mp4", "--heatmap", tmp_path / "h.mp4", "--report", tmp_path / "r.json",
        "--latents", tmp_path / "l.safetensors", "--scale", 2, "--compare-dense", "--device", "cpu",
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["h.mp4", "l.safetensors", "r.json", "v.mp4"]
    assert frames_of(tmp_path / "v.mp4") == frames_of(tmp_path / "h.mp4") == 9
    assert load_file(tmp_path / "l.safetensors")["latents"].shape == (1, 16, 3, 6, 8)
    assert len({p.stat().st_mode for p in tmp_path.iterdir()}) == 1  # all may be read by the same people
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["compute"] == pytest.approx(0.5, abs=0.02)
    assert report["seconds"]["denoise"] > 0 and len(report["steps"]) == 20
    assert report["request"]["fps"] == 6 and report["request"]["guidance_scale"] == 2.0
    assert report["against_dense"]["speedup"] > 0
    assert "9 frames of 64x48" in out and "times as fast" in out and "PSNR" in out


def test_quiet_prints_nothing(capsys, tiny_model, tmp_path):
    status, out, err = run(
        capsys, "generate", *PROMPT, "--model", tiny_model, "--steps", 4, "--frames", 5, "--compute", 1,
        "--output", tmp_path / "v.mp4", "--quiet",
    )  # fmt: skip
    assert (status, out, err) == (0, "", "")
    assert frames_of(tmp_path / "v.mp4") == 5
    assert are_progress_bars_disabled()  # of downloads, too
    enable_progress_bars()


def test_a_plan_that_cannot_be_met_is_said_before_the_model_is_loaded(capsys, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(Engine, "__init__", lambda *_, **__: pytest.fail("the model was loaded"))
    status, _, err = run(
        capsys, "generate", *PROMPT, "--model", tiny_model, "--steps", 5, "--frames", 5, "--compute", 0.1,
        "--output", tmp_path / "v.mp4", "--compare-dense", "--device", "cpu",
    )  # fmt: skip
    assert status == 2 and "ask for at least compute=0.2" in err


def test_the_same_seed_gives_the_same_latents(capsys, tiny_model, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        status, *_ = run(
            capsys, "generate", *PROMPT, "--model", tiny_model, "--steps", 8, "--frames", 5, "--seed", seed,
            "--output", tmp_path / "v.mp4", "--latents", tmp_path / f"{name}.safetensors", "--quiet",
        )  # fmt: skip
        assert status == 0
    a, b, c = (load_file(tmp_path / f"{name}.safetensors")["latents"] for name in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("solver", ["euler", "unipc", "dpm++"])
@pytest.mark.parametrize("policy", ["joint", "tokens", "groups", "steps"])
def test_policies_and_solvers(capsys, tiny_model, tmp_path, policy, solver):
    status, _, err = run(
        capsys, "generate", *PROMPT, "--model", tiny_model, "--steps", 20, "--frames", 5, "--policy", policy,
        "--solver", solver, "--output", tmp_path / "v.mp4", "--quiet",
    )  # fmt: skip
    assert (status, err) == (0, "")


@pytest.mark.usefixtures("no_model_loaded")
@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (["--compute", "0"], "above 0 and at most 1"),
        (["--compute", "1.5"], "above 0 and at most 1"),
        (["--compute", "nan"], "above 0 and at most 1"),
        (["--compute", "half"], "must be a finite number"),
        (["--size", "13x17"], "nearest size is 16x16"),
        (["--size", "large"], "WIDTHxHEIGHT"),
        (["--size", "0x64"], "WIDTHxHEIGHT"),
        (["--size", "64"], "WIDTHxHEIGHT"),
        (["--size=-64x64"], "WIDTHxHEIGHT"),
        (["--frames", "0"], "at least 1"),
        (["--frames", "8"], "nearest is 9"),
        (["--frames", "many"], "whole number"),
        (["--steps", "0"], "at least 1"),
        (["--steps", "1.5"], "whole number"),
        (["--fps", "0"], "from 1 to 1000"),
        (["--fps", "100000000000"], "from 1 to 1000"),
        (["--guidance", "1e39"], "from 0 to 1000"),
        (["--scale", "300"], "larger than the 16384 pixels"),
        (["--guidance", "nan"], "finite"),
        (["--seed", "-1"], "from 0 to 2**63 - 1"),
        (["--seed", "99999999999999999999"], "2**63"),
        (["--prompt", ""], "prompt is empty"),
        (["--policy", "magic"], "policy"),
        (["--solver", "heun"], "solver"),
        (["--dtype", "int4"], "--dtype: must be one of"),
        (["--device", "tpu"], "device must be"),
        (["--device", "cuda:77"], "does not exist"),
        (["--output", "v.avi"], "must end in .mp4"),
        (["--output", "absent/v.mp4"], "does not exist"),
        (["--heatmap", "absent/h.mp4"], "does not exist"),
        (["--report", "r.txt"], "must end in .json"),
        (["--latents", "l.pt"], "must end in .safetensors"),
        (["--output", "v.mp4", "--heatmap", "./v.mp4"], "same name"),
        (["--checkpoint-every", "0", "--job-dir", "j"], "at least 1"),
        (["--checkpoint-every", "5"], "--checkpoint-every needs a job; name its folder with --job-dir"),
        (["--resume", "auto"], "--resume needs a job"),
        (["--resume", "maybe", "--job-dir", "j"], "--resume: must be one of auto, never, not 'maybe'"),
        (["--job-dir", "j", "--compare-dense"], "leave out --job-dir"),
        (["--job-dir", ""], "must be a path"),
        (["--steps", "3", "--compute", "0.1"], "compute=0.1 cannot be met with 3 steps"),
        (["--steps", "20", "--compute", "0.1", "--policy", "tokens", "--job-dir", "j"], "follow a checkpoint"),
        (["--forecast", "ab2", "--solver", "unipc"], "would apply the second order twice"),
        (["--unknown"], "unrecognized arguments: --unknown; see `heterostep generate --help`"),
        (["--quality", "draft", "--compute", "0.5"], "--compute and --quality both say how much work to spend"),
        (["--comp", "0.5"], "unrecognized arguments"),
    ],
)
def test_bad_flags(capsys, tiny_model, tmp_path, monkeypatch, flags, rule):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "generate", *PROMPT, "--model", tiny_model, *flags)
    assert (status, out) == (2, "")
    assert rule in err and err.startswith("heterostep: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name",
    [
        "truncated weights",
        "truncated json",
        "no vae",
        "foreign",
        "no index",
        "bad sizes",
        "no weights",
        "no text encoder",
        "lacking a weight",
        "lacking a text weight",
        "lacking text embeddings",
        "lacking a VAE weight",
        "lacking much",
        "torn shards",
        "zero patch",
        "endless layers",
        "odd expert",
        "wrong channels",
    ],
)
def test_bad_model_folders(capsys, broken_models, tmp_path, name):
    status, out, err = run(capsys, "generate", *PROMPT, "--model", broken_models[name], "--output", tmp_path / "v.mp4")
    assert (status, out) == (2, "")
    assert err.startswith("heterostep: model") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_model_loaded")
@pytest.mark.parametrize("command", [["generate", *PROMPT], ["info"]])
@pytest.mark.parametrize(
    ("model", "rule"),
    [("./absent", "nor an existing folder"), ("", "nor a hub id"), ("a/b/c", "nor a hub id")],
)
def test_missing_models(capsys, command, model, rule):
    status, _, err = run(capsys, *command, "--model", model)
    assert status == 2 and err.count("\n") == 1


@pytest.mark.usefixtures("no_model_loaded")
@pytest.mark.parametrize(
    ("kind", "flags", "rule"),
    [
        (None, ["--image", "a.png"], "makes videos from text alone; leave out the image"),
        ("wan21 i2v", [], "makes videos from an image; give one (--image FILE)"),
        ("ti2v5b", ["--image", "absent.png"], "image 'absent.png' does not exist"),
        ("ti2v5b", ["--image", "."], "image '.' is not a file"),
        ("ti2v5b", ["--image", ""], "path of a file"),
        ("ti2v5b", ["--image", "text.png"], "image 'text.png' is not a PNG, JPEG or WebP image"),
        ("ti2v5b", ["--image", "torn.png"], "image 'torn.png' cannot be decoded: the file is truncated or damaged"),
        ("ti2v5b", ["--image", "a.png", "--size", "40x48"], "nearest size is 48x48"),
        ("ti2v5b", ["--image", "long.png"], "at most 64 along each axis"),
    ],
)
def test_bad_images(capsys, tiny_model, image_models, tmp_path, monkeypatch, kind, flags, rule):
    monkeypatch.chdir(tmp_path)
    picture().save("a.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "a.png").read_bytes()[:-150])
    (tmp_path / "text.png").write_text("a picture of a cat")
    picture(6400, 16).save("long.png")
    there = set(tmp_path.iterdir())
    status, out, err = run(capsys, "generate", *PROMPT, "--model", image_models[kind] if kind else tiny_model, *flags)
    assert (status, out) == (2, "")
    assert rule in err and err.startswith("heterostep: ") and err.count("\n") == 1
    assert set(tmp_path.iterdir()) == there


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_a_video_from_an_image(capsys, image_models, tmp_path, kind):
    picture(90, 60).save(tmp_path / "a.png")
    status, out, err = run(
        capsys, "generate", *PROMPT, "--model", image_models[kind], "--image", tmp_path / "a.png", "--steps", 20,
        "--frames", 5, "--policy", "tokens", "--output", tmp_path / "v.mp4", "--report", tmp_path / "r.json",
        "--device", "cpu",
    )  # fmt: skip
    assert (status, err) == (0, "") and "5 frames of 64x48" in out
    report = json.loads((tmp_path / "r.json").read_text())
    assert frames_of(tmp_path / "v.mp4") == 5 and len(report["request"]["image"]) == 64
    assert report["conditioned"] == (12 if kind == "ti2v5b i2v" else 0)
    assert report["compute"] == pytest.approx(0.5, abs=0.02)
    full = sum(step["active"] == step["total"] for step in report["steps"])
    assert full >= 1 and report["evaluations"]["min"] >= full


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("wan21 i2v", ["WanImageToVideoPipeline", "required: image to video; give --image FILE"]),
        ("wan22 i2v", ["2 x 2 layers", "required"]),
        ("ti2v5b", ["WanPipeline", "optional: text to video, or image to video with --image FILE"]),
        (None, ["no: text to video", "1, 2; ring takes any"]),
    ],
)
def test_info_says_whether_an_image_is_taken(capsys, tiny_model, image_models, kind, words):
    status, out, err = run(capsys, "info", "--model", image_models[kind] if kind else tiny_model)
    assert (status, err) == (0, "") and all(word in out for word in words)


def test_info(capsys, tiny_model):
    status, out, err = run(capsys, "info", "--model", tiny_model, "--size", "64x48", "--frames", 9)
    assert (status, err) == (0, "")
    assert "2 layers, 2 heads of 24" in out and "36 = 3 x 3 x 4" in out
    assert torch.__version__ in out and "cpu" in out
    assert run(capsys, "info", "--model", tiny_model, "--size", "60x48")[0] == 2


def test_info_of_the_demo_model_needs_no_flag(capsys):
    status, out, err = run(capsys, "info")
    assert (status, err) == (0, "") and "demo (Wan small" in out


def test_help_reads_well(capsys):
    for argv, words in (
        (["--help"], ["examples:", "generate", "info"]),
        (["generate", "--help"], ["examples:", "--compute", "--heatmap", "what to write"]),
        (["info", "--help"], ["--model"]),
    ):
        status, out, _ = run(capsys, *argv)
        assert status == 0 and all(word in out for word in words)
    assert run(capsys)[0] == 2
    assert run(capsys, "dance")[0] == 2


def test_a_job_from_the_command_line(capsys, tiny_model, tmp_path, monkeypatch):
    def make(*more, seed=3):
        return run(
            capsys, "generate", *PROMPT, "--model", tiny_model, "--steps", 8, "--frames", 5, "--seed", seed,
            "--output", tmp_path / "v.mp4", "--job-dir", tmp_path / "job", *more,
        )  # fmt: skip

    monkeypatch.setattr(VideoDecoder, "decode", lambda *_: (_ for _ in ()).throw(MemoryError("mine")))
    status, _, err = make()  # what is logged before it goes where an earlier test's libraries told it to
    assert status == 1 and err.endswith(f"heterostep: {TOO_LARGE}\n")
    monkeypatch.undo()
    status, out, err = make("--report", tmp_path / "r.json")
    assert (status, err) == (0, "") and out.startswith("resuming after step 8 of 8\n")
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["seconds"]["checkpoint"] > 0 and len(report["steps"]) == 8
    (tmp_path / "v.mp4").unlink()

    with monkeypatch.context() as patched:  # neither needs the model
        patched.setattr("heterostep.engine.engine.load_pipeline", None)
        status, out, _ = make("--heatmap", tmp_path / "h.mp4", "--report", tmp_path / "again.json")
        assert status == 0 and "is finished; nothing was computed" in out
        assert frames_of(tmp_path / "v.mp4") == frames_of(tmp_path / "h.mp4") == 5
        assert json.loads((tmp_path / "again.json").read_text()) == report
        status, out, err = make(seed=4)
        assert (status, out) == (2, "") and "seed (3, now 4)" in err and err.count("\n") == 1
    assert make("--resume", "never", "--quiet", seed=4) == (0, "", "")


def test_signals_while_the_model_loads(capsys, tiny_model, tmp_path, monkeypatch):
    def load(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal was not taken")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("heterostep.engine.engine.load_pipeline", load)
    flags = ["generate", *PROMPT, "--model", tiny_model, "--output", tmp_path / "v.mp4", "--job-dir", tmp_path / "job"]
    status, _, err = run(capsys, *flags)
    assert status == 75 and "stopped before the first step" in err and err.count("\n") == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_between_loading_and_running_is_not_lost(capsys, tiny_model, tmp_path, monkeypatch):
    stream = Engine.stream

    def kill_first(self, *arguments):
        os.kill(os.getpid(), signal.SIGUSR1)
        return stream(self, *arguments)

    monkeypatch.setattr(Engine, "stream", kill_first)
    flags = ["generate", *PROMPT, "--model", tiny_model, "--output", tmp_path / "v.mp4", "--job-dir", tmp_path / "job"]
    status, _, err = run(capsys, *flags, "--steps", 2000, "--compute", 1)
    assert status == 75 and "stopped after step" in err and err.count("\n") == 1


@pytest.mark.parametrize("own", [None, "active"])
def test_threads_do_not_wait_spinning_unless_told_so(monkeypatch, capsys, own):
    monkeypatch.setenv("OMP_WAIT_POLICY", own or "")
    if own is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    with pytest.raises(SystemExit):
        cli.main(["generate", "--steps", "0"])
    assert os.environ["OMP_WAIT_POLICY"] == (own or "passive")


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out.startswith("heterostep 0.")


def test_other_failures_are_one_sentence_too(capsys, monkeypatch):
    class OutOfMemoryError(RuntimeError):
        pass

    for error, status, words in (
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device"), 1, "No space"),
        (OutOfMemoryError("CUDA out of memory"), 1, "memory is too small"),
    ):
        monkeypatch.setattr(cli, "_info", lambda _, error=error: (_ for _ in ()).throw(error))
        got, out, err = run(capsys, "info")
        assert (got, out) == (status, "") and words in err and err.count("\n") == 1
    monkeypatch.setattr(cli, "_info", lambda _: torch.empty(10**15))
    got, out, err = run(capsys, "info")
    assert (got, out) == (1, "") and "memory is too small" in err and err.count("\n") == 1
    monkeypatch.setattr(cli, "_info", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a defect of ours is not hidden
        cli.main(["info"])


def command(*argv, cwd, **environment):
    """Run the installed command in a process of its own, without network."""
    return subprocess.run(
        [sys.executable, "-m", "heterostep", *map(str, argv)],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_hub_id_when_offline(tmp_path):
    done = command("generate", *PROMPT, "--model", "nobody/no-model", cwd=tmp_path, HF_HOME=str(tmp_path / "hub"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        "is not a local folder and could not be downloaded from the Hugging Face Hub" in done.stderr
        and errors(done.stderr).count("\n") == 1
    )


def test_hub_id_from_the_cache(tiny_model, tmp_path):
    cached = tmp_path / "hub" / "models--somebody--tiny-wan"
    shutil.copytree(tiny_model, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    done = command(
        "generate", *PROMPT, "--model", "somebody/tiny-wan", "--steps", 2, "--frames", 5, "--compute", 1,
        "--device", "cpu", cwd=tmp_path, HF_HUB_CACHE=str(tmp_path / "hub"),
    )  # fmt: skip
    assert done.returncode == 0 and (tmp_path / "video.mp4").is_file(), done.stderr


def test_a_torn_model_in_a_process_of_its_own(broken_models, tmp_path):
    done = command("generate", *PROMPT, "--model", broken_models["truncated weights"], cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert errors(done.stderr).count("\n") == 1


def test_the_command_is_installed():
    assert shutil.which("heterostep", path=os.path.dirname(sys.executable))
