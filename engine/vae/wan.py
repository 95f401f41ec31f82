"""Wan's VAEs are causal: each latent frame is decoded by itself, and features of the frames before it are kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor

from .pieces import Pieces, has_tiles


class WanPieces(Pieces):
    """One latent frame at a time, exactly as the VAE's own loop does it, which keeps all frames."""

    def __init__(self, vae: Any, decode: Any) -> None:
        """See `Pieces`."""
        super().__init__(vae, decode)
        self.tiles = has_tiles(vae)
        self.patch = vae.config.patch_size or 1

    @torch.no_grad()
    def raw(self, latents: Tensor, frames: int, *, park: bool = False) -> Iterator[Tensor]:
        """See `Pieces`; what is remembered are two frames of features of each convolution."""
        vae = self.vae
        vae.clear_cache()
        # The VAE puts a new list in the place of this one: each tile keeps its own.
        cache = vae._feat_map
        vae.clear_cache()
        for k in range(latents.shape[2]):
            if park and k:
                cache[:] = [_moved(item, latents.device) for item in cache]
            some = vae.post_quant_conv(latents[:, :, k : k + 1])
            raw = vae.decoder(some, feat_cache=cache, feat_idx=[0], first_chunk=k == 0)
            if park:
                cache[:] = [_moved(item, torch.device("cpu")) for item in cache]
            yield raw

    def finished(self, raw: Tensor) -> Tensor:
        """See `Pieces`."""
        if self.vae.config.patch_size is not None:
            raw = unpatchify(raw, patch_size=self.patch)
        return raw.clamp(-1.0, 1.0)


def suits_wan(vae: Any) -> bool:
    """Whether a VAE is Wan's, or built like it."""
    return all(hasattr(vae, name) for name in ("clear_cache", "post_quant_conv", "decoder"))


def _moved(item: Any, device: torch.device) -> Any:
    """A remembered feature on another device; there are also marks that are no tensors."""
    return item.to(device) if isinstance(item, Tensor) else item
