"""Why a policy is as good as it is: velocity changes, stale velocity against stale K/V, and ablations.

`python benchmarks/diagnostics.py` writes reports/diagnostics-demo.json and .md.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import time
from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from harness import DEMO_MODEL, REPORTS, ROOT, Bench, Clip, References, clips, compare, environment, quiet
from oracles import OtherSelection, Recorder, Replay, fresh, with_frozen_kv, without_sync
from torch import Tensor

import heterostep as hs
from heterostep.benchmarks.quality.figures import mean_and_error
from heterostep.engine.models.base import Patch, patchify

FIELDS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "profile 0": {"profile": 0.0},
    "profile -0.5": {"profile": -0.5},
    "profile -1": {"profile": -1.0},
    "windows 1, 0": {"warmup": 1, "cooldown": 0},
    "windows 4, 1": {"warmup": 4, "cooldown": 1},
    "windows 2, 4": {"warmup": 2, "cooldown": 4},
    "forecast hold": {"forecast": "hold"},
    "forecast taylor": {"forecast": "taylor"},
    "forecast ab2": {"forecast": "ab2"},
    "no correction in hindsight": {"correct": False},
    "K/V forecast 0": {"kv_forecast": 0.0},
    "K/V forecast .5": {"kv_forecast": 0.5},
    "K/V forecast 1": {"kv_forecast": 1.0},
}
OTHERS = ("tokens at random", "tokens by age", "K/V of active tokens only", "K/V of the last full step")
ORACLES: dict[str, dict[str, Any]] = {
    # The velocity oracle moves by fresh velocities alone, the K/V oracle has no use for a K/V forecast.
    "same plan, both stale": {},
    "same plan, stale velocity only": {"kv_forecast": 0.0},
    "same plan, stale K/V only": {"forecast": "hold"},
}
MOVING = 20 / 255
"""A pixel moves where a channel differs by more than this from the frame before."""


def velocities(bench: Bench, clip: Clip, steps: int) -> tuple[Tensor, list[float], Tensor]:
    """Dense run: guided velocities [T, N, D] from the latents' differences, sigmas, final latents."""
    path: list[Tensor] = []

    def first(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not path:
            path.append(kwargs["hidden_states"].clone())

    handle = bench.pipe.transformer.register_forward_pre_hook(first, with_kwargs=True)
    try:
        bench.denoise(clip, steps, on_step=lambda _, latents: path.append(latents.clone()))
    finally:
        handle.remove()
    sigmas = [float(s) for s in bench.pipe.scheduler.sigmas]
    patch = Patch(*bench.pipe.transformer.config.patch_size)
    found = [patchify((path[i + 1] - path[i]) / (sigmas[i + 1] - sigmas[i]), patch)[0] for i in range(len(path) - 1)]
    return torch.stack(found), sigmas, path[-1]


def moving_tokens(frames: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """Tokens whose part of the decoded video changes: bool [N].

    Args:
        frames: uint8 [frames, height, width, 3].
        grid: tokens along (frames, rows, columns); the first latent frame stands for one frame of the video.
    """
    f, h, w = grid
    change = np.abs(np.diff(frames.astype(np.float32) / 255, axis=0)).max(-1) > MOVING
    # The first frame has none before it: it moves where the second one does.
    change = np.concatenate([change[:1], change])
    stride = (len(frames) - 1) // max(f - 1, 1)
    spans = [change[:1]] + [change[1 + i * stride : 1 + (i + 1) * stride] for i in range(f - 1)]
    cells = np.stack([span.any(0) for span in spans])
    return cells.reshape(f, h, cells.shape[1] // h, w, cells.shape[2] // w).any((2, 4)).reshape(-1)


def change_statistics(velocity: Tensor, sigmas: list[float], moving: np.ndarray) -> list[dict[str, float]]:
    """Per step: how much the velocity changes to the next one, and how that differs over tokens."""
    change = (velocity[1:] - velocity[:-1]).abs().mean(-1).numpy()
    rows = []
    for i, tokens in enumerate(change):
        low, high = np.percentile(tokens, (10, 90))
        ahead = change[i + 1 : i + 5].mean(0) if i + 1 < len(change) else None
        rows.append(
            {
                "sigma": sigmas[i],
                "rate": float(tokens.mean() / (sigmas[i] - sigmas[i + 1])),
                "over_tokens": float(high / max(low, 1e-12)),
                "moving_to_still": float(tokens[moving].mean() / max(tokens[~moving].mean(), 1e-12))
                if 0 < moving.sum() < len(moving)
                else math.nan,
                "predictability": math.nan if ahead is None else _rank_correlation(tokens, ahead),
            }
        )
    return rows


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's."""
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


class Ablations:
    """Runs variants of a policy on a clip and compares them to both references."""

    def __init__(self, bench: Bench, references: References, args: argparse.Namespace) -> None:
        self.bench, self.references, self.args = bench, references, args
        self.found: dict[tuple[str, float, str], list[dict[str, Any]]] = defaultdict(list)
        self.refused: dict[tuple[str, float, str], str] = {}
        self.plans: dict[tuple[str, float], str] = {}

    def run(self, clip: Clip) -> None:
        """All variants of all policies at all computes."""
        for policy in self.args.policies:
            for compute in self.args.computes:
                self._oracles(clip, policy, compute)
                for name, fields in FIELDS.items():
                    self._variant(clip, policy, compute, name, fields)
                for name in OTHERS:
                    self._variant(clip, policy, compute, name, {})

    def _variant(self, clip: Clip, policy: str, compute: float, name: str, fields: dict[str, Any]) -> None:
        """One configuration, with `OTHERS` by their names."""
        pipe = self.bench.pipe
        try:
            config = hs.HSAConfig(compute=compute, policy=policy, **fields)
            session = hs.apply(pipe, config)
            if name in OTHERS[:2]:
                # The session's own planner, which knows what was deduced, with another selection.
                how = "random" if name == OTHERS[0] else "age"
                session.planner.policy = OtherSelection(session.planner.policy, how, clip.seed)
            elif name == OTHERS[2]:
                without_sync(pipe)
            elif name == OTHERS[3]:
                with_frozen_kv(session)
            latents = self.bench.denoise(clip, self.args.steps).latents
            self._note(clip, (policy, compute, name), latents, session.report.compute)
        except hs.ConfigError as error:
            self.refused[policy, compute, name] = str(error)
        finally:
            hs.remove(pipe)

    def _oracles(self, clip: Clip, policy: str, compute: float) -> None:
        """The policy's own active sets again, as they are and with one source of error kept away."""
        pipe = self.bench.pipe
        session = hs.apply(pipe, hs.HSAConfig(compute=compute, policy=policy))
        recorder = session._run.planner = Recorder(session.planner)
        try:
            self.bench.denoise(clip, self.args.steps)
            plans, achieved = recorder.plans, session.report.compute
            num_tokens = session.report.steps[0].total
            active = [record.active for record in session.report.steps]
        finally:
            hs.remove(pipe)
        full, none = active.count(num_tokens), active.count(0)
        self.plans[policy, compute] = f"{full} full, {len(active) - full - none} partial, {none} skipped steps"
        for (name, fields), what in zip(ORACLES.items(), (None, "kv", "velocity"), strict=True):
            config = hs.HSAConfig(compute=compute, policy=policy, **fields)
            hs.apply(pipe, config, planner=Replay(plans, num_tokens))
            try:
                with fresh(pipe, plans, what) if what else nullcontext():
                    latents = self.bench.denoise(clip, self.args.steps).latents
            finally:
                hs.remove(pipe)
            self._note(clip, (policy, compute, name), latents, achieved)

    def _note(self, clip: Clip, key: tuple[str, float, str], latents: Tensor, compute: float) -> None:
        frames = None if self.args.latent_only else self.bench.decode(latents)
        entry: dict[str, Any] = {"clip": clip.name, "compute": compute}
        for which in ("dense", "ode"):
            reference = self.references.dense(clip) if which == "dense" else self.references.ode(clip)
            other = None if frames is None else self.references.frames(clip, which)
            entry[which] = compare(latents, reference, frames, other)
        self.found[key].append(entry)

    def rows(self) -> list[dict[str, Any]]:
        """Means and standard errors, also of the difference to the policy as it is."""
        metric = "latent_psnr" if self.args.latent_only else "psnr"
        out = []
        for (policy, compute, name), entries in self.found.items():
            base = {e["clip"]: e for e in self.found.get((policy, compute, "as it is"), [])}
            row: dict[str, Any] = {
                "policy": policy,
                "target": compute,
                "variant": name,
                "clips": len(entries),
            }
            row["compute"] = float(np.mean([e["compute"] for e in entries]))
            for which in ("dense", "ode"):
                values = {e["clip"]: e[which][metric] for e in entries if e[which][metric] is not None}
                pairs = [v - base[c][which][metric] for c, v in values.items() if c in base]
                row[which] = {
                    metric: mean_and_error(list(values.values())),
                    "relative_l2": mean_and_error([e[which]["relative_l2"] for e in entries]),
                    "to_default": mean_and_error(pairs),
                }
            out.append(row)
        return out


def markdown(report: dict[str, Any]) -> str:
    """Render the report."""
    facts, env, changes = report["facts"], report["facts"]["environment"], report["change"]
    lines = [
        "# Diagnostics on the demo model",
        "",
        f"{facts['clips']} clips of the split `{facts['split']}`, {facts['steps']} Euler steps, guidance "
        f"{facts['guidance']:g}, model {facts['model']}. {env['date']}, {env['device']}, git {env['git']}. "
        f"Made by `{env['command']}`.",
        "",
        "## Where and when velocity changes",
        "",
        "Dense runs; means over clips. Over *time*, p90/p10 of the tokens' mean rate |dv|/dsigma is "
        f"**{changes['over_time']:.1f}** (largest over smallest {changes['over_time_range']:.1f}); over "
        f"*tokens*, p90/p10 of |dv| is **{changes['over_tokens']:.1f}** in the mean over steps. "
        f"{100 * changes['moving']:.0f} % of the tokens move (their part of the decoded dense video "
        "changes). *Predictability* is the rank correlation over tokens of |dv| with its mean over the "
        "next four steps.",
        "",
        "| sigma | rate | p90/p10 over tokens | moving / still | predictability |",
        "|---:|---:|---:|---:|---:|",
    ]
    shown = changes["steps"][:: max(len(changes["steps"]) // 13, 1)]
    for row in shown:
        lines.append(
            f"| {row['sigma']:.3f} | {row['rate']:.3f} | {row['over_tokens']:.2f} | "
            f"{row['moving_to_still']:.2f} | {row['predictability']:.2f} |"
        )
    lines += ["", "## Stale velocity, stale K/V, and ablations", ""]
    lines.append(
        f"{report['metric']} in dB, mean ± standard error; Δ is the variant minus the policy as it is, "
        "paired. Rows *same plan* repeat the policy's own active sets: as they are; with the keys and "
        "values of all tokens computed anew at every evaluated step, so that only velocities are stale; "
        "with the velocities of all tokens computed anew at every evaluated step from the keys and values as they "
        "are, so that only those are stale, and held where nothing is evaluated."
    )
    for policy, compute in dict.fromkeys((r["policy"], r["target"]) for r in report["rows"]):
        lines += ["", f"### `{policy}` at compute {compute:g}", ""]
        lines += [f"{report['plans'][f'{policy} {compute:g}']}.", ""]
        lines += [
            "| variant | compute | against dense | Δ | against ODE | Δ |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for row in report["rows"]:
            if (row["policy"], row["target"]) == (policy, compute):
                lines.append(_line(row, report["metric"]))
    for refusal in report["refused"]:
        lines += ["", f"Not run: {refusal}"]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any], metric: str) -> str:
    def show(pair: tuple[float, float], sign: str = "") -> str:
        if math.isnan(pair[0]):
            return "–"
        return f"{pair[0]:{sign}.2f}" + ("" if math.isnan(pair[1]) else f" ± {pair[1]:.2f}")

    cells = [row["variant"], f"{row['compute']:.3f}"]
    for which in ("dense", "ode"):
        cells += [show(row[which][metric]), show(row[which]["to_default"], "+")]
    return "| " + " | ".join(cells) + " |"


def summarise_changes(per_clip: list[list[dict[str, float]]], moving: list[float]) -> dict[str, Any]:
    """Means over clips of `change_statistics`."""
    steps = []
    for i in range(len(per_clip[0]) - 1):
        known = {key: [c[i][key] for c in per_clip if not math.isnan(c[i][key])] for key in per_clip[0][i]}
        steps.append({key: float(np.mean(v)) if v else math.nan for key, v in known.items()})
    rates = np.array([row["rate"] for row in steps])
    low, high = np.percentile(rates, (10, 90))
    return {
        "over_time": float(high / low),
        "over_time_range": float(rates.max() / rates.min()),
        "over_tokens": float(np.mean([row["over_tokens"] for row in steps])),
        "moving": float(np.mean(moving)),
        "steps": steps,
    }


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, default=DEMO_MODEL, help="pipeline folder (the demo model)")
    parser.add_argument("--split", choices=("tune", "held-out"), default="tune", help="disjoint captions and seeds")
    parser.add_argument("--count", type=int, default=8, help="clips (8)")
    parser.add_argument("--policies", nargs="+", default=["joint", "tokens"], help="default: joint tokens")
    parser.add_argument("--computes", nargs="+", type=float, default=[0.5, 0.33], help="default: .5 .33")
    parser.add_argument("--steps", type=int, default=40, help="dense steps (40)")
    parser.add_argument("--guidance", type=float, default=1.5, help="guidance scale (1.5)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no further clip after so long")
    parser.add_argument("--latent-only", action="store_true", help="compare latents only (the moving mask is decoded)")
    parser.add_argument("--output", type=pathlib.Path, default=REPORTS / "diagnostics-demo", help="without suffix")
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "out" / "pareto", help="references, as pareto.py's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    return parser.parse_args()


def main() -> None:
    """Run clip by clip; the report is written after each."""
    args = parse_arguments()
    quiet()
    torch.set_num_threads(args.threads)
    bench = Bench(args.model, args.guidance, args.device)
    folder = args.work / f"{bench.fingerprint}-g{args.guidance:g}"
    references = References(bench, args.steps, folder / "references")
    ablations, per_clip, moving = Ablations(bench, references, args), [], []
    chosen, began = clips(args.split, args.count), time.monotonic()
    patch = Patch(*bench.pipe.transformer.config.patch_size)
    for number, clip in enumerate(chosen):
        if time.monotonic() - began > 60 * args.minutes:
            break
        references.ode(clip, chosen[number:])
        velocity, sigmas, latents = velocities(bench, clip, args.steps)
        mask = moving_tokens(references.frames(clip, "dense"), tuple(patch.grid_of(latents)))
        per_clip.append(change_statistics(velocity.cpu(), sigmas, mask))
        moving.append(float(mask.mean()))
        ablations.run(clip)
        rows = ablations.rows()
        report = {
            "facts": {
                "clips": len(per_clip),
                "split": args.split,
                "steps": args.steps,
                "guidance": args.guidance,
                "model": bench.fingerprint,
                "environment": environment(args.device),
            },
            "metric": "latent_psnr" if args.latent_only else "psnr",
            "change": summarise_changes(per_clip, moving),
            "rows": rows,
            "plans": {f"{p} {c:g}": words for (p, c), words in ablations.plans.items()},
            "refused": [f"{p} at {c:g}, {n}: {why}" for (p, c, n), why in ablations.refused.items()],
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        args.output.with_suffix(".md").write_text(markdown(report))
        print(f"{clip.name}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
