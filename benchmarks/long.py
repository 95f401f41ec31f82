"""Videos of 1, 2, 4 and 8 times the model's length, in windows: `python benchmarks/long.py`.

For each: how much neighbouring frames differ at seams and elsewhere, how far the mean colour drifts, time and memory.
With `--ranks`, one rank and two that share the windows take turns at a video of four windows.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
from harness import REPORTS, ROOT, environment
from PIL import Image

import heterostep as hs
from heterostep.engine.denoise.long_video import windows_for

PROMPT = "a blue square stays still"
LENGTHS = (1, 2, 4, 8)
VARIANTS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "shared noise": ((1, 2, 4, 8), {}),
    "independent noise": ((2, 4, 8), {"shared_noise": False}),
    "rolled": ((4,), {"roll_windows": True}),
    "tokens": ((4,), {"policy": "tokens"}),
}
"""What is made, at which lengths."""


def one(settings: dict[str, Any], frames_file: str) -> dict[str, Any]:
    """Make one video in this process; its seams, drift, time and memory."""
    hsa = hs.HSAConfig(compute=0.5, policy=settings.pop("policy", "joint"))
    engine = hs.Engine(hs.EngineConfig(model="demo", device="cpu", hsa=hsa))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    video = engine.generate(hs.GenerateRequest(prompt=PROMPT, **settings), progress=False)
    np.save(frames_file, video.frames)
    assert video.report.evaluations is not None
    np.save(frames_file + ".map", video.report.evaluations.numpy())
    pixels = video.frames.astype(np.float32) / 255
    change = np.abs(np.diff(pixels, axis=0)).mean((1, 2, 3))
    windows = windows_for(engine.facts, video.request)
    starts = [] if windows is None else [window.start for window in windows.of(video.latents.shape[2])[1:]]
    # The changes into and out of a window's first latent frame, which is two frames of the video.
    seams = sorted({i for start in starts for i in range(2 * start - 2, 2 * start + 1)})
    colours = pixels.mean((1, 2))
    return {
        "frames": len(pixels),
        "windows": len(starts) + 1,
        "seam": float(change[seams].max()) if seams else None,
        "elsewhere": float(np.delete(change, seams).max()),
        "drift": float(np.abs(colours[-1] - colours[0]).max()),
        "farthest": float(np.abs(colours - colours[0]).max()),
        "compute": video.report.compute,
        "denoise_seconds": video.seconds["denoise"],
        "decode_seconds": video.seconds["decode"],
        "more_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }


def denoising(nproc: int, folder: pathlib.Path, frames: int, steps: int) -> float:
    """Seconds that ranks with one thread each take to denoise a video."""
    flags = ["--prompt", PROMPT, "--frames", str(frames), "--steps", str(steps), "--compute", "1", "--guidance", "1"]
    flags += ["--output", str(folder / "v.mp4"), "--report", str(folder / "r.json"), "--overwrite", "--quiet"]
    flags += ["--nproc", str(nproc), "--windows", str(nproc)] if nproc > 1 else []
    command = [sys.executable, "-m", "heterostep", "generate", *flags]
    subprocess.run(command, check=True, env=_environment())
    seconds: float = json.loads((folder / "r.json").read_text())["seconds"]["denoise"]
    return seconds


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def main() -> None:
    """Parse the command line, run, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--ranks", type=int, default=0, help="rounds of one rank and two in turn")
    parser.add_argument("--output", type=pathlib.Path, default=REPORTS / "long", help="without suffix")
    parser.add_argument("--one", nargs=2, metavar=("SETTINGS", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(one(json.loads(args.one[0]), args.one[1])))
        return
    saved = args.output.with_suffix(".json")
    report = json.loads(saved.read_text()) if saved.exists() else {"videos": {}, "ranks": {}}
    report |= {"environment": environment("cpu"), "steps": args.steps}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        for length in args.lengths:
            for name, (lengths, changes) in VARIANTS.items():
                key = f"{length} x, {name}"
                if key in report["videos"] or length not in lengths:
                    continue
                settings = {"num_frames": 16 * length + 1, "num_inference_steps": args.steps, **changes}
                file = folder / f"{length}-{name.replace(' ', '-')}.npy"
                command = [sys.executable, __file__, "--one", json.dumps(settings), str(file)]
                ran = subprocess.run(command, check=True, capture_output=True, text=True, env=_environment())
                report["videos"][key] = json.loads(ran.stdout.splitlines()[-1])
                print(key, report["videos"][key], flush=True)
                saved.write_text(json.dumps(report, indent=1) + "\n")
                if name == "tokens":
                    picture(np.load(file), np.load(f"{file}.map.npy")).save(ROOT / "docs" / "long.png")
        for _ in range(args.ranks):
            for nproc in (1, 2):
                report["ranks"].setdefault(str(nproc), []).append(denoising(nproc, folder, 53, 10))
            print(report["ranks"], flush=True)
            saved.write_text(json.dumps(report, indent=1) + "\n")
    write(args.output.with_suffix(".md"), report)


def picture(frames: np.ndarray, evaluations: np.ndarray, scale: int = 2) -> Image.Image:
    """Every sixth frame, above how often the tokens at its time were evaluated: black seldom, white often."""
    chosen = list(range(0, len(frames), 6))
    tokens = evaluations[[min((i + 1) // 2, len(evaluations) - 1) for i in chosen]].astype(float)
    shades = (255 * (tokens - tokens.min()) / max(np.ptp(tokens), 1)).astype(np.uint8)
    shades = np.repeat(shades.repeat(frames.shape[1] // shades.shape[1], 1), frames.shape[2] // shades.shape[2], 2)
    rows = [np.concatenate(list(frames[chosen]), 1), np.concatenate(list(np.stack([shades] * 3, -1)), 1)]
    image = Image.fromarray(np.concatenate(rows))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def write(path: pathlib.Path, report: dict[str, Any]) -> None:
    """The report as Markdown."""
    where = report["environment"]
    columns = ["video", "frames", "windows", "change at seams", "elsewhere", "drift", "farthest", "denoising, s"]
    columns += ["decoding, s", "more memory, MiB"]
    lines = [
        "# Long videos in windows",
        "",
        f'Demo model, "{PROMPT}", compute 0.5, {report["steps"]} steps, windows of 17 frames that overlap by 6. Made',
        f"by `python benchmarks/long.py` on {where['device']}, one thread, load average {where['load_average']}: where",
        "that is above 1, times are those of a machine with other work.",
        "",
        f"| {' | '.join(columns)} |",
        f"|---|{'---:|' * (len(columns) - 1)}",
    ]
    for name, row in report["videos"].items():
        cells = [name, str(row["frames"]), str(row["windows"]), "" if row["seam"] is None else f"{row['seam']:.4f}"]
        cells += [f"{row['elsewhere']:.4f}", f"{row['drift']:.3f}", f"{row['farthest']:.3f}"]
        cells += [f"{row[key]:.0f}" for key in ("denoise_seconds", "decode_seconds", "more_mib")]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "*Change*: mean absolute difference of neighbouring frames, of 1: the largest at the first latent frame of any",
        "window, and the largest elsewhere. *Drift*: mean colour of the last frame against the first, the channel that",
        "differs most; *farthest*: the same, of all frames. *More memory*: peak of the process over the loaded model.",
        "",
    ]
    if report["ranks"]:
        alone, shared = (statistics.median(report["ranks"][name]) for name in ("1", "2"))
        lines += [
            f"Four windows, dense and without guidance: one rank takes {alone:.1f} s, two with `--windows 2` take",
            f"{shared:.1f} s, {shared / alone:.2f} of it (medians of {len(report['ranks']['1'])} rounds; one thread",
            "for each rank).",
            "",
        ]
    path.write_text("\n".join(lines + _kills(report.get("kills"))))
    print(f"wrote {path}")


def _kills(found: dict[str, Any] | None) -> list[str]:
    """What `long_kills.py` found."""
    if found is None:
        return []
    tries = found["tries"]
    lines = [
        "## Killed and resumed",
        "",
        f"{len(tries)} jobs of 65 frames, {found['steps']} steps, checkpoints every {found['every']}; one rank of each",
        "got SIGKILL, after a random step or while it was decoded. One rank: the same command was given again. Two",
        "ranks (`--windows 2`): torchrun started both again. Made by `python benchmarks/long_kills.py`.",
        "",
        "| ranks | killed | jobs | latents and file of an unbroken job, bit for bit | steps repeated, most |",
        "|---:|---|---:|---:|---:|",
    ]
    for ranks in sorted({row["ranks"] for row in tries}):
        for decoding in (False, True):
            rows = [row for row in tries if (row["ranks"], row["decoding"]) == (ranks, decoding)]
            good = sum(row["same_bits"] and row["whole"] and row["in_time"] and not row["exit_code"] for row in rows)
            when = (
                "while decoding"
                if decoding
                else "after steps " + ", ".join(str(step) for step in sorted(row["killed_after_step"] for row in rows))
            )
            most = max((row["steps_repeated"] for row in rows), default=0)
            lines.append(f"| {ranks} | {when} | {len(rows)} | {good} | {most} |")
    return [*lines, ""]


if __name__ == "__main__":
    main()
