"""Worth over horizons, on curves whose answers are known."""

import numpy as np
import pytest

from kvtier.policy.baselines.interfaces import plain
from kvtier.policy.survival import CLASSES, EDGES_S, WIDTHS_S, SurvivalCurve, survival_kernels
from kvtier.policy.worth import worth_of

HOUR_S = 3600.0


def curve_of(returned_by):
    """A curve from the part that has returned by each age."""
    alive = np.array([1.0 - returned_by(age_s) for age_s in EDGES_S])
    return SurvivalCurve(alive.astype(np.float32))


def overnight(age_s):
    """Left at 23:00: one in ten is back within ten minutes, then nobody until the morning, when most are."""
    early = 0.1 * min(age_s / 600.0, 1.0)
    return early + 0.8 * min(max((age_s - 9 * HOUR_S) / (3 * HOUR_S), 0.0), 1.0)


def test_a_chat_left_at_night_is_kept_on_disk_and_dropped_from_host_memory():
    worth = worth_of(curve_of(overnight), idle_s=HOUR_S)
    saving_s, chat_bytes = 4.0, 4e9
    disk_price, host_price = 0.4e-14, 4e-14
    assert worth.kept(saving_s, chat_bytes * disk_price)
    assert not worth.kept(saving_s, chat_bytes * host_price)
    assert worth.horizon_s > 8 * HOUR_S
    assert worth.returns > 0.8


def test_the_chance_right_now_alone_would_drop_it():
    curve = curve_of(overnight)
    assert float(curve.returns_within(60.0, HOUR_S)) == pytest.approx(0.0, abs=1e-5)


def test_after_the_morning_it_is_dropped_everywhere():
    worth = worth_of(curve_of(overnight), idle_s=48 * HOUR_S)
    assert not worth.kept(4.0, 4e9 * 0.4e-14)


@pytest.mark.parametrize("idle_s", [0.0, 3.0, 200.0])
def test_waits_without_memory_are_worth_the_same_at_any_age(idle_s):
    hazard_per_s = 0.001
    worth = worth_of(curve_of(lambda age_s: 1.0 - np.exp(-hazard_per_s * age_s)), idle_s)
    assert worth.rate_per_s == pytest.approx(hazard_per_s, rel=0.1)


def test_a_wait_ahead_lowers_the_worth():
    curve = curve_of(lambda age_s: 1.0 - np.exp(-0.1 * age_s))
    assert worth_of(curve, 0.0, ahead_s=30.0).rate_per_s < worth_of(curve, 0.0).rate_per_s / 2


def test_what_outlived_the_curve_is_worth_nothing():
    assert worth_of(curve_of(overnight), 2 * float(EDGES_S[-1])).rate_per_s == 0.0


def test_the_expected_wait_is_the_area_under_the_curve():
    curve = curve_of(overnight)
    ages = np.linspace(1000.0, 41000.0, 400_001)
    area = np.trapezoid(curve.alive(ages), ages) / float(curve.alive(1000.0))
    assert float(curve.expected_wait_s(40000.0, 1000.0)) == pytest.approx(area, rel=1e-4)


def test_the_loops_of_the_replay_give_the_same_worth():
    kernels = survival_kernels(plain)
    curve = curve_of(overnight)
    rates = np.zeros(CLASSES + 1, np.float32)
    kernels.rank(curve.survival, rates)
    for edge in (0, 5, 20, 27):
        age_s = float(EDGES_S[edge])
        got = kernels.rate(curve.survival, rates, age_s)
        assert got == pytest.approx(worth_of(curve, age_s).rate_per_s, rel=1e-3)
    assert kernels.rate(curve.survival, rates, -30.0) == pytest.approx(
        worth_of(curve, 0.0, ahead_s=30.0).rate_per_s, rel=1e-3
    )


def test_every_age_has_a_class():
    class_of = survival_kernels(plain).class_of
    for k in range(CLASSES - 1):
        assert class_of(float(EDGES_S[k] + 0.5 * WIDTHS_S[k])) == k
    assert class_of(1e12) == CLASSES - 1
