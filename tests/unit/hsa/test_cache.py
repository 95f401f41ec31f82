import pytest
import torch

from heterostep.hsa.cache import KVCache

ACTIVE = [torch.tensor([1, 4]), torch.tensor([[0, 2], [4, 3]])]


def rows(count, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, 3, 4, generator=g), torch.randn(2, count, 3, 4, generator=g)


@pytest.mark.parametrize("active", ACTIVE)
def test_only_active_rows_change(active):
    cache = KVCache()
    k, v = rows(5, 0)
    cache.write(k, v)
    new_k, new_v = rows(2, 1)
    cache.write(new_k, new_v, active)
    got_k, got_v = cache.keys_values(torch.float32)
    for b in range(2):
        chosen = active if active.ndim == 1 else active[b]
        want_k, want_v = k[b].clone(), v[b].clone()
        want_k[chosen], want_v[chosen] = new_k[b], new_v[b]
        assert torch.equal(got_k[b], want_k)
        assert torch.equal(got_v[b], want_v)


def test_buffers_are_kept_and_released():
    cache = KVCache()
    cache.write(*rows(5, 0))
    assert cache.k is not None
    pointer = cache.k.data_ptr()
    cache.write(*rows(5, 1))
    assert cache.k.data_ptr() == pointer
    assert cache.nbytes == 2 * 2 * 5 * 3 * 4 * 4
    cache.write(*rows(7, 1))
    assert cache.k.shape[1] == 7
    cache.release()
    assert cache.nbytes == 0


def test_dtype_is_converted_both_ways():
    cache = KVCache(torch.bfloat16)
    k, v = rows(5, 0)
    cache.write(k, v)
    cache.write(*rows(2, 1), torch.tensor([0, 1]))
    assert cache.k is not None
    assert cache.k.dtype == torch.bfloat16
    assert cache.keys_values(torch.float32)[0].dtype == torch.float32


def test_forecast_extrapolates_rows_with_a_weight():
    cache = KVCache(history=True)
    (k0, v0), (k1, v1) = rows(5, 0), rows(5, 1)
    cache.write(k0, v0)
    assert torch.equal(cache.keys_values(torch.float32, torch.zeros(2, 5))[0], k0)
    cache.write(k1, v1)
    weight = torch.tensor([[0.0, 0.5, 1.0, 2.0, 0.0]] * 2)
    got_k, got_v = cache.keys_values(torch.float32, weight)
    w = weight[:, :, None, None]
    assert torch.allclose(got_k, k1 + w * (k1 - k0))
    assert torch.allclose(got_v, v1 + w * (v1 - v0))
    assert torch.equal(got_k[:, 0], k1[:, 0])


@pytest.mark.parametrize("history", [False, True])
def test_flat_rows_are_those_of_samples_with_different_counts(history):
    flat, each = KVCache(torch.bfloat16, history), KVCache(torch.bfloat16, history)
    for cache in (flat, each):
        cache.write(*rows(5, 0))
    k, v = rows(2, 1)
    each.write(k, v, torch.tensor([[0, 2], [4, 3]]))
    flat.write_flat(k.flatten(0, 1), v.flatten(0, 1), torch.tensor([0, 2, 5 + 4, 5 + 3]))
    # One sample has a third row, which no [B, A] could say.
    flat.write_flat(k[1, :1], v[1, :1], torch.tensor([5 + 1]))
    each.write(k[1:, :1].expand(2, -1, -1, -1), v[1:, :1].expand(2, -1, -1, -1), torch.tensor([[4], [1]]))
    weight = torch.full((2, 5), 0.5) if history else None
    for got, want in zip(flat.keys_values(torch.float32, weight), each.keys_values(torch.float32, weight), strict=True):
        assert torch.equal(got[1], want[1])
        assert torch.equal(got[0, :4], want[0, :4])


def test_a_view_into_a_message_does_not_shape_the_buffer():
    cache = KVCache()
    k, v = torch.randn(5, 2, 2, 3, 4).transpose(0, 2).unbind(1)
    assert not k.is_contiguous()
    cache.write(k, v)
    assert cache.k is not None and cache.k.is_contiguous() and torch.equal(cache.k, k)
    cache.write_flat(k[0, :1], v[0, :1], torch.tensor([9]))
    assert torch.equal(cache.k[1, 4], k[0, 0])
