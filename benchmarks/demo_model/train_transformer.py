"""Train the demo transformer and its text encoder: `python benchmarks/demo_model/train_transformer.py --out DIR`.

With more processes: `torchrun --standalone --nproc-per-node P benchmarks/demo_model/train_transformer.py --out DIR`.
On a GPU: `--device cuda --workers 15 --batch 256`; the workers draw the clips.

Rectified flow in the latent space of `latents.py`: x = (1 - sigma) x0 + sigma eps, target velocity eps - x0, sigma
logit-normal with shift 3 (the pipeline's own). Muon on the blocks' matrices, AdamW on the rest, an exponential moving
average of the weights is what is shipped. Progress is saved in DIR every few minutes and a later call with the same DIR
goes on from there, with the same data stream.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import pathlib
import time

import checkpoints
import lean
import scenes
import text
import torch
import torch.distributed as dist
import torch.nn.functional as F
from architecture import build_transformer, slow_features, smooth_time, text_attention
from batches import Batch, Batches
from safetensors.torch import load_file
from transformers import UMT5EncoderModel

STAGES = ((0.45, 9, 48), (0.7, 9, scenes.SIZE), (1.0, scenes.FRAMES, scenes.SIZE))
"""Until which share of the time clips have how many frames and pixels a side. A small clip costs a quarter and teaches
colour, shape, texture and how things move."""


class Trainer:
    """All state of a run; `save` and `load` move the whole of it to and from a folder."""

    def __init__(self, out: pathlib.Path, *, seed: int, learning_rate: float, device: str) -> None:
        self.out, self.learning_rate, self.device = out, learning_rate, torch.device(device)
        torch.manual_seed(seed)
        self.tokenizer = text.build_tokenizer()
        self.encoder = text.build_encoder(len(self.tokenizer)).to(device).train()
        self.model = build_transformer().to(device).train()
        slow = slow_features(self.model)
        self.model.condition_embedder.time_embedder.linear_1.weight.register_hook(lambda gradient: gradient * slow)
        self.step, self.seconds = 0, 0.0
        self.history: list[list[float]] = []
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
        for model in (self.model, self.ema[0]):
            smooth_time(model)

    def save(self) -> None:
        """Write the whole state."""
        progress = {"step": self.step, "seconds": self.seconds, "history": self.history}
        checkpoints.save(self.out, self.modules, self.optimizers, progress)

    def angles(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the rotary embedding for latents of that shape, as `lean.rotate` takes them."""
        cos, sin = self.model.rope(latents[:1].cpu())
        return cos[0, :, :, 0::2].to(self.device), sin[0, :, :, 1::2].to(self.device)

    def loss(self, forward, batch: Batch) -> torch.Tensor:
        """Weighted squared error of the velocity."""
        noisy, target, importance, sigmas, captions = batch.to(self.device)
        embeddings, lengths = text.encode(self.tokenizer, self.encoder, captions)
        padded = F.pad(embeddings, (0, 0, 0, 20 - embeddings.shape[1]))
        keys, weights = lean.text_keys(padded, lengths)
        features = self.model.condition_embedder.timesteps_proj(sigmas * 1000)
        error = (forward(self.model, noisy, features, keys, weights, *self.angles(noisy)) - target).square()
        return (error * importance).mean() / importance.mean()

    def update(self, loss: torch.Tensor, rate: float) -> None:
        """One optimizer step and one step of the moving average."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients([self.model, self.encoder])
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


def rank() -> int:
    """This process's number under torchrun, 0 without."""
    return dist.get_rank() if dist.is_initialized() else 0


def average_gradients(modules: list[torch.nn.Module]) -> None:
    """Make every process's gradients the mean of all."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for module in modules for p in module.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def slowest(seconds: float) -> float:
    """The longest of all processes' `seconds`: what depends on the time must depend on it alike everywhere."""
    if not dist.is_initialized():
        return seconds
    longest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return longest.item()


