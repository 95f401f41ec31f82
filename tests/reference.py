"""An independent reference of HSA: it recomputes every token at every step and masks in stale keys and
values.

Nothing is imported from heterostep. Attention is a plain einsum; packing, gathering and caches do not occur.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding by complex numbers."""
    z = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    turn = torch.complex(cos[..., 0::2].float(), sin[..., 1::2].float())
    return torch.view_as_real(z * turn).flatten(-2).type_as(x)


@dataclass
class History:
    """The last two evaluations of every token of one branch."""

    last: dict[str, Tensor] = field(default_factory=dict)
    prev: dict[str, Tensor] = field(default_factory=dict)
    sigma_last: Tensor | None = None
    sigma_prev: Tensor | None = None

    def mix(self, name: str, fresh: Tensor, mask: Tensor) -> Tensor:
        """Rows of `mask` [B, N] from `fresh`, the others from the last evaluation; moves the history on."""
        m = mask.reshape(*mask.shape, *[1] * (fresh.ndim - 2))
        old = self.last.get(name, fresh)
        self.prev[name] = torch.where(m, old, self.prev.get(name, old))
        self.last[name] = torch.where(m, fresh, old)
        return self.last[name]

    def tick(self, sigma: float, mask: Tensor) -> None:
        if self.sigma_last is None:
            self.sigma_last = torch.full(mask.shape, sigma)
            self.sigma_prev = torch.full(mask.shape, float("inf"))  # one evaluation only: no slope
            return
        self.sigma_prev = torch.where(mask, self.sigma_last, self.sigma_prev)
        self.sigma_last = torch.where(mask, torch.full(mask.shape, sigma), self.sigma_last)

    def at(self, name: str, sigma: float, damp: float = 1.0) -> Tensor:
        """Linear forecast of rows at `sigma`."""
        slope_time = (sigma - self.sigma_last) / (self.sigma_last - self.sigma_prev)
        slope_time = torch.where(self.sigma_prev.isinf(), torch.zeros_like(slope_time), slope_time)
        w = slope_time.reshape(*slope_time.shape, *[1] * (self.last[name].ndim - 2)) * damp
        return self.last[name] + w * (self.last[name] - self.prev[name])


@dataclass
class Hindsight:
    """Corrects forecasts token by token: a polynomial through the known velocities against what was applied."""

    sigmas: list[float]
    forecast: str
    known: dict[tuple[int, int], list[tuple[int, Tensor]]] = field(default_factory=dict)
    applied: list[Tensor] = field(default_factory=list)

    def owed(self, step: int, fresh: Tensor, mask: Tensor) -> Tensor:
        """Displacement [B, N, D] of every token evaluated at `step`, and remember its velocity."""
        out = torch.zeros_like(fresh)
        for b, n in mask.nonzero().tolist():
            known = self.known.setdefault((b, n), [])
            if known:
                begin = known[-1][0]
                knots = (
                    [*known[-2:], (step, fresh[b, n])] if self.forecast != "hold" else [known[-1], (step, fresh[b, n])]
                )
                out[b, n] = self._true(knots, begin, step) - self._moved(b, n, begin, step)
            known.append((step, fresh[b, n].clone()))
        return out

    def _moved(self, b: int, n: int, begin: int, step: int) -> Tensor:
        first = begin if self.forecast == "ab2" else begin + 1
        h = [self.sigmas[j + 1] - self.sigmas[j] for j in range(len(self.sigmas) - 1)]
        return sum((h[j] * self.applied[j][b, n] for j in range(first, step)), torch.tensor(0.0))

    def _true(self, knots: list[tuple[int, Tensor]], begin: int, step: int) -> Tensor:
        s = self.sigmas

        def u(sigma: float) -> Tensor:
            return lagrange([(s[at], v) for at, v in knots], sigma)

        if self.forecast == "ab2":  # Simpson's rule is exact for parabolas
            return (s[step] - s[begin]) * (u(s[begin]) + 4 * u((s[begin] + s[step]) / 2) + u(s[step])) / 6
        return sum(((s[j + 1] - s[j]) * u(s[j]) for j in range(begin + 1, step)), torch.tensor(0.0))


