"""Put a trained transformer and VAE together as a stock pipeline folder.

`python benchmarks/demo_model/assemble.py --transformer RUN --vae RUN --out engine/demo_model`
"""

from __future__ import annotations

import argparse
import json
import pathlib

import text
import torch
from architecture import build_transformer
from batches import SHIFT
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from latents import PatchPCA
from safetensors.torch import load_file
from train_vae import build_vae


def latest(run: pathlib.Path) -> pathlib.Path:
    """The folder of a run's last saved state."""
    return run / json.loads((run / "progress.json").read_text())["folder"]


def main() -> None:
    """Parse the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transformer", type=pathlib.Path, required=True, help="run folder of train_transformer.py")
    parser.add_argument("--vae", type=pathlib.Path, help="run folder of train_vae.py; without it the VAE is untrained")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    tokenizer = text.build_tokenizer()
    transformer, encoder = build_transformer(), text.build_encoder(len(tokenizer))
    state = latest(args.transformer)
    transformer.load_state_dict(load_file(state / "ema_model.safetensors"))
    encoder.load_state_dict(load_file(state / "ema_encoder.safetensors"))
    vae = build_vae(PatchPCA.shipped())
    if args.vae:
        vae.load_state_dict(load_file(latest(args.vae) / "ema.safetensors"))
    pipe = WanPipeline(
        tokenizer=tokenizer, text_encoder=encoder.eval(), vae=vae.eval(), transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT), transformer_2=None,
    )  # fmt: skip
    pipe.to(torch.float32).save_pretrained(args.out)
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"wrote {args.out}, {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