def check(trainer: Trainer, batch: Batch) -> None:
    """Print the largest difference between `lean.forward` and the stock class, and what the text attention sees."""
    noisy, _, _, sigmas, captions = batch.to(trainer.device)
    with torch.no_grad():
        embeddings, lengths = text.encode(trainer.tokenizer, trainer.encoder, captions)
        keys, weights = lean.text_keys(embeddings, lengths)
        features = trainer.model.condition_embedder.timesteps_proj(sigmas * 1000)
        ours = lean.forward(trainer.model, noisy, features, keys, weights, *trainer.angles(noisy))
        padded = F.pad(embeddings, (0, 0, 0, lean.TEXT_POSITIONS - embeddings.shape[1]))
        stock = trainer.model(noisy, sigmas * 1000, padded, return_dict=False)[0]
        shares = text_attention(trainer.model, padded[:1], int(lengths[0]))
    print(f"largest difference {(ours - stock).abs().max():.2e} of {stock.abs().max():.2f}")
    print("share of the text attention on words, by block:", *(f"{share:.2f}" for share in shares))


def main() -> None:
    """Parse the command line and train until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the run; resumed where it exists")
    parser.add_argument("--minutes", type=float, default=120.0, help="training time in all, earlier calls counted")
    parser.add_argument("--decay-minutes", type=float, default=30.0, help="the last of them, in which the rate falls")
    parser.add_argument("--batch", type=int, default=16, help="clips of each process")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--decisions", type=float, default=0.5, help="share of clips at the noise levels that decide")
    parser.add_argument("--init", type=pathlib.Path, help="pipeline folder whose weights a new run starts from")
    parser.add_argument("--whole", action="store_true", help="whole clips from the start: for a model that is trained")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw clips; 0: this one does")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument(
        "--check", action="store_true", help="compare the training forward with the stock class and stop"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs
    trainer = Trainer(args.out, seed=args.seed, learning_rate=args.learning_rate, device=args.device)

    def batches(frames: int, size: int) -> Batches:
        return Batches(
            seed=args.seed, rank=rank(), count=args.batch, frames=frames, size=size, decisions=args.decisions
        )

    if args.check:
        return check(trainer, batches(*STAGES[-1][1:])[0])
    if args.init:
        trainer.start_from(args.init)
    trainer.load()
    print("starting at step", trainer.step, flush=True)
    forward = lean.forward if args.no_compile else torch.compile(lean.forward, dynamic=False)
    smooth, last_save, shape = None, time.monotonic(), None
    while trainer.seconds < args.minutes * 60:
        began = time.monotonic()
        remaining = args.minutes * 60 - trainer.seconds
        rate = (
            args.learning_rate
            * min(1.0, (trainer.step + 1) / 100)
            * min(1.0, remaining / (args.decay_minutes * 60) + 0.02)
        )
        share = trainer.seconds / (args.minutes * 60)
        wanted = next(stage[1:] for stage in (STAGES[-1:] if args.whole else STAGES) if share < stage[0])
        if wanted != shape:
            shape, stream = wanted, batches(*wanted).following(trainer.step, args.workers)
        loss = trainer.loss(forward, next(stream))
        trainer.update(loss, rate)
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if not math.isfinite(smooth):
            raise SystemExit(f"the loss is {loss.item()} at step {trainer.step}: lower --learning-rate")
        trainer.seconds += slowest(min(time.monotonic() - began, 30.0))  # compilation is not training
        if trainer.step % 50 == 0 and rank() == 0:
            trainer.history.append([trainer.step, round(trainer.seconds, 1), round(smooth, 5)])
            print(*trainer.history[-1], f"lr {rate:.2e}", flush=True)
        if time.monotonic() - last_save > 180 and rank() == 0:
            trainer.save()
            last_save = time.monotonic()
    if rank() == 0:
        trainer.save()
        print("done", trainer.step, flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