def replayed(scheduler: Any, evaluated: Callable[[int, Tensor], Tensor], forecast: str = "taylor") -> Any:
    """A scheduler like the given one, of any kind, that takes the whole run again at each of its steps.

    It does so with the polynomials through all velocities that are known by then. `evaluated(step, velocity)` says
    which elements of a velocity are fresh at a step.
    """
    base = type(scheduler)

    class Replayed(base):
        @functools.wraps(base.set_timesteps)  # pipelines look at what it takes
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)
            self.arguments, self.moves, self.calls = (args, kwargs), [], []
            self.forget()

        def forget(self) -> None:
            self.known: dict[int, tuple[Tensor, Tensor]] = {}

        def step(self, velocity: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
            i, mask = len(self.moves), evaluated(len(self.moves), velocity)
            levels = [float(s) for s in self.sigmas]
            self.start = self.start if self.moves else sample
            numbers = sorted(self.known)
            before = [self.known[number] for number in numbers]
            for place in range(len(before)):  # where this was the last evaluation, and `back` the one before
                last, here = numbers[place], mask & before[place][0]
                for later, _ in before[place + 1 :]:
                    here = here & ~later
                for back in [*range(place - 1, -1, -1), None] if forecast != "hold" else [None]:
                    chosen = here & before[back][0] if back is not None else here
                    knots = [(levels[last], before[place][1]), (levels[i], velocity)]
                    if back is not None:
                        knots.append((levels[numbers[back]], before[back][1]))
                        here = here & ~before[back][0]
                    for j in range(last + 1, i):
                        self.moves[j] = torch.where(chosen, lagrange(knots, levels[j]), self.moves[j])
            if mask.any():
                self.known[i] = mask, velocity.clone()
            self.moves.append(velocity.clone())
            self.calls.append(timestep)
            again = base.from_config(self.config)
            again.set_timesteps(*self.arguments[0], **self.arguments[1])
            again.set_begin_index(0)
            sample = self.start
            for move, at in zip(self.moves, self.calls, strict=True):
                sample = again.step(move, at, sample, return_dict=False)[0]
            self._step_index = i + 1
            return (sample,)

    return Replayed.from_config(scheduler.config)


def lagrange(knots: list[tuple[float, Tensor]], at: float) -> Tensor:
    """The polynomial through (sigma, velocity) pairs."""
    total = torch.zeros(())
    for i, (a, v) in enumerate(knots):
        basis = 1.0
        for j, (c, _) in enumerate(knots):
            if i != j:
                basis *= (at - c) / (a - c)
        total = total + basis * v
    return total


class MaskedProcessor(WanAttnProcessor):
    """All tokens are computed; keys and values of inactive ones are replaced by those of their last
    evaluation."""

    def __init__(self, layer: int, reference: Reference) -> None:
        super().__init__()
        self.layer, self.reference = layer, reference

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        r, layer = self.reference, self.layer
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        k = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1))
        v = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        q, k = rotate(q, *rotary_emb), rotate(k, *rotary_emb)
        mixed = []
        for name, fresh in ((f"k{layer}", k), (f"v{layer}", v)):
            stale = r.history.at(name, r.sigma, r.damp) if r.damp and name in r.history.last else None
            rows = r.history.mix(name, fresh, r.mask)
            mixed.append(rows if stale is None else torch.where(r.mask[:, :, None, None], fresh, stale))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, mixed[0]) * q.shape[-1] ** -0.5
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), mixed[1]).flatten(2, 3)
        return attn.to_out[1](attn.to_out[0](out))


