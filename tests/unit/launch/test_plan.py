"""`heterostep plan`: what it says, writes and refuses; without PyTorch."""

import json
import subprocess
import sys

import pytest

from heterostep.engine.published import PUBLISHED, sizes_of
from heterostep.hsa.config import HSAConfig
from heterostep.launch.cli import main
from heterostep.launch.layouts import by_ranks, layouts, most, soonest, sweep, uneven
from heterostep.launch.plan import PlanSettings, case_of
from heterostep.launch.plan_report import as_json

WAN = ["plan", "--model", "wan2.1-14b", "--size", "1280x720", "--frames", "81", "--steps", "50"]


def said(capsys, *flags, code=0):
    assert main([*WAN, *flags]) == code
    output = capsys.readouterr()
    return output.out if code == 0 else output.err


def test_plan_needs_no_pytorch():
    program = (
        "import sys; from heterostep.launch.cli import main; "
        f"main({[*WAN, '--compute', '0.5', '--gpu', 'h100', '--gpus', '8']!r}); "
        "print([name for name in ('torch', 'diffusers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert "75,600 tokens; 50 steps, 2 guidance branch(es)" in lines[1]
    assert "25 full, 0 partial and 25 skipped steps" in lines[2]
    assert any(line.startswith("Soonest: 1 replica(s) of 2 x 1 x 4") for line in lines)
    assert any(line.startswith("Estimates, not measured: ") and "nvlink" in line for line in lines)
    assert lines[-1] in ("[]", "['numpy']")


def test_seven_gpus_are_answered_with_what_would_do(capsys):
    output = said(capsys, "--gpus", "7")
    assert "7 GPUs do not divide one video evenly: cfg takes 1 or 2 and ulysses one of 1, 2, 4, 5, 8" in output
    assert "5 (cfg 1 x ulysses 5) or 8 (cfg 2 x ulysses 4) GPUs would do, or 7 replicas" in output
    assert "do not divide" not in said(capsys, "--gpus", "8")
    assert "do not divide" not in said(capsys, "--gpus", "7", "--ring", "7")


def test_json_has_every_layout_and_the_sweep(capsys, tmp_path):
    file = tmp_path / "plan.json"
    output = said(capsys, "--gpus", "8", "--sweep", "--json", str(file), "--policy", "tokens")
    plan = json.loads(file.read_text())
    assert [row["gpus"] for row in plan["sweep"]] == [2**i for i in range(11)]
    assert plan["sweep"][0]["most_videos"] is None and "does not fit" in output
    degrees = {(row["cfg"], row["ring"], row["ulysses"]) for row in plan["layouts"] if row["replicas"] == 1}
    assert degrees == {(2, 1, 4), (2, 2, 2), (2, 4, 1), (1, 1, 8), (1, 2, 4), (1, 4, 2), (1, 8, 1)}
    for row in plan["layouts"]:
        ranks = row["cfg"] * row["ring"] * row["ulysses"]
        assert row["replicas"] * ranks == 8
        assert row["videos_per_hour"] == pytest.approx(8 * row["videos_per_gpu_hour"])
        assert row["fits"] == (row["peak_bytes"] <= plan["device"]["memory"])
    ulysses = next(row for row in plan["layouts"] if row["ulysses"] == 8)
    # docs/parallel.md: 4 N d (P - 1) / P^2 elements of two bytes a layer and branch.
    sent = sum(count for name, count in ulysses["sent_bytes_per_full_step"].items() if name != "velocity")
    assert sent == pytest.approx(4 * 75_600 * 5120 * 7 / 64 * 2 * 40 * 2, rel=1e-6)


def test_what_does_not_fit_names_what_would(capsys):
    output = said(capsys, "--gpus", "1", "--policy", "tokens")
    assert "nothing fits: a rank needs at least" in output and "of 78 GiB" in output
    assert "--policy steps" in output and "4 ranks (cfg x ring x ulysses = 2 x 1 x 2) would fit" in output
    assert "Most videos" not in output


def test_given_degrees_hold_for_all(capsys):
    output = said(capsys, "--gpus", "8", "--ulysses", "2", "--cfg", "1", "--ring", "2")
    assert "2             1 x 2 x 2" in output and "2 x 1 x 4" not in output


def test_a_folder_and_the_demo_model_can_be_planned_for(capsys):
    assert main(["plan", "--model", "demo", "--gpu", "cpu", "--gpus", "2"]) == 0
    assert "576 tokens" in capsys.readouterr().out
    for model in ("wan2.2-a14b", "wan2.2-ti2v-5b", "ltx-2", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"):
        assert main(["plan", "--model", model, "--gpus", "1"]) == 0
        assert model in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--gpu", "abacus"], "one of h100, h200, cpu, or a JSON file"),
        (["--ulysses", "7"], "ulysses=7 with 40 attention heads"),
        (["--gpus", "2", "--ulysses", "8"], "degrees of 8 rank(s) need a multiple of so many GPUs, not 2"),
        (["--compute", "0.01"], "compute=0.01 cannot be met with 50 steps"),
        (["--size", "33x44"], "the nearest size is 32x48"),
        (["--json", "/no/such/folder/plan.json"], "/no/such/folder"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(capsys, flags, says):
    code = main([*WAN, *flags])
    error = capsys.readouterr().err
    assert code in (1, 2) and says in error and len(error.splitlines()) == 1


def test_an_unknown_model_is_answered_with_the_known_ones(capsys):
    assert main(["plan", "--model", "wan9"]) == 2
    assert "nor one of wan2.1-1.3b, wan2.1-14b" in capsys.readouterr().err


def test_plot_is_drawn_or_says_what_it_needs(capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    file = tmp_path / "sweep.png"
    said(capsys, "--plot", str(file))
    assert file.stat().st_size > 10_000
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "--plot needs matplotlib" in said(capsys, "--plot", str(file), code=2)


def test_settings_are_checked():
    with pytest.raises(Exception, match="gpus must be a whole number from 1"):
        PlanSettings(model="ltx-2", gpus=0)


def test_a_published_model_is_known_by_both_of_its_names():
    for name, (hub_id, files) in PUBLISHED.items():
        assert sizes_of(name)("transformer/config.json") == sizes_of(hub_id)("transformer/config.json")
        assert files["model_index.json"]["_class_name"] in ("WanPipeline", "LTX2Pipeline")


def test_layouts_share_all_gpus_and_the_best_ones_fit():
    case = case_of(PlanSettings(model="wan2.1-1.3b"), HSAConfig(policy="tokens"))
    found = layouts(case, 12, {})
    assert {layout.gpus for layout in found} == {12}
    # 12 heads: the engine's own choice stands first where others are as fast.
    assert [layout.degrees for layout in by_ranks(found)][-1] == "2 x 1 x 6"
    assert most(found).per_hour == max(layout.per_hour for layout in found if layout.estimate.fits)
    assert soonest(found).degrees == "2 x 1 x 6"
    assert uneven(case, 12, {}) == "" and "14" not in uneven(case, 13, {}) and "12 (cfg 2" in uneven(case, 13, {})
    plan = as_json(case, found, sweep(case, {"ulysses": 4}), ["a note"])
    assert plan["sweep"][0]["gpus"] == 4 and plan["notes"] == ["a note"]
    json.dumps(plan)
