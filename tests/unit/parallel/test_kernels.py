import logging
import math
import sys
from enum import Enum
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from heterostep.errors import ConfigError
from heterostep.parallel.kernels import Kernel, merge, pick


def softmax_attention(q, k, v):
    """Attention and its logsumexp in float64, by the definition."""
    scores = torch.einsum("bahd,bnhd->bahn", q.double(), k.double()) / math.sqrt(q.shape[-1])
    return torch.einsum("bahn,bnhd->bahd", scores.softmax(-1), v.double()), scores.logsumexp(-1)


def qkv(A, N, D=8, B=2, H=3, dtype=torch.float32, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, n, H, D, generator=g) * scale for n in (A, N, N))
    return q.to(dtype), k.to(dtype), v.to(dtype)


@pytest.mark.parametrize("D", [1, 7, 8, 16, 40, 128])
@pytest.mark.parametrize(("A", "N"), [(1, 1), (1, 9), (5, 1), (33, 70)])
def test_sdpa_is_a_softmax(A, N, D):
    q, k, v = qkv(A, N, D)
    kernel = pick("sdpa", "cpu")
    out, lse = kernel.attend(q, k, v)
    want_out, want_lse = softmax_attention(q, k, v)
    assert lse.shape == (2, A, 3) and lse.dtype == torch.float32
    assert (out - want_out).abs().max() < 2e-6
    assert (lse - want_lse).abs().max() < 2e-6
    assert (kernel.attend_out(q, k, v) - want_out).abs().max() < 2e-6


def test_sdpa_in_bfloat16_keeps_its_lse_in_float32_and_takes_views():
    packed = torch.randn(11, 3, 2, 4, 16, dtype=torch.bfloat16).transpose(0, 2)
    q, k, v = packed.unbind(1)
    out, lse = pick("sdpa", "cpu").attend(q, k, v)
    want_out, want_lse = softmax_attention(q, k, v)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert (lse - want_lse).abs().max() < 1e-2
    assert (out - want_out).abs().max() < 2e-2


def test_without_lse_sdpa_is_called_as_diffusers_calls_it():
    q, k, v = qkv(17, 40)
    stock = F.scaled_dot_product_attention(*(t.permute(0, 2, 1, 3) for t in (q, k, v))).permute(0, 2, 1, 3)
    assert torch.equal(pick("auto", "cpu").attend_out(q, k, v), stock)


@pytest.mark.parametrize(("A", "N"), [(0, 5), (3, 0), (0, 0)])
def test_no_queries_and_no_keys(A, N):
    out, lse = pick("sdpa", "cpu").attend(*qkv(A, N))
    assert out.shape == (2, A, 3, 8) and lse.shape == (2, A, 3)
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_output_of_no_queries():
    assert pick("sdpa", "cpu").attend_out(*qkv(0, 4)).shape == (2, 0, 3, 8)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.integers(0, 99),
    # Wide scores in float64, where the kernel is exact: what is left would be an error of the merge.
    st.sampled_from([(torch.float32, 1.0, 1e-5), (torch.float64, 1.0, 1e-12), (torch.float64, 30.0, 1e-9)]),
)
def test_merged_parts_are_one_softmax(parts, seed, precision):
    dtype, scale, tolerance = precision
    q, k, v = qkv(4, sum(parts), seed=seed, scale=scale, dtype=dtype)
    pieces = zip(k.split(parts, 1), v.split(parts, 1), strict=True)
    outs, lses = zip(*(pick("sdpa", "cpu").attend(q, *piece) for piece in pieces), strict=True)
    out, lse = merge(torch.stack(outs), torch.stack(lses))
    assert out.dtype == lse.dtype == dtype
    if not sum(parts):
        assert (out == 0).all() and (lse == -torch.inf).all()
        return
    want_out, want_lse = softmax_attention(q, k, v)
    assert (out - want_out).abs().max() < tolerance
    assert (lse - want_lse).abs().max() < tolerance


def test_merge_is_associative():
    q, k, v = qkv(5, 12)
    pieces = zip(k.split(4, 1), v.split(4, 1), strict=True)
    outs, lses = map(torch.stack, zip(*(pick("sdpa", "cpu").attend(q, *piece) for piece in pieces), strict=True))
    first = merge(outs[:2], lses[:2])
    nested = merge(torch.stack([first[0], outs[2]]), torch.stack([first[1], lses[2]]))
    for a, b in zip(nested, merge(outs, lses), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_merge_widens_before_it_adds():
    outs = torch.full((3, 1, 4), 1.0, dtype=torch.bfloat16)
    out, lse = merge(outs, torch.zeros(3, 1))
    assert out.dtype == torch.float32 and torch.allclose(out, torch.ones(1, 4))
    assert torch.allclose(lse, torch.tensor([math.log(3)]))


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [
        ("flash", "cpu", "kernel='flash' on cpu: it needs a CUDA device"),
        ("xfuser", "cpu", "kernel='xfuser' on cpu"),
        ("flash", "cuda", "flash-attn cannot be imported"),
        ("flash3", "cuda", "flash-attn 3 cannot be imported"),
        ("xfuser", "cuda", "xfuser cannot be imported"),
        ("sage", "cpu", "kernel='sage': one of auto, sdpa, flash, flash3, xfuser"),
    ],
)
def test_a_kernel_that_is_not_there_is_refused(name, device, message, monkeypatch):
    for absent in ("flash_attn", "flash_attn_interface", "flash_attn_3", "xfuser"):
        monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(ConfigError, match=message):
        pick(name, device)


