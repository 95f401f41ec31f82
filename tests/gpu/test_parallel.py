"""Kernels and placements on real GPUs; skipped where there are none."""

import math

import pytest
import torch

import tiny
from attention_steps import follow
from heterostep import HSAConfig, apply
from heterostep.engine.denoise.work_split import Sharding
from heterostep.engine.models import WanAdapter
from heterostep.engine.vae.pieces import cuts, decode_pieces
from heterostep.errors import ConfigError
from heterostep.parallel.config import ParallelConfig, read
from heterostep.parallel.kernels import pick
from heterostep.parallel.mesh import ParallelMesh, shard_weights
from ranks import run_ranks

GPUS = torch.cuda.device_count()
needs_gpu = pytest.mark.skipif(GPUS < 1, reason="no GPU")


def needs_gpus(layout):
    ranks = ParallelConfig(**layout).world_size
    return pytest.param(layout, marks=pytest.mark.skipif(ranks > GPUS, reason=f"needs {ranks} GPUs"))


@needs_gpu
@pytest.mark.parametrize("name", ["auto", "sdpa", "flash", "flash3", "xfuser"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [40, 64, 100, 128])
def test_kernels_are_a_softmax(name, dtype, D):
    try:
        kernel = pick(name, "cuda")
        half = kernel.dtypes and dtype not in kernel.dtypes
    except ConfigError as error:
        pytest.skip(str(error))
    if half:
        pytest.skip(f"{name} does not compute in {dtype}")
    g = torch.Generator("cuda").manual_seed(0)
    for A, N in ((1, 1), (33, 70), (130, 517)):
        q, k, v = (torch.randn(2, n, 3, D, generator=g, device="cuda").to(dtype) for n in (A, N, N))
        scores = torch.einsum("bahd,bnhd->bahn", q.double(), k.double()) / math.sqrt(D)
        want = torch.einsum("bahn,bnhd->bahd", scores.softmax(-1), v.double())
        out, lse = kernel.attend(q, k, v)
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        assert out.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype == torch.float32
        assert (out - want).abs().max() < tolerance
        assert (lse - scores.logsumexp(-1)).abs().max() < tolerance
        assert (kernel.attend_out(q, k, v) - want).abs().max() < tolerance


@pytest.mark.parametrize(
    "layout",
    [
        needs_gpus(layout)
        for layout in (
            dict(),
            dict(ulysses=2),
            dict(ring=2, ring_cache="gathered"),
            dict(ring=2, ring_cache="sharded"),
            dict(ring=2, ulysses=2, ring_cache="gathered"),
            dict(ring=2, ulysses=2, ring_cache="sharded"),
        )
    ],
)
def test_placements_over_nccl(layout):
    ranks = ParallelConfig(**layout).world_size
    for B, N, history in ((1, 24, False), (2, 37, True), (2, 3, False)):
        assert max(run_ranks(ranks, follow, layout, B, N, history, True, "cuda", backend="nccl")) < 1e-4


def video_on_gpus(sharded):
    """Latents of a run, bytes of weights, and frames whose tiles the ranks shared."""
    layout = ParallelConfig(ulysses=torch.distributed.get_world_size())
    device = torch.device("cuda", torch.distributed.get_rank())
    mesh = ParallelMesh.create(layout, device)
    pipe = tiny.tiny_pipeline("euler", heads=4, layers=8)
    if sharded:
        shard_weights(pipe.transformer, pipe.transformer.blocks, mesh)
    pipe.to(device)
    session = apply(pipe, HSAConfig(compute=0.5, policy="tokens"), parallel=layout, mesh=mesh)
    latents = tiny.generate(pipe, steps=12, **{name: text.to(device) for name, text in tiny.embeddings().items()})
    pipe.vae.tile_sample_min_height = pipe.vae.tile_sample_min_width = 32
    pipe.vae.tile_sample_stride_height = pipe.vae.tile_sample_stride_width = 24
    with torch.no_grad():
        pieces, agreement = WanAdapter().pieces(pipe.vae), Sharding(mesh, layout).agreement
        cut = cuts(pieces, latents, shared=True)[0]
        found = list(decode_pieces(pieces, latents, cut, agreement, lambda video: video))
        pipe.vae.use_tiling = True
        alone = pipe.vae.decode(latents).sample
    same = found[0] is None or bool((torch.cat(found, dim=2) - alone).abs().max() < 1e-3)
    return latents.cpu(), session.full_report().ranks[0].weight_bytes, same


@pytest.mark.skipif(GPUS < 2, reason="needs 2 GPUs")
def test_sharded_weights_and_tiles_over_nccl():
    whole = run_ranks(2, video_on_gpus, False, backend="nccl")
    sharded = run_ranks(2, video_on_gpus, True, backend="nccl")
    for (latents, held, same), (want, all_held, _) in zip(sharded, whole, strict=True):
        assert (latents - want).abs().max() < 1e-4
        assert held < 0.75 * all_held
        assert same


@needs_gpu
def test_topology_of_this_machine():
    pytest.importorskip("pynvml")
    topology = read()
    assert sorted(topology.order) == list(range(GPUS)) and len(topology.free_bytes) == GPUS
    assert all(free > 0 for free in topology.free_bytes)
