"""When a tombstone counts as carried out, and what a directory that lost its memory may ask for."""

from __future__ import annotations

import pytest

from kvtier.messages import cluster as c
from kvtier.messages.calls import Forget
from kvtier.messages.tiers import DiskRemove
from kvtier.node.events import Received
from kvtier.node.graves import Burials
from kvtier.testing.rig_cluster import NodeRig, end_well, objects_of, pair, park_at


def forget_but_for_the_disk(rig: NodeRig) -> None:
    """Everybody else has erased it; here the removal is on its way to the disk."""
    rig.ask(Forget(conversation="chat", tenant="acme"))
    assert [op for op in rig.disk_ops() if isinstance(op.message, DiskRemove)]


def test_who_forgets_has_carried_it_out_only_when_that_is_durable() -> None:
    a, b = pair()
    park_at(a, level="disk")
    forget_but_for_the_disk(a)
    assert [stone.id for stone in b.proven] == [stone.id for stone in a.graves] != []
    assert not a.proven
    b.announce()
    # It waits for the node that forgot, too: nobody is told that it is over.
    assert not a.cluster.shard._tombstones._over
    a.run_disk()
    assert a.proven == a.graves
    end_well(a, b)


def test_the_control_a_node_that_says_so_at_once_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    bury = Burials.bury

    def hasty(self, name):
        job = bury(self, name)
        self._state.send(c.DIRECTORY, c.Erased(stone=self._unproven.pop(job)))
        return job

    monkeypatch.setattr(Burials, "bury", hasty)
    a, _ = pair()
    park_at(a, level="disk")
    forget_but_for_the_disk(a)
    assert a.proven


def test_a_start_in_the_middle_of_it_carries_it_out_before_it_says_so() -> None:
    a, _ = pair()
    cluster = a.cluster
    park_at(a, level="disk")
    store = a.store.copy()
    forget_but_for_the_disk(a)
    graves = tuple(a.graves)
    cluster.lose("a")
    assert store.objects, "the removal did not reach the drive"
    cluster.cut.add("a")
    a = NodeRig(cluster, "a", graves=graves, epoch=7, disk=store)
    assert not a.proven
    cluster.cut.discard("a")
    a.tick(1.5)
    a.run()
    assert not store.objects and not store.records
    assert a.proven == list(graves)
    end_well(a)


def test_an_erasure_that_failed_is_tried_again_until_it_worked() -> None:
    a, _ = pair()
    park_at(a, level="disk")
    forget_but_for_the_disk(a)
    for op in a.disk_ops():
        a.finish(op, "disk_error")
    assert not a.proven
    for _ in range(4):
        a.tick(31.0)
        a.run()
    assert a.proven == a.graves and not a.store.objects


def test_what_came_after_the_end_of_a_tombstone_outlives_a_directory_that_asks_for_it_once_more() -> None:
    a, b = pair()
    park_at(a)
    b.ask(Forget(conversation="chat", tenant="acme"))
    (stone,) = b.graves
    for rig in (a, b):
        rig.tell(Received(c.DIRECTORY, c.Over(ids=(stone.id,))))
        # Longer than it is kept for reads that may be under way.
        rig.tick(130.0)
        rig.tick(1.0)
        assert not rig.core.state.stones
    park_at(a)
    assert a.core.state.conversations["acme", "chat"].after == ()
    answers = a.question(c.Erase(stone=stone))
    assert answers == c.Erased(stone=stone)
    assert len(objects_of(a, "chat")) == 3
    # Also after a start: the names of those that are over are on the drive.
    again = NodeRig(a.cluster, "a", epoch=9, disk=a.cluster.lose("a"))
    again.tell(Received(c.DIRECTORY, c.Graves(stones=(), past=(stone.id,))))
    again.announce()
    park_at(again)
    assert again.question(c.Erase(stone=stone)).ok
    assert len(objects_of(again, "chat")) == 3


def test_a_park_that_begins_after_a_start_is_not_taken_for_what_was_forgotten() -> None:
    a, _ = pair()
    cluster = a.cluster
    park_at(a, level="disk")
    a.ask(Forget(conversation="chat", tenant="acme"))
    a.run()
    graves, store = tuple(a.graves), cluster.lose("a")
    cluster.cut.add("a")
    a = NodeRig(cluster, "a", graves=graves, epoch=7, disk=store)
    park = a.park(a.attach(), "chat", range(10), level="disk")
    a.tick(1.5)
    # The directory does not know that this node has carried it out, and asks.
    a.tell(Received(c.DIRECTORY, c.Erase(stone=graves[0])))
    a.run()
    assert park.receipt.level == "disk"
    assert a.proven == list(graves)
    assert len(objects_of(a, "chat")) == 3
    end_well(a)
