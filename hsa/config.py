"""`HSAConfig`: how much to compute and, for those who want to say so, how."""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import check, setting

POLICIES = ("joint", "tokens", "groups", "steps")
SOLVERS = ("euler", "unipc", "dpm++")
FORECASTS = ("hold", "taylor", "ab2")
KV_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class HSAConfig:
    """Settings of heterogeneous step allocation. Every field that is ``None`` is deduced.

    The cost of a step is linear in its active tokens, so ``compute=0.5`` halves the denoising time. ``profile`` is an
    exponent a: the share of a step's tokens (``tokens``) or the density of evaluated steps (``steps``) is proportional
    to (sigma_i - sigma_next)^a. ``correct`` is deduced as true where the solver is Euler, the policy works by whole
    steps (``joint``, ``steps``) and the forecast is not ``hold``. ``kv_forecast`` above 0 doubles the cache.

    Raises:
        ConfigError: a value is out of range or of the wrong type.
    """

    compute: float = setting(
        0.5, above=0, most=1, metavar="C", help="share of the dense denoising work to spend; 1 is the stock pipeline"
    )
    policy: str = setting(
        "joint",
        choices=POLICIES,
        help="how the share is spent: joint places whole steps, and adds a partial step where they miss the target; "
        "tokens ranks single tokens at every evaluated step; groups follows the paper (step divisors 1, 2, 4, 8); "
        "steps evaluates whole steps only",
    )
    warmup: int | None = setting(None, least=1, help="number of first steps at which all tokens are active")
    cooldown: int | None = setting(None, least=0, help="number of last steps at which all tokens are active")
    profile: float | None = setting(
        None,
        least=-4,
        most=4,
        help="for tokens and steps: exponent of the share over the sigma steps; below 0 spends more on early steps",
    )
    solver: str | None = setting(
        None, choices=SOLVERS, help="scheduler to use in place of the pipeline's; left out, the pipeline's own stays"
    )
    forecast: str | None = setting(
        None,
        choices=FORECASTS,
        help="velocity of a skipped token: hold keeps its last one (the paper); taylor extrapolates it in sigma; ab2 "
        "(with --solver euler) follows the exact solution of the flow",
    )
    correct: bool | None = setting(
        None,
        help="correct each forecast afterwards with the next evaluation; deduced for Euler and whole steps",
    )
    kv_forecast: float | None = setting(
        None, least=0, most=1, help="damping of the linear forecast of stale keys and values; 0 is off"
    )
    max_age: int | None = setting(
        None,
        least=1,
        help="for tokens: evaluated steps after which a skipped token is evaluated again, if the budget allows",
    )
    kv_dtype: str | None = setting(
        None,
        choices=KV_DTYPES,
        help="data type of cached keys and values; left out, the type in which they are computed",
    )

    def __post_init__(self) -> None:
        check(self)
