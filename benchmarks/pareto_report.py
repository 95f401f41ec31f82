"""The report of `pareto.py`: from lines of results to JSON, Markdown and a plot, for each guidance scale."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from heterostep.benchmarks.quality.figures import Results, paired, plus_minus, summary_of, time_ratio

DEFAULT = "joint"
OURS = ("joint", "joint-ab2", "tokens", "groups")
CLOCKS = {"seconds": "wall time", "cpu_seconds": "processor time, which other programs disturb less"}
REFERENCES = {"dense": "the dense run of the same seed", "ode": "the accurate ODE solution"}
SOLVER_NAMES = {"euler": "Euler", "unipc": "UniPC"}
SCORES = ("colour", "size", "direction", "single")
TIME_NOISE = 0.02
"""Ratios of times that differ by no more are equal: no measurement here is better."""


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
        found = [r["against"][which] for r in group if which in r["against"]]
        if len(found) < len(group):
            row[f"{which}_clips"] = len(found)
        row[which] = {
            key: summary_of(values)
            for key in ("psnr", "ssim", "relative_l2", "latent_psnr")
            if (values := [f[key] for f in found if f.get(key) is not None])
        }
        default = groups.get((DEFAULT, target), [])
        differences = paired(default, group, lambda r, w=which: r["against"].get(w, {}).get(metric))
        if name not in (DEFAULT, "dense") and differences:
            row[which]["default_minus_this"] = summary_of(differences)
    scored = [r["score"] for r in group if "score" in r]
    if scored:
        row["score"] = {key: float(np.mean([s[key] for s in scored])) for key in SCORES}
    return row


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
                value = result["against"].get(which, {}).get(metric)
                curve = [_value(groups[DEFAULT, t], result["clip"], which, metric) for _, t in points]
                if value is not None and None not in curve and time >= times[0] - TIME_NOISE:
                    differences.append(float(np.interp(time, times, curve)) - value)
            if differences:
                entry[which] = summary_of(differences)
        found.append(entry)
    return sorted(found, key=lambda e: (-e["target"], e["method"]))


def _value(group: Results, clip: str, which: str, metric: str) -> float | None:
    """Figure of one clip in a group."""
    return next((r["against"].get(which, {}).get(metric) for r in group if r["clip"] == clip), None)


def write(output: pathlib.Path, results: Mapping[float, Results], facts: dict[str, Any]) -> list[pathlib.Path]:
    """Write `output` with suffixes .json, .md and .png; `results` by guidance scale."""
    output.parent.mkdir(parents=True, exist_ok=True)
    # One thread on a busy machine: the process's own time is the quiet machine's wall time.
    on_cpu = str(facts["environment"]["device"]).startswith("CPU")
    clock = "cpu_seconds" if on_cpu and facts["environment"]["threads"] == 1 else "seconds"
    summaries = {guidance: summarise(found, clock) for guidance, found in results.items()}
    paths = [output.with_name(output.name + suffix) for suffix in (".json", ".md", ".png")]
    settings = {f"{r['method']} {r['target']:g}": r["settings"] for found in results.values() for r in found}
    by_guidance = {f"{guidance:g}": summary for guidance, summary in summaries.items()}
    paths[0].write_text(json.dumps({"facts": facts, "guidance": by_guidance, "settings": settings}, indent=1) + "\n")
    paths[1].write_text(markdown(summaries, facts, output.name + ".png"))
    plot(paths[2], summaries)
    return paths


def unit_of(summary: dict[str, Any]) -> str:
    """What the figures are."""
    return "PSNR (dB)" if summary["metric"] == "psnr" else "latent PSNR (dB)"


def markdown(summaries: Mapping[float, dict[str, Any]], facts: dict[str, Any], picture: str) -> str:
    """Render the report."""
    env = facts["environment"]
    counts = {row["clips"] for summary in summaries.values() for row in summary["rows"]}
    number = f"{max(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    scales = " and ".join(f"{guidance:g}" for guidance in summaries)
    solver = SOLVER_NAMES[facts["solver"]]
    lines = [
        "# Quality against time on the demo model",
        "",
        f"{number} clips of the split `{facts['split']}`, {facts['steps']} steps of {solver}, guidance "
        f"{scales}, model {facts['model']}. {env['date']}, {env['device']}, {env['threads']} "
        f"thread(s), torch {env['versions']['torch']}, diffusers {env['versions']['diffusers']}, git "
        f"{env['git']}. Made by `{env['command']}`.",
        "",
        f"Against {REFERENCES['dense']} and {REFERENCES['ode']} (100 steps of Adams' method of third order). Means "
        "over clips ± standard error of the mean. *wall* is the median over clips of the denoising time "
        "(transformer and scheduler) over that of the clip's dense run, *CPU* the same in processor time. "
        "*compute* is counted in token rows that went through the blocks. Δ is the default policy "
        f"(`{DEFAULT}`) minus the row's method on the same clips, so positive is good for the default. In brackets: "
        "clips whose ODE solution was computed, if not all. "
        f"Baselines were tuned to the computes on {facts['calibration_clips']} other clips, once for all guidance "
        "scales, as our defaults are the same for all. Spectrum and DPCache are ours after their papers. "
        "`steps*` are whole-step baselines built from our parts, without the placement and the correction of the "
        "default. `unipc-placed` is UniPC on our choice of noise levels and nothing else. `cache-dit` "
        "has as many full steps as the others, and runs one block of this small model's six at each other step, so it "
        "spends more.",
        "",
        f"![time against quality]({picture})",
        "",
        *_nearest_table(summaries),
    ]
    for guidance, summary in summaries.items():
        lines += ["", f"## Guidance {guidance:g}"]
        for target in sorted({row["target"] for row in summary["rows"]}, reverse=True):
            lines += ["", f"### compute {target:g}", "", *_table(summary, target, unit_of(summary))]
        lines += ["", *_equal_time_table(summary, unit_of(summary))]
    return "\n".join(lines) + "\n"


def _nearest_table(summaries: Mapping[float, dict[str, Any]]) -> list[str]:
    """The default beside the baseline that comes nearest to it, for each guidance scale, compute and reference."""
    lines = [
        "## The default and the baseline nearest to it",
        "",
        "| guidance | compute | reference | default | nearest | Δ | Δ in standard errors |",
        "|---:|---:|---|---:|---|---:|---:|",
    ]
    for guidance, summary in summaries.items():
        rows, metric = summary["rows"], summary["metric"]
        for default in (row for row in rows if row["method"] == DEFAULT):
            others = [r for r in rows if r["target"] == default["target"] and r["method"] not in OURS]
            for which in REFERENCES:
                compared = [r for r in others if "default_minus_this" in r[which]]
                if not compared:
                    continue
                nearest = min(compared, key=lambda r, w=which: r[w]["default_minus_this"]["mean"])
                delta = nearest[which]["default_minus_this"]
                cells = [f"{guidance:g}", f"{default['target']:g}", which, plus_minus(default[which].get(metric))]
                cells += [nearest["method"], plus_minus(delta, sign=True)]
                cells.append(f"{delta['mean'] / delta['error']:+.1f}" if delta["error"] > 0 else "–")
                lines.append("| " + " | ".join(cells) + " |")
    return lines


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
            f"{row['clips']} ({row['ode_clips']})" if "ode_clips" in row else f"{row['clips']}",
            f"{row['compute']:.3f}",
            f"{row['wall_time']:.2f}",
            f"{row['cpu_time']:.2f}",
            plus_minus(row["dense"].get(metric)),
            plus_minus(row["dense"].get("default_minus_this"), sign=True),
            plus_minus(row["ode"].get(metric)),
            plus_minus(row["ode"].get("default_minus_this"), sign=True),
            plus_minus(row["dense"].get("ssim"), digits=4),
            plus_minus(row["dense"].get("relative_l2"), digits=4),
            shares,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _equal_time_table(summary: dict[str, Any], unit: str) -> list[str]:
    """Who wins at equal measured time."""
    lines = [
        "### At equal measured time",
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
        cells += [plus_minus(entry.get(which), sign=True) for which in REFERENCES]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def plot(path: pathlib.Path, summaries: Mapping[float, dict[str, Any]]) -> None:
    """Draw measured time against quality: a row for each guidance scale, a panel for each reference."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(len(summaries), 2, figsize=(13, 5.5 * len(summaries)), squeeze=False)
    names = list(dict.fromkeys(r["method"] for s in summaries.values() for r in s["rows"] if r["method"] != "dense"))
    for panels, (guidance, summary) in zip(grid, summaries.items(), strict=True):
        for panel, which in zip(panels, REFERENCES, strict=True):
            _panel(panel, summary, which, names, plt.get_cmap("tab20"))
            panel.set_title(f"against {REFERENCES[which]}, guidance {guidance:g}")
    grid[0, 1].legend(fontsize=8, ncol=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(panel: Any, summary: dict[str, Any], which: str, names: list[str], colours: Any) -> None:
    metric = summary["metric"]
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
    panel.set_ylabel(unit_of(summary))
    panel.grid(alpha=0.3)
