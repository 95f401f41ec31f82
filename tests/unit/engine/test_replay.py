"""Stock schedulers whose skipped steps are taken again with the velocities that they should have moved by."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

import heterostep as hs
from heterostep.engine.denoise.replay import Replays
from tiny import generate, tiny_pipeline

KINDS = ["euler", "unipc", "dpm++"]
T = 12
EVALUATED = (0, 1, 4, 8, 11)


def velocity(sigma: float) -> torch.Tensor:
    """Quadratic in sigma, and the same wherever the latents are: hindsight knows it exactly."""
    a, b, c = (torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(i)) for i in range(3))
    return a + b * sigma + c * sigma**2


class Drive:
    """Steps a scheduler as a pipeline does, skipped steps by the line through the last two evaluations."""

    def __init__(self, kind: str, *, replayed: bool, edits: dict[int, torch.Tensor] | None = None) -> None:
        self.scheduler, self.replays, self.edits = tiny_pipeline(kind).scheduler, Replays(), edits or {}
        self.scheduler.set_timesteps(T)
        self.replayed, self.now, self.known = replayed, None, []
        self.levels = self.scheduler.sigmas.tolist()
        if replayed:
            self.replays.begin([self.scheduler], self.levels, "taylor", [], lambda: self.now, lambda *_: None, 0)

    def steps(self, sample: torch.Tensor, start: int = 0, stop: int = T) -> torch.Tensor:
        for i in range(start, stop):
            active = i in EVALUATED or not self.replayed
            self.now = SimpleNamespace(
                index=i, sigma=self.levels[i], count=int(active), whole=set(), reason="", entered={"cond"}, left=1
            )
            sample = self.scheduler.step(self.moves(i, active), self.scheduler.timesteps[i], sample, return_dict=False)[
                0
            ]
            sample = sample + self.edits.get(i, 0.0)  # as a callback does it
        return sample

    def moves(self, i: int, active: bool) -> torch.Tensor:
        if active:
            self.known.append((self.levels[i], velocity(self.levels[i])))
            return self.known[-1][1]
        (b, v_b), (a, v_a) = self.known[-2:]
        return v_a + (self.levels[i] - a) / (a - b) * (v_a - v_b)


def start() -> torch.Tensor:
    return torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_gaps_ends_where_one_with_all_velocities_does(kind):
    edits = {2: torch.full((1, 2, 3), 0.5), 6: torch.randn(1, 2, 3), 8: torch.ones(1, 2, 3)}
    for some in ({}, edits):
        want = Drive(kind, replayed=False, edits=some).steps(start())
        assert torch.allclose(Drive(kind, replayed=True, edits=some).steps(start()), want, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [3, 5, 9])
def test_a_state_goes_on_with_the_same_bits(kind, at):
    whole = Drive(kind, replayed=True)
    middle = whole.steps(start(), stop=at)
    state = copy.deepcopy(whole.replays.state())
    history = copy.deepcopy({k: v for k, v in vars(whole.scheduler).items() if k != "step"})
    want = whole.steps(middle, start=at)
    again = Drive(kind, replayed=True)
    vars(again.scheduler).update(history)
    again.known = [(again.levels[i], velocity(again.levels[i])) for i in EVALUATED if i < at]
    again.replays.restore(state, torch.device("cpu"))
    assert torch.equal(again.steps(middle, start=at), want)


@pytest.mark.parametrize("kind", KINDS)
def test_the_scheduler_is_stock_outside_of_the_run(kind):
    drive = Drive(kind, replayed=True)
    middle = drive.steps(start(), stop=6)
    twin = copy.deepcopy(drive.scheduler)
    assert "step" in vars(drive.scheduler)
    stock = Drive(kind, replayed=False)
    # A copy belongs to no run; nor is the scheduler itself in one that begins anew, after an error broke off the first.
    for scheduler in (twin, drive.scheduler):
        scheduler.set_timesteps(T)
        sample = start()
        for i, t in enumerate(scheduler.timesteps):
            sample = scheduler.step(stock.moves(i, True), t, sample, return_dict=False)[0]
        assert torch.equal(sample, Drive(kind, replayed=False).steps(start()))
    assert middle.isfinite().all()
    drive.replays.end()
    assert "step" not in vars(drive.scheduler)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_in_the_model_leaves_others_a_stock_scheduler(kind):
    """Nothing tells of such an error: diffusers ends no run then, and another pipeline may have the same scheduler."""
    drive, stock = Drive(kind, replayed=True), Drive(kind, replayed=False)
    drive.steps(start(), stop=8)
    drive.now = SimpleNamespace(index=8, sigma=0.5, count=1, whole=set(), reason="", entered={"cond", "uncond"}, left=1)
    drive.scheduler.set_timesteps(T)
    sample = start()
    for i, t in enumerate(drive.scheduler.timesteps):
        sample = drive.scheduler.step(stock.moves(i, True), t, sample, return_dict=False)[0]
    assert torch.equal(sample, Drive(kind, replayed=False).steps(start()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_the_users_own_is_called_and_stays(kind):
    pipe, calls = tiny_pipeline(kind), []
    stock = pipe.scheduler.step
    pipe.scheduler.step = own = lambda *args, **kwargs: calls.append(1) or stock(*args, **kwargs)
    hs.apply(pipe, hs.HSAConfig(compute=0.5))
    generate(pipe, steps=20)
    assert pipe.scheduler.step is own and len(calls) > 20  # some were taken again
    calls.clear()
    generate(pipe, steps=8)
    assert pipe.scheduler.step is own and (len(calls) == 8 or kind == "euler")


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_run_of_a_broken_one_is_a_clean_one(kind):
    pipe = tiny_pipeline(kind)
    hs.apply(pipe, hs.HSAConfig(compute=0.5))
    want = generate(pipe, steps=10)

    def stop(pipe, step, timestep, tensors):
        if step == 6:
            raise RuntimeError("stop")
        return {}

    with pytest.raises(RuntimeError, match="stop"):
        generate(pipe, steps=10, callback_on_step_end=stop)
    assert torch.equal(generate(pipe, steps=10), want)
    hs.remove(pipe)
    assert "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_forecast_the_solver_takes_fewer_steps(kind):
    """Every third of 12 steps: the noise levels of 4."""
    few = tiny_pipeline(kind).scheduler
    few.set_timesteps(T)
    few.sigmas, few.timesteps = few.sigmas[[0, 3, 6, 9, T]], few.timesteps[::3]
    want = start()
    for i, t in enumerate(few.timesteps):
        want = few.step(velocity(float(few.sigmas[i])), t, want, return_dict=False)[0]
    drive = Drive(kind, replayed=False)
    drive.replays.begin([drive.scheduler], drive.levels, "none", [0, 3, 6, 9], lambda: drive.now, lambda *_: None, 0)
    assert torch.equal(drive.steps(start()), want)
    if kind != "euler":  # whose last of 4 steps of their own ends elsewhere
        few.set_timesteps(4)
        assert torch.allclose(few.sigmas, torch.tensor(drive.levels)[[0, 3, 6, 9, T]], atol=1e-3)


@pytest.mark.parametrize("kind", ["unipc", "dpm++"])
def test_where_few_steps_are_left_there_is_no_forecast(kind, caplog):
    pipe = tiny_pipeline(kind)
    session = hs.apply(pipe, hs.HSAConfig(compute=0.5))
    got = generate(pipe, steps=8)
    assert [r.active > 0 for r in session.report.steps].count(True) == 4 and session.report.compute == 0.5
    pipe = tiny_pipeline(kind)
    hs.apply(pipe, hs.HSAConfig(compute=0.5, forecast="none"))
    assert torch.equal(generate(pipe, steps=8), got)
    pipe = tiny_pipeline(kind)
    hs.apply(pipe, hs.HSAConfig(compute=0.5, forecast="taylor"))
    caplog.clear()
    assert not torch.equal(generate(pipe, steps=8), got)
    assert "only 4 of 8 steps are evaluated, too few for forecast='taylor'" in caplog.text
    caplog.clear()
    generate(pipe, steps=20)
    assert not caplog.text


def test_no_forecast_is_for_whole_steps():
    with pytest.raises(hs.ConfigError, match='policy="joint"'):
        hs.apply(tiny_pipeline(), hs.HSAConfig(policy="tokens", forecast="none"))


def test_ab2_brings_its_solver():
    pipe = tiny_pipeline("unipc")
    hs.apply(pipe, hs.HSAConfig(forecast="ab2"))
    got = generate(pipe, steps=10)
    hs.apply(pipe, hs.HSAConfig(forecast="ab2", solver="euler"))
    assert torch.equal(generate(pipe, steps=10), got)
    with pytest.raises(hs.ConfigError, match="second order twice"):
        hs.apply(pipe, hs.HSAConfig(forecast="ab2", solver="unipc"))
