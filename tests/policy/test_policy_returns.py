"""Return times over arrays: what they learn, how hints count, and what is read back after a restart."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from kvtier.errors import ConfigError
from kvtier.policy import returns as returns_module
from kvtier.policy.return_time import ReturnTimes
from kvtier.policy.return_time_context import Context, codes_of
from kvtier.policy.returns import Returns, class_of
from kvtier.policy.survival import EDGES_S, SurvivalCurve
from kvtier.policy.worth import worth_of

# --- curves -----------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", "end_turn", "tool_use"]),
            st.floats(0.0, 1e7),
            st.integers(0, 60),
            st.booleans(),
        ),
        max_size=12,
    )
)
@settings(deadline=None, max_examples=40)
def test_over_arrays_it_learns_what_return_times_learns(waits):
    one, many = ReturnTimes(), Returns()
    for stop, gap_s, turns, returned in waits:
        codes = codes_of(Context("end", stop, "", turns, 1000, 100, tenant=turns, hour=float(turns % 24)))
        for age_class in range(min(class_of(gap_s), 6)):
            one.lasted(codes, age_class)
            many.lasted(codes, age_class, age_class + 1)
        if returned:
            one.ended(codes, gap_s)
            many.ended(codes, class_of(gap_s), gap_s)
        curve = many.curve(codes, "t")
        np.testing.assert_allclose(
            SurvivalCurve.of_hazards(one.hazards(codes)).survival, curve.survival, rtol=1e-5, atol=1e-7
        )


def told_in_steps(together):
    """The curve after 2,000 waits of people, most of half a minute, and of tools; each step of so many."""
    returns, rng = Returns(), np.random.default_rng(5)
    people, tools = (codes_of(Context("end", stop, "", 3, 1000, 100)) for stop in ("end_turn", "tool_use"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(returns_module, "_TOGETHER", together)
        patch.setattr(returns_module, "_ONE_MORE_AFTER", 1)
        for number in range(2000):
            codes, middle_s = (people, 30.0) if number % 2 else (tools, 2.0)
            gap_s = float(middle_s * np.exp(rng.normal()))
            returns.lasted(codes, 0, class_of(gap_s))
            returns.ended(codes, class_of(gap_s), gap_s)
        return returns, [returns.curve(codes, "t").survival for codes in (people, tools)]


def test_waits_that_teach_in_one_step_teach_what_each_alone_does():
    (_, single), (_, together) = told_in_steps(1), told_in_steps(64)
    untaught = [Returns().curve(codes_of(Context("end", "end_turn", "", 3, 1000, 100)), "t").survival] * 2
    assert np.abs(np.array(single) - together).max() < 0.03
    assert np.abs(np.array(single) - untaught).max() > 0.2, "it had something to learn"


def test_writing_down_takes_what_is_yet_to_be_learned_and_changes_nothing():
    returns, curves = told_in_steps(64)
    codes = codes_of(Context("end", "end_turn", "", 3, 1000, 100))
    returns.lasted(codes, 0, 20)
    before = returns.curve(codes, "t").survival
    after = Returns()
    after.take_over(returns.to_bytes())
    assert (returns.curve(codes, "t").survival == before).all()
    assert (after.curve(codes, "t").survival != before).any()
    assert len(curves) == 2


@given(st.floats(0.0, 1e7), st.sampled_from(["end_turn", "tool_use"]))
@settings(deadline=None)
def test_the_rate_of_a_run_is_the_best_over_all_horizons(idle_s, stop):
    curve = Returns().curve(codes_of(Context("end", stop, "", 3, 1000, 100)), "t")
    edge_s = float(EDGES_S[class_of(idle_s)])
    assert curve.rate(edge_s) == pytest.approx(worth_of(curve.whole, edge_s).rate_per_s, rel=1e-3, abs=1e-12)


def test_a_wait_that_teaches_in_one_step_comes_near_many_steps():
    codes = codes_of(Context("end", "end_turn", "", 3, 1000, 100))
    single, steps = Returns(), Returns()
    for _ in range(300):
        single.lasted(codes, 0, 12)
        single.ended(codes, 12, 40.0)
        for age_class in range(12):
            steps.lasted(codes, age_class, age_class + 1)
        steps.ended(codes, class_of(40.0), 40.0)
    for age_s in (5.0, 60.0, 600.0):
        one, other = (float(r.curve(codes, "t").whole.alive(age_s)) for r in (single, steps))
        assert one == pytest.approx(other, abs=0.1)


def test_a_hint_moves_the_return_and_is_believed_as_far_as_hints_came_true():
    codes = codes_of(Context("end", "end_turn", "", 3, 1000, 100))
    returns = Returns()

    def comes_then(tenant):
        curve = returns.curve(codes, tenant, 50_000.0).whole
        return float(curve.alive(30_000.0) - curve.alive(80_000.0))

    plain = returns.curve(codes, "a").whole
    assert comes_then("a") > 0.4 > float(plain.alive(30_000.0) - plain.alive(80_000.0))
    for _ in range(20):
        returns.hint_came("honest", True)
        returns.hint_came("liar", False)
    assert comes_then("honest") > 0.7 > 0.2 > comes_then("liar")


# --- what is kept across restarts -------------------------------------------------------------------------


def taught():
    returns = Returns()
    for turns in range(40):
        codes = codes_of(Context("end", "end_turn", "u", turns, 1000, 100, tenant=3))
        returns.lasted(codes, 0, 20)
        returns.ended(codes, 20, 4000.0)
        returns.hint_came("t", turns % 3 == 0)
    return returns


def test_what_was_learned_is_read_back_to_the_bit():
    before, after = taught(), Returns()
    after.take_over(before.to_bytes())
    assert after.to_bytes() == before.to_bytes() != Returns().to_bytes()
    codes = codes_of(Context("end", "end_turn", "", 3, 1000, 100))
    assert (after.curve(codes, "t", 9.0).survival == before.curve(codes, "t", 9.0).survival).all()


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        (b'"version":1', b'"version":9', "returns.version"),
        (b'"waits":40', b'"waits":-1', "returns.waits"),
        (b'"waits":40', b'"waits":NaN', "returns.waits"),
        (b'"height":"', b'"height":"AAAA', "returns.weights.height"),
        (b'"step":"', b'"step":"!', "returns.weights.step"),
        (b'"step":', b'"steps":', "returns.weights"),
        (b'"t":[', b'"t":[1,', "returns.hints.t"),
        (b'{"version"', b'{version"', "returns"),
    ],
)
def test_damaged_state_is_refused_by_field_and_changes_nothing(old, new, field):
    data = taught().to_bytes()
    assert old in data
    returns = Returns()
    with pytest.raises(ConfigError) as refused:
        returns.take_over(data.replace(old, new, 1))
    assert refused.value.field == field
    assert returns.to_bytes() == Returns().to_bytes()


@given(st.binary(max_size=200))
def test_noise_is_no_state(data):
    with pytest.raises(ConfigError):
        Returns().take_over(data)
