"""The report of `parallel.py`: what must hold, a Markdown table, a picture."""

from __future__ import annotations

import os
import pathlib
from typing import Any

DENSE_LIMIT = 1.05
"""Our dense time over a peer's, on two ranks."""
SPARSE_LIMITS = {0.5: 0.58, 0.25: 0.33}
"""HSA's time over our dense time, on two ranks, by compute."""
COLOURS = ("#4c72b0", "#937860", "#8c8c8c", "#dd8452", "#ccb974", "#55a868", "#64b5cd", "#c44e52", "#8172b3")


def checks(worlds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What must hold on two ranks, as far as it was measured."""
    found = []
    for world in worlds:
        if world["world"] != 2:
            continue
        for row in world["rows"]:
            kind, _, last = row["method"].rpartition(" ")
            if kind in ("ours tokens", "ours joint"):
                what, value, limit = f"{row['method']} / ours dense", row["ratio"], SPARSE_LIMITS[float(last)]
            elif row["method"] != "ours dense":
                what, value, limit = f"ours dense / {row['method']}", 1 / row["ratio"], DENSE_LIMIT
            else:
                continue
            found.append({"what": what, "value": value, "limit": limit, "holds": value <= limit})
    return found


def markdown(report: dict[str, Any], name: str) -> str:
    """Render the report."""
    facts, env = report["facts"], report["facts"]["environment"]
    frames, height, width = facts["grid"]
    lines = [
        "# Many ranks",
        "",
        f"Random Wan transformer: width {facts['dim']}, {facts['layers']} layers, N = {facts['num_tokens']:,} tokens "
        f"({frames} x {height} x {width}), float32, no guidance, {facts['steps']} steps, gloo over the loopback, one "
        f"thread for each rank, ulysses = ranks. {env['date']}, {env['device']}, {os.cpu_count()} processors, load "
        f"{env['load_average']} at the start, torch {env['versions']['torch']}, diffusers "
        f"{env['versions']['diffusers']}, xfuser {env['versions']['xfuser'] or 'not installed'}, git {env['git']}. "
        f"{facts['seconds']:.0f} s in all, by `{env['command']}`. "
        "No GPU: what NCCL and overlap give is not measured here.",
        "",
        f"Medians of {facts['rounds']} runs that alternate. A ratio is that of a run to the mean of our dense runs "
        "before and behind it. Error: relative L2 of the latents to our dense ones.",
        "",
        f"![seconds by method and number of ranks; imbalance of cuts]({name}.png)",
        "",
        "| ranks | method | compute | seconds | lowest .. highest | over ours dense | lowest .. highest | "
        "MB sent per step and rank | error |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for world in report["worlds"]:
        for row in world["rows"]:
            lines.append(
                f"| {world['world']} | {row['method']} | {row['achieved']:.3f} | {row['seconds']:.2f} | "
                f"{row['fastest']:.2f} .. {row['slowest']:.2f} | **{row['ratio']:.3f}** | "
                f"{row['lowest']:.3f} .. {row['highest']:.3f} | {row['bytes_per_step'] / 1e6:.2f} | "
                f"{row['relative_error']:.1e} |"
            )
        for method, reason in world["absent"].items():
            lines.append(f"| {world['world']} | {method} | | skipped: {reason} | | | | | |")
    lines += ["", "## What must hold on 2 ranks", "", "| | measured | at most | holds |", "|---|---:|---:|---|"]
    for check in report["checks"]:
        holds = "yes" if check["holds"] else "**no**"
        lines.append(f"| {check['what']} | **{check['value']:.3f}** | {check['limit']:g} | {holds} |")
    lines += [
        "",
        "## Cuts",
        "",
        "Most active tokens of a rank over the mean, on the active sets of the demo model's partial steps (policy "
        "`tokens`; a moving object). `contiguous` and `interleaved` give each token a fixed owner; `exact` cuts each "
        "step's active tokens anew, as heterostep does. Mean (worst).",
        "",
        "| compute | ranks | sets | contiguous | interleaved | exact |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in report["cuts"]:
        cuts = " | ".join(
            f"{row[cut]['mean']:.3f} ({row[cut]['worst']:.3f})" for cut in ("contiguous", "interleaved", "exact")
        )
        lines.append(f"| {row['compute']:g} | {row['world']} | {row['sets']} | {cuts} |")
    return "\n".join(lines) + "\n"


def plot(path: pathlib.Path, report: dict[str, Any]) -> None:
    """Draw the seconds of each method by number of ranks, and the imbalance of each cut."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (times, cuts) = plt.subplots(1, 2, figsize=(13, 4.8), width_ratios=(3, 2))
    names = list(dict.fromkeys(row["method"] for world in report["worlds"] for row in world["rows"]))
    colours = dict(zip(names, COLOURS, strict=False))
    left, ticks = 0.0, {}
    for world in report["worlds"]:
        first, labelled = left, times.get_legend_handles_labels()[1]
        for row in world["rows"]:
            spread = [[row["seconds"] - row["fastest"]], [row["slowest"] - row["seconds"]]]
            label = None if row["method"] in labelled else row["method"]
            times.bar(left, row["seconds"], yerr=spread, color=colours[row["method"]], label=label, capsize=2)
            left += 1
        ticks[(first + left - 1) / 2] = f"{world['world']} rank{'s' if world['world'] > 1 else ''}"
        left += 1
    times.set_xticks(list(ticks), list(ticks.values()))
    times.set_ylabel(f"seconds for {report['facts']['steps']} steps")
    times.legend(fontsize=8)
    rows = report["cuts"]
    for i, cut in enumerate(("contiguous", "interleaved", "exact")):
        places = [j + 0.27 * (i - 1) for j in range(len(rows))]
        mean = [row[cut]["mean"] for row in rows]
        worst = [[0.0] * len(rows), [row[cut]["worst"] - row[cut]["mean"] for row in rows]]
        cuts.bar(places, mean, 0.25, yerr=worst, label=cut, capsize=2)
    cuts.set_xticks(range(len(rows)), [f"{row['world']} ranks\n{row['compute']:g}" for row in rows], fontsize=8)
    cuts.set_ylim(bottom=0.9)
    cuts.set_ylabel("active tokens, most / mean (line: worst step)")
    cuts.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
