"""Latents are cut in time and into tiles, and decoded piece by piece, on one rank or on many."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import is_out_of_memory
from ...parallel.collectives import Agreement

_TILED = ("tile_sample_min_height", "tile_sample_stride_height", "spatial_compression_ratio", "blend_v", "blend_h")
# Latent frames that are decoded at once, where there is a choice.
_FRAMES = 4
# Each of these divides the sides of the tiles where memory was too small before.
_SHRINK = (1, 2, 4)
# The smallest tile, in latents along each side.
_LEAST = 4
# What a rank says that cannot decode; others say whether they have decoded something.
_NO_MEMORY = 2


class Pieces:
    """Decodes the whole video at once: what suits any VAE. Others derive from it.

    A *raw* tensor [B, C, f, h, w] is what the tiles of a VAE are blended in; `finished` makes pixels of it.

    Attributes:
        vae: the stock VAE.
        patch: pixels of a raw value along each side.
        tiles: whether `raw` also decodes tiles of pictures, which may then be blended.
    """

    tiles = False
    patch = 1

    def __init__(self, vae: Any, decode: Callable[[Any, Tensor], Tensor]) -> None:
        """Decode by `vae`; `decode` does so for the whole video."""
        self.vae = vae
        self._decode = decode

    def raw(self, latents: Tensor, frames: int, *, park: bool = False) -> Iterator[Tensor]:
        """Decode latents [B, C, F, Y, X], of whole pictures or of a tile.

        Args:
            latents: in the form and type that the VAE decodes.
            frames: the most latent frames that are decoded at once, where there is a choice.
            park: keep what is remembered from one piece to the next in the host's memory.

        Returns:
            An iterator over raw tensors, consecutive in time; how they are cut depends on F and `frames` alone.
        """
        yield self._decode(self.vae, latents)

    def finished(self, raw: Tensor) -> Tensor:
        """Raw values of whole pictures -> pixels [B, 3, f, H, W], nominally from -1 to 1."""
        return raw


def has_tiles(vae: Any) -> bool:
    """Whether a VAE says how large its tiles are, and blends them."""
    return all(hasattr(vae, name) for name in _TILED)


class NoMemory(Exception):
    """Decoding a video that is cut like this needs more memory than there is; on all ranks alike."""


class Side(NamedTuple):
    """How one side of a picture is cut.

    Attributes:
        tile: latents of a tile.
        step: latents from one tile to the next.
        raw_step: raw values of a tile that are kept, but for the last one.
        blend: raw values over which a tile is blended with the one before it.
    """

    tile: int
    step: int
    raw_step: int
    blend: int


class Cut(NamedTuple):
    """How latents are cut.

    Attributes:
        frames: the most latent frames at once, where there is a choice.
        rows: how columns of latents are cut into tiles; None: pictures stay whole.
        columns: how rows of latents are.
        park: whether features that are remembered wait in the host's memory.
    """

    frames: int = _FRAMES
    rows: Side | None = None
    columns: Side | None = None
    park: bool = False


def is_large(pieces: Pieces, latents: Tensor) -> bool:
    """Whether a VAE would cut the pictures of latents [B, C, F, Y, X] into tiles, if that is enabled."""
    if not pieces.tiles:
        return False
    vae, ratio = pieces.vae, pieces.vae.spatial_compression_ratio
    height, width = latents.shape[-2:]
    return bool(height > vae.tile_sample_min_height // ratio or width > vae.tile_sample_min_width // ratio)


def cuts(pieces: Pieces, latents: Tensor, shared: bool) -> list[Cut]:
    """The ways to cut a video, the best first; each of the later ones needs less memory.

    Args:
        pieces: of the VAE.
        latents: [B, C, F, Y, X].
        shared: whether tiles are wanted anyway, for ranks to share them.
    """
    tiled = is_large(pieces, latents) and (shared or pieces.vae.use_tiling)
    found = [_tiles(pieces, 1, Cut()) if tiled else Cut()]
    if pieces.tiles:
        height, width = latents.shape[-2:]
        for shrink in _SHRINK:
            cut = _tiles(pieces, shrink, Cut(frames=1, park=True))
            smaller = cut.rows is not None and cut.columns is not None
            if smaller and (cut.rows.tile < height or cut.columns.tile < width) and cut not in found:  # type: ignore[union-attr]
                found.append(cut)
    return found


def _tiles(pieces: Pieces, shrink: int, cut: Cut) -> Cut:
    """Add tiles to a cut: those of the VAE, with sides divided by `shrink`."""
    vae, patch = pieces.vae, pieces.patch
    ratio = vae.spatial_compression_ratio

    def side(least: int, step: int) -> Side:
        if shrink == 1:  # exactly as the VAE's own code does it
            return Side(least // ratio, step // ratio, step // patch, least // patch - step // patch)
        tile = max(least // ratio // shrink, _LEAST)
        overlap = max((least - step) // ratio // shrink, 1)
        raw = ratio // patch
        return Side(tile, tile - overlap, (tile - overlap) * raw, overlap * raw)

    rows = side(vae.tile_sample_min_height, vae.tile_sample_stride_height)
    return cut._replace(rows=rows, columns=side(vae.tile_sample_min_width, vae.tile_sample_stride_width))


def decode_pieces(
    pieces: Pieces,
    latents: Tensor,
    cut: Cut,
    agreement: Agreement | None,
    finish: Callable[[Tensor], NDArray[np.uint8]],
) -> Iterator[NDArray[np.uint8] | None]:
    """Decode latents piece by piece: the memory that it needs does not depend on the number of frames.

    Args:
        pieces: of the VAE.
        latents: [B, C, F, Y, X] in the form and type that the VAE decodes; on all ranks alike.
        cut: one of `cuts`.
        agreement: of the ranks that share the tiles, each of which must iterate to the end; None: there are none.
        finish: makes frames [f, H, W, 3] of pixels [B, 3, f, H, W], nominally from -1 to 1. What it raises on purpose
            is raised on all ranks.

    Returns:
        An iterator over what `finish` makes, consecutive in time; on other ranks than rank 0 over as many times None.

    Raises:
        NoMemory: from the iterator.
    """
    decoding, shape = _generators(pieces, latents, cut, agreement)
    frames: NDArray[np.uint8] | None = None

    def done(tiles: list[Tensor]) -> bool:
        nonlocal frames
        try:
            frames = finish(pieces.finished(_joined(pieces, tiles, shape, cut, latents.shape)))
            return True
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False

    while True:
        frames = None
        tiles = _next(decoding)
        said = _NO_MEMORY if tiles is None else int(bool(tiles))
        said = said if agreement is None else agreement.most(said)
        if said == 0:
            return
        if said == _NO_MEMORY or tiles is None:
            raise NoMemory
        if agreement is not None:
            parts = agreement.bring(tiles)
            size = agreement.mesh.world.size
            # Tile n is of rank n % P.
            tiles = [parts[n % size][n // size] for n in range(shape[0] * shape[1])] if parts else []
        if not (done(tiles) if agreement is None else agreement.decide(functools.partial(done, tiles))):
            raise NoMemory
        yield frames


def _generators(
    pieces: Pieces, latents: Tensor, cut: Cut, agreement: Agreement | None
) -> tuple[list[Iterator[Tensor]], tuple[int, int]]:
    """The decoding of each tile of this rank, and how many rows and columns of tiles there are."""
    if cut.rows is None or cut.columns is None:
        return [pieces.raw(latents, cut.frames, park=cut.park)], (1, 1)
    tops = range(0, latents.shape[-2], cut.rows.step)
    lefts = range(0, latents.shape[-1], cut.columns.step)
    tiles = [latents[..., top : top + cut.rows.tile, left : left + cut.columns.tile] for top in tops for left in lefts]
    if agreement is not None:
        tiles = tiles[agreement.mesh.world.rank :: agreement.mesh.world.size]
    return [pieces.raw(tile, cut.frames, park=cut.park) for tile in tiles], (len(tops), len(lefts))


def _next(decoding: list[Iterator[Tensor]]) -> list[Tensor] | None:
    """The next piece of each tile; none after the last one; None where memory is too small."""
    try:
        # All tiles have as many pieces.
        return [piece for piece in (next(tile, None) for tile in decoding) if piece is not None]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None


def _joined(pieces: Pieces, tiles: list[Tensor], shape: tuple[int, int], cut: Cut, size: tuple[int, ...]) -> Tensor:
    """Blend the tiles of one piece into raw pictures, as the VAE's own code does it."""
    if cut.rows is None or cut.columns is None:
        return tiles[0]
    vae, across = pieces.vae, shape[1]
    rows = [tiles[i : i + across] for i in range(0, len(tiles), across)]
    joined = []
    for i, row in enumerate(rows):
        kept = []
        for j, tile in enumerate(row):
            if i > 0:
                tile = vae.blend_v(rows[i - 1][j], tile, cut.rows.blend)
            if j > 0:
                tile = vae.blend_h(row[j - 1], tile, cut.columns.blend)
            kept.append(tile[..., : cut.rows.raw_step, : cut.columns.raw_step])
        joined.append(torch.cat(kept, dim=-1))
    raw = vae.spatial_compression_ratio // pieces.patch
    return torch.cat(joined, dim=3)[..., : size[-2] * raw, : size[-1] * raw]
