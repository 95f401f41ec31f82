import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import heterostep as hs
from heterostep.hsa.config import Schedule, bucket_of, fit_counts, place_steps, profile_weights
from tiny import shifted

POLICIES = ("joint", "tokens", "groups", "steps")


def counts_of(steps, n=75600, forced=(), shift=3.0, **config):
    planner = hs.StepPlanner(hs.HSAConfig(**config))
    planner.begin(shifted(steps, shift), n, 1, frozenset(forced))
    return planner.counts


@pytest.mark.parametrize("forced", [(), (26,)])
@pytest.mark.parametrize("n", [48, 300, 1560, 75600])
@pytest.mark.parametrize("steps", [20, 25, 40, 50])
@pytest.mark.parametrize("policy", POLICIES)
def test_achieved_compute_is_near_the_target(policy, steps, n, forced):
    forced = tuple(i for i in forced if i < steps)
    for compute in (0.2, 0.25, 0.33, 0.5, 0.75, 0.9, 1.0):
        if policy == "groups" and compute < 0.25 and forced:
            continue  # divisors up to 8 cost more
        counts = counts_of(steps, n, forced, policy=policy, compute=compute)
        achieved = sum(counts) / (steps * n)
        # Whole steps cannot be finer than half a step.
        assert abs(achieved - compute) <= (max(0.02, 0.5 / steps) if policy == "steps" else 0.02) + 1e-9
        assert len(counts) == steps
        assert all(counts[i] == n for i in (0, *forced))
        if policy in ("tokens", "groups"):  # whole steps round, by at most the tolerance
            assert achieved <= compute + 1e-9


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(POLICIES),
    st.integers(1, 60),
    st.integers(1, 3000),
    st.floats(0.05, 1.0),
    st.floats(1.0, 12.0),
    st.sets(st.integers(0, 59), max_size=2),
)
def test_any_plan_is_sound_or_refused_with_a_number_that_works(policy, steps, n, compute, shift, forced):
    forced = {i for i in forced if i < steps}
    try:
        counts = counts_of(steps, n, forced, shift, policy=policy, compute=compute)
    except hs.ConfigError as error:
        least = float(str(error).split("at least compute=")[1].split(",")[0])
        assert least > compute
        counts = counts_of(steps, n, forced, shift, policy=policy, compute=least)
        compute = least
    assert len(counts) == steps
    assert all(0 <= c <= n for c in counts)
    assert all(counts[i] == n for i in {0} | forced)
    achieved = sum(counts) / (steps * n)
    if policy == "steps":
        assert abs(achieved - compute) <= 0.5 / steps + 1e-9 or sum(c == n for c in counts) == len({0} | forced)
    else:
        assert achieved <= compute + 1e-9 or all(c in (0, n) for c in counts)
        if steps >= 20 and n >= 32:
            assert achieved >= compute - 0.02
    assert len(set(counts)) <= 40


@pytest.mark.parametrize("policy", POLICIES)
def test_windows_are_full_and_unreachable_targets_name_the_least(policy):
    counts = counts_of(40, 320, policy=policy, compute=0.5, warmup=6, cooldown=3)
    assert counts[:6] == [320] * 6
    assert counts[-3:] == [320] * 3
    with pytest.raises(hs.ConfigError, match=r"compute=0\.2 cannot be met with 40 steps.*at least compute=0\.225"):
        counts_of(40, 320, policy=policy if policy != "groups" else "joint", compute=0.2, warmup=6, cooldown=3)


def test_one_step_cannot_be_halved():
    with pytest.raises(hs.ConfigError, match=r"at least compute=1"):
        counts_of(1, compute=0.5)
    assert counts_of(1, compute=1.0) == [75600]


def test_nothing_to_plan_is_refused():
    with pytest.raises(hs.ConfigError, match="at least one step"):
        hs.StepPlanner().begin([1.0], 10)
    with pytest.raises(hs.ConfigError, match="at least one step"):
        hs.StepPlanner().begin([1.0, 0.0], 0)


def test_groups_name_their_least():
    with pytest.raises(hs.ConfigError, match="divisors up to 8"):
        counts_of(40, policy="groups", compute=0.1)


def test_steps_are_whole():
    assert set(counts_of(40, policy="steps", compute=0.37)) == {0, 75600}


def test_profile_moves_work():
    early = counts_of(40, 3200, policy="tokens", compute=0.5, profile=-1.0)
    late = counts_of(40, 3200, policy="tokens", compute=0.5, profile=1.0)
    assert sum(early[:20]) > sum(late[:20])


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=40),
    st.integers(1, 40),
    st.sets(st.integers(0, 39), max_size=3),
)
def test_placed_steps(weights, count, required):
    required = {i for i in required if i < len(weights)}
    assume(len(required) <= min(count, len(weights)))
    chosen = place_steps(weights, count, required)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(count, len(weights))
    assert required <= set(chosen)
    assert 0 in place_steps(weights, count)


def test_equal_weights_are_spread_evenly():
    assert place_steps([1.0] * 12, 4) == [0, 3, 6, 9]


def test_fit_counts_uses_buckets_and_spends_everything():
    n = 75600
    schedule = Schedule(sigmas=shifted(20), num_tokens=n)
    weights = dict(enumerate(profile_weights(schedule.gaps(range(20)), -0.5)))
    counts = fit_counts(schedule, 0.5, {0}, weights)
    bucket = bucket_of(n)
    assert bucket == 2048
    assert all(c % bucket == 0 or c == n for c in counts)
    assert 0 <= 0.5 * 20 * n - sum(counts) < bucket
    assert counts[1] > counts[-1]


def test_bucket_is_a_power_of_two_near_a_32nd():
    for n in (1, 31, 32, 63, 64, 1560, 75600):
        bucket = bucket_of(n)
        assert math.log2(bucket).is_integer()
        assert bucket == 1 or n / 64 < bucket <= n / 32


@pytest.mark.parametrize("policy", ["joint", "steps"])
@pytest.mark.parametrize(
    ("steps", "compute", "windows"),
    [(20, 0.25, {"warmup": 5}), (20, 0.25, {"cooldown": 4}), (50, 0.1, {"warmup": 5}), (100, 0.02, {"warmup": 2})],
)
def test_windows_may_use_up_the_whole_budget(policy, steps, compute, windows):
    counts = counts_of(steps, 320, policy=policy, compute=compute, **windows)
    assert sum(counts) == round(compute * steps) * 320
    assert counts[0] == 320
    assert all(c == 320 for c in counts[: windows.get("warmup", 1)])
    assert all(c == 320 for c in counts[steps - windows.get("cooldown", 0) :])
