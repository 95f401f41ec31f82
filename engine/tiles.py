"""Decode a large video on all ranks: each decodes some of the VAE's own tiles, and rank 0 blends them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import AutoencoderKLLTX2Video
from torch import Tensor

from ..parallel.agreement import Agreement

_NEEDED = ("tiled_decode", "decoder", "use_tiling", "tile_sample_min_height", "spatial_compression_ratio")
_WAN = "clear_cache"
"""What only Wan's VAEs have, which decode a few frames at a time."""


def can_share(vae: Any, latents: Tensor) -> bool:
    """Whether a VAE would cut latents [B, C, F, Y, X] into tiles, and in the way that `decode_shared` follows."""
    if not all(hasattr(vae, name) for name in _NEEDED):
        return False
    if isinstance(vae, AutoencoderKLLTX2Video):
        if any(vae.config.decoder_inject_noise):  # which each rank would draw for itself
            return False
    elif not hasattr(vae, _WAN):
        return False
    ratio, (height, width) = vae.spatial_compression_ratio, latents.shape[-2:]
    return bool(height > vae.tile_sample_min_height // ratio or width > vae.tile_sample_min_width // ratio)


def decode_shared(
    vae: Any, latents: Tensor, agreement: Agreement, decode: Callable[[Any, Tensor], Tensor]
) -> Tensor | None:
    """Decode as `vae` does with tiling enabled, the tiles shared among all ranks; each rank must call it.

    The VAE's own code cuts and blends, and runs twice for it: first every rank goes over all tiles and decodes its own,
    those with number % P = rank; then rank 0, which was sent all of them, goes over them again. The result is that of
    one rank, bit for bit.

    Args:
        vae: diffusers' AutoencoderKLLTX2Video, which calls its decoder once for each tile; or AutoencoderKLWan and
            what is built like it, which calls it several times, with ``first_chunk=True`` at the first frames.
        latents: [B, C, F, Y, X], alike on all ranks; `can_share` is true for them.
        agreement: speaks to the ranks.
        decode: calls `vae.decode` on latents; `Recipe.decode` of the model.

    Returns:
        The video [B, 3, frames, height, width] on rank 0, None on all others.
    """
    rank, size = agreement.mesh.world.rank, agreement.mesh.world.size
    nothing = latents.new_empty(latents.shape[0], vae.config.out_channels, 0, 0, 0)
    own: dict[int, list[Tensor]] = {}

    def decode_own(stock: Callable[[], Tensor], number: int, first: bool) -> Tensor:
        if number % size == rank:
            own.setdefault(number, []).append(stock())
        return nothing  # so that there is nothing to blend yet

    with _tiled(vae, decode_own):
        decode(vae, latents)
    tiles: dict[int, Tensor] = {}
    for part, some in enumerate(agreement.bring([torch.cat(own.pop(number), dim=2) for number in sorted(own)])):
        tiles |= {part + size * i: tile for i, tile in enumerate(some)}
    if not agreement.leads:
        return None

    def hand_out(stock: Callable[[], Tensor], number: int, first: bool) -> Tensor:
        return tiles[number] if first else tiles[number][:, :, :0]  # all frames of a tile at once

    with _tiled(vae, hand_out):
        return decode(vae, latents)


@contextlib.contextmanager
def _tiled(vae: Any, answer: Callable[[Callable[[], Tensor], int, bool], Tensor]) -> Iterator[None]:
    """Enable tiling, and let `answer` stand for the decoder.

    It is given a function that decodes, the number of the tile, and whether its first frames are asked for.
    """
    decoder, before, by_frames = vae.decoder, vae.use_tiling, hasattr(vae, _WAN)
    stock, own = decoder.forward, "forward" in vars(decoder)
    number = -1

    def forward(*args: Any, **options: Any) -> Tensor:
        nonlocal number
        first = options.get("first_chunk", not by_frames)
        number += first
        return answer(lambda: stock(*args, **options), number, first)

    vae.use_tiling, decoder.forward = True, forward
    try:
        yield
    finally:
        vae.use_tiling = before
        if own:
            decoder.forward = stock
        else:
            del decoder.forward
