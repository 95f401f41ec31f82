"""`heterostep bench quality` (`launch/bench.py`): one command measures a model, resumes, and reports."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch

import forked
from folders import complete_pipeline
from folders_ltx2 import complete_ltx2
from heterostep.benchmarks.baselines import KINDS
from heterostep.benchmarks.quality import report, run
from heterostep.benchmarks.quality.settings import DEMO_PROMPTS, METHODS, PRESETS, PROMPTS, QualitySettings
from heterostep.benchmarks.quality.store import with_scheduler
from heterostep.engine.facts import DEMO_MODEL, read_facts
from heterostep.engine.request import GenerateRequest
from heterostep.errors import ConfigError
from heterostep.launch import cli
from heterostep.launch.bench import _request
from said import errors
from tiny import picture

SMALL = ["--size", "32x32", "--frames", "5", "--steps", "8", "--guidance", "2", "--device", "cpu"]


def bench(capsys, *argv):
    """Exit code, stdout, and errors."""
    try:
        status = cli.main(["bench", "quality", *map(str, argv)])
    except SystemExit as exit_:
        status = exit_.code
    captured = capsys.readouterr()
    return status, captured.out, errors(captured.err)


def rows_of(folder):
    content = json.loads((folder / "report.json").read_text())
    return {(row["method"], row["target"]): row for row in content["rows"]}, content


class Videos(HTMLParser):
    """The sources of the videos of a page."""

    def __init__(self, text):
        super().__init__()
        self.sources = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "video":
            self.sources.append(dict(attrs)["src"])


def test_a_model_is_measured_and_the_same_command_computes_nothing_more(capsys, tiny_model, tmp_path, monkeypatch):
    folder = tmp_path / "bench"
    argv = ["--model", tiny_model, *SMALL, "--count", 2, "--computes", "0.5,0.75", "--policies", "joint,tokens"]
    argv += ["--baselines", "unipc", "--output", folder]
    status, out, err = bench(capsys, *argv)
    assert (status, err) == (0, "")
    assert "14 videos to make" in out
    rows, content = rows_of(folder)
    assert set(rows) == {("dense", 1.0), *((m, c) for m in ("joint", "tokens", "unipc") for c in (0.5, 0.75))}
    assert rows["joint", 0.5]["compute"] == pytest.approx(0.5, abs=0.03)
    assert rows["unipc", 0.5]["compute"] == 0.5
    assert all(row["clips"] == 2 for row in rows.values())
    assert all(10 < rows[key]["psnr"]["mean"] < 100 for key in rows if key[0] != "dense")
    assert "default_minus_this" in rows["tokens", 0.5]
    command = f"heterostep bench quality --model {tiny_model}"
    assert command in (folder / "report.md").read_text()
    assert command in content["facts"]["command"]
    page = (folder / "index.html").read_text()
    sources = Videos(page).sources
    assert len(sources) == 14 and all((folder / source).is_file() for source in sources)
    assert PROMPTS[0] in page

    def refuse(*_):
        raise AssertionError("a video was made again")

    monkeypatch.setattr(run.OneRank, "make", refuse)
    (folder / "report.md").unlink()
    status, out, err = bench(capsys, *argv)
    assert (status, err) == (0, "") and "0 videos to make" in out
    assert (folder / "report.md").is_file()


def test_an_interrupted_benchmark_goes_on_where_it_was(capsys, tiny_model, tmp_path, monkeypatch):
    argv = ["--model", tiny_model, *SMALL, "--count", 2, "--computes", "0.5", "--output", tmp_path / "b"]
    make, made = run.OneRank.make, []

    def failing(self, request, hsa, label):
        if len(made) == 5:  # two for the estimate, two videos of the first prompt, and the second's dense one
            raise KeyboardInterrupt
        made.append(label)
        return make(self, request, hsa, label)

    monkeypatch.setattr(run.OneRank, "make", failing)
    assert bench(capsys, *argv)[0] == 130
    kept = (tmp_path / "b" / "results.jsonl").read_text()
    assert len(kept.splitlines()) == 3
    with (tmp_path / "b" / "results.jsonl").open("a") as file:
        file.write('{"clip": "001", "meth')  # as a crash leaves it
    monkeypatch.setattr(run.OneRank, "make", make)
    status, out, err = bench(capsys, *argv)
    assert (status, err) == (0, "") and "1 videos to make" in out
    assert rows_of(tmp_path / "b")[0]["joint", 0.5]["clips"] == 2
    # One more share is measured beside what is there.
    status, out, _ = bench(capsys, *argv[:-3], "0.75", *argv[-2:])
    assert status == 0 and "2 videos to make" in out
    rows = rows_of(tmp_path / "b")[0]
    assert {target for _, target in rows} == {1.0, 0.75, 0.5}
    assert rows["joint", 0.5]["clips"] == 2, "what was written after the torn line is there"


def test_results_of_other_settings_are_not_mixed(capsys, tiny_model, tmp_path):
    argv = ["--model", tiny_model, *SMALL, "--count", 1, "--computes", "0.5", "--output", tmp_path / "b", "--estimate"]
    assert bench(capsys, *argv)[0] == 0
    status, _, err = bench(capsys, *argv, "--seed", 4)
    assert status == 2
    assert "other settings" in err and "'seed': 4" in err and "another folder" in err
    for other in (["--dtype", "bfloat16"], ["--vae-tiling"], ["--nproc", 2]):
        status, _, err = bench(capsys, *argv, *other)
        assert status == 2 and "other settings" in err
    assert bench(capsys, *argv[:-1])[0] == 0
    (tmp_path / "p.txt").write_text("something else\n")
    status, _, err = bench(capsys, *argv, "--prompts", tmp_path / "p.txt")
    assert status == 2 and "other prompts" in err and "something else" in err


@pytest.mark.parametrize("family", ["Wan 2.1", "Wan 2.2", "TI2V-5B", "LTX-2"])
def test_every_family(capsys, tmp_path, family):
    make = {
        "Wan 2.1": lambda: complete_pipeline("euler"),
        "Wan 2.2": lambda: complete_pipeline("wan22"),
        "TI2V-5B": lambda: complete_pipeline("ti2v5b"),
        "LTX-2": complete_ltx2,
    }[family]
    make().save_pretrained(tmp_path / "model")
    capsys.readouterr()
    size = ["--size", "64x64", "--frames", "9" if family == "LTX-2" else "5", "--steps", "8", "--guidance", "2"]
    argv = ["--model", tmp_path / "model", *size, "--device", "cpu", "--count", 1, "--computes", "0.5"]
    status, _, err = bench(capsys, *argv, "--baselines", "unipc", "--output", tmp_path / "b")
    assert (status, err) == (0, "")
    rows, _ = rows_of(tmp_path / "b")
    assert 0.4 < rows["joint", 0.5]["compute"] < 0.65
    assert ("audio_relative_l2" in rows["joint", 0.5]) == (family == "LTX-2")


def test_a_model_that_starts_from_an_image(capsys, image_models, tmp_path):
    picture().save(tmp_path / "p.png")
    argv = ["--model", image_models["wan22 i2v"], *SMALL, "--computes", "0.5", "--output", tmp_path / "b"]
    status, _, err = bench(capsys, *argv)
    assert status == 2 and "--image FILE" in err and not (tmp_path / "b").exists()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f'# one line\n{{"prompt": "a disc", "image": "{tmp_path / "p.png"}", "seed": 7}}\n')
    status, _, err = bench(capsys, *argv, "--prompts", prompts)
    assert (status, err) == (0, "")
    assert rows_of(tmp_path / "b")[0]["joint", 0.5]["clips"] == 1


@pytest.mark.slow
def test_on_two_ranks(capsys, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", forked.Popen)
    argv = ["--model", tiny_model, *SMALL, "--count", 1, "--computes", "0.5", "--output"]
    status, _, err = bench(capsys, *argv, tmp_path / "two", "--nproc", 2)
    assert (status, err) == (0, "")
    assert bench(capsys, *argv, tmp_path / "one")[0] == 0
    two, one = (rows_of(tmp_path / name)[0]["joint", 0.5] for name in ("two", "one"))
    assert two["psnr"]["mean"] == pytest.approx(one["psnr"]["mean"], abs=0.5)
    assert "2 rank(s)" in (tmp_path / "two" / "report.md").read_text()
    status, _, err = bench(capsys, *argv, tmp_path / "two", "--nproc", 2, "--baselines", "unipc")
    assert status == 2 and "leave out --nproc" in err


def test_a_preset_sets_what_is_not_given_and_shows_what_was_published(capsys, tiny_model, tmp_path):
    argv = ["--model", tiny_model, *SMALL, "--preset", "magcache", "--count", 1, "--computes", "0.5"]
    status, _, err = bench(capsys, *argv, "--output", tmp_path / "b")
    assert (status, err) == (0, "")
    text = (tmp_path / "b" / "report.md").read_text()
    assert "8 steps of UniPCMultistepScheduler with shift 8, guidance 2" in text
    assert "not measured here" in text and "| MagCache slow (K 2, .12) | 2.14 | 23.42 | 0.813 | 0.121 |" in text
    config = json.loads((tmp_path / "b" / "model" / "scheduler" / "scheduler_config.json").read_text())
    assert config["flow_shift"] == 8.0
    settings = json.loads((tmp_path / "b" / "settings.json").read_text())
    assert settings["request"]["num_inference_steps"] == 8
    assert PRESETS["magcache"].request["num_inference_steps"] == 50


def test_a_preset_gives_way_to_what_is_given():
    preset = PRESETS["magcache"].request
    assert _request(GenerateRequest(prompt="-"), preset).num_frames == 81
    made = _request(GenerateRequest(prompt="-", seconds=2.0, seed=3), preset)
    assert (made.num_frames, made.seconds, made.seed, made.num_inference_steps) == (None, 2.0, 3, 50)


def test_no_folder_of_the_users_is_taken_for_links_to_the_model(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    files = sorted(tmp_path.rglob("*"))
    facts = read_facts(str(tmp_path / "model"))
    with pytest.raises(ConfigError, match="was not made by this command"):
        with_scheduler(facts, tmp_path / "model", "unipc", None)
    assert sorted(tmp_path.rglob("*")) == files
    for _ in range(2):  # what it made itself is made anew
        made = with_scheduler(facts, tmp_path / "other", "unipc", 3.0)
    assert read_facts(made).pipeline == facts.pipeline


def test_tuned_baselines_keep_their_settings(capsys, tiny_model, tmp_path):
    argv = ["--model", tiny_model, *SMALL, "--count", 1, "--computes", "0.5", "--output", tmp_path / "b"]
    status, out, err = bench(capsys, *argv, "--baselines", "unipc-placed,dpcache")
    assert (status, err) == (0, "") and "for tuning the baselines" in out
    tuned = json.loads((tmp_path / "b" / "tuned.json").read_text())
    assert len(tuned["unipc-placed"]["0.5"]["levels"]) == len(tuned["dpcache"]["0.5"]["evaluated"]) == 4
    assert {"unipc-placed", "dpcache"} <= {method for method, _ in rows_of(tmp_path / "b")[0]}


def test_lpips_from_a_file(capsys, tiny_model, tmp_path):
    class Distance(torch.nn.Module):
        def forward(self, a, b):
            return (a - b).abs().mean((1, 2, 3))

    torch.jit.script(Distance()).save(str(tmp_path / "lpips.pt"))
    argv = ["--model", tiny_model, *SMALL, "--count", 1, "--computes", "0.5", "--output", tmp_path / "b"]
    assert bench(capsys, *argv, "--lpips", tmp_path / "lpips.pt")[0] == 0
    assert 0 < rows_of(tmp_path / "b")[0]["joint", 0.5]["lpips"]["mean"] < 1
    (tmp_path / "other.pt").write_text("no module")
    status, _, err = bench(capsys, *argv, "--lpips", tmp_path / "other.pt")
    assert status == 2 and "TorchScript" in err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--policies", "joint,best"], "--policies must be names of joint"),
        (["--baselines", "nothing"], "--baselines must be names of euler"),
        (["--computes", "0.5,1.5"], "shares above 0 and at most 1"),
        (["--computes", "half"], "numbers separated by commas"),
        (["--policies", ""], "both empty"),
        (["--prompts", "missing.txt"], "cannot be read"),
        (["--shift", "-1"], "must be"),
        (["--size", "33x32"], "does not fit"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(capsys, tiny_model, tmp_path, argv, said):
    status, _, err = bench(capsys, "--model", tiny_model, "--output", tmp_path / "b", *argv)
    assert status == 2 and said in err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [('{"prompt": }', "not valid JSON"), ('{"text": "a"}', "prompt is needed"), ("# none", "no prompt")],
)
def test_lines_of_prompts_are_checked(capsys, tiny_model, tmp_path, line, said):
    (tmp_path / "p.txt").write_text(line + "\n")
    status, _, err = bench(capsys, "--model", tiny_model, "--output", tmp_path / "b", "--prompts", tmp_path / "p.txt")
    assert status == 2 and said in err


def test_a_shift_that_depends_on_the_size_is_refused(tmp_path):
    complete_ltx2().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="depend on the size"):
        run_with_shift(tmp_path)


def run_with_shift(tmp_path):
    return with_scheduler(read_facts(str(tmp_path / "model")), tmp_path / "other", None, 5.0)


def test_names_are_those_of_the_baselines():
    assert set(METHODS) == set(KINDS)
    assert len(PROMPTS) >= 12 and len(DEMO_PROMPTS) >= 12
    QualitySettings()


def test_without_matplotlib_there_is_no_plot(tmp_path, monkeypatch):
    from heterostep.benchmarks.quality.store import Store

    store = Store(tmp_path, {})
    store.prepare()
    against = {"psnr": None, "ssim": 1.0}
    common = {"clip": "000", "prompt": "a <b>", "target": 0.5, "compute": 0.5, "seconds": 1.0, "dense_seconds": 2.0}
    store.add({**common, "method": "joint", "against": {"dense": against}, "video": "videos/x.mp4"})
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    request = {"width": 8, "height": 8, "num_frames": 1, "num_inference_steps": 2, "guidance_scale": 1.0, "seed": 0}
    facts = {
        "command": "c",
        "model": "m",
        "prompts": 1,
        "request": request,
        "scheduler": "s",
        "ranks": 1,
        "device": "d",
    }
    paths = report.write(store, ["000"], {**facts, "versions": {}}, "joint", None)
    assert not (tmp_path / "report.png").exists() and all(path.is_file() for path in paths)
    assert "(1 equal)" in (tmp_path / "report.md").read_text()
    assert "a &lt;b&gt;" in (tmp_path / "index.html").read_text()


def test_the_demo_model(capsys, tmp_path):
    """From one command, as the docs have it; smaller in number, so that it takes seconds."""
    argv = [
        "--model",
        "demo",
        "--count",
        1,
        "--steps",
        4,
        "--frames",
        9,
        "--computes",
        "0.5",
        "--output",
        tmp_path / "b",
    ]
    status, out, err = bench(capsys, *argv)
    assert (status, err) == (0, "") and "wrote" in out
    assert DEMO_PROMPTS[0] in (tmp_path / "b" / "report.json").read_text()
    assert DEMO_MODEL.is_dir()
    shutil.rmtree(tmp_path / "b")
