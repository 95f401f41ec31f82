"""Keys and values in 8 bits and in host memory, against those of the plain cache."""

from __future__ import annotations

import pytest
import torch

import heterostep as hs
from heterostep.engine.facts import DEMO_MODEL
from heterostep.engine.record import psnr
from heterostep.hsa.cache import KVCache
from heterostep.hsa.config import HSAConfig
from heterostep.hsa.kv_storage import HostKVCache, SmallKVCache, make_caches

TYPES = {"int8": 0.006, "fp8": 0.04}
ACTIVE = [torch.tensor([1, 4]), torch.tensor([[0, 2], [4, 3]])]


def rows(count, seed, offset=3.0):
    g = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, count, 3, 16, generator=g)
    # Keys have large means that differ from channel to channel.
    return keys + offset * torch.arange(16), torch.randn(2, count, 3, 16, generator=g)


@pytest.mark.parametrize("active", ACTIVE)
@pytest.mark.parametrize("kind", TYPES)
def test_small_rows_are_near_those_that_were_written(kind, active):
    plain, (small,) = KVCache(), make_caches(1, kind, history=False, host=False)
    for cache in (plain, small):
        cache.write(*rows(5, 0))
        cache.write(*rows(2, 1), active)
        cache.write_flat(*(t[0, :1] for t in rows(5, 2)), torch.tensor([8]))
    for got, want, around in zip(
        small.keys_values(torch.float32), plain.keys_values(torch.float32), (45, 0), strict=True
    ):
        spread = (want - want.mean(1, keepdim=True)).abs().max() if around else want.abs().max()
        assert (got - want).abs().max() <= TYPES[kind] * spread + 1e-3
    assert small.nbytes < 0.4 * plain.nbytes  # of 32 bits, with scales of 16 for 16 values, and the mean
    small.release()
    assert small.nbytes == 0


def test_zeros_and_large_rows_survive():
    cache = SmallKVCache(torch.int8)
    k = torch.zeros(1, 4, 1, 8)
    k[0, 1] = 1e4
    cache.write(k, k)
    got = cache.keys_values(torch.float32)
    assert torch.isfinite(got[0]).all() and torch.allclose(got[1], k, rtol=0.01)


@pytest.mark.parametrize("kind", [None, "int8"])
def test_host_memory_changes_no_bit(kind):
    here = make_caches(3, kind, history=False, host=False)
    there = make_caches(3, kind, history=False, host=True)
    assert all(isinstance(cache, HostKVCache) for cache in there)
    for step in range(3):
        for layer, (one, other) in enumerate(zip(here, there, strict=True)):
            for cache in (one, other):
                seed = 10 * step + layer
                cache.write(*rows(5, seed)) if step == 0 else cache.write(*rows(2, seed), ACTIVE[1])
            if step:
                pairs = zip(one.keys_values(torch.float32), other.keys_values(torch.float32), strict=True)
                assert all(torch.equal(a, b) for a, b in pairs)
    assert [cache.nbytes for cache in here] == [cache.nbytes for cache in there]


def test_what_cannot_be_combined_is_refused():
    with pytest.raises(hs.ConfigError, match="kv_forecast does not work"):
        HSAConfig(kv_dtype="int8", kv_forecast=0.5)
    with pytest.raises(hs.ConfigError, match="compile does not work with kv_host"):
        hs.EngineConfig(compile=True, hsa=HSAConfig(kv_host=True))


@pytest.mark.skipif(not (DEMO_MODEL / "model_index.json").is_file(), reason="no demo model in this checkout")
@pytest.mark.slow
def test_small_keys_cost_little_quality_and_half_of_the_memory():
    def run(**changes):
        hsa = HSAConfig(policy="tokens", **changes)
        engine.config = hs.EngineConfig(device="cpu", hsa=hsa)
        return engine.generate(hs.GenerateRequest(prompt="a red disc moves right", num_inference_steps=16, seed=1))

    engine = hs.Engine(hs.EngineConfig(device="cpu"))
    dense = run(compute=1.0)
    plain, small = run(kv_dtype="bfloat16"), run(kv_dtype="int8", kv_host=True)
    assert psnr(small.frames, dense.frames) > psnr(plain.frames, dense.frames) - 0.3
    assert 0.5 <= small.report.kv_bytes / plain.report.kv_bytes < 0.56
