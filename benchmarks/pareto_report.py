"""The report of `pareto.py`: from lines of results to JSON, Markdown and a plot."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

DEFAULT = "joint"
OURS = ("joint", "joint-ab2", "tokens", "groups")
CLOCKS = {"seconds": "wall time", "cpu_seconds": "processor time, which other programs disturb less"}
REFERENCES = {"dense": "the dense run of the same seed", "ode": "the accurate ODE solution"}
SCORES = ("colour", "size", "direction", "single")
TIME_NOISE = 0.02
"""Ratios of times that differ by no more are equal: no measurement here is better."""
Results = Sequence[dict[str, Any]]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the mean (nan for fewer than two values)."""
    array = np.array(values, dtype=float)
    if not len(array):
        return math.nan, math.nan
    return float(array.mean()), float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else math.nan


def time_ratio(results: Results, name: str = "seconds") -> tuple[float, float]:
    """Median over clips of time (a key of `CLOCKS`) over the dense time beside it; quartile distance."""
    ratios = [r[name] / r[f"dense_{name}"] for r in results if r[f"dense_{name}"]]
    if not ratios:
        return math.nan, math.nan
    low, middle, high = np.percentile(ratios, (25, 50, 75))
    return float(middle), float(high - low)


def metric_of(results: Results) -> str:
    """What plot and paired differences are about: PSNR of frames, or of latents if none were decoded."""
    measured = [r for r in results if r["method"] != "dense"]
    return "psnr" if measured and all("psnr" in r["against"]["dense"] for r in measured) else "latent_psnr"


def summarise(results: Results, clock: str = "seconds") -> dict[str, Any]:
    """All figures of the report; `clock`, a key of `CLOCKS`, is what times are compared by.

    Returns:
        ``metric``, ``rows`` (one for each method and compute), and ``equal_time`` (the default policy at the
        measured time of every baseline, by `equal_time`).
    """
    metric = metric_of(results)
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["method"], result["target"]), []).append(result)
    rows = [_row(name, target, group, groups, metric) for (name, target), group in groups.items()]
    for row in rows:
        row["time"] = row["wall_time"] if clock == "seconds" else row["cpu_time"]
    rows.sort(key=lambda row: (-row["target"], row["method"] not in OURS, row["method"]))
    return {"metric": metric, "clock": clock, "rows": rows, "equal_time": equal_time(groups, metric, clock)}


def _row(name: str, target: float, group: Results, groups: dict[Any, Any], metric: str) -> dict[str, Any]:
    """Figures of one method at one compute."""
    wall, spread = time_ratio(group)
    row: dict[str, Any] = {
        "method": name,
        "target": target,
        "clips": len(group),
        "compute": float(np.mean([r["compute"] for r in group])),
        "seconds": float(np.median([r["seconds"] for r in group])),
        "wall_time": wall,
        "wall_quartiles": spread,
        "cpu_time": time_ratio(group, "cpu_seconds")[0],
    }
    for which in REFERENCES:
        found = [r["against"][which] for r in group]
        row[which] = {
            key: dict(zip(("mean", "error"), mean_and_error(values), strict=True))
            for key in ("psnr", "ssim", "relative_l2", "latent_psnr")
            if (values := [f[key] for f in found if f.get(key) is not None])
        }
        default = groups.get((DEFAULT, target), [])
        differences = paired(default, group, lambda r, w=which: r["against"][w].get(metric))
        if name not in (DEFAULT, "dense") and differences:
            row[which]["default_minus_this"] = dict(zip(("mean", "error"), mean_and_error(differences), strict=True))
    scored = [r["score"] for r in group if "score" in r]
    if scored:
        row["score"] = {key: float(np.mean([s[key] for s in scored])) for key in SCORES}
    return row


def paired(first: Results, second: Results, value: Callable[[dict[str, Any]], float | None]) -> list[float]:
    """Differences first - second over the clips that both have."""
    other = {r["clip"]: value(r) for r in second}
    pairs = [(value(r), other.get(r["clip"])) for r in first]
    return [a - b for a, b in pairs if a is not None and b is not None]


