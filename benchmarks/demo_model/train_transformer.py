"""Train the demo transformer and its text encoder: `python benchmarks/demo_model/train_transformer.py --out DIR`.

Rectified flow in the latent space of `latents.py`: x = (1 - sigma) x0 + sigma eps, target velocity eps - x0, sigma
logit-normal with shift 3 (the pipeline's own). Muon on the blocks' matrices, AdamW on the rest, an exponential moving
average of the weights is what is shipped. Progress is saved in DIR every few minutes and a later call with the same DIR
goes on from there, with the same data stream.
"""

from __future__ import annotations

import argparse
import copy
import math
import pathlib
import random
import time

import checkpoints
import lean
import scenes
import text
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from latents import CHANNELS, PatchPCA
from safetensors.torch import load_file
from transformers import UMT5EncoderModel

HEADS, HEAD_DIM, LAYERS, FFN = 4, 32, 6, 512
SHIFT = 3.0
DECISIONS = (0.82, 0.98)
SUBJECT_WEIGHT = 8.0
"""Weight of the loss where the subject ever is, 1 elsewhere: that is where the caption's words must be learned. What
every token should predict stays the same."""
DECISIONS = (0.82, 0.98)
SUBJECT_WEIGHT = 8.0
"""Weight of the loss where the subject ever is, 1 elsewhere: that is where the caption's words must be learned. What
every token should predict stays the same."""


