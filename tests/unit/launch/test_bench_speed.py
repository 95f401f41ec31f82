"""`heterostep bench offline`, `single-stream`, `scaling`, `recovery`, `step`, `calibrate` (`launch/bench_step.py`), and
the form of results; what `--help` shows of them is in `launch/examples.py`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from heterostep.benchmarks.quality import run as quality
from heterostep.benchmarks.results import result as results
from heterostep.benchmarks.speed import calibrate, step
from heterostep.benchmarks.speed.runs import Energy, Run, Saved, drive, figures, traffic
from heterostep.benchmarks.speed.settings import (
    PRESETS,
    OfflineSettings,
    RecoverySettings,
    ResultFiles,
    ScalingSettings,
    StepSettings,
)
from heterostep.engine.devices import DEVICES, device_of
from heterostep.engine.progress import Progress
from heterostep.engine.report import RankReport, Sent
from heterostep.engine.request import Started, StepDone
from heterostep.errors import ConfigError, HeterostepError, RankLost
from heterostep.launch import bench_recovery, bench_speed, cli
from said import errors

SMALL = ["--size", "32x32", "--frames", "5", "--steps", "4", "--device", "cpu"]
KEYS = {
    *("schema", "verb", "command", "environment", "settings", "warmup_policy", "seeds", "interrupted", "notes", "rows"),
}
REPORTS = Path(__file__).parents[3] / "benchmarks" / "reports"
MINI = step.Shape(2, 16, 2, 64, 16, (2, 8, 8), torch.float32)


def bench(capsys, *argv):
    """Exit code, stdout, and errors."""
    try:
        status = cli.main(["bench", *map(str, argv)])
    except SystemExit as exit_:
        status = exit_.code
    captured = capsys.readouterr()
    return status, captured.out, errors(captured.err)


def video(seconds=0.0, ranks=()):
    report = SimpleNamespace(ranks=ranks, compute=0.5)
    return SimpleNamespace(report=report, seconds={"denoise": 0.7, "total": 1.0}, fps=8, frames=None, audio=None)


class Fake:
    """A replica whose videos take no time."""

    def __init__(self, ranks=()):
        self.ranks, self.made = ranks, []

    def make(self, request, hsa, label):
        time.sleep(0.002)
        self.made.append((request, hsa.compute))
        return video(ranks=self.ranks)


# The form of results.


def a_result(**metrics):
    found = results.new("offline", ["bench"], {}, warmup="none", seeds=[0], device="x")
    return found | {"rows": [results.row({"compute": 1.0}, metrics)]}


def test_what_changed_beyond_the_noise_is_said():
    old = a_result(seconds=results.metric([9.0, 10.0, 11.0]), compute=0.5, gone=1.0, none=None)
    new = a_result(seconds=results.metric([11.0, 11.5, 12.0]), compute=0.4)
    assert old["rows"][0]["metrics"]["seconds"] == {"value": 10.0, "low": 9.0, "high": 11.0}
    assert "none" not in old["rows"][0]["metrics"]
    found = {change["metric"]: change for change in results.changes(new, old)}
    assert set(found) == {"seconds", "compute"}
    assert not found["seconds"]["changed"] and found["seconds"]["noise"] == pytest.approx(0.2)
    assert found["compute"]["changed"] and found["compute"]["ratio"] == pytest.approx(0.8)
    new["changes"] = list(found.values())
    assert results.said_changes(new) == ["compute 1.0: compute is 0.80 times the old one (noise 3%)"]
    assert "## Since the older result" in results.markdown(new)
    assert results.differing(new, old) == []
    assert results.differing(new | {"settings": {"x": 1}}, old) == ["settings"]


def test_a_result_becomes_a_table_with_limits_and_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    found = a_result(ratio=results.metric([0.5, 0.7], limit=0.55), large=123456.0)
    found["rows"].append(results.row({"compute": 0.5}, {"ratio": results.metric(0.1, limit=0.55)}))
    text = results.markdown(found)
    assert "| 1.0 | 0.6 (0.5 .. 0.7), at most 0.55: **does not hold** | 123,456 |" in text
    assert "0.1, at most 0.55: holds" in text and "heterostep bench" in text
    files = results.Files(str(tmp_path / "r.json"), None)
    written = files.finish(found, ("compute", "ratio"))
    assert [path.name for path in written] == ["r.json", "r.md", "r.png"] and all(
        path.stat().st_size for path in written
    )
    assert results.read(written[0])["rows"] == found["rows"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["offline", "--computes", "2"], "--computes must be shares above 0 and at most 1"),
        (["scaling", "--computes", "x"], "--computes must be shares above 0 and at most 1"),
        (["step", "--shares", ""], "--shares must be shares above 0 and at most 1"),
        (["step", "--nproc", "4", "--device", "cpu"], "the 6 heads of shape 'small' must be a multiple of the ranks"),
        (["offline", "--output-file", "/no/such/r.json", *SMALL], "does not exist; create it first"),
        (["step", "--output-file", "r.md", "--device", "cpu"], "must end in .json"),
        (["offline", "--quality", "30"], "--quality"),
        (["offline", "--compare", "/no/such/r.json", *SMALL], "cannot be read as a result"),
        (["single-stream", "--replicas", "2"], "single-stream makes one video at a time"),
        (["recovery", "--kills", "1", "--freezes", "2"], "--freezes and --rapid are a part of the 1 jobs"),
        (["recovery", "--rank", "1", *SMALL], "--rank 1: 1 rank(s) have numbers from 0 to 0"),
        (["recovery", "--at", "3", *SMALL], "--at must leave two of the 4 steps"),
        (["offline", "--preset", "mlperf"], "preset: must be one of mlperf-wan22"),
        (["calibrate", "--like", "abacus", "--device", "cpu"], "must be one of h100, h200, cpu"),
        (["offline", "--device", "cuda:0", "--replicas", "2"], "'cuda:0' does not exist"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(capsys, tiny_model, argv, says):
    if argv[0] not in ("step", "calibrate"):
        argv = [*argv, "--model", tiny_model]
    status, _, err = bench(capsys, *argv)
    assert status == 2 and len(err.splitlines()) == 1
    assert says.replace("preset: ", "") in err


def test_an_older_form_is_no_result(tmp_path):
    (tmp_path / "old.json").write_text('{"schema": 1, "rows": []}')
    with pytest.raises(ConfigError, match="not a result of `heterostep bench` in form 2"):
        results.read(tmp_path / "old.json")


# Videos for the clock.


def test_mlperfs_task_runs_on_the_tiny_model(capsys, tiny_model, tmp_path):
    torch.save(torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(1)), tmp_path / "fixed_latent.pt")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    file = tmp_path / "r.json"
    argv = ["--model", tiny_model, "--preset", "mlperf-wan22", *SMALL, "--noise", tmp_path / "fixed_latent.pt"]
    argv += ["--prompts", tmp_path / "prompts.txt", "--videos", 3, "--warmup-videos", 0, "--save", tmp_path / "videos"]
    status, out, err = bench(capsys, "offline", *argv, "--output-file", file)
    assert (status, err) == (0, "")
    assert sorted(path.name for path in (tmp_path / "videos").iterdir()) == [
        "a cat-0.mp4",
        "a cat-1.mp4",
        "a dog-0.mp4",
    ]
    found = json.loads(file.read_text())
    assert found.keys() >= KEYS and found["seeds"] == [42] and "| videos |" in out
    request = found["settings"]["request"]
    assert (request["guidance_scale"], request["fps"]) == (4.0, 16)
    assert request["negative_prompt"] == PRESETS["mlperf-wan22"]["negative_prompt"]
    # What was given goes before the task, and what differs from it is said.
    (note,) = found["notes"]
    assert "width 32 for 1280" in note and "boundary_ratio None for 0.875" in note and "noise is drawn" not in note
    (row,) = found["rows"]
    assert row["what"] == {"compute": 1.0, "replicas": 1, "ranks": 1}
    metrics = {name: figure["value"] for name, figure in row["metrics"].items()}
    assert metrics["videos"] == 3 and metrics["achieved_compute"] == 1.0
    assert metrics["videos_per_hour"] == pytest.approx(3600 * 3 / metrics["duration_seconds"])
    assert metrics["gpu_seconds_per_video"] == pytest.approx(metrics["duration_seconds"] / 3)
    assert "joules_per_video" not in metrics  # no GPU
    assert set(found["environment"]) >= {"date", "git", "versions", "device", "load_average"}
    assert f"heterostep bench offline --model {tiny_model}" in (tmp_path / "r.md").read_text()


def test_ctrl_c_writes_what_there_is(capsys, tiny_model, tmp_path, monkeypatch):
    made, file = [], tmp_path / "r.json"

    def make(self, request, hsa, label):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(label)
        return video()

    monkeypatch.setattr(quality.OneRank, "make", make)
    monkeypatch.setattr(quality.OneRank, "__init__", lambda self, *args: setattr(self, "pipeline", None))
    argv = ["--model", tiny_model, *SMALL, "--computes", "1,0.5", "--videos", 2, "--warmup-videos", 0]
    status, _, err = bench(capsys, "offline", *argv, "--output-file", file)
    assert status == 130 and "the result has what was measured until then" in err
    found = json.loads(file.read_text())
    assert found["interrupted"] and [row["metrics"]["videos"]["value"] for row in found["rows"]] == [2, 1]
    assert "**Interrupted**" in (tmp_path / "r.md").read_text()


def test_replicas_take_the_next_request_and_a_failure_ends_all():
    fakes, run = [Fake(), Fake()], Run(busy=[0.0, 0.0])
    hsa, saved = SimpleNamespace(compute=0.5), []
    drive(fakes, list(range(8)), hsa, run, "", lambda number, output: saved.append(number))
    assert sorted(request for fake in fakes for request, _ in fake.made) == list(range(8)) == sorted(saved)
    assert all(fake.made for fake in fakes)
    row = figures({"compute": 0.5}, run, 2)["metrics"]
    assert row["videos"]["value"] == 8
    assert row["videos_per_gpu_hour"]["value"] == pytest.approx(row["videos_per_hour"]["value"] / 4)
    assert row["gpu_seconds_per_video"]["value"] == pytest.approx(4 * max(run.busy) / 8)

    class Broken(Fake):
        def make(self, *_):
            raise HeterostepError("lost")

    with pytest.raises(HeterostepError, match="lost"):
        drive([Fake(), Broken()], [1] * 50, hsa, Run(busy=[0.0, 0.0]), "")


def test_joules_are_nvmls(monkeypatch):
    counter = iter([5_000, 1_000, 5_500, 1_500, 7_000, 3_000])
    nvml = SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counter),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert Energy(range(2)).joules() is None  # no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"{index}"))
    energy = Energy((0, 1))
    assert Energy(()).joules() is None  # a CPU beside GPUs
    before = energy.joules()
    assert energy.joules() - before == pytest.approx(3.0)
    run = Run(busy=[1.0], joules=3.0)
    drive([Fake()], [1, 2], SimpleNamespace(compute=1.0), run, "")
    run = dataclasses.replace(run, made=[dataclasses.replace(one, peak_bytes=7) for one in run.made])
    assert figures({}, run, 1)["metrics"]["joules_per_video"]["value"] == 1.5


def test_prompts_that_are_no_names_are_refused(tmp_path):
    for prompt in ("a/b", "x" * 241):
        with pytest.raises(ConfigError, match="cannot be the name of a file"):
            Saved(str(tmp_path), [prompt])
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="the folder cannot be used"):
        Saved(str(tmp_path / "file"), ["a"])


def test_videos_of_several_shares_have_a_folder_each(tmp_path):
    names = [
        save._folder.relative_to(tmp_path).as_posix()
        for computes in ("1", "1,0.5")
        for save in bench_speed._saves(OfflineSettings(computes=computes, save=str(tmp_path)), ["a"])
    ]
    assert names == [".", "compute-1", "compute-0.5"]
    assert bench_speed._gpus("cpu", 2) == ()


def test_a_result_that_cannot_be_written_is_printed(capsys, monkeypatch, tmp_path):
    files = ResultFiles(output_file=str(tmp_path / "r.json"))
    measurement = bench_speed.Measurement(files, a_result(), Progress(False))
    monkeypatch.setattr(results, "write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"), measurement.finishing():
        measurement.result["rows"] = [results.row({"compute": 1.0}, {"seconds": 2.0})]
    assert "| 1.0 | 2 |" in capsys.readouterr().out


def test_scaling_divides_the_gpus_and_counts_what_was_sent(capsys, tiny_model, tmp_path, monkeypatch):
    assert ScalingSettings(gpus=4).layouts == [(1, 1), (1, 2), (1, 4), (4, 1), (2, 2)]
    sent = {"heads_out": Sent(calls=4, bytes=100, seconds=0.1)}
    ranks = [RankReport(rank=n, sent=sent, kv_bytes=0, weight_bytes=0, peak_bytes=n) for n in range(2)]

    @contextlib.contextmanager
    def makers(command, replicas, progress):
        several = command.ranks.nproc == 2
        yield [Fake(ranks if several else ()) for _ in range(replicas)]

    monkeypatch.setattr(bench_speed, "makers", makers)
    file = tmp_path / "r.json"
    argv = ["scaling", "--model", tiny_model, *SMALL, "--gpus", 2, "--computes", "0.5", "--videos", 1, "--gpu", "cpu"]
    status, _, err = bench(capsys, *argv, "--output-file", file)
    assert (status, err) == (0, "")
    rows = json.loads(file.read_text())["rows"]
    wholes = [row for row in rows if "collective" not in row["what"]]
    assert [(row["what"]["replicas"], row["what"]["ranks"]) for row in wholes] == [(1, 1), (1, 2), (2, 1)]
    for row in wholes:
        assert {"speedup", "efficiency", "denoise_over_first", "planned_over_first"} <= set(row["metrics"])
    assert wholes[0]["metrics"]["speedup"]["value"] == wholes[0]["metrics"]["efficiency"]["value"] == 1.0
    (collective,) = [row for row in rows if "collective" in row["what"]]
    assert collective["what"] == {"compute": 0.5, "replicas": 1, "ranks": 2, "collective": "heads_out"}
    assert {name: figure["value"] for name, figure in collective["metrics"].items()} == {
        "calls": 4, "bytes": 100, "seconds": 0.1,
    }  # fmt: skip
    assert traffic({}, Run(busy=[0.0])) == []


# Losses.


def test_what_a_loss_costs_and_the_goodput(monkeypatch, tmp_path):
    clock = iter([100.0, 100.5, 102.0])
    monkeypatch.setattr(bench_recovery.time, "monotonic", lambda: next(clock))
    attack = bench_recovery.planned(RecoverySettings(kills=1, freezes=0, rank=1, at=4), 2, 8)[0]
    assert (attack.signal, attack.rank, attack.at) == ("SIGKILL", 1, 4)
    struck = []
    monkeypatch.setattr(bench_recovery.os, "kill", lambda pid, number: struck.append(pid))
    group = SimpleNamespace(standby_ready=True, pids=[10, 11])
    request = SimpleNamespace(num_inference_steps=6)
    shared = {"num_steps": 6, "sigma": 1.0, "active": 1, "total": 1, "seconds": 0.2, "eta_seconds": 0.0}

    def make_video(group, work, folder, lost):
        yield Started(request=request, num_tokens=1)
        yield from (StepDone(step=n, **shared) for n in range(1, 5))
        lost(RankLost("died", "rank 1"))
        yield Started(request=request, num_tokens=1, resumed_at=3)
        yield from (StepDone(step=n, **shared) for n in range(4, 7))
        return SimpleNamespace(output=SimpleNamespace(latents=torch.zeros(1), request=request))

    monkeypatch.setattr(bench_recovery, "make_video", make_video)
    latents, whole = bench_recovery._job(group, None, tmp_path, attack, [])
    assert whole and struck == [11] and torch.equal(latents, torch.zeros(1))
    assert (attack.resumed_at, attack.to_notice, attack.to_next_step, attack.cause) == (3, 0.5, 2.0, "died")
    attack.whole = True
    # The step that follows makes up for one of those that were lost.
    assert attack.lost_seconds(0.2) == pytest.approx(2.0)
    rows = bench_recovery.rows([attack], 0.2, deaths=4320.0)
    assert [row["what"] for row in rows] == [
        {"loss": "all", "standby": ""}, {"loss": "SIGKILL", "standby": "ready"}, {"deaths_per_day": 4320.0},
    ]  # fmt: skip
    assert rows[0]["metrics"]["steps_repeated"]["value"] == 1 and rows[0]["losses"][0]["cause"] == "died"
    assert rows[-1]["metrics"]["goodput"]["value"] == pytest.approx(0.9)


# Steps.


@pytest.fixture
def mini(monkeypatch):
    monkeypatch.setitem(step.SHAPES, "small", MINI)
    monkeypatch.setattr(step, "PLAN_TOKENS", 64)
    monkeypatch.setattr(step, "LOOPS", (("tokens", 0.5),))


def test_a_step_is_divided_into_parts(capsys, mini, tmp_path):
    file = tmp_path / "r.json"
    argv = ["--rounds", 1, "--repeats", 1, "--loop-steps", 8, "--shares", "1,0.5", "--device", "cpu"]
    status, out, err = bench(capsys, "step", *argv, "--output-file", file)
    assert (status, err) == (0, "") and "gaps" in out
    rows = {json.dumps(row["what"]): row["metrics"] for row in json.loads(file.read_text())["rows"]}
    half = {name: figure["value"] for name, figure in rows['{"step": "0.5 active"}'].items()}
    parts = [half[name] for name in ("attention", "linear", "elementwise", "exchange", "plan", "gaps")]
    assert all(part >= 0 for part in parts) and half["attention"] > 0 and half["linear"] > 0 and half["plan"] > 0
    assert sum(parts) == pytest.approx(half["seconds"], rel=0.05) and half["exchange"] == 0
    assert rows['{"loop": "tokens", "compute": 0.5}']["over_dense"]["limit"] == 0.56
    assert '{"planner": "joint", "tokens": 64}' in rows


def test_the_planner_of_a_step_has_its_share():
    planner = step.FixedShare(0.25)
    planner.begin([1.0, 0.6, 0.3, 0.0], 64)
    assert planner.plan(0, 3, 1.0, 64) is None
    planner.observe(0, 1.0, torch.randn(1, 64, 4), None)
    assert len(planner.plan(1, 3, 0.6, 64)) == 16 and planner.seconds > 0


def test_a_rank_that_fails_is_one_sentence(monkeypatch):
    def spawn(*_):
        raise step.ProcessExitedException("process 1 terminated", error_index=1, error_pid=7, exit_code=1)

    monkeypatch.setattr(step, "spawn", spawn)
    with pytest.raises(HeterostepError, match="a rank of 2 failed: process 1 terminated"):
        step.measure(StepSettings(nproc=2), "cpu", lambda rows: None)


def test_a_measured_device_is_one_that_plan_reads(capsys, mini, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "decode_seconds", lambda device, rounds: 2e-5)
    monkeypatch.setattr(calibrate, "of_link", lambda settings, device: {"nvlink": 1e9, "latency": 1e-4})
    file = tmp_path / "mine.json"
    status, out, err = bench(capsys, "calibrate", "--rounds", 1, "--nproc", 2, "--device", "cpu", "--output-file", file)
    assert (status, err) == (0, "") and "| attention |" in out
    device = device_of(str(file))
    assert (device.decode, device.nvlink, device.latency, device.text) == (2e-5, 1e9, 1e-4, DEVICES["cpu"].text)
    assert device.sources["attention"].startswith("measured: heterostep bench calibrate")
    assert {"text", "pcie", "network"} <= set(device.estimates) and "linear" not in device.estimates
    assert 1e6 < device.attention < 1e13 and device.layer_floor > 0
    assert cli.main(["plan", "--model", "wan2.1-1.3b", "--gpu", str(file), "--gpus", "2", "--compute", "1"]) == 0
    assert device.name in capsys.readouterr().out


def test_the_report_of_this_machine_is_a_device_for_plans():
    device = device_of(str(REPORTS / "calibrate-cpu.json"))
    assert device.attention == pytest.approx(DEVICES["cpu"].attention, rel=0.25)
    assert device.linear == pytest.approx(DEVICES["cpu"].linear, rel=0.25)


def test_every_verb_has_a_report_in_the_form_of_results():
    verbs = {}
    for path in REPORTS.rglob("*.json"):
        found = json.loads(path.read_text())
        if isinstance(found, dict) and found.get("schema") == results.SCHEMA:
            assert found.keys() >= KEYS and all(row["what"] is not None and row["metrics"] for row in found["rows"])
            verbs.setdefault(found["verb"], path)
    assert set(verbs) == {
        *("offline", "single-stream", "scaling", "recovery", "step", "calibrate", "serving", "quality"),
    }
