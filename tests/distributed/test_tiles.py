"""Ranks that share the tiles of a VAE make the video of one rank that decodes all of them."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLLTX2Video, AutoencoderKLWan

import ranks
import tiny
import tiny_ltx2
from heterostep import Engine, EngineConfig, GenerateRequest, ParallelConfig, RequestError
from heterostep.engine.decoding import VideoDecoder
from heterostep.engine.denoise.work_split import Sharding
from heterostep.engine.models.ltx2 import LTX2Adapter
from heterostep.engine.models.wan import WanAdapter
from heterostep.engine.vae.pieces import cuts, decode_pieces, is_large
from heterostep.parallel.mesh import ParallelMesh

TILE, STRIDE = 64, 48
ADAPTERS = {"wan21": WanAdapter, "wan22": WanAdapter, "ltx2": LTX2Adapter}
CHUNKS = {"wan21": 3, "wan22": 3, "ltx2": 1}  # of each tile of three latent frames


def build_vae(kind):
    if kind == "wan21":
        vae = tiny.tiny_pipeline().vae
    elif kind == "ltx2":  # told how noisy its latents are, as some are
        torch.manual_seed(0)
        config = {**tiny_ltx2.tiny_ltx2().vae.config, "timestep_conditioning": True}
        vae = AutoencoderKLLTX2Video.from_config(config).eval()
    else:  # of TI2V-5B: pixels are packed into patches, 16 times smaller latents
        torch.manual_seed(0)
        vae = AutoencoderKLWan(
            base_dim=8,
            z_dim=16,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 16,
            latents_std=[1.0] * 16,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
        ).eval()
    vae.tile_sample_min_height = vae.tile_sample_min_width = TILE
    vae.tile_sample_stride_height = vae.tile_sample_stride_width = STRIDE
    return vae


def latents_of(vae, height, width):
    ratio = vae.spatial_compression_ratio
    generator = torch.Generator().manual_seed(3)
    channels = 4 if isinstance(vae, AutoencoderKLLTX2Video) else 16
    return torch.randn(1, channels, 3, height // ratio, width // ratio, generator=generator)


def decoded(vae, adapter, latents, agreement=None, shared=False):
    """All pieces as the engine decodes them, [1, 3, F, H, W]; on other ranks than rank 0 how many there were."""
    pieces = adapter.pieces(vae)
    cut = cuts(pieces, latents, shared)[0]
    found = list(decode_pieces(pieces, latents, cut, agreement, lambda video: video))
    return len(found) if found[0] is None else torch.cat(found, dim=2)


def share(kind, height, width):
    """What this rank gets, and how many chunks of frames its decoder decoded."""
    vae = build_vae(kind)
    size = torch.distributed.get_world_size()
    config = ParallelConfig(ring=size)
    agreement = Sharding(ParallelMesh.create(config), config).agreement
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    vae.decoder.conv_in.register_forward_pre_hook(count)
    latents = latents_of(vae, height, width)
    assert is_large(ADAPTERS[kind].pieces(vae), latents)
    return decoded(vae, ADAPTERS[kind], latents, agreement, shared=True), calls


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize(
    ("size", "height", "width", "tiles"),
    [(2, 128, 128, 9), (3, 96, 160, 8), (3, 64, 96, 4), (2, 256, 64, 12)],
)
@torch.no_grad()
def test_shared_tiles_make_the_same_video(kind, size, height, width, tiles):
    vae = build_vae(kind)
    vae.use_tiling = True
    want = ADAPTERS[kind].decode(vae, latents_of(vae, height, width))
    results = ranks.run_ranks(size, share, kind, height, width)
    assert torch.equal(results[0][0], want)
    assert [pieces for pieces, _ in results[1:]] == [CHUNKS[kind]] * (size - 1)
    assert [calls for _, calls in results] == [CHUNKS[kind] * len(range(rank, tiles, size)) for rank in range(size)]


@torch.no_grad()
def test_more_ranks_than_tiles():
    vae = build_vae("wan21")
    vae.use_tiling = True
    want = vae.decode(latents_of(vae, 48, 96)).sample  # two tiles
    results = ranks.run_ranks(3, share, "wan21", 48, 96)
    assert torch.equal(results[0][0], want)
    assert [calls for _, calls in results] == [3, 3, 0]


def without_memory(height, width):
    """What rank 0 gets where rank 1 has no memory for its first tile until tiles are smaller."""
    vae = build_vae("wan21")
    config = ParallelConfig(ring=2)
    sharding = Sharding(ParallelMesh.create(config), config)
    pipe = tiny.tiny_pipeline()
    pipe.register_modules(vae=vae)
    stock = vae.decoder.forward

    def forward(hidden, *args, **options):
        if not sharding.agreement.leads and max(hidden.shape[-2:]) > 4:
            raise MemoryError
        return stock(hidden, *args, **options)

    vae.decoder.forward = forward
    taken = []
    VideoDecoder(pipe, WanAdapter(), sharding, latents_of(vae, height, width)).decode(
        lambda runs: taken.append(np.concatenate(list(runs)))
    )
    return taken


def test_a_rank_without_memory_makes_all_take_smaller_tiles():
    first, second = ranks.run_ranks(2, without_memory, 96, 96)
    assert len(first) == 1 and second == []
    vae = build_vae("wan21")
    pipe = tiny.tiny_pipeline()
    pipe.register_modules(vae=vae)
    vae.use_tiling, vae.tile_sample_min_height, vae.tile_sample_min_width = True, 32, 32
    vae.tile_sample_stride_height = vae.tile_sample_stride_width = 24
    taken = []
    VideoDecoder(pipe, WanAdapter(), None, latents_of(vae, 96, 96)).decode(
        lambda runs: taken.append(np.concatenate(list(runs)))
    )
    assert (first[0] == taken[0]).all()


def test_what_is_not_shared():
    def large(kind, height, width, **settings):
        vae = build_vae(kind)
        vae.register_to_config(**settings)
        return is_large(ADAPTERS[kind].pieces(vae), latents_of(vae, height, width))

    assert not large("wan21", TILE, TILE)  # one tile
    assert large("wan21", TILE + 16, TILE)
    assert large("ltx2", TILE, TILE + 16)
    assert not large("ltx2", TILE, TILE)
    # Each rank would draw its own noise.
    assert not large("ltx2", TILE, TILE + 16, decoder_inject_noise=(True, False))


def frames_of(layout):
    """A video of the demo model whose VAE was given tiles smaller than it."""
    engine = Engine(EngineConfig(model="demo", parallel=ParallelConfig(**layout) if layout else None))
    vae = engine.pipeline.vae
    vae.tile_sample_min_height = vae.tile_sample_min_width = 32
    vae.tile_sample_stride_height = vae.tile_sample_stride_width = 24
    vae.use_tiling = not layout
    video = engine.generate(GenerateRequest(prompt="a red disc moves right", num_inference_steps=2, num_frames=5))
    assert video.seconds["decode"] > 0
    return video.frames


def refusal_of_the_vae(layout):
    """What each rank raises where the VAE's values are not finite; then a video, so that no rank waits for another."""
    engine = Engine(EngineConfig(model="demo", parallel=ParallelConfig(**layout)))
    vae = engine.pipeline.vae
    vae.tile_sample_min_height = vae.tile_sample_min_width = 32
    vae.tile_sample_stride_height = vae.tile_sample_stride_width = 24
    kept = vae.decoder.conv_in.bias.data.clone()
    vae.decoder.conv_in.bias.data.fill_(float("nan"))
    request = GenerateRequest(prompt="a red disc moves right", num_inference_steps=2, num_frames=5)
    with pytest.raises(RequestError) as refused:
        engine.generate(request)
    vae.decoder.conv_in.bias.data.copy_(kept)
    engine.generate(request)
    return str(refused.value)


def test_all_ranks_refuse_a_video_that_is_not_finite():
    said = ranks.run_ranks(2, refusal_of_the_vae, {"cfg": 2})
    assert said[0] == said[1] and said[0].startswith("the VAE produced values that are not finite numbers")


def test_the_engine_shares_a_large_video():
    alone = frames_of({})
    for frames in ranks.run_ranks(2, frames_of, {"cfg": 2}):
        # Latents differ in their last bits between one rank and two.
        assert abs(frames.astype(int) - alone).max() <= 1
