"""Make the README's picture: one moment of a generated video beside the map of evaluations per token.

`python benchmarks/readme_picture.py` writes docs/demo.png.
"""

from __future__ import annotations

import argparse
import pathlib

from PIL import Image

import heterostep as hs
from heterostep.engine.media.video import heatmap_frames

ROOT = pathlib.Path(__file__).resolve().parents[1]


def main() -> None:
    """Parse the command line, generate, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompt", default="a red disc moves right")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--compute", type=float, default=0.5)
    parser.add_argument("--policy", default="tokens", help="the one whose map shows most")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "docs" / "demo.png")
    args = parser.parse_args()
    config = hs.EngineConfig(model=args.model, hsa=hs.HSAConfig(compute=args.compute, policy=args.policy))
    video = hs.Engine(config).generate(hs.GenerateRequest(prompt=args.prompt, seed=args.seed))
    shares = [step.active / step.total for step in video.report.steps]
    pages = list(heatmap_frames(video.frames, video.report.evaluations.numpy(), shares))
    # Three moments one below the other would be tall: the middle of the clip is enough.
    args.output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pages[len(pages) // 2]).save(args.output, optimize=True)


if __name__ == "__main__":
    main()
