"""What the demo transformer is trained on: noisy clips, their velocities, and captions, made as they are needed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import scenes
import torch
from latents import SPATIAL, TEMPORAL, PatchPCA
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

SHIFT = 3.0
DECISIONS = (0.82, 0.98)
SUBJECT_WEIGHT = 8.0
"""Weight of the loss where the subject ever is, 1 elsewhere: that is where the caption's words must be learned. What
every token should predict stays the same."""
CANDIDATES, FAR, NEAR = 24, 0.945, 0.86
"""How many other places of the subject its target is averaged over (see `expected`), and from which noise level on they
are anywhere, or nearby."""


class Batch(NamedTuple):
    """Noisy latents and target velocity [B, C, F, Y, X], loss weights [B, 1, 1, Y, X], sigmas [B], and captions."""

    noisy: Tensor
    target: Tensor
    weights: Tensor
    sigmas: Tensor
    captions: list[str]

    def to(self, device: torch.device) -> Batch:
        """The same with its tensors on a device."""
        return Batch(*(t.to(device, non_blocking=True) for t in self[:4]), self.captions)


class Batches(Dataset):
    """The batch of each step of a run, from seed, step and rank alone: whoever makes it, and when."""

    def __init__(self, *, seed: int, rank: int, count: int, frames: int, size: int, decisions: float) -> None:
        self.seed, self.rank, self.decisions = seed, rank, decisions
        self.count, self.frames, self.size = count, frames, size
        self.codec = PatchPCA.shipped()

    def __getitem__(self, step: int) -> Batch:
        rng = random.Random(self.seed * 1_000_003 + step + 500_009 * self.rank)
        generator = torch.Generator().manual_seed(rng.getrandbits(40))
        frames, size = self.frames, self.size
        drawn = [scenes.random_scene(rng, frames=frames, size=size) for _ in range(self.count)]
        clean = self.codec.normalise(self.codec.raw(scenes.render(drawn, frames=frames, size=size)))
        noise = torch.randn(clean.shape, generator=generator)
        sigmas = sample_sigmas(self.count, generator, self.decisions)
        s = sigmas.view(-1, 1, 1, 1, 1)
        captions = ["" if rng.random() < 0.1 else scene.caption for scene in drawn]
        weights = 1 + (SUBJECT_WEIGHT - 1) * scenes.swept(drawn, frames=frames, size=size)[:, None, None]
        noisy = (1 - s) * clean + s * noise
        for i, scene in enumerate(drawn):
            sigma = sigmas[i].item()
            if sigma > FAR:
                others = scenes.elsewhere(scene, rng, CANDIDATES, same_way=bool(captions[i]), frames=frames, size=size)
            elif sigma > NEAR:
                others = scenes.nearby(
                    scene, rng, CANDIDATES, 4 * (sigma - NEAR) / (FAR - NEAR) + 1, frames=frames, size=size
                )
            else:
                continue
            clean[i] = expected(self.codec, scene, others, noisy[i], sigma)
        return Batch(noisy, (noisy - clean) / s, weights, sigmas, captions)

    def following(self, step: int, workers: int) -> Iterator[Batch]:
        """The batches from `step` on, without end; `workers` processes make them ahead, 0 makes them when asked."""
        yield from (
            DataLoader(
                self, batch_size=None, sampler=range(step, 1 << 30), num_workers=workers, multiprocessing_context="fork"
            )
            if workers
            else map(self.__getitem__, range(step, 1 << 30))
        )


def sample_sigmas(count: int, generator: torch.Generator, decisions: float) -> Tensor:
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


def expected(codec: PatchPCA, scene: scenes.Scene, others: list[scenes.Object], noisy: Tensor, sigma: float) -> Tensor:
    """Mean of the clean clip [C, F, Y, X] over which of several subjects the noisy one shows.

    The true subject and the others are draws from one distribution. Given all of them and the noisy clip, each is
    the true one with a probability in proportion to exp(-|noisy - (1 - sigma) clean_k|^2 / 2 sigma^2), so the mean
    under these has the same expectation given the noisy clip as the clean clip itself, which is what the model
    should return, and much less variance (Rao-Blackwell). Where noise hides the place, a single clip says almost
    nothing of what the caption means.
    """
    size, frames = noisy.shape[-1] * SPATIAL, noisy.shape[-3] * TEMPORAL - 1
    subjects = [scene.objects[0], *others]
    clips = codec.normalise(codec.raw(scenes.render_each(scene, subjects, frames=frames, size=size)))
    distance = (noisy - (1 - sigma) * clips).square().flatten(1).sum(1, dtype=torch.float64)
    chances = torch.softmax(-distance / (2 * sigma * sigma), dim=0).to(clips.dtype)
    return torch.einsum("k,k...->...", chances, clips)
