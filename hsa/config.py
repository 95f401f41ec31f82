"""`HSAConfig`: how much to compute and, for those who want to say so, how."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError

POLICIES = ("joint", "tokens", "groups", "steps")
SOLVERS = ("euler", "unipc", "dpm++")
FORECASTS = ("hold", "taylor", "ab2")
KV_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class HSAConfig:
    """Settings of heterogeneous step allocation. Every field that is ``None`` is deduced.

    Attributes:
        compute: target share of the dense denoising work, in (0, 1]; .5 means half of the token evaluations
            and so, since every term of the cost is linear in the active tokens, half of the denoising time.
        policy: how the budget is spent. ``joint`` puts whole steps where the error that reaches the end is least and
            adds a partial one where whole ones miss the target; ``tokens`` ranks tokens at every evaluated step;
            ``groups`` is the paper's reading (groups with step divisors 1, 2, 4, 8); ``steps`` evaluates whole steps
            only and so meets the target to within half a step.
        warmup: number of first steps at which all tokens are active, at least 1.
        cooldown: number of last steps at which all tokens are active.
        profile: exponent a; the share of a step's tokens (``tokens``) or the density of evaluated steps (``steps``)
            is proportional to (sigma_i - sigma_next)^a, so that a < 0 spends more where the sigma steps are small
            (early). The other policies do without.
        solver: replaces the pipeline's scheduler; ``None`` keeps it.
        forecast: what a skipped token's velocity is taken to be: ``hold`` (its last one, as in the paper),
            ``taylor`` (extrapolated linearly in sigma), ``ab2`` (Adams-Bashforth 2 on each token's own
            sub-grid).
        correct: whether a token's next evaluation corrects its forecast in hindsight (`velocity.VelocityCache`);
            deduced: where the solver is Euler, the policy works by whole steps (``joint``, ``steps``) and the forecast
            is not ``hold``, which is the paper's.
        kv_forecast: damping in [0, 1] of the linear forecast of stale keys and values; 0 is off; above 0
            doubles the cache.
        max_age: a token is evaluated again after at most this many evaluated steps, as far as the budget
            allows; ``groups`` has its divisors instead.
        kv_dtype: data type of the cached keys and values; ``None`` keeps the computed one.

    Raises:
        ConfigError: a value is out of range or of the wrong type.
    """

    compute: float = 0.5
    policy: str = "joint"
    warmup: int | None = None
    cooldown: int | None = None
    profile: float | None = None
    solver: str | None = None
    forecast: str | None = None
    correct: bool | None = None
    kv_forecast: float | None = None
    max_age: int | None = None
    kv_dtype: str | None = None

    def __post_init__(self) -> None:
        """Check every field; see the class for the rules."""
        compute = _number("compute", self.compute)
        if not 0.0 < compute <= 1.0:
            raise ConfigError(
                f"compute={self.compute!r}: it is a share of the dense work, above 0 and at most 1, e.g. 0.5."
            )
        object.__setattr__(self, "compute", compute)
        _choice("policy", self.policy, POLICIES)
        for name, choices in (("solver", SOLVERS), ("forecast", FORECASTS), ("kv_dtype", KV_DTYPES)):
            if getattr(self, name) is not None:
                _choice(name, getattr(self, name), choices)
        for name, least in (("warmup", 1), ("cooldown", 0), ("max_age", 1)):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), least)
        if self.correct is not None and not isinstance(self.correct, bool):
            raise ConfigError(f"correct={self.correct!r}: True or False is needed, or None to have it deduced.")
        if self.profile is not None:
            exponent = _number("profile", self.profile)
            if abs(exponent) > 4.0:
                raise ConfigError(f"profile={self.profile!r}: the exponent lies between -4 and 4, e.g. -0.5.")
        if self.kv_forecast is not None and not 0.0 <= _number("kv_forecast", self.kv_forecast) <= 1.0:
            raise ConfigError(f"kv_forecast={self.kv_forecast!r}: a damping between 0 (off) and 1, e.g. 0.5.")


def _number(name: str, value: Any) -> float:
    """Return `value` as a finite float, or refuse it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{name}={value!r}: a finite number is needed, e.g. 0.5.")
    return float(value)


def _whole(name: str, value: Any, least: int) -> None:
    """Refuse anything but a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(
            f"{name}={value!r}: a whole number of at least {least} is needed, or None to have it deduced."
        )


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse anything but one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name}={value!r}: one of {', '.join(choices)} is needed.")
