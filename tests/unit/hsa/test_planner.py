import copy

import pytest
import torch

import heterostep as hs
from heterostep.hsa.policies import JointPolicy
from tiny import shifted

T, N, D = 20, 320, 8
POLICIES = ("joint", "tokens", "groups", "steps")


def velocities(seed=0, batch=1, steps=T):
    """Velocities that change at a rate of their own for each token: fast ones at high indices."""
    g = torch.Generator().manual_seed(seed)
    base, direction = torch.randn(batch, N, D, generator=g), torch.randn(batch, N, D, generator=g)
    rate = torch.linspace(0.1, 4.0, N)[None, :, None]
    return [base + rate * direction * sigma for sigma in shifted(steps)[:-1]]


def run(planner, seed=0, batch=1, noise=0.0, steps=T):
    sigmas, plans = shifted(steps), []
    g = torch.Generator().manual_seed(99)
    planner.begin(sigmas, N, batch, frozenset({0}))
    for i, v in enumerate(velocities(seed, batch, steps)):
        active = planner.plan(i, steps, sigmas[i], N)
        plans.append(active)
        planner.observe(i, sigmas[i], v * (1 + noise * torch.randn(v.shape, generator=g)), active)
    return plans


def same(a, b):
    return all(
        (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y))
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_plans_have_the_promised_form(policy):
    planner = hs.StepPlanner(hs.HSAConfig(policy=policy))
    for i, active in enumerate(run(planner)):
        count = planner.counts[i]
        assert planner.reason(i) == ("full" if count == N else "partial" if count else "skipped")
        if count == N:
            assert active is None
            continue
        assert active.dtype == torch.int64
        assert active.shape == (count,)
        assert torch.equal(active, active.unique())


def partial_planner(policy):
    """A planner that leaves tokens out; `joint` does so where a part of its budget is set aside for it."""
    config = hs.HSAConfig(policy=policy)
    return hs.StepPlanner(config, policy=JointPolicy(token_budget=0.4) if policy == "joint" else None)


@pytest.mark.parametrize("policy", ["joint", "tokens", "groups"])
def test_samples_have_sets_of_their_own(policy):
    plans = run(partial_planner(policy), batch=3)
    partial = [p for p in plans if p is not None and p.numel()]
    assert partial
    assert all(p.ndim == 2 and p.shape[0] == 3 for p in partial)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_second_run_is_the_same(policy):
    planner = hs.StepPlanner(hs.HSAConfig(policy=policy))
    first = run(planner)
    run(planner, seed=7, steps=31)
    assert same(run(planner), first)


@pytest.mark.parametrize("policy", ["joint", "tokens", "groups"])
def test_fast_tokens_are_evaluated_more_often(policy):
    counts = torch.zeros(N)
    for active in run(partial_planner(policy)):
        counts[slice(None) if active is None else active] += 1
    assert counts[N // 2 :].mean() > counts[: N // 2].mean()


def test_joint_meets_every_target_and_is_whole_where_that_does():
    for steps in range(20, 61):
        for compute in (0.21, 0.25, 0.33, 0.5, 0.66, 0.75):
            planner = hs.StepPlanner(hs.HSAConfig(compute=compute))
            planner.begin(shifted(steps), 576)
            assert abs(sum(planner.counts) / (576 * steps) - compute) <= 0.02 + 1e-9
            if steps >= 25:
                assert set(planner.counts) == {0, 576}


def test_old_tokens_are_forced():
    planner = hs.StepPlanner(hs.HSAConfig(policy="tokens", compute=0.6, max_age=2, cooldown=0))
    age = torch.zeros(N)
    for i, active in enumerate(run(planner, steps=40)):
        if active is not None and not active.numel():
            continue
        age += 1
        age[slice(None) if active is None else active] = 0
        if sum(planner.counts[:i]) and planner.counts[i] > 0.6 * N:
            assert age.max() <= 2


def test_noise_of_another_number_of_ranks_changes_few_tokens():
    """Rounding keeps the plan: at most a token that sits on a rounding boundary may differ."""
    planner = hs.StepPlanner(hs.HSAConfig(policy="tokens"))
    for a, b in zip(run(planner), run(planner, noise=1e-7), strict=True):
        if a is not None and a.numel():
            assert len(set(a.tolist()) ^ set(b.tolist())) <= 4


def test_inactive_rows_are_not_read():
    sigmas, results = shifted(T), []
    for garbage in (0.0, 1e3):
        planner, plans = hs.StepPlanner(hs.HSAConfig(policy="tokens")), []
        planner.begin(sigmas, N)
        for i, v in enumerate(velocities()):
            active = planner.plan(i, T, sigmas[i], N)
            plans.append(active)
            if active is not None:
                kept = v.clone()
                v = v + garbage
                v[:, active] = kept[:, active]
            planner.observe(i, sigmas[i], v, active)
        results.append(plans)
    assert same(*results)


def test_few_and_many_active_tokens_are_observed_alike():
    sigmas, v = shifted(T), velocities()
    rates = []
    for many in (False, True):
        planner = hs.StepPlanner(hs.HSAConfig(policy="tokens"))
        planner.begin(sigmas, N)
        planner.observe(0, sigmas[0], v[0], None)
        active = torch.arange(10)
        if many:
            planner._observe_many(sigmas[1], v[1], active, True)
        else:
            planner.observe(1, sigmas[1], v[1], active)
        rates.append((planner._tokens.rate.clone(), planner._velocity.clone()))
    assert torch.allclose(rates[0][0], rates[1][0])
    assert torch.equal(rates[0][1], rates[1][1])


def test_change_of_experts_does_not_count_as_change_of_tokens():
    sigmas, v = shifted(T), velocities()
    planner = hs.StepPlanner()
    planner.begin(sigmas, N, 1, frozenset({0, 2}))
    for i in range(2):
        planner.observe(i, sigmas[i], v[i], None)
    before = planner._tokens.rate.clone()
    planner.observe(2, sigmas[2], v[2] + 100.0, None)
    assert torch.equal(planner._tokens.rate, before)
    assert before.any()


def test_a_full_step_after_a_checkpoint_teaches_as_any_other():
    sigmas, v = shifted(T), velocities()
    rates = []
    for forced, switches in ((frozenset({0}), None), (frozenset({0, 2}), frozenset()), (frozenset({0, 2}), {2})):
        planner = hs.StepPlanner()
        planner.begin(sigmas, N, 1, forced, switches)
        for i in range(3):
            planner.observe(i, sigmas[i], v[i], None)
        rates.append(planner._tokens.rate.clone())
    assert torch.equal(rates[0], rates[1]) and not torch.equal(rates[0], rates[2])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_restored_planner_goes_on_alike(policy):
    """Through a copy of its state, at every step."""
    sigmas, g = shifted(T), torch.Generator().manual_seed(5)
    v = [torch.randn(1, N, D, generator=g) for _ in range(T)]  # rates of change that change
    states, plans = [], []

    def go_on(planner, begin):
        for i in range(begin, T):
            states.append(copy.deepcopy(planner.state()))
            active = planner.plan(i, T, sigmas[i], N)
            planner.observe(i, sigmas[i], v[i], active)
            yield active

    planner = partial_planner(policy)
    planner.begin(sigmas, N)
    plans += go_on(planner, 0)
    for begin, state in enumerate(states[:T]):
        planner = partial_planner(policy)
        planner.begin(sigmas, N)
        planner.restore(state)
        assert same(list(go_on(planner, begin)), plans[begin:])
