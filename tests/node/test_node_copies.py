"""A park that asks for copies at other nodes: what its receipt says is true, whatever becomes of them."""

from __future__ import annotations

import msgspec
import pytest

from kvtier.messages import cluster as c
from kvtier.messages.calls import Forget
from kvtier.node.events import Received
from kvtier.node.replicas import Replicas
from kvtier.testing.rig_cluster import NodeRig, RigCluster, end_well, objects_of, park_at
from kvtier.testing.rig_uses import HYBRID, PLAIN, UNIT


def three(**how):
    cluster = RigCluster("a", "b", "d", **how)
    cluster.announce()
    return cluster.rigs.values()


def holders(cluster, count=10):
    """Nodes that restore a whole conversation of `count` tokens from what they have themselves."""
    found = []
    for name, rig in cluster.rigs.items():
        others = set(cluster.rigs) - {name}
        cluster.cut |= others
        if rig.resume(rig.attach(), "chat", range(count)).receipt.tokens == count:
            found.append(name)
        cluster.cut -= others
    return found


@pytest.mark.parametrize("geometry", [PLAIN, HYBRID])
def test_two_copies_outlive_the_node_that_was_parked_at(geometry):
    a, b, d = three()
    park = park_at(a, geometry=geometry, level="copies=2")
    assert (park.receipt.level, park.receipt.ok, park.receipt.reason) == ("copies=2", True, "")
    (other,) = park.receipt.copies
    cluster = a.cluster
    cluster.lose("a")
    rig = cluster.rigs[other]
    restore = rig.resume(rig.attach(geometry), "chat", range(12))
    assert (restore.receipt.tokens, restore.receipt.sources) == (10, {"host": 10})
    third = cluster.rigs[({"b", "d"} - {other}).pop()]
    assert third.resume(third.attach(geometry), "chat", range(12)).receipt.sources == {"peer": 10}
    end_well(b, d)


def parking(rig, count=10, level="copies=2", **how):
    """A park whose copies at other nodes wait for their reads."""
    park = rig.park(rig.attach(), "chat", range(count), level=level, **how)
    rig.run_copies()
    return park


def keeper(cluster):
    """The node that reads for a park now."""
    (found,) = [rig for rig in cluster.rigs.values() if rig.pulls]
    return found


def test_nothing_is_said_before_the_other_node_has_it_all():
    a, *_ = three()
    park = parking(a)
    other = keeper(a.cluster)
    while other.pulls:
        assert not park.receipts
        other.finish_pull(other.pulls[0])
    assert park.receipt.copies == {other.name: "host"}
    assert park.released


def test_another_node_is_asked_when_one_dies_in_the_middle():
    a, *_ = three()
    park = parking(a, 24)
    first = keeper(a.cluster)
    first.finish_pull(first.pulls[0])
    a.cluster.lose(first.name)
    assert not park.receipts
    second = keeper(a.cluster)
    assert second is not first
    a.run()
    assert park.receipt.copies == {second.name: "host"}
    end_well(a, second)


def test_a_silent_node_takes_no_more_than_its_share_of_the_time():
    a, *_ = three()
    park = parking(a)
    first = keeper(a.cluster)
    first.pulls.clear()
    # The daemon's question ends with its time-out; the node that hangs keeps its slots to itself.
    (job,) = a.core.cluster.replicas._asked
    a.tick(13.0)
    assert not park.receipts
    a.tell(Received(c.PEERS, c.Kept(job=job, reason="peer_lost")))
    second = keeper(a.cluster)
    while second.pulls:
        second.finish_pull(second.pulls[0])
    assert park.receipt.level == "copies=2"
    assert list(park.receipt.copies) == [second.name]


@pytest.mark.parametrize(("disk", "level"), [(1 << 20, "disk"), (None, "host")])
def test_without_other_nodes_the_level_is_lower_and_says_why(disk, level):
    cluster = RigCluster("a", disk=disk)
    (a,) = cluster.rigs.values()
    park = park_at(a, level="copies=2")
    assert (park.receipt.level, park.receipt.ok, park.receipt.reason) == (level, False, "no_peer")
    assert park.receipt.tokens == 10 and "failure domain" in park.receipt.detail
    end_well(a)


