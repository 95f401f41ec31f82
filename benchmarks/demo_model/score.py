"""Score generated clips by what they show: `python benchmarks/demo_model/score.py --model DIR`.

It needs scipy: `pip install -e .[training]`.

Every pixel is given to the nearest of the four object colours or to the background; the subject's pixels are then
tracked through the clip. The thresholds hold for drawn clips (`--real` scores those, a check of the scorer itself).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import random
import time

import numpy as np
import scenes
import torch

AREA = math.pi * (sum(r * r for r in scenes.RADIUS) / 2)
NAMES = ("colour", "size", "direction", "single")


@dataclasses.dataclass(frozen=True)
class Score:
    """Whether a clip shows the right colour, size, direction, and one object that neither doubles nor jumps."""

    colour: bool
    size: bool
    direction: bool
    single: bool


def colour_masks(frames: np.ndarray) -> dict[str, np.ndarray]:
    """Frames uint8 [F, H, W, 3] -> for each colour bool [F, H, W]: pixels nearer to it than to grey."""
    pixels = frames.astype(np.float32) / 255
    grey = pixels.mean(-1, keepdims=True)
    names = list(scenes.COLOURS)
    distances = np.stack([np.linalg.norm(pixels - np.array(scenes.COLOURS[name]), axis=-1) for name in names])
    background = np.linalg.norm(pixels - grey, axis=-1)
    nearest = distances.argmin(0)
    coloured = distances.min(0) < background
    return {name: coloured & (nearest == i) for i, name in enumerate(names)}


def score(frames: np.ndarray, scene: scenes.Scene) -> Score:
    """Judge a clip [F, H, W, 3] uint8 against the scene that its caption was made from."""
    masks = colour_masks(frames)
    subject = scene.objects[0]
    mine = masks[subject.colour]
    allowed = {thing.colour for thing in scene.objects}
    areas = mine.sum((1, 2))
    strangers = sum(masks[name].sum((1, 2)) for name in masks if name not in allowed)
    colour = bool(np.median(areas) > 0.4 * AREA and np.median(strangers) < 0.3 * AREA)
    size = bool(abs(np.median(areas) / AREA - 1) <= 0.3)
    pieces = [_pieces(frame) for frame in mine]
    if not all(pieces):
        return Score(colour, size, False, False)
    centres = np.array([found[0][1:] for found in pieces])
    doubled = np.mean([len(found) > 1 and found[1][0] > 0.25 * found[0][0] for found in pieces])
    jumps = np.linalg.norm(np.diff(centres, axis=0), axis=1)
    single = bool(doubled <= 0.1 and jumps.max() < 5.0)
    return Score(colour, size, _goes(centres[-1] - centres[0], scene.direction), single)


def _pieces(mask: np.ndarray) -> list[tuple[float, float, float]]:
    """Connected pieces of a mask, largest first: area, x, y; specks of under 4 pixels are dropped."""
    from scipy import ndimage

    labels, count = ndimage.label(mask)
    index = range(1, count + 1)
    areas = ndimage.sum_labels(mask, labels, index)
    centres = ndimage.center_of_mass(mask, labels, index)
    found = [(float(a), float(x), float(y)) for a, (y, x) in zip(areas, centres, strict=True) if a >= 4]
    return sorted(found, reverse=True)


def _goes(moved: np.ndarray, direction: str) -> bool:
    """Whether a displacement (x, y) in pixels is what the word says: half the least travel, and mostly along it."""
    unit = np.array(scenes.DIRECTIONS[direction])
    if direction == "still":
        return bool(np.linalg.norm(moved) < 4.0)
    along = float(moved @ unit)
    return along > 0.5 * scenes.TRAVEL[0] and float(np.linalg.norm(moved - along * unit)) < 0.5 * along


def held_out(count: int) -> list[scenes.Scene]:
    """Scenes for scoring, from seeds that training does not use, in canonical words."""
    return [scenes.random_scene(random.Random(f"held-out {i}"), varied=False) for i in range(count)]


def summary(scores: list[Score]) -> dict[str, float]:
    """Share of clips that pass, by name."""
    return {name: sum(getattr(s, name) for s in scores) / len(scores) for name in NAMES}


def main() -> None:
    """Parse the command line, generate, and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, help="pipeline folder; default: the one in the package")
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--linear", action="store_true", help="decode with the linear transform instead of the VAE")
    parser.add_argument("--real", action="store_true", help="score drawn clips instead: the scorer's own check")
    parser.add_argument("--output", type=pathlib.Path, help="write the figures here as JSON")
    parser.add_argument("--sheet", type=pathlib.Path, help="write a contact sheet of five frames a clip here (PNG)")
    args = parser.parse_args()
    chosen, clips, began = held_out(args.count), [], time.monotonic()
    if args.real:
        clips = [to_uint8(scenes.render([scene]))[0] for scene in chosen]
    else:
        generate = generator(args.model, args.linear, args.steps, args.guidance, args.device)
        clips = [generate(scene.caption, seed) for seed, scene in enumerate(chosen)]
    scores = [score(clip, scene) for clip, scene in zip(clips, chosen, strict=True)]
    for scene, found in zip(chosen, scores, strict=True):
        failed = [name for name in NAMES if not getattr(found, name)]
        print(f"{scene.caption:60s}", "ok" if not failed else "fails " + ", ".join(failed))
    result = {"count": args.count, "steps": args.steps, "guidance": args.guidance, "scores": summary(scores)}
    print(json.dumps(result), f"{time.monotonic() - began:.0f} s")
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    if args.sheet:
        write_sheet(args.sheet, clips)


