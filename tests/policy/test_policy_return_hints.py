"""A caller's hint is evidence: a tenant whose hints come true is believed, one whose hints do not is not."""

import numpy as np
import pytest

from kvtier.policy.defaults import make_policies
from kvtier.policy.return_time_context import Context, codes_of
from kvtier.policy.returns import Returns
from kvtier.policy.survival import EDGES_S
from kvtier.policy.usage import ParkedBlock, Turn

CHAT = codes_of(
    Context(clock="end", stop="end_turn", kind="u", turns=3, tokens_in=9000, new_tokens=500, tokens_out=300)
)
SOON_S = 20.0


class Credulous(Returns):
    """Broken: believes everyone for ever."""

    def hint_came(self, tenant, true):
        pass


def told(returns, tenant, true, times):
    for _ in range(times):
        returns.hint_came(tenant, true)
    return returns


def moved(returns, tenant, hint_s=SOON_S):
    """How far a hint moves what is expected, from 0 to 1."""
    with_it, without = (returns.curve(CHAT, tenant, hint).survival for hint in (hint_s, None))
    return float(np.abs(with_it - without).max())


def lies_lose_their_weight(returns):
    told(returns, "liar", False, 40)
    return returns.hint_trust("liar") < 0.1 and moved(returns, "liar") < 0.1


def test_a_source_that_lies_loses_its_weight():
    assert moved(Returns(), "liar") > 0.3
    assert lies_lose_their_weight(Returns())


def test_one_that_is_believed_for_ever_does_not():
    assert not lies_lose_their_weight(Credulous())


def test_a_source_that_is_right_is_believed_more_and_more():
    returns = told(Returns(), "honest", True, 40)
    assert returns.hint_trust("honest") > 0.9 > Returns().hint_trust("honest")
    curve = returns.curve(CHAT, "honest", 1800.0).whole
    plain = returns.curve(CHAT, "honest").whole
    assert float(curve.returns_within(600.0)) < 0.15 < float(plain.returns_within(600.0))
    assert float(curve.returns_within(3600.0)) > 0.9


def test_tenants_are_apart():
    returns = told(Returns(), "liar", False, 40)
    assert returns.hint_trust("honest") == Returns().hint_trust("honest")


def test_a_liar_that_gets_better_is_believed_again():
    returns = told(Returns(), "liar", False, 1000)
    assert told(returns, "liar", True, 100).hint_trust("liar") > 0.5


@pytest.mark.parametrize("hint_s", [0.0, -5.0])
def test_a_hint_that_lies_in_the_past_says_nothing(hint_s):
    assert moved(Returns(), "any", hint_s) == 0.0


@pytest.mark.parametrize("hint_s", [1e-6, 3.0, 1e12])
def test_extremes_give_a_curve(hint_s):
    survival = Returns().curve(CHAT, "any", hint_s).survival
    assert len(survival) == len(EDGES_S) and survival[0] == 1.0
    assert np.all(np.isfinite(survival)) and np.all(np.diff(survival) <= 1e-6)


def hinted(policies, number, *, comes=False):
    """A conversation that is said to come back in a minute; it does not, or does."""
    usage, now_s = policies.usage, 1e6 + number * 1e4
    block = ParkedBlock(b"%d" % number, 0, 256, 1 << 20)
    name = ("liar", f"c{number}")
    usage.passed(now_s, True, 0)
    usage.parked(name, [block], Turn("end_turn", returns_at_s=now_s + 60.0), now_s)
    if comes:
        usage.asked(name, 300, now_s + 60.0)
    for step in range(1, 10):
        usage.passed(now_s + 60.0 * step, True, 0)


def test_a_hint_that_never_comes_true_counts_as_false():
    policies = make_policies("cost")
    trust = [policies.usage._returns.hint_trust("liar")]
    for number in range(10):
        hinted(policies, number)
        trust.append(policies.usage._returns.hint_trust("liar"))
    assert trust == sorted(trust, reverse=True)
    assert trust[-1] < 0.2
    # Each counts once, also where somebody comes back much later.
    policies.usage.asked(("liar", "c0"), 300, 2e6)
    assert policies.usage._returns.hint_trust("liar") == trust[-1]


def test_a_hint_that_came_true_is_not_taken_back_later():
    policies = make_policies("cost")
    for number in range(10):
        hinted(policies, number, comes=True)
    assert policies.usage._returns.hint_trust("liar") > 0.8