def equal_time(groups: dict[tuple[str, float], Results], metric: str, clock: str) -> list[dict[str, Any]]:
    """The default policy at the measured time of each other result.

    Every clip's figure of the default policy is interpolated, linearly in the measured time, between its
    computes. Where a baseline takes longer than the slowest of them, that one stands in (to the default's
    disadvantage); where it is faster than the fastest by more than `TIME_NOISE`, nothing is said.
    """
    points = sorted(
        (time_ratio(group, clock)[0], target) for (name, target), group in groups.items() if name == DEFAULT
    )
    if not points:
        return []
    times = [t for t, _ in points]
    found = []
    for (name, target), group in groups.items():
        if name in (DEFAULT, "dense"):
            continue
        time = time_ratio(group, clock)[0]
        entry: dict[str, Any] = {"method": name, "target": target, "time": time}
        for which in REFERENCES:
            differences = []
            for result in group:
                value = result["against"][which].get(metric)
                curve = [_value(groups[DEFAULT, t], result["clip"], which, metric) for _, t in points]
                if value is not None and None not in curve and time >= times[0] - TIME_NOISE:
                    differences.append(float(np.interp(time, times, curve)) - value)
            if differences:
                entry[which] = dict(zip(("mean", "error"), mean_and_error(differences), strict=True))
        found.append(entry)
    return sorted(found, key=lambda e: (-e["target"], e["method"]))


def _value(group: Results, clip: str, which: str, metric: str) -> float | None:
    """Figure of one clip in a group."""
    return next((r["against"][which].get(metric) for r in group if r["clip"] == clip), None)


def write(output: pathlib.Path, results: Results, facts: dict[str, Any]) -> list[pathlib.Path]:
    """Write `output` with suffixes .json, .md and .png."""
    output.parent.mkdir(parents=True, exist_ok=True)
    # One thread on a busy machine: the process's own time is the quiet machine's wall time.
    on_cpu = str(facts["environment"]["device"]).startswith("CPU")
    summary = summarise(results, "cpu_seconds" if on_cpu and facts["environment"]["threads"] == 1 else "seconds")
    paths = [output.with_name(output.name + suffix) for suffix in (".json", ".md", ".png")]
    settings = {f"{r['method']} {r['target']:g}": r["settings"] for r in results}
    paths[0].write_text(json.dumps({"facts": facts, **summary, "settings": settings}, indent=1) + "\n")
    paths[1].write_text(markdown(summary, facts, output.name + ".png"))
    plot(paths[2], summary)
    return paths


def markdown(summary: dict[str, Any], facts: dict[str, Any], picture: str) -> str:
    """Render the report."""
    unit = "PSNR (dB)" if summary["metric"] == "psnr" else "latent PSNR (dB)"
    env = facts["environment"]
    most = max(row["clips"] for row in summary["rows"])
    lines = [
        "# Quality against time on the demo model",
        "",
        f"{most} clips of the split `{facts['split']}`, {facts['steps']} Euler steps, guidance "
        f"{facts['guidance']:g}, model {facts['model']}. {env['date']}, {env['device']}, {env['threads']} "
        f"thread(s), torch {env['versions']['torch']}, diffusers {env['versions']['diffusers']}, git "
        f"{env['git']}.",
        "",
        f"Against {REFERENCES['dense']} and {REFERENCES['ode']} (200 steps of Adams-Bashforth 2). Means "
        "over clips ± standard error of the mean. *wall* is the median over clips of the denoising time "
        "(transformer and scheduler) over that of a dense run beside it, *CPU* the same in processor time. "
        "*compute* is counted in token rows that went through the blocks. Δ is the default policy "
        f"(`{DEFAULT}`) minus the row's method on the same clips, so positive is good for the default. "
        f"Baselines were tuned to the computes on {facts['calibration_clips']} other clips. `steps*` are whole-step "
        "baselines built from our parts, without the placement and the correction of the default.",
        "",
        f"![time against quality]({picture})",
        "",
    ]
    for target in sorted({row["target"] for row in summary["rows"]}, reverse=True):
        lines += ["", f"## compute {target:g}", "", *_table(summary, target, unit)]
    lines += ["", *_equal_time_table(summary, unit)]
    return "\n".join(lines) + "\n"


