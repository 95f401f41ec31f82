"""The reports of `bench quality`: JSON, Markdown, a plot where matplotlib is installed, and a page with the videos."""

from __future__ import annotations

import html
import importlib.util
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...engine.media.files import replacing, write_json
from ..results import result as form
from .figures import Results, paired, plus_minus, summary_of, time_ratio
from .settings import PRESETS, Published
from .store import Store

DENSE = "dense"
METRICS = {
    "psnr": ("PSNR, dB", 2),
    "ssim": ("SSIM", 4),
    "lpips": ("LPIPS", 4),
    "relative_l2": ("rel. L2 of latents", 4),
    "audio_relative_l2": ("rel. L2 of sound", 4),
}


def summarise(results: Results, default: str) -> list[dict[str, Any]]:
    """A row for each method and share: the largest share first, and in it the default policy.

    ``default_minus_this`` is the paired difference of PSNR over the clips that both have.
    """
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["method"], result["target"]), []).append(result)
    rows = []
    for (name, target), group in groups.items():
        row: dict[str, Any] = {
            "method": name,
            "target": target,
            "clips": len(group),
            "compute": sum(r["compute"] for r in group) / len(group),
            "seconds": sum(r["seconds"] for r in group) / len(group),
            "time": time_ratio(group)[0],
        }
        for metric in METRICS:
            values = [r["against"][DENSE][metric] for r in group if r["against"][DENSE].get(metric) is not None]
            if values:
                row[metric] = summary_of(values)
        equal = sum("psnr" in r["against"][DENSE] and r["against"][DENSE]["psnr"] is None for r in group)
        if equal:
            row["equal"] = equal
        if name not in (default, DENSE):
            differences = paired(groups.get((default, target), []), group, lambda r: r["against"][DENSE].get("psnr"))
            if differences:
                row["default_minus_this"] = summary_of(differences)
        rows.append(row)
    return sorted(rows, key=lambda row: (-row["target"], row["method"] != default, row["method"]))


def write(
    store: Store, clips: Collection[str], facts: Mapping[str, Any], default: str, preset: str | None
) -> list[Path]:
    """Write report.json, report.md, report.png and index.html into the folder.

    Args:
        store: results.
        clips: names of the prompts to report on.
        facts: ``command``, ``model``, ``request`` (with the model's defaults), ``prompts``, ``ranks``, ``scheduler``,
            ``versions`` and ``device``.
        default: the policy that others are compared with.
        preset: whose published figures stand beside.
    """
    chosen = [result for result in store.results.values() if result["clip"] in clips]
    results = sorted(chosen, key=lambda r: (r["clip"], -r["target"], r["method"]))
    rows = summarise(results, default)
    published = PRESETS[preset].published if preset is not None else ()
    content = {
        "schema": form.SCHEMA,
        "verb": "quality",
        "command": facts["command"],
        "environment": form.environment(facts["device"]),
        "settings": {name: facts[name] for name in ("model", "request", "scheduler", "ranks", "prompts")},
        "warmup_policy": "two dense runs of two steps",
        "seeds": [facts["request"]["seed"]],
        "interrupted": False,
        "notes": [],
        "facts": dict(facts),
        "rows": [{**each, **_shared(each)} for each in rows],
        "published": [row._asdict() for row in published],
        "results": results,
    }
    paths = [store.folder / "report.json", store.folder / "report.md", store.folder / "index.html"]
    write_json(paths[0], finite(content))
    picture = store.folder / "report.png"
    plotted = importlib.util.find_spec("matplotlib") is not None
    if plotted:
        plot(picture, rows, published)
        paths.append(picture)
    text = markdown(rows, facts, default, preset, picture.name if plotted else None)
    for path, written in ((paths[1], text), (paths[2], page(results, rows, facts, default))):
        with replacing(path) as torn:
            torn.write_text(written, encoding="utf-8")
    return paths