def build_transformer() -> WanTransformer3DModel:
    """The stock class at demo size, initialised so that each block starts as the identity."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=CHANNELS,
        out_channels=CHANNELS, text_dim=text.WIDTH, freq_dim=64, ffn_dim=FFN, num_layers=LAYERS, cross_attn_norm=True,
        rope_max_seq_len=64,
    )  # fmt: skip
    for block in model.blocks:
        for layer in (block.attn1.to_out[0], block.attn2.to_out[0], block.ffn.net[2]):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
        torch.nn.init.zeros_(block.scale_shift_table)
        with torch.no_grad():  # open gates: a closed one starves the layer behind it of gradient
            block.scale_shift_table[:, (2, 5)] = 1.0
    # Noise in, noise out: velocity carries eps, so the token's own values must pass through the residual stream.
    with torch.no_grad():
        rows = CHANNELS * 4
        model.patch_embedding.weight.mul_(0.3)
        model.patch_embedding.weight[:rows].copy_(torch.eye(rows).view(rows, CHANNELS, 1, 2, 2) * 1.5)
        # Rows leave as (ph, pw, c), they came in as (c, ph, pw).
        out_of_in = torch.arange(rows).view(CHANNELS, 2, 2).permute(1, 2, 0).flatten()
        model.proj_out.weight.mul_(0.1)
        model.proj_out.weight[:, :rows] += torch.eye(rows)[out_of_in] * 0.4
        model.proj_out.bias.zero_()
        model.scale_shift_table.zero_()
    return model


def sample_sigmas(count: int, generator: torch.Generator, decisions: float) -> torch.Tensor:
    """Noise levels [count] in random order.

    A share `decisions` of them is uniform over `DECISIONS`, where it is settled what is where and where it goes; the
    others are logit-normal with the pipeline's shift. Both are stratified over the batch.
    """
    early = round(decisions * count)
    low, high = DECISIONS
    spread = (torch.arange(early) + torch.rand(early, generator=generator)) / max(early, 1)
    quantile = (torch.arange(count - early) + torch.rand(count - early, generator=generator)) / max(count - early, 1)
    u = torch.sigmoid(1.2 * torch.special.ndtri(quantile.clamp(1e-4, 1 - 1e-4)))
    sigmas = torch.cat([low + (high - low) * spread, SHIFT * u / (1 + (SHIFT - 1) * u)])
    return sigmas[torch.randperm(count, generator=generator)]


class Trainer:
    """All state of a run; `save` and `load` move the whole of it to and from a folder."""

    def __init__(
        self, out: pathlib.Path, *, seed: int, learning_rate: float, device: str, decisions: float = 0.0
    ) -> None:
        self.out, self.learning_rate, self.device = out, learning_rate, torch.device(device)
        torch.manual_seed(seed)
        self.tokenizer = text.build_tokenizer()
        self.encoder = text.build_encoder(len(self.tokenizer)).to(device).train()
        self.model = build_transformer().to(device).train()
        self.step, self.seconds, self.seed, self.decisions = 0, 0.0, seed, decisions
        self.history: list[list[float]] = []
        self.codec = PatchPCA.shipped()
        self.ema = [copy.deepcopy(m).eval() for m in (self.model, self.encoder)]
        matrices = [p for n, p in self.model.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
        chosen = {id(p) for p in matrices}
        rest = [p for m in (self.model, self.encoder) for p in m.parameters() if id(p) not in chosen]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                matrices, lr=learning_rate, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        grid = self.model.rope(torch.empty(1, CHANNELS, 9, scenes.SIZE // 4, scenes.SIZE // 4))
        self.cos, self.sin = grid[0][0, :, :, 0::2].to(device), grid[1][0, :, :, 1::2].to(device)

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        """Everything with weights, by the name of its file."""
        return {
            "model": self.model,
            "encoder": self.encoder,
            "ema_model": self.ema[0],
            "ema_encoder": self.ema[1],
        }

    def load(self) -> None:
        """Go on from the folder's last save, if there is one."""
        progress = checkpoints.load(self.out, self.modules, self.optimizers)
        if progress is not None:
            self.step, self.seconds, self.history = progress["step"], progress["seconds"], progress["history"]

    def start_from(self, folder: pathlib.Path) -> None:
        """Take the weights of a pipeline folder; the optimizers start anew."""
        weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
        words = UMT5EncoderModel.from_pretrained(folder / "text_encoder").state_dict()
        for module, state in zip((self.model, self.encoder, *self.ema), (weights, words) * 2, strict=True):
            module.load_state_dict(state)

    def save(self) -> None:
        """Write the whole state."""
        progress = {"step": self.step, "seconds": self.seconds, "history": self.history}
        checkpoints.save(self.out, self.modules, self.optimizers, progress)

    def batch(self, size: int, frames: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
        """Noisy latents, velocity targets, loss weights, sigmas and captions of this step, from the seed alone."""
        rng = random.Random(self.seed * 1_000_003 + self.step)
        generator = torch.Generator().manual_seed(rng.getrandbits(40))
        drawn = [scenes.random_scene(rng) for _ in range(size)]
        clean = self.codec.normalise(self.codec.raw(scenes.render(drawn, frames=frames)))
        noise = torch.randn(clean.shape, generator=generator)
        sigmas = sample_sigmas(size, generator, self.decisions)
        s = sigmas.view(-1, 1, 1, 1, 1)
        captions = ["" if rng.random() < 0.1 else scene.caption for scene in drawn]
        weights = 1 + (SUBJECT_WEIGHT - 1) * scenes.swept(drawn, frames=frames)[:, None, None]
        tensors = (((1 - s) * clean + s * noise), noise - clean, weights, sigmas)
        return *(t.to(self.device) for t in tensors), captions  # type: ignore[return-value]

    def loss(self, forward, size: int, frames: int, positions: float) -> torch.Tensor:
        """Weighted squared error of the velocity on this step's batch; `positions` as in `lean.text_keys`."""
        noisy, target, importance, sigmas, captions = self.batch(size, frames)
        embeddings, lengths = text.encode(self.tokenizer, self.encoder, captions)
        padded = F.pad(embeddings, (0, 0, 0, 20 - embeddings.shape[1]))
        keys, weights = lean.text_keys(padded, lengths, positions)
        features = self.model.condition_embedder.timesteps_proj(sigmas * 1000)
        tokens = noisy[0, 0].numel() // 4
        cos, sin = self.cos[:tokens], self.sin[:tokens]
        error = (forward(self.model, noisy, features, keys, weights, cos, sin) - target).square()
        return (error * importance).mean() / importance.mean()

    def update(self, loss: torch.Tensor, rate: float) -> None:
        """One optimizer step and one step of the moving average."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for m in (self.model, self.encoder) for p in m.parameters()], 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self.step += 1
        decay = min(0.998, (self.step + 1) / (self.step + 20))
        with torch.no_grad():
            for average, live in zip(self.ema, (self.model, self.encoder), strict=True):
                torch._foreach_lerp_(list(average.parameters()), list(live.parameters()), 1 - decay)


def check(trainer: Trainer) -> None:
    """Print the largest difference between `lean.forward` and the stock class."""
    noisy, _, _, sigmas, captions = trainer.batch(4, scenes.FRAMES)
    with torch.no_grad():
        for block in trainer.model.blocks:
            block.attn2.to_out[0].weight.normal_(std=0.1)
            block.attn1.to_out[0].weight.normal_(std=0.1)
        embeddings, lengths = text.encode(trainer.tokenizer, trainer.encoder, captions)
        keys, weights = lean.text_keys(embeddings, lengths)
        features = trainer.model.condition_embedder.timesteps_proj(sigmas * 1000)
        ours = lean.forward(trainer.model, noisy, features, keys, weights, trainer.cos, trainer.sin)
        padded = F.pad(embeddings, (0, 0, 0, lean.TEXT_POSITIONS - embeddings.shape[1]))
        stock = trainer.model(noisy, sigmas * 1000, padded, return_dict=False)[0]
    print(f"largest difference {(ours - stock).abs().max():.2e} of {stock.abs().max():.2f}")


def text_positions(args: argparse.Namespace, remaining: float) -> float:
    """Positions of the text that cross-attention sees, with `remaining` seconds of training to go.

    WanPipeline pads captions to 512. Among so many equal keys a word gets 1 / 512 of the attention and of the gradient,
    and "left" and "right" stay unlearned for thousands of steps. So most of the training sees few, and their number
    rises geometrically to 512 while the learning rate falls.
    """
    share = min(max((remaining / (args.decay_minutes * 60) - 1 / 3) * 1.5, 0.0), 1.0)
    return lean.TEXT_POSITIONS * (args.text_positions / lean.TEXT_POSITIONS) ** share


def main() -> None:
    """Parse the command line and train until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the run; resumed where it exists")
    parser.add_argument("--minutes", type=float, default=120.0, help="training time in all, earlier calls counted")
    parser.add_argument("--decay-minutes", type=float, default=30.0, help="the last of them, in which the rate falls")
    parser.add_argument("--short-minutes", type=float, default=30.0, help="the first of them, on 9 of the 17 frames")
    parser.add_argument("--text-positions", type=float, default=12.0, help="few at first, 512 in the end")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--decisions", type=float, default=0.5, help="share of clips at the noise levels that decide")
    parser.add_argument("--init", type=pathlib.Path, help="pipeline folder whose weights a new run starts from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument(
        "--check", action="store_true", help="compare the training forward with the stock class and stop"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        args.out, seed=args.seed, learning_rate=args.learning_rate, device=args.device, decisions=args.decisions
    )
    if args.check:
        return check(trainer)
    if args.init:
        trainer.start_from(args.init)
    trainer.load()
    print("starting at step", trainer.step, flush=True)
    forward = lean.forward if args.no_compile else torch.compile(lean.forward, dynamic=False)
    smooth, last_save = None, time.monotonic()
    while trainer.seconds < args.minutes * 60:
        began = time.monotonic()
        remaining = args.minutes * 60 - trainer.seconds
        rate = (
            args.learning_rate
            * min(1.0, (trainer.step + 1) / 100)
            * min(1.0, remaining / (args.decay_minutes * 60) + 0.02)
        )
        # A clip of 9 frames costs less than half and teaches colour, shape, texture and most of motion.
        frames = 9 if trainer.seconds < args.short_minutes * 60 else scenes.FRAMES
        loss = trainer.loss(forward, args.batch, frames, text_positions(args, remaining))
        trainer.update(loss, rate)
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if not math.isfinite(smooth):
            raise SystemExit(f"the loss is {loss.item()} at step {trainer.step}: lower --learning-rate")
        trainer.seconds += min(time.monotonic() - began, 30.0)  # compilation is not training
        if trainer.step % 50 == 0:
            trainer.history.append([trainer.step, round(trainer.seconds, 1), round(smooth, 5)])
            print(*trainer.history[-1], f"lr {rate:.2e}", flush=True)
        if time.monotonic() - last_save > 180:
            trainer.save()
            last_save = time.monotonic()
    trainer.save()
    print("done", trainer.step, flush=True)


if __name__ == "__main__":
    main()