def test_two_of_three_copies_are_two():
    a, *_ = RigCluster("a", "b").rigs.values()
    a.cluster.announce()
    park = park_at(a, level="copies=3")
    assert (park.receipt.level, park.receipt.reason) == ("copies=2", "no_peer")
    assert not park.receipt.ok


def test_nodes_that_may_fail_together_count_once():
    cluster = RigCluster("a", "b", wishes={"failure_domain": "rack 1"})
    a, _ = cluster.rigs.values()
    cluster.announce()
    assert park_at(a, level="copies=2").receipt.reason == "no_peer"
    assert not holders_of_objects(cluster, "b")


def holders_of_objects(cluster, name):
    return objects_of(cluster.rigs[name], "chat")


def test_one_of_two_in_a_domain_takes_the_place_of_the_other():
    cluster = RigCluster("a")
    for name in ("b", "d"):
        NodeRig(cluster, name, epoch=9, wishes={"failure_domain": "rack 2"})
    cluster.announce()
    a = cluster.rigs["a"]
    park = parking(a, level="copies=3")
    first = keeper(cluster)
    cluster.lose(first.name)
    a.run()
    assert park.receipt.level == "copies=2"
    assert list(park.receipt.copies) == [({"b", "d"} - {first.name}).pop()]


def test_the_next_turn_goes_to_the_same_node_and_only_its_own_blocks_travel():
    a, *_ = three()
    (first,) = park_at(a, 10, level="copies=2").receipt.copies
    other = a.cluster.rigs[first]
    before = other.core.state.counters.kept_bytes
    assert before
    park = park_at(a, 15, level="copies=2")
    assert list(park.receipt.copies) == [first]
    # A tail of two tokens was there; the full block that contains it and a new tail have come.
    assert other.core.state.counters.kept_bytes - before == (4 + 3) * UNIT // 2
    known = other.core.state.conversations["acme", "chat"]
    assert [head.tokens for head in known.heads] == [15]
    assert len(objects_of(other, "chat")) == 4
    end_well(*a.cluster.rigs.values())


def test_a_private_conversation_is_found_at_its_copy():
    a, *_ = three()
    (name,) = park_at(a, 14, level="copies=2", private_from=4).receipt.copies
    cluster = a.cluster
    cluster.lose("a")
    (third,) = [rig for rig in cluster.rigs.values() if rig.name != name]
    assert third.resume(third.attach(), "chat", range(14)).receipt.tokens == 14
    assert third.resume(third.attach(), "other", range(14)).receipt.tokens == 4


def test_forgetting_reaches_all_copies():
    a, *_ = three()
    park_at(a, level="copies=3")
    cluster = a.cluster
    assert sorted(holders(cluster)) == ["a", "b", "d"]
    a.ask(Forget(conversation="chat", tenant="acme"))
    a.run()
    cluster.announce()
    assert not any(holders_of_objects(cluster, name) for name in cluster.rigs)
    assert not holders(cluster)


def test_what_is_forgotten_while_it_is_copied_stays_forgotten():
    a, *_ = three()
    park = parking(a, 24)
    other = keeper(a.cluster)
    other.finish_pull(other.pulls[0])
    a.ask(Forget(conversation="chat", tenant="acme"))
    a.run()
    assert park.receipt.reason == "forgotten"
    assert not any(holders_of_objects(a.cluster, name) for name in a.cluster.rigs)
    end_well(*a.cluster.rigs.values())


def test_a_node_that_has_yet_to_forget_does_so_first():
    a, b, _ = three()
    cluster = a.cluster
    park_at(b, level="disk")
    cluster.cut.add("b")
    a.ask(Forget(conversation="chat", tenant="acme"))
    a.run()
    cluster.cut.clear()
    a.announce()
    park = parking(a, 6, level="copies=3")
    a.run()
    assert not park.receipts
    for _ in range(3):
        a.tick(0.6)
        a.run()
    assert sorted(park.receipt.copies) == ["b", "d"]
    assert [head.tokens for head in b.core.state.conversations["acme", "chat"].heads] == [6]
    # The directory tells it of the tombstone all the same: that does not reach what came after it.
    cluster.announce()
    assert sorted(holders(cluster, 6)) == ["a", "b", "d"]