def generator(model: pathlib.Path | None, linear: bool, steps: int, guidance: float, device: str):
    """Return a function (caption, seed) -> uint8 frames that runs the stock pipeline."""
    from diffusers import WanPipeline
    from latents import PatchPCA

    default = pathlib.Path(__file__).parents[2] / "engine" / "demo_model"
    pipe = WanPipeline.from_pretrained(model or default).to(device)
    pipe.set_progress_bar_config(disable=True)
    codec = PatchPCA.shipped() if linear else None

    def generate(caption: str, seed: int) -> np.ndarray:
        out = pipe(
            prompt=caption, negative_prompt="", height=scenes.SIZE, width=scenes.SIZE, num_frames=scenes.FRAMES,
            num_inference_steps=steps, guidance_scale=guidance, generator=torch.Generator().manual_seed(seed),
            output_type="latent" if codec else "pt",
        ).frames  # fmt: skip
        if codec:
            return to_uint8(codec.decode(out.cpu()))[0]
        return (out[0].permute(0, 2, 3, 1) * 255).round().clamp(0, 255).byte().cpu().numpy()

    return generate


def to_uint8(video: torch.Tensor) -> np.ndarray:
    """Video [B, 3, F, H, W] in [-1, 1] -> uint8 [B, F, H, W, 3]."""
    return ((video + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 4, 1).numpy()


def write_sheet(path: pathlib.Path, clips: list[np.ndarray], columns: int = 3) -> None:
    """Draw five frames of each clip in a row, three clips a line, twice enlarged."""
    from PIL import Image

    strips = [np.concatenate(list(clip[[0, 4, 8, 12, 16]]), axis=1) for clip in clips]
    strips = [np.pad(s, ((0, 4), (0, 8), (0, 0)), constant_values=255) for s in strips]
    strips += [np.full_like(strips[0], 255)] * (-len(strips) % columns)
    rows = [np.concatenate(strips[i : i + columns], axis=1) for i in range(0, len(strips), columns)]
    image = Image.fromarray(np.concatenate(rows))
    image.resize((image.width * 3 // 2, image.height * 3 // 2), Image.Resampling.BILINEAR).save(path)


if __name__ == "__main__":
    main()
