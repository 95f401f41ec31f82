"""LTX-2's VAE sees all frames at once; here every layer is given a few, with just the neighbours that it looks at.

Nothing in it but convolutions looks at other frames, so that is the same video, at the cost of computing the neighbours
again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKLLTX2Video
from torch import Tensor

from .pieces import Pieces, has_tiles


class _Stage(NamedTuple):
    """A part of the decoder that looks at other frames.

    Attributes:
        run: decodes frames [B, C, f, h, w], as if they were a whole video.
        convolutions: how many it has in a row, each of them three frames wide.
        stride: frames that it makes of one, but for the first, of which it makes one.
    """

    run: Callable[[Tensor], Tensor]
    convolutions: int
    stride: int = 1


class LTX2Pieces(Pieces):
    """A few latent frames at a time."""

    def __init__(self, vae: Any, decode: Any) -> None:
        """See `Pieces`."""
        super().__init__(vae, decode)
        self.tiles = has_tiles(vae)

    @torch.no_grad()
    def raw(self, latents: Tensor, frames: int, *, park: bool = False) -> Iterator[Tensor]:
        """See `Pieces`; what is remembered are four frames at most before each layer."""
        decoder = self.vae.decoder
        told = latents.new_zeros(len(latents)) if self.vae.config.timestep_conditioning else None
        pieces: Iterable[Tensor] = latents.split(frames, dim=2)
        total = latents.shape[2]
        for stage in _stages(decoder, told, decoder.is_causal):
            pieces = _staged(stage, pieces, total, frames, decoder.is_causal)
            total, frames = stage.stride * (total - 1) + 1, stage.stride * frames
        yield from pieces


def suits_ltx2(vae: Any) -> bool:
    """Whether a VAE is LTX-2's and can be cut: it draws no noise, and is not told to cut in its own way."""
    return (
        isinstance(vae, AutoencoderKLLTX2Video)
        and not any(_each(vae.config.decoder_inject_noise))
        and not vae.use_framewise_decoding
        and vae.config.patch_size_t == 1
    )


def _each(flags: bool | Iterable[bool]) -> Iterable[bool]:
    return (flags,) if isinstance(flags, bool) else flags


def _staged(stage: _Stage, pieces: Iterable[Tensor], total: int, most: int, causal: bool) -> Iterator[Tensor]:
    """Run a stage over pieces of `total` frames in all, at most `most` of them at once."""
    reach = stage.convolutions
    left, right = (2 * reach, 0) if causal else (reach, reach)
    held: Tensor | None = None
    start = done = 0  # the first frame that is held, and the first whose outcome is still missing
    for piece in pieces:
        held = piece if held is None else torch.cat([held, piece], dim=2)
        seen = start + held.shape[2]
        ready = total if seen == total else seen - right
        while done < ready:
            end = min(done + most, ready)
            first, last = max(done - left, 0), min(end + right, seen)
            out = stage.run(held[:, :, first - start : last - start])
            # The run takes its first frame for that of a video, which becomes one frame alone.
            skip = stage.stride * (done - first) - (stage.stride - 1) if done else 0
            count = stage.stride * (end - done) - (0 if done else stage.stride - 1)
            yield out[:, :, skip : skip + count]
            done = end
        keep = max(done - left, 0)
        held, start = held[:, :, keep - start :].clone(), keep  # not a view, which would keep all of them
        del piece


def _stages(decoder: Any, told: Tensor | None, causal: bool) -> Iterator[_Stage]:
    """The stages of a decoder in their order, as its own `forward` runs them."""

    def convolution(layer: Any) -> _Stage:
        return _Stage(lambda x: layer(x, causal=causal), 1)

    def resnet(layer: Any, told: Tensor | None) -> _Stage:
        return _Stage(lambda x: layer(x, told, None, causal=causal), 2)

    yield convolution(decoder.conv_in)
    if told is not None:
        told = told * decoder.timestep_scale_multiplier
    for block in (decoder.mid_block, *decoder.up_blocks):
        first = getattr(block, "conv_in", None)
        if first is not None:
            yield resnet(first, told)
        level = _embedded(block.time_embedder, told, next(block.resnets.parameters()).dtype)
        for layer in getattr(block, "upsamplers", None) or ():
            yield _Stage(convolution(layer).run, 1, layer.stride[0])
        for layer in block.resnets:
            yield resnet(layer, level)
    yield _Stage(lambda x: _pixels(decoder, x, told, causal), 1)


def _embedded(embedder: Any, told: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What layers are told of the noise in the latents; None where they are told nothing."""
    if embedder is None or told is None:
        return told
    size = len(told)
    known: Tensor = embedder(
        timestep=told.flatten(), resolution=None, aspect_ratio=None, batch_size=size, hidden_dtype=dtype
    )
    return known.view(size, -1, 1, 1, 1)


def _pixels(decoder: Any, hidden: Tensor, told: Tensor | None, causal: bool) -> Tensor:
    """The end of the decoder's `forward`."""
    hidden = decoder.norm_out(hidden)
    known = _embedded(decoder.time_embedder, told, hidden.dtype)
    if decoder.time_embedder is not None and known is not None:
        shift, scale = (known.unflatten(1, (2, -1)) + decoder.scale_shift_table[None, ..., None, None, None]).unbind(1)
        hidden = hidden * (1 + scale) + shift
    hidden = decoder.conv_out(decoder.conv_act(hidden), causal=causal)
    side = decoder.patch_size
    # [B, (C, column, row), f, h, w] -> [B, C, f, h * row, w * column]
    cells = hidden.unflatten(1, (-1, side, side))
    return cells.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
