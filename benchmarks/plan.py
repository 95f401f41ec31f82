"""The constants of `heterostep plan`, derived, and what it says of 1 to 1,024 GPUs: `python benchmarks/plan.py`.

Needs no GPU and takes seconds. Reads the reports of `bench step` and of parallel.py; writes reports/plan.json, .md
and .png.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from heterostep.engine.devices import DEVICES, ELEMENTWISE_BYTES
from heterostep.engine.estimate import Case, estimate, pass_flops
from heterostep.hsa.config import HSAConfig
from heterostep.launch.layouts import sweep
from heterostep.launch.plan import PlanSettings, case_of
from heterostep.launch.plan_report import as_json
from heterostep.parallel.config import ParallelConfig

REPORTS = pathlib.Path(__file__).parent / "reports"
COMMAND = "python benchmarks/plan.py"
FORWARD = {(832, 480): 3.75, (1280, 720): 13.30}
"""Published seconds of one pass of Wan 2.1 14B, 81 frames, on one H100 with PyTorch's attention (Hugging Face data set
yitongl/wan21-flsplan)."""
SWEPT = (("wan2.2-a14b", 40), ("wan2.1-14b", 50))
SIZE = (1280, 720)
WHO_MLPERF = "MLPerf Inference v6.0, Krai, 8 x H200"
WHO_LIGHT = "LightX2V README"
ONE = ParallelConfig()
EIGHT = ParallelConfig(cfg=2, ulysses=4)


def case(model: str, size: tuple[int, int], gpu: str, compute: float = 1.0, **settings: Any) -> Case:
    return case_of(PlanSettings(model=model, gpu=gpu, **settings), HSAConfig(compute=compute), size)


def derived() -> dict[str, float]:
    """Solve for the constants again: three equations of seconds, three unknown speeds."""
    step = json.loads((REPORTS / "step-wan-1.3b.json").read_text())
    seconds_of = {
        row["what"]["step"]: row["metrics"]["seconds"]["value"] for row in step["rows"] if "step" in row["what"]
    }
    dense = seconds_of["dense"]
    partial = {float(name.split()[0]): value for name, value in seconds_of.items() if name not in ("dense", "1 active")}
    rows = [(case("wan2.1-14b", size, "h100"), seconds) for size, seconds in FORWARD.items()]
    rows.append((case("wan2.1-1.3b", (832, 480), "h200"), dense))
    terms, seconds = [], []
    for made, measured in rows:
        linear, attention = pass_flops(made.sizes, made.video, made.video.tokens, 1)
        channels = made.video.tokens * made.sizes.width * made.sizes.facts.num_layers
        terms.append([linear, attention, channels / made.device.bandwidth])
        seconds.append(measured)
    per_linear, per_attention, elementwise = np.linalg.solve(np.array(terms), np.array(seconds))
    extra = [(taken - share * dense) / rows[-1][0].sizes.facts.num_layers for share, taken in partial.items()]
    cpu = json.loads((REPORTS / "parallel.json").read_text())
    return {
        "attention": 1 / per_attention,
        "linear": 1 / per_linear,
        "elementwise": elementwise,
        "partial_layer": float(np.mean(extra)),
        **_of_the_cpu(cpu),
    }


def _of_the_cpu(report: dict[str, Any]) -> dict[str, float]:
    facts = report["facts"]
    n, d, layers, steps = facts["num_tokens"], facts["dim"], facts["layers"], facts["steps"]
    one, two = (next(row for row in world["rows"] if row["method"] == "ours dense") for world in report["worlds"][:2])
    flops = layers * steps * n * (12 * d * d + 16 * d * d + 4 * n * d)
    sending = two["seconds"] - one["seconds"] / 2
    return {"cpu": flops / one["seconds"], "cpu_link": two["bytes_per_step"] * steps / sending}


def published() -> list[tuple[str, str, str, float, float]]:
    """Published figures and ours: who, what, unit, theirs, ours."""
    h200 = case("wan2.2-a14b", SIZE, "h200", num_inference_steps=20)
    one, eight = estimate(h200, ONE), estimate(h200, EIGHT)
    small, large = (case("wan2.1-14b", size, "h200", num_inference_steps=40) for size in FORWARD)
    h100 = case("wan2.1-14b", (832, 480), "h100")
    tiny = case("wan2.1-1.3b", (832, 480), "h100")
    task = "Wan 2.2 A14B, 1280x720, 20 steps"
    return [
        (WHO_MLPERF, f"{task}, offline, closed", "videos per GPU-hour", 8.2, 3600 / one.video),
        (WHO_MLPERF, f"{task}, single stream, closed", "s", 57.4, eight.video),
        (f"{WHO_LIGHT}: Wan's own code", "Wan 2.1 14B, 832x480, 40 steps, H200", "s", 366, estimate(small, ONE).video),
        (f"{WHO_LIGHT}: LightX2V", "the same", "s", 250, estimate(small, ONE).video),
        (f"{WHO_LIGHT}: Wan's own code", "Wan 2.1 14B, 1280x720, 40 steps, H200", "s", 974, estimate(large, ONE).video),
        (f"{WHO_LIGHT}: LightX2V", "the same", "s", 807, estimate(large, ONE).video),
        (f"{WHO_LIGHT}: diffusers", "Wan 2.1 14B I2V, 832x480, H100", "s a step", 9.77, estimate(h100, ONE).full_step),
        (f"{WHO_LIGHT}: LightX2V", "the same on 8 x H100", "s a step", 0.75, estimate(h100, EIGHT).full_step),
        ("FlashDreams", "Wan 2.1 1.3B, 832x480, H100", "s a step", 1.04, estimate(tiny, ONE).full_step),
    ]


def markdown(constants: dict[str, float], swept: dict[str, Any]) -> str:
    hopper, cpu = DEVICES["h200"], DEVICES["cpu"]
    rows = [
        ("attention kernel, H100 and H200", "TFLOP/s", constants["attention"] / 1e12, hopper.attention / 1e12),
        ("matrix multiplications, H100 and H200", "TFLOP/s", constants["linear"] / 1e12, hopper.linear / 1e12),
        ("elementwise kernels", "bytes a channel, token and layer", constants["elementwise"], ELEMENTWISE_BYTES),
        ("a layer of a partial step besides", "ms", constants["partial_layer"] * 1e3, hopper.partial_layer * 1e3),
        ("CPU core", "GFLOP/s", constants["cpu"] / 1e9, cpu.linear / 1e9),
        ("gloo between two processes", "GB/s", constants["cpu_link"] / 1e9, cpu.nvlink / 1e9),
    ]
    lines = [
        "# Plans",
        "",
        f"Estimates by the model of costs behind `heterostep plan` ([how](../../docs/planning.md)); `{COMMAND}` makes",
        "this page again. No GPU was used: seconds are computed, and links are nominal.",
        "",
        "## Constants",
        "",
        "Three equations give the first three: one pass of Wan 2.1 14B on an H100 takes 3.75 s at 832x480 and 13.30 s",
        "at 1280x720 (published, PyTorch's attention), and one of Wan 1.3B on an H200 .612 s",
        "([measured](step-wan-1.3b.md)). Each is the sum of FLOPs over two speeds and of bytes over the memory's",
        "bandwidth. The rest are from the reports [step-wan-1.3b](step-wan-1.3b.md) and [parallel](parallel.md).",
        "",
        "| what | unit | derived | used |",
        "|---|---|---:|---:|",
        *(f"| {what} | {unit} | {found:.4g} | {used:.4g} |" for what, unit, found, used in rows),
        "",
        "## Beside published figures",
        "",
        "Dense runs with guidance. Ours are of stock diffusers with PyTorch's attention in bfloat16, so a stack with",
        "faster kernels or fewer bits should be faster than these estimates. LightX2V's runs start from an image,",
        "which Wan 2.1 attends to besides; ours do not. FlashDreams does not say whether it counts one",
        "guidance branch or two.",
        "",
        "| who | what | unit | published | estimated | ratio |",
        "|---|---|---|---:|---:|---:|",
        *(
            f"| {who} | {what} | {unit} | {_short(theirs)} | {_short(ours)} | {ours / theirs:.2f} |"
            for who, what, unit, theirs, ours in published()
        ),
    ]
    for name, plans in swept.items():
        lines += ["", f"## {name}", "", *_table(plans)]
    return "\n".join([*lines, "", "![videos per hour, and seconds of a video, by GPUs](plan.png)", ""])


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _table(plans: dict[str, Any]) -> list[str]:
    lines = [
        "| GPU | compute | GPUs | most videos: replicas of cfg x ring x ulysses | videos/h | videos/GPU-h "
        "| soonest: cfg x ring x ulysses | s a video | videos/GPU-h |",
        "|---|---:|---:|---|---:|---:|---|---:|---:|",
    ]
    for key, rows in plans.items():
        gpu, compute = key.split(" at ")
        for gpus, most, soonest in rows:
            lines.append(
                f"| {gpu} | {compute} | {gpus:,} | {most.replicas:,} of {most.degrees} | {most.per_hour:,.1f} | "
                f"{most.per_gpu_hour:.2f} | {soonest.degrees} | {soonest.estimate.video:.1f} | "
                f"{soonest.per_gpu_hour:.2f} |"
            )
    return lines


def plot(path: pathlib.Path, swept: dict[str, Any]) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axis, (name, plans) in zip(figure.subplots(1, 2), swept.items(), strict=True):
        for key, rows in plans.items():
            gpus = [row[0] for row in rows]
            axis.plot(gpus, [row[2].estimate.video for row in rows], marker="o", label=key)
        axis.set(
            xscale="log", yscale="log", xlabel="GPUs that share one video", ylabel="seconds of a video", title=name
        )
        axis.set_xticks(gpus, [str(number) for number in gpus])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(title="GPU at compute")
    figure.savefig(path, dpi=110)


def main() -> None:
    constants, swept, plain = derived(), {}, {}
    for model, steps in SWEPT:
        title = f"{model}, {SIZE[0]}x{SIZE[1]}, 81 frames, {steps} steps"
        swept[title] = {}
        for gpu in ("h100", "h200"):
            for compute in (1.0, 0.5):
                made = case(model, SIZE, gpu, compute, num_frames=81, num_inference_steps=steps)
                rows = sweep(made, {})
                swept[title][f"{gpu} at {compute:g}"] = rows
                plain[f"{title}, {gpu} at {compute:g}"] = as_json(made, [], rows, [])["sweep"]
    devices = {name: dataclasses.asdict(device) for name, device in DEVICES.items()}
    keys = ("who", "what", "unit", "published", "estimated")
    content = {
        "command": COMMAND,
        "derived": constants,
        "devices": devices,
        "beside": [dict(zip(keys, row, strict=True)) for row in published()],
        "sweeps": plain,
    }
    (REPORTS / "plan.json").write_text(json.dumps(content, indent=1) + "\n")
    (REPORTS / "plan.md").write_text(markdown(constants, swept))
    plot(REPORTS / "plan.png", swept)


if __name__ == "__main__":
    main()
