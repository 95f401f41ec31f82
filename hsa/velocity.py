"""The velocities of all tokens, fresh or not, and what is assumed of those that are not (`hindsight` corrects it).

Notation: a token n was last evaluated at sigma_l with velocity v_l and before that at sigma_p with v_p. Its
slope is s = (v_l - v_p) / (sigma_l - sigma_p), zero until two evaluations exist. The sampler moves x along
dx/dsigma = v.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .cache import fill_rows, gather_rows, write_rows


class TokenClock:
    """When each token was evaluated last, and the time before, in sigma."""

    def __init__(self, batch_size: int, num_tokens: int, device: torch.device | str = "cpu") -> None:
        """Start without any evaluation."""
        shape = (batch_size, num_tokens)
        self.last = torch.full(shape, torch.nan, dtype=torch.float32, device=device)
        self.prev = torch.full(shape, torch.nan, dtype=torch.float32, device=device)

    def reset(self) -> None:
        """Forget all evaluations."""
        self.last.fill_(torch.nan)
        self.prev.fill_(torch.nan)

    def tick(self, active: Tensor | None, sigma: float) -> None:
        """Note that the active tokens ([A], [B, A], None for all) were evaluated at `sigma`."""
        write_rows(self.prev, active, gather_rows(self.last, active))
        fill_rows(self.last, active, sigma)

    def weight(self, sigma: float) -> Tensor:
        """Return (sigma - sigma_l) / (sigma_l - sigma_p), float32 [B, N]: the factor of (v_l - v_p).

        Zero for tokens without two evaluations, which is the slope's definition there.
        """
        # NaN marks "never": any token without two evaluations gives NaN, and NaN becomes 0.
        return ((sigma - self.last) / (self.last - self.prev)).nan_to_num_(0.0, 0.0, 0.0)


class VelocityCache:
    """Velocity tokens [B, N, D] of one guidance branch, float32 or wider.

    ``forecast`` says what `merged` returns at a step sigma_i -> sigma_{i+1}:

    * ``hold``: v_l. The paper's cached Euler. Over k skipped steps the updates telescope, sum (sigma_{j+1} -
      sigma_j) v_l = (sigma_{i+k} - sigma_i) v_l, so a token is plain Euler on its own coarser grid. (``none`` does
      the same, for whom it does not matter.)
    * ``taylor``: v_l + s (sigma_i - sigma_l): the first-order Taylor expansion in sigma, evaluated where the
      sampler stands. For a token evaluated at this step sigma_l = sigma_i, so it gets its exact velocity.
      Suits any scheduler because it forecasts what the model would have returned.
    * ``ab2``: v_l + s ((sigma_i + sigma_{i+1}) / 2 - sigma_l), for *all* tokens. The linear velocity
      u(sigma) = v_l + s (sigma - sigma_l) is integrated over the step; the midpoint rule is exact for
      linear functions, so the sum over skipped steps telescopes to the integral from sigma_l to the next
      evaluation sigma_m: (sigma_m - sigma_l) (v_l + (sigma_m - sigma_l) / 2 * s), which is the
      Adams-Bashforth step of order 2 with variable step size on the token's own sub-grid. Belongs with
      Euler: a multistep scheduler would add its own second order.
    """

    def __init__(self, forecast: str = "hold") -> None:
        """Create an empty cache; `start` allocates."""
        self.forecast = forecast
        self.last: Tensor | None = None
        self.prev: Tensor | None = None
        self.clock: TokenClock | None = None

    def start(
        self, batch_size: int, num_tokens: int, width: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        """Begin a run: all tokens unevaluated. Buffers of the same shape are kept, but not what is in them."""
        shape = (batch_size, num_tokens, width)
        dtype = torch.promote_types(dtype, torch.float32)
        last = self.last
        if last is None or last.shape != shape or last.dtype != dtype or last.device != torch.device(device):
            self.last = torch.zeros(shape, dtype=dtype, device=device)
            self.prev = None if self.forecast in ("hold", "none") else torch.zeros_like(self.last)
            self.clock = TokenClock(batch_size, num_tokens, device)
        elif self.prev is not None:
            # An earlier run may have ended in NaN, and a weight of 0 times NaN is still NaN.
            self.prev.zero_()
            last.zero_()
        self.reset()

    def reset(self) -> None:
        """Forget all evaluations, as at an expert switch: slopes across two models mean nothing."""
        assert self.clock is not None, "start() comes first"
        self.clock.reset()

    def write(self, active: Tensor | None, rows: Tensor, sigma: float) -> None:
        """Store velocities [B, A, D] of the active tokens ([A], [B, A], None: all), evaluated at `sigma`."""
        assert self.last is not None and self.clock is not None, "start() comes first"
        if self.prev is not None:
            if active is None:
                self.prev, self.last = self.last, self.prev
            else:
                write_rows(self.prev, active, gather_rows(self.last, active))
        write_rows(self.last, active, rows)
        self.clock.tick(active, sigma)

    def merged(self, sigma: float, sigma_next: float) -> Tensor:
        """Velocity [B, N, D] of all tokens for the step sigma -> sigma_next; see the class. Not to be written to."""
        assert self.last is not None and self.clock is not None, "start() comes first"
        velocity = self.last
        if self.prev is not None:
            at = sigma if self.forecast == "taylor" else 0.5 * (sigma + sigma_next)
            weight = self.clock.weight(at)[..., None].to(velocity.dtype)
            velocity = velocity + weight * (velocity - self.prev)
        return velocity

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, as it is at the end of a step; the tensors are not copies."""
        clock = None if self.clock is None else {"last": self.clock.last, "prev": self.clock.prev}
        return {"last": self.last, "prev": self.prev, "clock": clock}

    def restore(self, state: Mapping[str, Any], device: torch.device | str) -> None:
        """Go on where a cache of the same settings was when it gave its `state`."""
        self.last, self.prev = (None if state[k] is None else state[k].to(device) for k in ("last", "prev"))
        self.clock = None
        if state["clock"] is not None:
            self.clock = TokenClock(0, 0, device)
            self.clock.last, self.clock.prev = (state["clock"][k].to(device) for k in ("last", "prev"))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in (self.last, self.prev) if t is not None)