def _table(summary: dict[str, Any], target: float, unit: str) -> list[str]:
    metric = summary["metric"]
    head = (
        f"| method | clips | compute | wall | CPU | {unit}, dense | Δ | {unit}, ODE | Δ "
        "| SSIM, dense | rel. L2, dense | colour / size / direction / single |"
    )
    lines = [head, "|---|" + "---:|" * 10 + "---|"]
    for row in (r for r in summary["rows"] if r["target"] == target):
        name = f"**{row['method']}**" if row["method"] == DEFAULT else row["method"]
        scores = row.get("score")
        shares = " / ".join(f"{100 * scores[key]:.0f}" for key in SCORES) if scores else "–"
        cells = [
            name,
            str(row["clips"]),
            f"{row['compute']:.3f}",
            f"{row['wall_time']:.2f}",
            f"{row['cpu_time']:.2f}",
            _plus_minus(row["dense"].get(metric)),
            _plus_minus(row["dense"].get("default_minus_this"), sign=True),
            _plus_minus(row["ode"].get(metric)),
            _plus_minus(row["ode"].get("default_minus_this"), sign=True),
            _plus_minus(row["dense"].get("ssim"), digits=4),
            _plus_minus(row["dense"].get("relative_l2"), digits=4),
            shares,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _equal_time_table(summary: dict[str, Any], unit: str) -> list[str]:
    """Who wins at equal measured time."""
    lines = [
        "## At equal measured time",
        "",
        f"The default policy minus each method, {unit}, with the default interpolated clip by clip to the "
        f"method's measured time ({CLOCKS[summary['clock']]}). Where a method is slower than the default at "
        "its largest compute, that one stands in; – where it is faster than the default at its smallest "
        "compute.",
        "",
        "| method | compute | time | Δ, dense | Δ, ODE |",
        "|---|---:|---:|---:|---:|",
    ]
    for entry in summary["equal_time"]:
        cells = [entry["method"], f"{entry['target']:g}", f"{entry['time']:.2f}"]
        cells += [_plus_minus(entry.get(which), sign=True) for which in REFERENCES]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _plus_minus(found: dict[str, float] | None, *, digits: int = 2, sign: bool = False) -> str:
    if not found:
        return "–"
    mean = f"{found['mean']:{'+' if sign else ''}.{digits}f}"
    return mean if math.isnan(found["error"]) else f"{mean} ± {found['error']:.{digits}f}"


def plot(path: pathlib.Path, summary: dict[str, Any]) -> None:
    """Draw measured time against quality, one panel for each reference."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metric = summary["metric"]
    figure, panels = plt.subplots(1, 2, figsize=(13, 5.5))
    names = list(dict.fromkeys(row["method"] for row in summary["rows"] if row["method"] != "dense"))
    colours = plt.get_cmap("tab20")
    for panel, (which, words) in zip(panels, REFERENCES.items(), strict=True):
        for i, name in enumerate(names):
            rows = [r for r in summary["rows"] if r["method"] == name and metric in r[which]]
            rows.sort(key=lambda r: r["time"])
            style = {"linestyle": "-", "marker": "o"} if name in OURS else {"linestyle": "--", "marker": "s"}
            panel.errorbar(
                [r["time"] for r in rows],
                [r[which][metric]["mean"] for r in rows],
                [r[which][metric]["error"] for r in rows],
                label=name,
                color=colours(i % 20),
                linewidth=2.5 if name == DEFAULT else 1.2,
                markersize=4,
                **style,
            )
        panel.set_xlabel(f"denoising time / dense ({CLOCKS[summary['clock']].split(',')[0]})")
        panel.set_ylabel(f"{'PSNR' if metric == 'psnr' else 'latent PSNR'} (dB)")
        panel.set_title(f"against {words}")
        panel.grid(alpha=0.3)
    panels[1].legend(fontsize=8, ncol=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