def test_who_forgot_it_does_not_take_it_from_who_has_not_heard():
    a, b, _ = three()
    b.tell(Received(c.DIRECTORY, c.Erase(stone=c.Stone("s1", "acme", "chat", 1.0))))
    b.run()
    park = park_at(a, level="copies=3")
    assert list(park.receipt.copies) == ["d"]
    assert "b: forgotten" in park.receipt.detail


def test_a_node_that_goes_out_of_service_is_not_asked():
    a, b, _ = three()
    b.tell(Received(c.SERVICE, c.Drain()))
    b.tick(2.0)
    assert list(park_at(a, level="copies=2").receipt.copies) == ["d"]


def test_a_busy_node_is_asked_again():
    a, b = RigCluster("a", "b", disk=None).rigs.values()
    a.cluster.announce()
    holder = b.attach()
    b.park(holder, "other", range(100, 228))
    b.run()
    # All of its memory is held for a plan.
    b.plan(holder, "other", range(100, 228), lease_s=5.0)
    park = parking(a, 60)
    assert not park.receipts and not b.pulls
    b.tick(6.0)
    a.tick(6.0)
    a.run()
    assert park.receipt.level == "copies=2"


def test_a_conversation_that_is_too_large_for_the_others_is_refused_there():
    a, _ = RigCluster("a", "b").rigs.values()
    a.cluster.announce()
    park = park_at(a, 72, level="copies=2")
    assert (park.receipt.level, park.receipt.reason) == ("disk", "no_peer")
    assert "b: too_large" in park.receipt.detail


def test_the_time_of_a_park_is_kept():
    a, *_ = three()
    park = parking(a, timeout_s=8.0)
    other = keeper(a.cluster)
    other.pulls.clear()
    a.tick(6.1)
    a.run()
    assert (park.receipt.level, park.receipt.reason) == ("disk", "deadline")
    other.tick(30.0)


def test_memory_gives_a_copy_to_the_disk_and_does_not_drop_it(monkeypatch):
    a, b = RigCluster("a", "b").rigs.values()
    a.cluster.announce()
    park_at(a, level="copies=2")
    for rig in (a, b):
        monkeypatch.setattr(rig.core.state.policies.admission, "demote", lambda *about: False)
        for filler in range(8):
            first = 1000 * (filler + 1)
            rig.park(rig.attach(), f"filler-{filler}", range(first, first + 40))
            rig.run()
        assert all(stored.on_disk is not None for stored in objects_of(rig, "chat"))
    assert sorted(holders(a.cluster)) == ["a", "b"]


def test_a_node_of_another_secret_or_a_liar_is_refused_and_nothing_changes():
    a, b = RigCluster("a", "b").rigs.values()
    a.cluster.announce()
    said = []
    tell = b.tell
    b.tell = lambda stimulus: (said.append(stimulus), tell(stimulus))
    park_at(a, level="copies=2")
    (keep,) = [s.message for s in said if isinstance(getattr(s, "message", None), c.Keep)]
    for wrong in (
        {"tokens": 11},
        {"metas": []},
        {"roots": [msgspec.structs.replace(keep.roots[0], tenant="rival")]},
        {"tenant": "rival"},
        {"timeout_s": float("inf")},
        {"metas": [msgspec.structs.replace(meta, checksum=None) for meta in keep.metas]},
    ):
        answer = b.question(msgspec.structs.replace(keep, conversation="new", **wrong))
        assert type(answer).__name__ == "Failed", wrong
    assert ("acme", "new") not in b.core.state.conversations
    end_well(a, b)


def test_a_width_that_one_owner_does_not_know_is_learned_from_the_next():
    a, b = RigCluster("a", "b").rigs.values()
    a.cluster.announce()
    worker, known = a.attach(), dict(a.core.state.item_bytes)
    a.core.state.item_bytes.clear()
    for name, widths in (("chat", {}), ("other", known)):
        a.core.state.item_bytes.update(widths)
        park = a.park(worker, name, range(10), level="copies=2")
        a.run()
        assert (park.receipt.ok, b.core.state.item_bytes) == (True, widths)
    end_well(a, b)


