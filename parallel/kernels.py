"""Attention kernels under one signature, with the logsumexp that partial results are merged by.

Shapes everywhere: q [B, A, H, D], k and v [B, N, H, D] -> out [B, A, H, D] and lse [B, A, H], float32 (float64 for
float64 queries). lse = log sum_n exp(q . k_n / sqrt(D)). No mask: every query attends to every key.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from .config import KERNELS
from .mesh import registry_attention

logger = logging.getLogger(__name__)

WithLse = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Plain = Callable[[Tensor, Tensor, Tensor], Tensor]

HALF = (torch.float16, torch.bfloat16)


class Kernel:
    """One attention kernel; makes the cases without queries or keys harmless, which most kernels do not bear."""

    def __init__(self, name: str, with_lse: WithLse, plain: Plain, dtypes: tuple[torch.dtype, ...] = ()) -> None:
        """Wrap functions of non-empty q, k, v.

        Args:
            name: what it is, for logs and messages.
            with_lse: returns (out, lse [B, A, H]).
            plain: returns out only, perhaps faster.
            dtypes: what it can compute in; empty for all.
        """
        self.name, self.dtypes = name, dtypes
        self._with_lse, self._plain = with_lse, plain

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return out and lse; without keys 0 and -inf, the neutral element of `merge`."""
        self._check(q)
        if q.numel() == 0 or k.numel() == 0:
            lse_dtype = torch.promote_types(q.dtype, torch.float32)
            return torch.zeros_like(q), q.new_full(q.shape[:-1], -torch.inf, dtype=lse_dtype)
        return self._with_lse(q, k, v)

    def attend_out(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return out alone; there must be keys."""
        self._check(q)
        assert k.shape[1], "attention to no keys has no result"
        return self._plain(q, k, v) if q.numel() else torch.zeros_like(q)

    def _check(self, q: Tensor) -> None:
        if self.dtypes and q.dtype not in self.dtypes:
            raise ConfigError(
                f"kernel={self.name!r} with {q.dtype}: it computes in float16 and bfloat16; "
                "'sdpa' takes any type, and 'auto' chooses by it."
            )


def pick(name: str, device: torch.device | str) -> Kernel:
    """Return a kernel by name.

    * ``sdpa``: PyTorch's own, on any device. Where no lse is needed it is called as diffusers calls it.
    * ``flash``, ``flash3``: flash-attn 2, and 3 for Hopper.
    * ``xfuser``: from xfuser's registry, what the running xfuser job has chosen, else flash-attn 3 or cuDNN.
    * ``auto``: on CUDA flash3 (on Hopper) or flash for half precision where installed, else sdpa. Logged.

    Raises:
        ConfigError: the package is not installed, or the device cannot run it.
    """
    device = torch.device(device)
    if name == "auto":
        kernel = _auto(device)
        logger.info("attention kernel: %s (chosen for %s)", kernel.name, device)
        return kernel
    if name == "sdpa":
        return Kernel("sdpa", _sdpa_with_lse, _sdpa)
    if name not in KERNELS:
        raise ConfigError(f"kernel={name!r}: one of {', '.join(KERNELS)} is needed.")
    if device.type != "cuda":
        raise ConfigError(f"kernel={name!r} on {device}: it needs a CUDA device; 'sdpa' runs anywhere.")
    try:
        return {"flash": _flash2, "flash3": _flash3, "xfuser": _xfuser}[name]()
    except ImportError as error:
        packages = {"flash": "flash-attn", "flash3": "flash-attn 3", "xfuser": "xfuser"}
        raise ConfigError(
            f"kernel={name!r}: {packages[name]} cannot be imported ({error}); install it or take 'sdpa' or 'auto'."
        ) from error


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Combine attention to disjoint sets of keys into attention to all of them.

    out = sum_p exp(lse_p - lse) out_p with lse = log sum_p exp(lse_p): the softmax over all keys, exactly.

    Args:
        outs: [P, ..., D].
        lses: [P, ...]; -inf for a part without keys.

    Returns:
        out [..., D] and lse [...], in float32 or wider; without any key 0 and -inf.
    """
    lses = lses.to(torch.promote_types(lses.dtype, torch.float32))
    lse = lses.logsumexp(0)
    # Without any key lse is -inf, and -inf - -inf is NaN where the weight must be 0.
    weights = (lses - lse.nan_to_num(neginf=0.0)).exp()
    out = torch.zeros(outs.shape[1:], dtype=lse.dtype, device=outs.device)
    for part, weight in zip(outs, weights, strict=True):
        out.addcmul_(part.to(out.dtype), weight[..., None])
    return out, lse


def _auto(device: torch.device) -> Kernel:
    """Choose by device and by what is installed."""
    sdpa = pick("sdpa", device)
    if device.type != "cuda" or torch.version.hip:
        return sdpa
    makers = {"flash3": _flash3, "flash": _flash2}
    if torch.cuda.get_device_capability(device)[0] != 9:
        del makers["flash3"]
    for make in makers.values():
        try:
            return _by_dtype(make(), sdpa)
        except ImportError:
            continue
    return sdpa


def _by_dtype(half: Kernel, other: Kernel) -> Kernel:
    """Join a kernel for half precision with one for every other type."""

    def choose(q: Tensor) -> Kernel:
        return half if q.dtype in half.dtypes else other

    return Kernel(
        f"{half.name} for half precision, else {other.name}",
        lambda q, k, v: choose(q).attend(q, k, v),
        lambda q, k, v: choose(q).attend_out(q, k, v),
    )


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.permute(0, 2, 1, 3) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).permute(0, 2, 1, 3)


def _sdpa_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    num_queries, head_dim = q.shape[1], q.shape[3]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif q.device.type == "cuda":
        # The kernels want rows of whole 16 bytes. Zeros change no product; the scale is that of the true width.
        q, k, v = (F.pad(t, (0, -head_dim % 8)) for t in (q, k, v))
        scale = head_dim**-0.5
        if q.dtype in HALF and q.shape[-1] <= 256:
            out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
        else:
            out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)
        # The efficient kernel's lse has rows up to a multiple of 32.
        out, lse = out[..., :head_dim], lse[..., :num_queries]
    else:
        raise ConfigError(f"ring_cache='sharded' on {q.device}: no kernel there returns a logsumexp; take 'gathered'.")
    return out.transpose(1, 2), lse.transpose(1, 2)


def _flash2() -> Kernel:
    flash = import_module("flash_attn").flash_attn_func

    def with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, _ = flash(q, k, v, return_attn_probs=True)
        return out, lse.transpose(1, 2)

    return Kernel("flash", with_lse, flash, HALF)


def _flash3() -> Kernel:
    try:
        flash = import_module("flash_attn_interface").flash_attn_func
    except ImportError:
        flash = import_module("flash_attn_3.flash_attn_interface").flash_attn_func
    # Early releases always return (out, lse), later ones on request.
    options = {"return_attn_probs": True} if "return_attn_probs" in inspect.signature(flash).parameters else {}

    def with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, *_ = flash(q, k, v, **options)
        return out, lse.transpose(1, 2)

    return Kernel("flash3", with_lse, lambda q, k, v: with_lse(q, k, v)[0], HALF)


def _xfuser() -> Kernel:
    return Kernel(*registry_attention())