def cpu_flash(q, k, v):
    """Stand in for a GPU library's kernel: [B, A, H, D] -> out and lse [B, H, A]."""
    out, lse = pick("sdpa", "cpu").attend(q, k, v)
    return out, lse.transpose(1, 2)


def install(monkeypatch, name, **contents):
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def flash2(q, k, v, dropout_p=0.0, return_attn_probs=False):
    out, lse = cpu_flash(q, k, v)
    return (out, lse, None) if return_attn_probs else out


def flash3(q, k, v, return_attn_probs=False):
    return cpu_flash(q, k, v) if return_attn_probs else cpu_flash(q, k, v)[0]


def early_flash3(q, k, v):
    return cpu_flash(q, k, v)


@pytest.mark.parametrize(
    ("name", "module", "function"),
    [
        ("flash", "flash_attn", flash2),
        ("flash3", "flash_attn_interface", flash3),
        ("flash3", "flash_attn_interface", early_flash3),
    ],
)
def test_adapters_of_flash_attention(name, module, function, monkeypatch):
    """The libraries need a GPU: here their signatures are tried, in tests/gpu they themselves."""
    install(monkeypatch, module, flash_attn_func=function)
    kernel = pick(name, "cuda")
    q, k, v = qkv(5, 9, dtype=torch.bfloat16)
    for got, want in zip(kernel.attend(q, k, v), pick("sdpa", "cpu").attend(q, k, v), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(kernel.attend_out(q, k, v), kernel.attend(q, k, v)[0])
    with pytest.raises(ConfigError, match=f"kernel='{name}' with torch.float32"):
        kernel.attend(*qkv(5, 9))


def test_auto_takes_flash_for_half_precision_only(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    monkeypatch.setitem(sys.modules, "flash_attn_3", None)
    used = []

    def spy(q, k, v, dropout_p=0.0, return_attn_probs=False):
        used.append(q.dtype)
        return flash2(q, k, v, dropout_p, return_attn_probs)

    install(monkeypatch, "flash_attn", flash_attn_func=spy)
    with caplog.at_level(logging.INFO):
        kernel = pick("auto", "cuda")
    assert caplog.messages == ["attention kernel: flash for half precision, else sdpa (chosen for cuda)"]
    kernel.attend(*qkv(5, 9, dtype=torch.float16))
    kernel.attend_out(*qkv(5, 9))
    assert used == [torch.float16]
    install(monkeypatch, "flash_attn_interface", flash_attn_func=flash3)
    assert pick("auto", "cuda").name == "flash3 for half precision, else sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert pick("auto", "cuda").name == "flash for half precision, else sdpa"
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert pick("auto", "cuda").name == "sdpa"


def test_adapter_of_the_registry_of_xfuser(monkeypatch):
    backends = Enum("AttentionBackendType", ["CUDNN", "FLASH_3", "SDPA"])

    def cudnn(query, key, value, dropout_p, is_causal, attention_kwargs=None):
        out, lse = pick("sdpa", "cpu").attend(*(t.transpose(1, 2) for t in (query, key, value)))
        return out.transpose(1, 2), F.pad(lse.transpose(1, 2), (0, 3))

    def sdpa(query, key, value, dropout_p, is_causal, attention_kwargs=None):
        return cudnn(query, key, value, dropout_p, is_causal)[0], None

    job = SimpleNamespace(attention_backend=None)
    for name in ("xfuser", "xfuser.core", "xfuser.core.distributed"):
        install(monkeypatch, name)
    install(
        monkeypatch,
        "xfuser.core.distributed.attention_backend",
        AttentionBackendType=backends,
        ATTENTION_FUNCTION_REGISTRY={backends.CUDNN: cudnn, backends.SDPA: sdpa},
    )
    install(
        monkeypatch,
        "xfuser.core.distributed.runtime_state",
        runtime_state_is_initialized=lambda: job.attention_backend is not None,
        get_runtime_state=lambda: job,
    )
    install(monkeypatch, "xfuser.envs", PACKAGES_CHECKER=SimpleNamespace(packages_info={}))
    kernel = pick("xfuser", "cuda")
    assert kernel.name == "xfuser CUDNN"
    for got, want in zip(kernel.attend(*qkv(5, 9)), pick("sdpa", "cpu").attend(*qkv(5, 9)), strict=True):
        assert torch.equal(got, want)
    job.attention_backend = backends.SDPA
    kernel = pick("xfuser", "cuda")
    assert torch.equal(kernel.attend_out(*qkv(5, 9)), pick("sdpa", "cpu").attend_out(*qkv(5, 9)))
    with pytest.raises(ConfigError, match="is SDPA here, which returns no logsumexp"):
        kernel.attend(*qkv(5, 9))


def test_a_kernel_never_sees_empty_tensors():
    def explode(q, k, v):
        raise AssertionError("called")

    kernel = Kernel("explosive", explode, explode)
    kernel.attend(*qkv(0, 4))
    kernel.attend(*qkv(4, 0))
    kernel.attend_out(*qkv(0, 4))
