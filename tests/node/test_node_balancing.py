"""A node that is full gives idle conversations to one with room, while both stay."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvtier.messages import cluster as c
from kvtier.messages.calls import DropPlan, Forget
from kvtier.node import balancing
from kvtier.policy import balance
from kvtier.testing.rig_cluster import NodeRig, RigCluster, end_well
from kvtier.testing.rig_uses import UNIT

TOKENS, CHAT = 120, 60 * UNIT
# Of four conversations it is full, and each further one pushes out the oldest.
ARENA = 250 * UNIT


def nodes(*names: str, rate: int = 1 << 30, eviction: str = "cost", **how: Any) -> list[NodeRig]:
    """Nodes without a disk, which drop for good what leaves their memory."""
    wishes = {"disk_expected": False, "rebalance_bytes_per_s": rate}
    settings = {"arena_bytes": [ARENA], "disk": None, "eviction": eviction, "wishes": wishes, **how}
    cluster = RigCluster(*names, **settings)
    for rig in cluster.rigs.values():
        rig.attach()
    cluster.announce()
    return list(cluster.rigs.values())


def tokens_of(number: int) -> range:
    return range(1000 * number, 1000 * number + TOKENS)


def park(rig: NodeRig, *numbers: int, **how: Any) -> None:
    for number in numbers:
        rig.park(rig.workers[0], f"chat-{number}", tokens_of(number), **how)
        rig.run()
        settle(rig)


def settle(rig: NodeRig, seconds: int = 2) -> None:
    """Time passes, and what is given away arrives."""
    for _ in range(seconds):
        rig.tick(1.0)
        rig.run()
        rig.cluster.announce()


def names(rig: NodeRig) -> list[int]:
    return sorted(int(name.removeprefix("chat-")) for _, name in rig.core.state.conversations)


def restorable(rig: NodeRig, numbers: range) -> int:
    """Tokens of these conversations that a plan finds, here or elsewhere."""
    found = 0
    for number in numbers:
        plan = rig.plan(rig.workers[0], f"chat-{number}", tokens_of(number)).plan
        rig.ask(DropPlan(plan_id=plan.plan_id))
        found += plan.load_tokens
    return found


def test_what_goes_next_is_given_to_the_node_with_room_and_comes_back_from_there() -> None:
    a, b = nodes("a", "b")
    park(a, 0, 1, 2)
    assert names(b) == [], "there is room yet"
    park(a, 3)
    (given,) = names(b)
    assert b.core.state.counters.kept_bytes == CHAT, "no more than goes soon: nothing is dropped yet"
    a.cluster.lose("a")
    back = b.resume(b.workers[0], f"chat-{given}", tokens_of(given)).receipt
    assert (back.tokens, back.sources) == (TOKENS, {"host": TOKENS})
    end_well(b)


def after_six(rate: int) -> int:
    a, b = nodes("a", "b", rate=rate)
    park(a, *range(6))
    found = restorable(a, range(6))
    end_well(a, b)
    return found


def test_what_is_evicted_here_is_found_there() -> None:
    assert after_six(1 << 30) >= 5 * TOKENS


def test_and_would_be_gone_if_nothing_might_be_given() -> None:
    assert after_six(0) < 4.5 * TOKENS


def test_the_disk_is_what_counts_where_there_is_one() -> None:
    wishes = {"rebalance_bytes_per_s": 1 << 30}
    a, b = nodes("a", "b", disk=ARENA, wishes=wishes)
    park(a, 0, 1, 2, 3)
    assert names(b) == [], "memory is full, but the disk is empty"
    for number in range(4):
        a.park(a.workers[0], f"chat-{number}", tokens_of(number), level="disk")
        a.run()
    settle(a)
    assert len(names(b)) == 1
    end_well(a, b)


def test_both_full_nothing_moves_and_nothing_ever_goes_back() -> None:
    a, b = nodes("a", "b")
    park(b, 100, 101)
    given: list[Any] = []
    b.core.cluster.balancing._give = given.append  # type: ignore[method-assign,assignment]
    park(a, *range(12))
    moved = b.core.state.counters.kept_bytes
    assert moved and b.core.state.host.usage().used_bytes <= 0.95 * ARENA
    settle(a, 20)
    assert b.core.state.counters.kept_bytes == moved
    assert not given
    park(b, 102, 103)
    assert names(a) and a.core.state.counters.kept_bytes == 0
    end_well(a, b)


def test_no_more_is_given_than_may_be_in_a_second() -> None:
    a, b = nodes("a", "b", rate=CHAT // 10)
    park(a, 0, 1, 2, 3)
    began_s = a.now_s
    assert len(names(b)) == 1
    park(a, 4)
    assert len(names(b)) == 1
    while len(names(b)) < 2:
        settle(a, 1)
        assert a.now_s < began_s + 60
    assert a.now_s >= began_s + 5
    end_well(a, b)


def test_what_is_there_already_costs_nothing_of_the_budget() -> None:
    a, b = nodes("a", "b")
    park(a, 0, 1, 2, 3)
    (given,) = b.core.state.conversations.values()
    a.core.state.settings = replace(a.core.state.settings, rebalance_bytes_per_s=CHAT // 10)
    a.core.cluster.balancing._todo.append(balancing._Idle(given.id, given.heads[0]))
    settle(a)
    assert not a.core.cluster.balancing._todo
    assert b.core.state.counters.kept_bytes == CHAT
    assert a.core.cluster.balancing._paid_s <= a.now_s
    end_well(a, b)


def test_no_more_is_given_than_is_dropped_and_soon_will_be() -> None:
    a, b = nodes("a", "b")
    park(a, 0, 1, 2, 3)
    settle(a, 300)
    assert b.core.state.counters.kept_bytes == CHAT
    park(a, 4)
    settle(a, 300)
    assert b.core.state.counters.kept_bytes == 2 * CHAT
    end_well(a, b)


def test_where_nobody_takes_anything_nobody_is_asked_all_the_time() -> None:
    a, b = nodes("a", "b")
    park(b, 100, 101, 102)
    asked = []
    answer = a.cluster.at_directory

    def counted(rig: NodeRig, message: Any) -> None:
        if isinstance(message, c.FindNodes):
            asked.append(rig.name)
        answer(rig, message)

    a.cluster.at_directory = counted  # type: ignore[method-assign]
    park(a, 0, 1, 2, 3)
    settle(a, 58)
    assert 1 <= len(asked) <= 20
    assert a.core.state.counters.kept_bytes == b.core.state.counters.kept_bytes == 0
    end_well(a, b)


def test_what_nobody_took_is_given_once_a_node_has_room() -> None:
    a, b = nodes("a", "b")
    b.core.state.draining = True
    settle(b)
    park(a, *range(12))
    settle(a, 300)
    assert names(b) == []
    b.core.state.draining = False
    settle(b)
    settle(a, 120)
    assert len(names(b)) >= 2, "what was only in the queue when the first was refused counts as not given"
    end_well(a, b)


def test_an_order_that_does_not_reckon_gives_nothing() -> None:
    a, b = nodes("a", "b", eviction="lru")
    park(a, 0, 1, 2, 3, 4)
    assert names(b) == []
    end_well(a, b)


def test_what_is_not_worth_its_way_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "pays", lambda returns, recompute_s, move_s: False)
    a, b = nodes("a", "b")
    park(a, 0, 1, 2, 3, 4)
    assert names(b) == []
    assert len(a.core.cluster.balancing._known) >= 1
    end_well(a, b)


def test_what_a_plan_holds_is_not_idle() -> None:
    a, b = nodes("a", "b")
    park(a, 0, 1, 2)
    for number in range(3):
        a.plan(a.workers[0], f"chat-{number}", tokens_of(number), lease_s=30.0)
    park(a, 3)
    assert names(b) in ([], [3])
    end_well(a, b)


def test_a_node_that_goes_out_of_service_balances_nothing_and_takes_nothing() -> None:
    a, b = nodes("a", "b")
    b.core.state.draining = True
    settle(b)
    assert a.cluster.loads["b"].takes_bytes == 0
    park(a, 0, 1, 2, 3, 4)
    assert names(b) == []
    b.core.state.draining = False
    end_well(a, b)


def test_what_is_forgotten_on_its_way_is_nowhere() -> None:
    a, b = nodes("a", "b")
    park(a, 0, 1, 2)
    a.park(a.workers[0], "chat-3", tokens_of(3))
    a.run_copies()
    a.tick(1.0)
    a.tick(1.0)
    assert b.pulls, "it is on its way"
    for number in range(4):
        a.ask(Forget(conversation=f"chat-{number}", tenant="acme"))
    a.run()
    settle(a)
    assert names(a) == names(b) == []
    assert not list(b.core.state.tree)
    end_well(a, b)


def test_of_several_nodes_one_with_room_gets_it() -> None:
    a, b, d = nodes("a", "b", "d")
    park(b, 100, 101, 102)
    park(a, 0, 1, 2, 3)
    assert names(b) == [100, 101, 102]
    assert len(names(d)) == 1
    end_well(a, b, d)
