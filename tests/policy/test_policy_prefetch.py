"""Who is worth reading ahead: the sum against brute force, and whom the policy names when."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from kvtier.policy.prefetch import _IDLE_READ, pays_from, worth_ahead
from kvtier.policy.survival import CLASSES, EDGES_S, SurvivalCurve
from kvtier.policy.usage import Turn
from kvtier.testing.worth_rig import Node, key

AHEAD_S = 600.0
CURVES = st.lists(st.floats(0.0, 0.9), min_size=CLASSES, max_size=CLASSES).map(
    lambda hazards: SurvivalCurve.of_hazards(np.array(hazards))
)


def brute_force(curve, idle_s, saving, read, ahead_s):
    """The best of many horizons, each by itself."""
    taus = np.linspace(ahead_s / 2000, ahead_s, 2000)
    gains = curve.returns_within(taus, idle_s) * saving - read
    return max(0.0, float((gains / np.maximum(curve.expected_wait_s(taus, idle_s), 1e-9)).max()))


@given(CURVES, st.floats(0.0, 1e5), st.floats(1.0, 7200.0), st.floats(0.0, 1.0))
@settings(deadline=None, max_examples=40)
def test_it_is_the_best_over_all_times_of_holding_it(curve, idle_s, ahead_s, read):
    found = worth_ahead(curve, idle_s, 1.0, read, ahead_s)
    best = brute_force(curve, idle_s, 1.0, read, ahead_s)
    assert found == pytest.approx(best, rel=0.05, abs=1e-9) or read == 0.0 or found >= 0.9 * best
    assert (found > 0) == (float(curve.returns_within(ahead_s, idle_s)) > read), "in the end"


@given(CURVES, st.floats(0.0, 1e5), st.floats(0.05, 1.0))
@settings(deadline=None, max_examples=60)
def test_it_pays_from_the_first_age_on_at_which_it_does(curve, idle_s, read):
    age_s = pays_from(curve, idle_s, 1.0, read, AHEAD_S)
    if age_s is not None:
        assert age_s >= idle_s
        assert float(curve.returns_within(AHEAD_S, age_s)) > read
    # Ages are looked at eight times in each class, its start among them.
    sooner = [float(t) for t in EDGES_S[:-1] if idle_s < t < (np.inf if age_s is None else age_s)]
    assert not any(float(curve.returns_within(AHEAD_S, t)) > read + 1e-9 for t in sooner)


def test_the_longer_one_looks_ahead_the_sooner_it_pays():
    alive = np.interp(np.arange(CLASSES + 1), [0, 25, 28, 40], [1, 0.9, 0.1, 0.05])
    curve = SurvivalCurve(alive.astype(np.float32))
    found = [pays_from(curve, 10.0, 1.0, 0.2, ahead_s) for ahead_s in (600.0, 3600.0, 14400.0)]
    ages = [np.inf if age_s is None else age_s for age_s in found]
    assert ages == sorted(ages, reverse=True)
    assert ages[-1] < np.inf


# --- whom it names ----------------------------------------------------------------------------------------


def on_disk(*names, **how):
    """A node that has these on disk alone, for a week."""
    node = Node()
    for name in names:
        node.park(name, 3, **how)
    node.evicted(3 * len(names))
    node.wait(7 * 86400.0, 40)
    return node


def due(node, ahead_s=3600.0):
    ahead = node.policies.prefetch.due(node.now_s, ahead_s)
    return None if ahead is None else ahead.name[1]


def test_who_is_expected_is_named_once_in_a_while():
    node = on_disk("a", "b")
    assert due(node) is None
    node.usage.hinted(("t", "b"), node.now_s + 60.0, None, node.now_s)
    assert [due(node), due(node)] == ["b", None]
    node.wait(30.0)
    assert due(node, 80.0) is None
    node.wait(450.0, 10)
    assert due(node) in ("b", None)


def test_hints_that_come_late_are_about_what_is_left():
    """A week later, half a minute is half a minute."""
    node = on_disk("a")
    node.usage.hinted(("t", "a"), node.now_s + 30.0, None, node.now_s)
    account = node.usage.account(key("a", 0), 1, (0, 1), node.now_s)
    assert account.returns[0] > 0.45
    assert account.idle_s == pytest.approx(7 * 86400.0)
    node.wait(46.0)
    assert node.usage.account(key("a", 0), 1, (0, 1), node.now_s).returns[0] < 0.1, "it did not come true"


NOT_NAMED = ("kept long enough", "forgotten", "asked for", "model retired", "no disk", "in memory")


@pytest.mark.parametrize("why", NOT_NAMED)
def test_who_gains_nothing_is_not_named(why):
    node = on_disk("a", turn=Turn("end_turn", model=b"m"))
    until_s = node.now_s - 1.0 if why == "kept long enough" else None
    node.usage.hinted(("t", "a"), node.now_s + 60.0, until_s, node.now_s)
    if why == "forgotten":
        node.usage.forgotten(("t", "a"))
    elif why == "asked for":
        node.ask("a", 700)
    elif why == "model retired":
        node.usage.serves({b"n": None}, {b"m": None})
    elif why == "no disk":
        node.usage.passed(node.now_s, False, 0)
    elif why == "in memory":
        for number, parent in enumerate((b"root", key("a", 0), key("a", 1))):
            node.policies.host.added(key("a", number), parent, 1, node.now_s)
    assert due(node) is None


@pytest.mark.parametrize("usable", [True, False])
def test_who_is_gone_is_not_remembered_where_nobody_asks(usable):
    """Without a disk, or with nothing read ahead, `due` names nobody."""
    node = Node()
    for number in range(1500):
        node.park(f"c{number}", 1, tiers=("host",))
        node.evicted(1)
        node.usage.forgotten(("t", f"c{number}"))
        node.usage.passed(node.now_s, usable, 0)
        if not usable:
            assert due(node) is None
    book = node.order("host")._book
    assert not book.owned()
    assert len(book.away) <= 1024


def test_only_what_is_worth_less_goes_for_it():
    node = on_disk("a")
    node.park("tool", 1, turn=Turn("tool_use"))
    node.park("gone", 1)
    node.usage.forgotten(("t", "gone"))
    node.usage.hinted(("t", "a"), node.now_s + 60.0, None, node.now_s)
    ahead = node.policies.prefetch.due(node.now_s, 3600.0)
    displaces = node.policies.prefetch.displaces
    assert displaces(ahead, key("gone", 0))
    assert not displaces(ahead, key("tool", 0))
    assert not displaces(ahead, key("a", 0)), "its own"
    node.ask("a", 700)
    assert not displaces(ahead, key("gone", 0)), "it is here already"


def test_a_read_costs_something_even_where_room_is_free():
    curve = SurvivalCurve(np.linspace(1.0, 0.99, CLASSES + 1).astype(np.float32))
    assert pays_from(curve, 0.0, 1.0, _IDLE_READ, AHEAD_S) is None
    assert pays_from(curve, 0.0, 1.0, 0.0, AHEAD_S) == 0.0
