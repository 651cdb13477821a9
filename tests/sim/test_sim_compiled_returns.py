"""Return times in compiled loops: the numbers that the daemon has over arrays."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from kvtier.policy.baselines.interfaces import plain
from kvtier.policy.return_time_context import Context, codes_of
from kvtier.policy.returns import ARRAYS, Returns, class_of
from kvtier.policy.returns_loops import loops
from kvtier.policy.worth_usage import CostUsage
from kvtier.sim.cluster.deciders import compiled_policies_of, policies_of
from kvtier.sim.compiled import compiled

WAITS = st.lists(
    st.tuples(
        st.sampled_from(["", "end_turn", "tool_use"]),
        st.floats(0.0, 1e7),
        st.integers(0, 60),
        st.booleans(),
        st.integers(1, 12),
    ),
    max_size=30,
)


def teach(returns, waits):
    """What waits teach; the curve after each."""
    curves = []
    for stop, gap_s, turns, returned, at_once in waits:
        codes = codes_of(Context("end", stop, "", turns, 1000, 100, tenant=turns, hour=float(turns % 24)))
        taught = 0
        for age_class in range(at_once, class_of(gap_s), at_once):
            returns.lasted(codes, taught, age_class)
            taught = age_class
        if returned:
            returns.ended(codes, taught, gap_s)
        curves.append(returns.curve(codes, "t", gap_s if turns % 2 else None))
    return curves


@pytest.mark.parametrize("jit", [plain, compiled])
@given(waits=WAITS)
@settings(deadline=None, max_examples=30)
def test_loops_learn_what_arrays_learn(jit, waits):
    arrays, looped = (teach(Returns(way), waits) for way in (ARRAYS, loops(jit)))
    for one, other in zip(arrays, looped, strict=True):
        np.testing.assert_allclose(one.survival, other.survival, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(one.rates, other.rates, rtol=1e-4, atol=1e-10)


def test_loops_that_learn_nothing_are_told_apart():
    waits = [("end_turn", 40.0 + n, 3, True, 4) for n in range(30)]
    wrong = loops(plain)._replace(learn=lambda *told: None)
    arrays, looped = (teach(Returns(way), waits)[-1] for way in (ARRAYS, wrong))
    assert np.abs(arrays.survival - looped.survival).max() > 0.01


def test_a_simulated_node_has_compiled_return_times_where_it_asks_for_any():
    by_worth, by_use = compiled_policies_of("cost+cost"), compiled_policies_of("lru")
    assert isinstance(by_worth.usage, CostUsage)
    assert by_worth.learned["returns"]._arithmetic is loops(compiled)
    assert policies_of("cost").learned["returns"]._arithmetic is ARRAYS
    assert "returns" not in by_use.learned