def test_a_copy_of_what_went_on_here_is_no_branch_of_its_own():
    a, b = RigCluster("a", "b").rigs.values()
    a.cluster.announce()
    park_at(a, 8)
    park_at(b, 16)
    assert park_at(a, 8, level="copies=2").receipt.copies == {"b": "host"}
    assert [head.tokens for head in b.core.state.conversations["acme", "chat"].heads] == [16]


def test_a_prompt_that_many_share_is_pulled_once():
    a, b = RigCluster("a", "b").rigs.values()
    for number in range(3):
        park_at(a, 16, f"chat-{number}")
    assert b.resume(b.attach(), "chat-0", range(16)).receipt.sources == {"peer": 16}
    for number in (1, 2):
        assert b.resume(b.attach(), f"chat-{number}", range(16)).receipt.sources == {"host": 16}
    assert b.core.state.counters.pulled_bytes == 16 * UNIT // 2


# --- a node that restarts after it has answered -----------------------------------------------------------


def restarting(disk=None):
    """A park for three nodes: the first of two others has it, restarts, and then the second has it too."""
    cluster = RigCluster("a", "b", "d", disk=disk)
    cluster.announce()
    a = cluster.rigs["a"]
    park = parking(a, level="copies=3")
    first, second = [rig for rig in cluster.rigs.values() if rig.pulls]
    ends(first)
    assert not park.receipts
    store = cluster.lose(first.name)
    again = NodeRig(cluster, first.name, epoch=9, disk=store)
    again.now_s = a.now_s
    cluster.announce()
    ends(second)
    return park, again, second


def ends(rig):
    """Its reads, and what it writes for them."""
    while rig.pulls:
        rig.finish_pull(rig.pulls[0])
    rig.run_disk()


def test_a_node_that_restarted_since_it_answered_does_not_count_and_is_asked_again():
    park, again, second = restarting()
    assert not park.receipts
    ends(again)
    assert (park.receipt.level, set(park.receipt.copies)) == ("copies=3", {again.name, second.name})
    assert holders(again.cluster) == sorted(
        ["a", again.name, second.name], key=list(again.cluster.rigs).index
    )
    end_well(*again.cluster.rigs.values())


def test_and_without_that_it_would_be_counted(monkeypatch):
    monkeypatch.setattr(Replicas, "_proven", lambda self, wish, nodes: self._end(wish))
    park, again, second = restarting()
    assert set(park.receipt.copies) == {again.name, second.name}
    assert again.name not in holders(again.cluster)


def test_one_that_restarted_and_fails_then_leaves_two_copies_and_the_reason():
    park, again, second = restarting()
    while again.pulls:
        again.finish_pull(again.pulls[0], "peer_lost")
    assert (park.receipt.level, set(park.receipt.copies)) == ("copies=2", {second.name})
    assert again.name in park.receipt.detail


def test_what_was_on_its_disk_is_still_there():
    cluster = RigCluster("a", "b", "d")
    cluster.announce()
    a, b, _ = cluster.rigs.values()
    park = parking(a, level="copies=3")
    first, second = [rig for rig in cluster.rigs.values() if rig.pulls]
    ends(second)
    (job,) = a.core.cluster.replicas._asked
    restarted = c.NodeThere(first.name, 9, cluster.loads[first.name])
    answer = cluster._answer
    cluster._answer = lambda rig, message: (
        c.NodesThere(job=message.job, nodes=(restarted,))
        if isinstance(message, c.FindNodes)
        else answer(rig, message)
    )
    a.tell(Received(c.PEERS, c.Kept(job=job, tier="disk", epoch=b.core.state.epoch)))
    assert park.receipt.copies == {first.name: "disk", second.name: "host"}


def test_a_directory_that_does_not_say_holds_up_nobody():
    a, *_ = three()
    park = parking(a, level="copies=3")
    a.cluster._answer = lambda rig, message: None
    for rig in list(a.cluster.rigs.values()):
        ends(rig)
    assert not park.receipts
    a.tick(0.6)
    assert park.receipt.level == "copies=3"
