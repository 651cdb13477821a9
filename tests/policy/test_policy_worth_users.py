"""Who uses what: fronts that many share, conversations under new names, requests, and who stays away."""

import pytest

from kvtier.policy import worth_usage
from kvtier.policy.usage import Turn
from kvtier.testing.worth_rig import NBYTES, Node, chain, key


def test_what_many_use_is_worth_the_sum_over_its_users():
    def first(users):
        node = Node()
        for number in range(users):
            node.park(f"u{number}", 3, front="prompt", shared=1)
            node.wait(20.0)
        node.park("alone", 2)
        node.wait(3600.0, 60)
        for number in range(users):
            node.usage.forgotten(("t", f"u{number}"))
        node.park("late", 1)
        node.wait(60.0, 4)
        gone = node.evicted(2 * users + 1)
        return gone[-1]

    assert first(12) == "alone 1", "a front that comes up again and again outlives its users"
    assert first(1) == "prompt 0"


def test_uses_of_a_shared_front_are_not_counted_for_ever():
    node = Node()
    for number in range(40):
        node.park(f"u{number}", 2, front="prompt", shared=1)
        node.wait(10.0)
    shared = node.policies.host._book.owner(key("prompt", 0))
    assert 8 <= shared.uses <= 16
    assert shared.curve.rate(0.0) == pytest.approx(1 / 10.0, rel=0.5)
    assert shared.curve.rate(7200.0) < 16 / 7200.0


def test_another_rank_and_a_restart_count_no_use_twice():
    node = Node()
    node.park("a", 2)
    node.park("b", 3, front="a", shared=1)
    shared = node.policies.host._book.owner(key("a", 0))
    node.park("b", 3, front="a", shared=1)
    assert node.policies.host._book.owner(key("a", 0)) is shared
    assert shared.uses == 1


def test_while_a_request_is_served_the_next_one_is_waited_for_since_it_came():
    node = Node()
    for number in range(60):
        node.park(f"c{number}", 1, tiers=())
        node.ask(f"c{number}")
        node.wait(30.0, 6)
        node.ask(f"c{number}", 2)
        node.wait(1.0)
    node.park("a", 1)
    node.ask("a", 300)
    run = node.usage._chats["t", "a"].run
    assert run.serving
    assert run.rate(node.now_s) == pytest.approx(1 / 30.0, rel=0.5), "the next is half a minute away"
    node.usage.parked(("t", "a"), chain("a", 2), Turn(), node.now_s)
    assert not node.usage._chats["t", "a"].run.serving


def under_new_names(turns, gap_s=30.0, *, again=False):
    """Somebody whose every request has another name; answers the node and its last run."""
    node = Node()
    for number in range(turns):
        name = "same" if again else f"r{number}"
        node.ask(name, 100 * number + 1)
        node.wait(2.0)
        path = chain("a", number + 2)
        for before, block in zip([None, *path], path, strict=False):
            node.policies.host.added(block.key, before.key if before else b"root", NBYTES, node.now_s)
        node.usage.parked(("t", name), path, Turn("end_turn"), node.now_s)
        node.wait(gap_s, 5)
    return node, node.policies.host._book.owner(key("a", 0))


def test_a_conversation_under_a_new_name_each_time_is_one_conversation():
    node, run = under_new_names(8)
    other, same = under_new_names(8, again=True)
    assert node.policies.host._book.owner(key("a", 8)) is run
    assert not run.uses, "nobody else uses it"
    assert run.rate(node.now_s) == pytest.approx(same.rate(other.now_s), rel=0.25)
    assert node.usage._returns.waits_seen == other.usage._returns.waits_seen
    assert len(node.usage._chats) == 1


def test_who_only_shares_a_front_is_somebody_else():
    node = Node()
    node.park("a", 6)
    node.park("b", 4, front="a", shared=3)
    assert node.policies.host._book.owner(key("a", 5)).waiting
    assert node.policies.host._book.owner(key("a", 0)).uses == 1
    assert {("t", "a"), ("t", "b")} <= set(node.usage._chats)


def expected_of_nobody():
    """The chance to come back within an hour after five minutes, after two hundred did not."""
    node = Node()
    for number in range(200):
        node.park(f"c{number}", 1, tiers=())
    node.wait(1800.0, 60)
    node.park("last", 1)
    curve = node.policies.host._book.owner(key("last", 0)).curve.whole
    return float(curve.returns_within(3600.0, 300.0))


def test_who_stays_away_teaches_while_he_is_away(monkeypatch):
    soon = expected_of_nobody()
    monkeypatch.setattr(worth_usage, "_TEACH_AT_ONCE", 40)
    assert soon < 0.5 * expected_of_nobody(), "the control: told at the end alone, nothing is learned of it"