class Reference:
    """Runs the denoising loop of a tiny pipeline under a given plan."""

    def __init__(self, pipe: Any, forecast: str, damp: float = 0.0, correct: bool = False) -> None:
        self.models = [copy.deepcopy(m) for m in (pipe.transformer, pipe.transformer_2) if m is not None]
        self.scheduler = copy.deepcopy(pipe.scheduler)
        # Euler's correction has a closed form, per branch; any other scheduler takes its steps again.
        self.again = correct and not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
        if self.again:
            self.scheduler = replayed(pipe.scheduler, self.evaluated, forecast)
        self.boundary = pipe.config.boundary_ratio
        self.per_token = pipe.config.expand_timesteps
        self.forecast, self.damp, self.correct = forecast, damp, correct and not self.again
        for model in self.models:
            for i, block in enumerate(model.blocks):
                block.attn1.set_processor(MaskedProcessor(i, self))

    def evaluated(self, step: int, velocity: Tensor) -> Tensor:
        """Which elements of a velocity are fresh."""
        _, c, f, y, x = velocity.shape
        return self.video(self.mask[..., None].expand(-1, -1, 4 * c).float(), (f, y, x)) > 0

    def velocity(self, name: str, model: Any, noisy: Tensor, step: Tensor, embeds: Tensor, seen: Tensor | None):
        """What the model says of the whole video; `name` is the branch."""
        return model(noisy, step, embeds, seen, return_dict=False)[0]

    def given(self, latents: Tensor, t: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """The model's input and timesteps; `condition` is a first latent frame, or channels to be appended."""
        b, _, f, y, x = latents.shape
        n = f * (y // 2) * (x // 2)
        if not self.per_token:
            return latents if condition is None else torch.cat([latents, condition], 1), t.expand(b)
        step = t.repeat(b, n)
        if condition is not None:
            latents = torch.cat([condition, latents[:, :, 1:]], 2)
            step[:, : n // f] = 0
        return latents, step

    @torch.no_grad()
    def run(
        self,
        latents: Tensor,
        plans: list[Tensor | None],
        text: Tensor,
        negative: Tensor | None,
        scale: float,
        condition: Tensor | None = None,
        seen: Tensor | None = None,
    ):
        """Return the final latents; `plans` holds None, [0], [A] or [B, A] per step.

        `condition` as in `given`; `seen` is what the image encoder says of the image.
        """
        scheduler = self.scheduler
        scheduler.set_timesteps(len(plans))
        scheduler.set_begin_index(0)
        sigmas = [float(s) for s in scheduler.sigmas]
        texts = {"cond": text} if negative is None else {"cond": text, "uncond": negative}
        histories = {name: History() for name in texts}
        hindsight = {name: Hindsight(sigmas, self.forecast) for name in texts}
        b, _, f, y, x = latents.shape
        n, before = f * (y // 2) * (x // 2), 0
        for i, t in enumerate(scheduler.timesteps):
            expert = int(self.boundary is not None and float(t) < self.boundary * 1000)
            if expert != before:
                histories, before = {name: History() for name in texts}, expert
                for corrector in hindsight.values():
                    corrector.known.clear()
                if self.again:
                    scheduler.forget()
            self.mask = torch.zeros(b, n, dtype=torch.bool)
            for s in range(b):
                chosen = plans[i]
                self.mask[s, slice(None) if chosen is None else (chosen[s] if chosen.ndim == 2 else chosen)] = True
            self.sigma = sigmas[i]
            out = {}
            for name, embeds in texts.items():
                self.history = histories[name]
                if self.mask.any():
                    noisy, step = self.given(latents, t, condition)
                    v = self.velocity(name, self.models[expert], noisy, step, embeds, seen)
                    self.history.mix("velocity", self.rows(v), self.mask)
                    self.history.tick(self.sigma, self.mask)
                where = {"hold": None, "taylor": sigmas[i], "ab2": (sigmas[i] + sigmas[i + 1]) / 2}[self.forecast]
                last = self.history.last["velocity"]
                rows = last if where is None else self.history.at("velocity", where)
                hindsight[name].applied.append(rows)
                if self.correct and self.mask.any():
                    rows = rows + hindsight[name].owed(i, last, self.mask) / (sigmas[i + 1] - sigmas[i])
                out[name] = self.video(rows, (f, y, x))
            v = out["cond"] if negative is None else out["uncond"] + scale * (out["cond"] - out["uncond"])
            latents = scheduler.step(v, t, latents, return_dict=False)[0]
        return latents if condition is None else self.given(latents, t, condition)[0][:, : latents.shape[1]]

    @staticmethod
    def rows(video: Tensor) -> Tensor:
        """[B, C, F, Y, X] -> [B, N, C * 4] by unfolding, patch (1, 2, 2)."""
        cells = video.unfold(3, 2, 2).unfold(4, 2, 2)
        return cells.permute(0, 2, 3, 4, 1, 5, 6).flatten(4).flatten(1, 3)

    @staticmethod
    def video(rows: Tensor, shape: tuple[int, int, int]) -> Tensor:
        f, y, x = shape
        out = rows.new_zeros(rows.shape[0], rows.shape[2] // 4, f, y, x)
        cells = rows.unflatten(1, (f, y // 2, x // 2)).unflatten(-1, (-1, 2, 2))
        for dy in range(2):
            for dx in range(2):
                out[:, :, :, dy::2, dx::2] = cells[..., dy, dx].permute(0, 4, 1, 2, 3)
        return out
