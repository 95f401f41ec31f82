"""Schedulers' options: each is forecast right, or refused in one sentence; with compute=1 all are the stock ones."""

from __future__ import annotations

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

import heterostep as hs
import tiny_ltx2
from heterostep.engine.denoise.schedulers import build_scheduler
from tiny import generate, tiny_pipeline


class Whole:
    """A user's planner that happens to leave out nothing."""

    def plan(self, step, num_steps, sigma, num_tokens):
        return None


def euler(**options):
    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **options})


def dpm(**options):
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, **{"flow_shift": 3.0, **options}
    )


def unipc(**options):
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, **{"flow_shift": 3.0, **options}
    )


NOISY = {
    "stochastic_sampling=True": euler(stochastic_sampling=True),
    "algorithm_type='sde-dpmsolver++'": dpm(algorithm_type="sde-dpmsolver++"),
}
OUT_OF_RANGE = {
    "rising": euler(invert_sigmas=True),
    "dpm karras": dpm(use_karras_sigmas=True),
    "dpm exponential": dpm(use_exponential_sigmas=True),
    "dpm lu": dpm(use_lu_lambdas=True),
    "unipc exponential": unipc(use_exponential_sigmas=True),
}
FINE = {
    "euler karras": euler(use_karras_sigmas=True),
    "euler exponential": euler(use_exponential_sigmas=True),
    "euler terminal": euler(shift_terminal=0.1),
    "unipc 3": unipc(solver_order=3),
    "unipc karras": unipc(use_karras_sigmas=True),
    "unipc no corrector": unipc(disable_corrector=[0, 1, 2, 3]),
    "unipc last": unipc(final_sigmas_type="sigma_min"),
    "unipc terminal": unipc(shift_terminal=0.1),
    "dpm 3": dpm(solver_order=3),
    "dpm heun": dpm(solver_type="heun"),
    "dpm euler at final": dpm(euler_at_final=True),
    "dpm last": dpm(final_sigmas_type="sigma_min"),
}


def made(scheduler, compute, **arguments):
    pipe = tiny_pipeline()
    pipe.scheduler = scheduler
    if compute:
        hs.apply(pipe, hs.HSAConfig(compute=compute))
    torch.manual_seed(0)
    return generate(pipe, **arguments)


@pytest.mark.parametrize("option", NOISY)
def test_noise_that_no_forecast_can_know_is_refused(option):
    pipe = tiny_pipeline()
    pipe.scheduler = NOISY[option]
    with pytest.raises(hs.ConfigError, match=rf"with {option.replace('+', '.')} adds fresh noise .* or compute=1\.0"):
        hs.apply(pipe, hs.HSAConfig(compute=0.5))
    with pytest.raises(hs.ConfigError, match="adds fresh noise"):
        hs.apply(pipe, hs.HSAConfig(compute=1.0), Whole())
    assert torch.equal(made(NOISY[option], 1.0), made(NOISY[option], None))


def test_noise_that_comes_after_apply_is_refused_at_the_run():
    pipe = tiny_pipeline()
    session = hs.apply(pipe, hs.HSAConfig(compute=0.5))
    pipe.scheduler = NOISY["stochastic_sampling=True"]
    with pytest.raises(hs.ConfigError, match="use stochastic_sampling=False"):
        generate(pipe)
    assert session.report.steps == []
    pipe.scheduler = euler()
    assert generate(pipe).isfinite().all()


def test_a_solver_replaces_one_that_adds_noise():
    pipe = tiny_pipeline()
    pipe.scheduler = NOISY["algorithm_type='sde-dpmsolver++'"]
    hs.apply(pipe, hs.HSAConfig(compute=0.5, solver="euler"))
    assert generate(pipe).isfinite().all()
    hs.remove(pipe)
    with pytest.raises(hs.ConfigError, match="adds fresh noise"):
        hs.apply(pipe, hs.HSAConfig(compute=0.5, solver="dpm++"))  # of its kind already, so not replaced


@pytest.mark.parametrize("option", OUT_OF_RANGE)
def test_noise_levels_that_are_no_flow_or_rise_are_refused(option):
    pipe = tiny_pipeline()
    pipe.scheduler = OUT_OF_RANGE[option]
    hs.apply(pipe, hs.HSAConfig(compute=0.5))
    with pytest.raises(hs.ConfigError, match=r"sigmas (lie between .* flow|do not fall at step 0).* compute=1\.0"):
        generate(pipe)
    got, want = made(OUT_OF_RANGE[option], 1.0), made(OUT_OF_RANGE[option], None)
    assert torch.equal(got.nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize("option", FINE)
def test_other_options_are_forecast_right(option):
    want = made(FINE[option], None, steps=24)
    assert torch.equal(made(FINE[option], 1.0, steps=24), want)
    got = made(FINE[option], 0.7, steps=24)
    assert ((got - want).norm() / want.norm()).item() < 0.05


def test_noise_levels_of_ones_own():
    """LTX-2 takes them."""
    pipe = tiny_ltx2.tiny_ltx2()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    levels = [1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.45, 0.3, 0.15]
    want = tiny_ltx2.generate(pipe, steps=len(levels), sigmas=levels)[0]
    hs.apply(pipe, hs.HSAConfig(compute=0.7))
    got = tiny_ltx2.generate(pipe, steps=len(levels), sigmas=levels)[0]
    assert ((got - want).norm() / want.norm()).item() < 0.1
    for wrong in ([1.0, 0.8, 0.8, 0.4], [1.0, 0.5, 0.7, 0.3]):
        with pytest.raises(hs.ConfigError, match="do not fall at step 1"):
            tiny_ltx2.generate(pipe, steps=4, sigmas=wrong)


def test_a_replaced_scheduler_has_the_shift_that_was_set():
    like = FlowMatchEulerDiscreteScheduler(shift=3.0)
    like.set_shift(7.0)
    assert build_scheduler("unipc", like).config.flow_shift == 7.0
