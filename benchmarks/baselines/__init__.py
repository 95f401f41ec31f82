"""Accelerations of stock Wan and LTX-2 pipelines, with one expert or two: what heterostep is measured against.

All have one interface: ``with baseline.applied(pipe): pipe(..., num_inference_steps=baseline.steps)``,
afterwards ``baseline.compute`` is the share of the dense transformer work that was evaluated. Outside of the
context the pipeline is the stock one.
"""

from .baseline import Baseline, WorkCounter
from .cache_dit import CacheDiT
from .dpcache import DPCache
from .easycache import EasyCache
from .fewer_steps import FewerSteps, PlacedSteps
from .first_block import FirstBlock
from .magcache import MagCache, magnitude_ratios
from .pab import PAB
from .solvers import SOLVERS
from .spectrum import Spectrum
from .taylorseer import TaylorSeer
from .teacache import TeaCache, fit_polynomial
from .tuning import KINDS, Trial, available, bisect_thresholds, build, tune

__all__ = [
    "KINDS",
    "PAB",
    "SOLVERS",
    "Baseline",
    "CacheDiT",
    "DPCache",
    "EasyCache",
    "FewerSteps",
    "FirstBlock",
    "MagCache",
    "PlacedSteps",
    "Spectrum",
    "TaylorSeer",
    "TeaCache",
    "Trial",
    "WorkCounter",
    "available",
    "bisect_thresholds",
    "build",
    "fit_polynomial",
    "magnitude_ratios",
    "tune",
]
