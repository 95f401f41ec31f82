"""What a run did: `StepRecord` per step and `HSAReport` over all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What a rank sent by one kind of collective: calls, bytes to other ranks, seconds until it was done."""

    calls: int
    bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class ParallelRecord:
    """How one step was shared among the ranks.

    Attributes:
        tokens: evaluated tokens of each rank that works on one guidance branch.
        imbalance: the most of these over their mean; 1 is perfect.
        seconds: this rank's time in the transformer, without that in collectives.
        sent: this rank's traffic, by kind of collective. Seconds include the wait for ranks that come late.
    """

    tokens: list[int]
    imbalance: float
    seconds: float
    sent: dict[str, Sent]


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One denoising step.

    Attributes:
        step: its number, from 0.
        sigma: noise level it starts at.
        active: evaluated tokens per sample, the mean over the guidance units where these differ.
        total: tokens per sample, N.
        reason: why it has that size: "first step", "full", "partial", "skipped", "expert switch", "inputs changed" ...
        seconds: wall time on the host from its first model call to its last, or to the next step.
        parallel: how the ranks shared it; None on one rank.
    """

    step: int
    sigma: float
    active: int
    total: int
    reason: str
    seconds: float
    parallel: ParallelRecord | None = None


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one rank did in a run.

    Attributes:
        rank: its number.
        sent: its traffic over all steps, by kind of collective.
        kv_bytes: bytes of keys and values that it keeps.
        weight_bytes: bytes of the transformers' weights that it holds.
        peak_bytes: the most memory that it had in use, on its GPU, or of its process on a CPU.
    """

    rank: int
    sent: dict[str, Sent]
    kv_bytes: int
    weight_bytes: int
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class HSAReport:
    """One run, finished or not.

    Attributes:
        steps: the steps so far.
        compute: evaluated share of all tokens of these steps; nan before the first.
        evaluations: how often each token was evaluated, int32 [F, Y, X] on the grid of tokens, [B, F, Y, X]
            for several samples; None before the first step.
        kv_bytes: bytes of cached keys and values.
        num_steps: steps of the whole run, T.
        ranks: what each rank did; empty on one rank.
        estimated_psnr: PSNR in dB that the final latents are expected to have against those of the dense run of the
            same solver, with their own span as the peak; from the residuals of the evaluations (`hsa.distance`). None
            where the run is the dense one, or forecasts are not corrected in hindsight.
        conditioned: tokens per sample that were given (an image), and whose velocity is never used. They count as all
            others do in `compute` and `evaluations`: dense, they are evaluated at every step.
    """

    steps: list[StepRecord]
    compute: float
    evaluations: Tensor | None
    kv_bytes: int
    num_steps: int
    ranks: tuple[RankReport, ...] = ()
    conditioned: int = 0
    estimated_psnr: float | None = None

    def of_frames(self, count: int) -> HSAReport:
        """The same with the evaluations of the first frames of tokens alone: others are not the video's, but given."""
        evaluations = self.evaluations
        return replace(self, evaluations=None if evaluations is None else evaluations[..., :count, :, :])


def plain_step(record: StepRecord) -> dict[str, Any]:
    """One step as numbers and lists; how ranks shared it only where there are several."""
    plain = asdict(record)
    if record.parallel is None:
        del plain["parallel"]
    return plain


def step_from(plain: Mapping[str, Any]) -> StepRecord:
    """The inverse of `plain_step`."""
    shared = plain.get("parallel")
    if shared is None:
        return StepRecord(**plain)
    return StepRecord(**{**plain, "parallel": ParallelRecord(**{**shared, "sent": _sent(shared["sent"])})})


def rank_from(plain: Mapping[str, Any]) -> RankReport:
    """The inverse of `dataclasses.asdict` for a rank."""
    return RankReport(**{**plain, "sent": _sent(plain["sent"])})


def _sent(plain: Mapping[str, Any]) -> dict[str, Sent]:
    return {name: Sent(**count) for name, count in plain.items()}
