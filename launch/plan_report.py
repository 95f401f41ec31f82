"""A plan as a table for people, as JSON, and as a picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..engine.devices import GIB
from ..engine.estimate import Case
from .layouts import Layout, by_ranks, most, soonest

Swept = Sequence[tuple[int, Layout | None, Layout | None]]
SCHEMA = 1
"""Version of the JSON file."""


def text(case: Case, found: list[Layout], swept: Swept, notes: Sequence[str]) -> str:
    """The whole plan."""
    parts = [_head(case, found), *([*notes] if notes else []), "", *_table(case, found), "", *_best(found)]
    if swept:
        parts += ["", *_sweep(swept)]
    parts += [
        "",
        f"Estimates, not measured: {', '.join(case.device.estimates)}, and the memory of decoding.",
    ]
    return "\n".join(parts)


def _head(case: Case, found: list[Layout]) -> str:
    video, allotted, facts = case.video, case.allotment, case.sizes.facts
    hsa = case.hsa
    weights = case.sizes.parameters * facts.experts / 1e9
    inside, outside = case.links.inside / 1e9, case.links.outside / 1e9
    return "\n".join(
        [
            f"{facts.name} ({facts.family}): {weights:.3g} billion weights, {facts.num_layers} layers, "
            f"{facts.num_heads} heads of {facts.head_dim}",
            f"{video.width}x{video.height}, {video.num_frames} frames: {video.tokens:,} tokens; {video.steps} steps, "
            f"{video.branches} guidance branch(es)",
            f"compute {hsa.compute:g} by {hsa.policy}: {allotted.full} full, {allotted.partial} partial and "
            f"{allotted.skipped} skipped steps, {allotted.compute:.3f} of the dense work",
            f"{found[0].gpus} x {case.device.name}, {case.links.machine} in a machine; a GPU sends {inside:.3g} GB/s "
            f"inside, {outside:.3g} GB/s between machines",
        ]
    )


_HEADS = (
    "replicas", "cfg x ring x ulysses", "tokens", "weights", "K/V", "activations", "decode", "GiB at most", "fits",
    "step s", "sending", "video s", "videos/h", "videos/GPU-h",
)  # fmt: skip


def _table(case: Case, found: list[Layout]) -> list[str]:
    rows = [list(_HEADS)]
    for layout in by_ranks(found):
        one = layout.estimate
        sizes = [f"{one.memory[part] / GIB:.1f}" for part in ("weights", "kv", "activations", "decode")]
        rows.append(
            [
                str(layout.replicas), layout.degrees, f"{one.rows:,}", *sizes, f"{one.peak / GIB:.1f}",
                "yes" if one.fits else "no", f"{one.full_step:.3g}", f"{one.communication:.0%}", f"{one.video:.1f}",
                f"{layout.per_hour:.1f}", f"{layout.per_gpu_hour:.2f}",
            ]
        )  # fmt: skip
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _best(found: list[Layout]) -> list[str]:
    fastest, largest = soonest(found), most(found)
    lines = []
    if largest is not None:
        lines.append(
            f"Most videos: {largest.replicas} replica(s) of {largest.degrees}, {largest.per_hour:.1f} per hour, "
            f"{largest.per_gpu_hour:.2f} per GPU-hour"
        )
    if fastest is not None:
        one = fastest.estimate
        lines.append(
            f"Soonest: {fastest.replicas} replica(s) of {fastest.degrees}, a video in {one.video:.1f} s "
            f"(text {one.text:.1f}, denoising {one.denoise:.1f}, decoding {one.decode:.1f})"
        )
    ranks = max(layout.ranks for layout in found)
    whole = [layout for layout in found if layout.ranks == ranks]
    lines.append(f"Valid degrees of {ranks} rank(s), the fastest first: {', '.join(each.degrees for each in whole)}")
    sent = ", ".join(f"{name} {count / 1e6:,.1f} MB" for name, count in whole[0].estimate.sent.items() if count)
    if sent:
        lines.append(f"Each rank of {whole[0].degrees} sends at a full step: {sent}")
    return lines


def _sweep(swept: Swept) -> list[str]:
    rows = [["GPUs", "most videos", "video s", "videos/h", "videos/GPU-h", "soonest", "video s", "videos/GPU-h"]]
    for gpus, largest, fastest in swept:
        if largest is None or fastest is None:
            rows.append([str(gpus), "does not fit", *[""] * 6])
            continue
        rows.append(
            [
                str(gpus), f"{largest.replicas} of {largest.degrees}", f"{largest.estimate.video:.1f}",
                f"{largest.per_hour:.1f}", f"{largest.per_gpu_hour:.2f}", f"{fastest.replicas} of {fastest.degrees}",
                f"{fastest.estimate.video:.1f}", f"{fastest.per_gpu_hour:.2f}",
            ]
        )  # fmt: skip
    return _aligned(rows)


def as_json(case: Case, found: list[Layout], swept: Swept, notes: Sequence[str]) -> dict[str, Any]:
    """The plan as plain data; docs/planning.md names the fields."""
    facts = case.sizes.facts
    return {
        "schema": SCHEMA,
        "model": {"name": facts.name, "family": facts.family, "parameters": case.sizes.parameters * facts.experts},
        "video": dataclasses.asdict(case.video),
        "hsa": dataclasses.asdict(case.hsa),
        "steps": dataclasses.asdict(case.allotment),
        "device": dataclasses.asdict(case.device),
        "links": dataclasses.asdict(case.links),
        "notes": list(notes),
        "layouts": [_plain(layout) for layout in found],
        "most_videos": _plain(most(found)),
        "soonest": _plain(soonest(found)),
        "sweep": [
            {"gpus": gpus, "most_videos": _plain(largest), "soonest": _plain(fastest)}
            for gpus, largest, fastest in swept
        ],
    }


def _plain(layout: Layout | None) -> dict[str, Any] | None:
    if layout is None:
        return None
    one, config = layout.estimate, layout.estimate.config
    return {
        "replicas": layout.replicas,
        "cfg": config.cfg,
        "ring": config.ring,
        "ulysses": config.ulysses,
        "ring_cache": config.ring_cache,
        "tokens_per_rank": one.rows,
        "sent_bytes_per_full_step": dict(one.sent),
        "memory_bytes": dict(one.memory),
        "peak_bytes": one.peak,
        "fits": one.fits,
        "seconds": {
            "full_step": one.full_step,
            "partial_step": one.partial_step,
            "text": one.text,
            "denoise": one.denoise,
            "decode": one.decode,
            "video": one.video,
        },
        "sending_share": one.communication,
        "videos_per_hour": layout.per_hour,
        "videos_per_gpu_hour": layout.per_gpu_hour,
    }


def write_json(path: str, case: Case, found: list[Layout], swept: Swept, notes: Sequence[str]) -> None:
    """Write the plan as JSON."""
    Path(path).write_text(json.dumps(as_json(case, found, swept, notes), indent=1) + "\n", encoding="utf-8")


def plot(path: str, case: Case, swept: Swept) -> None:
    """Draw videos per hour and seconds of a video over the number of GPUs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    fitting = [(gpus, largest, fastest) for gpus, largest, fastest in swept if largest and fastest]
    gpus = [row[0] for row in fitting]
    for axis, pick, what in (
        (left, lambda layout: layout.per_hour, "videos per hour"),
        (right, lambda layout: layout.estimate.video, "seconds of a video"),
    ):
        axis.plot(gpus, [pick(row[1]) for row in fitting], marker="o", label="most videos")
        axis.plot(gpus, [pick(row[2]) for row in fitting], marker="s", label="soonest")
        axis.set(xscale="log", yscale="log", xlabel="GPUs", ylabel=what)
        axis.set_xticks(gpus, [str(number) for number in gpus])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    video = case.video
    figure.suptitle(
        f"{case.sizes.facts.name}, {video.width}x{video.height}, {video.num_frames} frames, {video.steps} steps, "
        f"compute {case.hsa.compute:g}, {case.device.name}: estimated"
    )
    figure.savefig(path, dpi=120)