def _shared(found: Mapping[str, Any]) -> dict[str, Any]:
    """A row in the form of all results."""
    metrics = {name: found[name] for name in ("compute", "seconds", "time")}
    for name in METRICS:
        if name in found:
            mean, error = found[name]["mean"], found[name]["error"]
            metrics[name] = {"value": mean} | ({} if math.isnan(error) else {"low": mean - error, "high": mean + error})
    return form.row({"method": found["method"], "target": found["target"]}, metrics)


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON has no word for, as the error of a mean of one."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown(
    rows: Sequence[dict[str, Any]], facts: Mapping[str, Any], default: str, preset: str | None, picture: str | None
) -> str:
    """Render the report."""
    request = facts["request"]
    lines = [
        f"# Quality against time: {facts['model']}",
        "",
        f"{facts['prompts']} prompts, {request['width']}x{request['height']}, {request['num_frames']} frames, "
        f"{request['num_inference_steps']} steps of {facts['scheduler']}, guidance {request['guidance_scale']:g}, seed "
        f"{request['seed']}. {facts['device']}, {facts['ranks']} rank(s), "
        + ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
        + ".",
        "",
        "Made by:",
        "",
        f"    {facts['command']}",
        "",
        "Each video is compared with the dense one of the same prompt and seed, frame for frame in 8-bit RGB; the PSNR "
        "is of the error over all frames. Means over prompts ± standard error of the mean. *time* is the median over "
        "prompts of the denoising time over that of the dense video. Δ is the PSNR of "
        f"`{default}` minus the row's on the same prompts. The videos stand side by side in `index.html`.",
        "",
    ]
    lines += [f"![time against quality]({picture})", ""] if picture else []
    lines += _table(rows, default)
    if preset is not None:
        lines += ["", *_published(preset)]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[dict[str, Any]], default: str) -> list[str]:
    metrics = [metric for metric in METRICS if any(metric in row or _equal(row, metric) for row in rows)]
    head = [
        "method",
        "share",
        "prompts",
        "compute",
        "seconds",
        "time",
        "speed-up",
        *(METRICS[m][0] for m in metrics),
        "Δ PSNR",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        cells = [f"**{row['method']}**" if row["method"] == default else row["method"], f"{row['target']:g}"]
        cells += [f"{row['clips']}", f"{row['compute']:.3f}", f"{row['seconds']:.2f}", f"{row['time']:.2f}"]
        cells.append(f"{1 / row['time']:.2f}" if row["time"] > 0 else "–")
        cells += [plus_minus(row.get(m), digits=METRICS[m][1]) + _equal(row, m) for m in metrics]
        cells.append(plus_minus(row.get("default_minus_this"), sign=True))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _equal(row: Mapping[str, Any], metric: str) -> str:
    """How many videos have no PSNR, since they are equal to the dense ones."""
    return f" ({row['equal']} equal)" if metric == "psnr" and "equal" in row else ""


def _published(preset: str) -> list[str]:
    """The figures of papers, marked as theirs."""
    chosen = PRESETS[preset]
    lines = [
        f"## Published figures for {chosen.model}, not measured here",
        "",
        "As their authors or other papers print them, from their own prompts, machines and code; for the same method "
        "papers differ by up to 10 dB. Read them as the scale, not as results of this run.",
        "",
        "| method | speed-up | PSNR, dB | SSIM | LPIPS | printed in |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for row in chosen.published:
        ssim, lpips = ("–" if value is None else f"{value:.3f}" for value in (row.ssim, row.lpips))
        lines.append(f"| {row.method} | {row.speedup:.2f} | {row.psnr:.2f} | {ssim} | {lpips} | {row.source} |")
    return lines


def plot(path: Path, rows: Sequence[dict[str, Any]], published: Sequence[Published]) -> None:
    """Draw speed-up against PSNR."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(8, 5.5))
    for name in dict.fromkeys(row["method"] for row in rows):
        points = sorted((1 / r["time"], r["psnr"]["mean"], r["psnr"]["error"]) for r in rows if _drawn(r, name))
        if points:
            speeds, means, errors = zip(*points, strict=True)
            panel.errorbar(speeds, means, [0 if math.isnan(e) else e for e in errors], marker="o", label=name)
    for row in published:
        panel.plot(row.speedup, row.psnr, marker="x", color="grey", linestyle="none")
        panel.annotate(f"{row.method} ({row.source})", (row.speedup, row.psnr), fontsize=6, color="grey")
    panel.set_xlabel("speed-up of denoising over the dense run")
    panel.set_ylabel("PSNR against the dense video (dB)")
    panel.set_title("grey crosses: published, not measured here" if published else "")
    panel.grid(alpha=0.3)
    if panel.get_legend_handles_labels()[0]:
        panel.legend()
    figure.tight_layout()
    with replacing(path) as torn:
        figure.savefig(torn, dpi=110, format="png")
    plt.close(figure)


def _drawn(row: Mapping[str, Any], name: str) -> bool:
    return row["method"] == name and "psnr" in row and row["time"] > 0


_STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem; background: #fff; color: #111 }
h2 { font-size: 1rem; margin: 1.6rem 0 .4rem }
.row { display: flex; gap: .8rem; overflow-x: auto; padding-bottom: .5rem }
figure { margin: 0; flex: 0 0 auto; width: min(30vw, 26rem) }
video { width: 100%; image-rendering: pixelated; background: #000 }
figcaption { font-size: .85rem }
pre { white-space: pre-wrap; background: #f3f3f3; padding: .5rem }
"""
_SCRIPT = """
document.querySelectorAll('.row').forEach(row => {
  const videos = [...row.querySelectorAll('video')];
  row.previousElementSibling.querySelector('button').onclick = () =>
    videos.forEach(video => { video.currentTime = 0; video.play(); });
});
"""


def page(results: Results, rows: Sequence[dict[str, Any]], facts: Mapping[str, Any], default: str) -> str:
    """A page with each prompt's videos side by side, the dense one first; it needs no network."""
    clips: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        clips.setdefault(result["clip"], []).append(result)
    order = {(row["method"], row["target"]): number for number, row in enumerate(rows)}
    parts = []
    for name, group in clips.items():
        group = sorted(group, key=lambda r: (r["method"] != DENSE, order[r["method"], r["target"]]))
        figures = "".join(_figure(result) for result in group)
        title = f"{html.escape(name)}: {html.escape(group[0]['prompt'])}"
        parts.append(f'<h2>{title} <button type="button">play all</button></h2>\n<div class="row">{figures}</div>')
    title = html.escape(f"Quality against time: {facts['model']}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n"
        f"<p>Made by:</p><pre>{html.escape(facts['command'])}</pre>\n"
        f'<p>The figures are in <a href="report.md">report.md</a>; Δ there is against {html.escape(default)}.</p>\n'
        + "\n".join(parts)
        + f"\n<script>{_SCRIPT}</script></body></html>\n"
    )


def _figure(result: Mapping[str, Any]) -> str:
    against = result["against"][DENSE]
    caption = "dense" if result["method"] == DENSE else f"{result['method']} at {result['target']:g}"
    caption += f": {result['seconds']:.1f} s"
    if "psnr" in against:
        caption += ", equal to dense" if against["psnr"] is None else f", {against['psnr']:.1f} dB"
    if against.get("ssim") is not None:
        caption += f", SSIM {against['ssim']:.3f}"
    source = html.escape(result["video"])
    return (
        f'<figure><video src="{source}" controls loop muted playsinline preload="metadata"></video>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )
