"""The demo model's latent space: a fixed linear transform of small space-time patches.

The first frame counts as a pair of equal frames, every further pair is one latent frame (the causal layout of
`AutoencoderKLWan` with two-fold temporal compression). A patch of 2 x 4 x 4 pixels x RGB (96 numbers) is projected on
its first principal components. The transformer learns in this space at once; the shipped `AutoencoderKLWan` is trained
to read and to write the same space, so neither has to wait for the other.
"""

from __future__ import annotations

import pathlib

import torch
from safetensors.torch import load_file

CODEC = pathlib.Path(__file__).with_name("codec.safetensors")
"""The fitted transform. Transformer and VAE belong to it: fitted anew, both would have to be trained anew."""
CHANNELS = 8
TEMPORAL, SPATIAL = 2, 4
# Normalised channels get std (sigma_k / sigma_0) ** FLATTEN: 0 whitens, which would make faint edges weigh as much as
# whole areas; 1 keeps the data's own scale, which would drown them in the noise.
FLATTEN = 0.4


def patches(video: torch.Tensor) -> torch.Tensor:
    """Cut video [B, 3, 1 + 2k, H, W] into rows [B, 1 + k, H / 4, W / 4, 96]."""
    b, c, _, h, w = video.shape
    t, s = TEMPORAL, SPATIAL
    pairs = torch.cat([video[:, :, :1].repeat(1, 1, t - 1, 1, 1), video], dim=2)
    pairs = pairs.reshape(b, c, -1, t, h // s, s, w // s, s)
    return pairs.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, pairs.shape[2], h // s, w // s, c * t * s * s)


class PatchPCA:
    """The transform: `basis` [96, CHANNELS] orthonormal, `centre` [96], and the statistics of its coefficients."""

    def __init__(self, basis: torch.Tensor, centre: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> None:
        self.basis, self.centre, self.mean, self.std = basis, centre, mean, std

    @classmethod
    def fit(cls, video: torch.Tensor) -> PatchPCA:
        """Fit to clips [B, 3, F, H, W]; signs are fixed so that the same clips give the same basis."""
        rows = patches(video).flatten(0, 3).double()
        centre = rows.mean(0)
        covariance = (rows - centre).T @ (rows - centre) / len(rows)
        values, vectors = torch.linalg.eigh(covariance)
        basis = vectors.flip(1)[:, :CHANNELS]
        basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
        sigma = values.flip(0)[:CHANNELS].sqrt()
        std = sigma / (sigma / sigma[0]) ** FLATTEN
        return cls(basis.float(), centre.float(), torch.zeros(CHANNELS), std.float())

    @classmethod
    def shipped(cls) -> PatchPCA:
        """The one that the demo model was trained with."""
        return cls(**load_file(CODEC))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The four tensors by name, as `PatchPCA(**state)` takes them."""
        return {"basis": self.basis.contiguous(), "centre": self.centre, "mean": self.mean, "std": self.std}

    def raw(self, video: torch.Tensor) -> torch.Tensor:
        """Video [B, 3, F, H, W] in [-1, 1] -> what the VAE encodes to, [B, CHANNELS, f, H / 4, W / 4]."""
        return ((patches(video) - self.centre) @ self.basis).permute(0, 4, 1, 2, 3)

    def normalise(self, raw: torch.Tensor) -> torch.Tensor:
        """VAE latents -> what the transformer sees."""
        return (raw - self.mean.view(1, -1, 1, 1, 1)) / self.std.view(1, -1, 1, 1, 1)

    def decode(self, normalised: torch.Tensor) -> torch.Tensor:
        """The linear inverse, for looking at samples before the VAE is trained: -> video [B, 3, F, H, W]."""
        raw = normalised * self.std.view(1, -1, 1, 1, 1) + self.mean.view(1, -1, 1, 1, 1)
        rows = raw.permute(0, 2, 3, 4, 1) @ self.basis.T + self.centre
        b, f, h, w, _ = rows.shape
        t, s = TEMPORAL, SPATIAL
        video = rows.reshape(b, f, h, w, 3, t, s, s).permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(b, 3, f * t, h * s, w * s)
        return video[:, :, t - 1 :]


def main() -> None:
    """Fit the transform to drawn clips and write it: once, before anything is trained on it."""
    import random

    import scenes
    from safetensors.torch import save_file

    clips = scenes.render([scenes.random_scene(random.Random(i)) for i in range(256)])
    save_file(PatchPCA.fit(clips).state_dict(), CODEC)
    print(f"wrote {CODEC}")


if __name__ == "__main__":
    main()
