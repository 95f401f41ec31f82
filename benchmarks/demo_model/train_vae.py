"""Train the demo VAE: `python benchmarks/demo_model/train_vae.py --out DIR`.

A small stock `AutoencoderKLWan` learns to write clips from the fixed latents of `latents.py` (decoder) and to produce
those latents from clips (encoder). As the latent space does not move, the transformer trains on it at the same time.
"""

from __future__ import annotations

import argparse
import pathlib
import random
import time

import checkpoints
import scenes
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from latents import CHANNELS, SPATIAL, TEMPORAL, PatchPCA

DECODER_STEPS_PER_ENCODER_STEP = 4
LOG_VARIANCE = -12.0


def build_vae(codec: PatchPCA) -> AutoencoderKLWan:
    """The stock class at demo size; its latent statistics are the codec's."""
    return AutoencoderKLWan(
        base_dim=16, z_dim=CHANNELS, dim_mult=[1, 2, 2], num_res_blocks=1, attn_scales=[],
        temperal_downsample=[False, True], latents_mean=codec.mean.tolist(), latents_std=codec.std.tolist(),
        scale_factor_temporal=TEMPORAL, scale_factor_spatial=SPATIAL,
    )  # fmt: skip


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of clips in [-1, 1]."""
    return float(-10 * torch.log10(((a - b) / 2).pow(2).mean()))


def decoder_loss(vae: AutoencoderKLWan, video: torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Absolute plus squared pixel error, and the clip's PSNR."""
    # A sampler never lands exactly on clean latents: learn to forgive a little.
    noise = torch.randn_like(latents) * 0.03 * torch.rand(len(latents), 1, 1, 1, 1)
    scale = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    out = vae.decode(latents + noise * scale, return_dict=False)[0]
    return F.l1_loss(out, video) + 2 * F.mse_loss(out, video), psnr(out.detach(), video)


def encoder_loss(vae: AutoencoderKLWan, video: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Squared error of the mean in units of the latents' std, and of the (constant, tiny) log variance."""
    moments = vae._encode(video)
    mean, log_variance = moments.chunk(2, dim=1)
    scale = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    return F.mse_loss(mean / scale, latents / scale) + 1e-3 * F.mse_loss(
        log_variance, torch.full_like(mean, LOG_VARIANCE)
    )


def clips(codec: PatchPCA, step: int, size: int, frames: int, crop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Video and raw latents of a step, drawn from its number alone; `crop` x `crop` pixels of every clip."""
    rng = random.Random(7_000_003 + step)
    video = scenes.render([scenes.random_scene(rng) for _ in range(size)], frames=frames)
    y, x = (rng.randrange(0, (scenes.SIZE - crop) // SPATIAL + 1) * SPATIAL for _ in range(2))
    video = video[..., y : y + crop, x : x + crop]
    return video, codec.raw(video)


def main() -> None:
    """Parse the command line and train until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the run; resumed where it exists")
    parser.add_argument("--minutes", type=float, default=60.0, help="training time in all, earlier calls counted")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument(
        "--frames",
        type=int,
        default=9,
        help="1 + a multiple of 4, the chunks in which AutoencoderKLWan encodes",
    )
    parser.add_argument("--crop", type=int, default=32, help="side of the crops that the first two thirds train on")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    codec = PatchPCA.shipped()
    vae = build_vae(codec)
    # post_quant_conv and decoder on one side, encoder and quant_conv on the other: they share no weight.
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    ema = torch.optim.swa_utils.AveragedModel(vae, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995))
    modules = {"vae": vae, "ema": ema.module}
    progress = checkpoints.load(args.out, modules, [optimizer]) or {"step": 0, "seconds": 0.0}
    print(
        "parameters",
        sum(p.numel() for p in vae.parameters()),
        "starting at step",
        progress["step"],
        flush=True,
    )
    quality, error, last_save = None, None, time.monotonic()
    while progress["seconds"] < args.minutes * 60:
        began, step = time.monotonic(), progress["step"]
        remaining = 1 - progress["seconds"] / (args.minutes * 60)
        rate = args.learning_rate * min(1.0, (step + 1) / 100) * min(1.0, remaining * 2 + 0.01)
        optimizer.param_groups[0]["lr"] = rate
        # Convolutions learn as much from a crop, at a fraction of the cost; attention needs whole frames at the end.
        crop = args.crop if remaining > 1 / 3 else scenes.SIZE
        video, latents = clips(codec, step, args.batch, args.frames, crop)
        if step % (DECODER_STEPS_PER_ENCODER_STEP + 1) < DECODER_STEPS_PER_ENCODER_STEP:
            loss, db = decoder_loss(vae, video, latents)
            quality = db if quality is None else 0.97 * quality + 0.03 * db
        else:
            loss = encoder_loss(vae, video, latents)
            error = loss.item() if error is None else 0.9 * error + 0.1 * loss.item()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        ema.update_parameters(vae)
        progress = {"step": step + 1, "seconds": progress["seconds"] + time.monotonic() - began}
        if progress["step"] % 50 == 0:
            print(
                progress["step"],
                round(progress["seconds"]),
                f"decoder {quality:.2f} dB, encoder {error:.4f}",
                flush=True,
            )
        if time.monotonic() - last_save > 180:
            checkpoints.save(args.out, modules, [optimizer], progress)
            last_save = time.monotonic()
    checkpoints.save(args.out, modules, [optimizer], progress)
    print("done", progress["step"], flush=True)


if __name__ == "__main__":
    main()
