"""A node goes out of service: no park begins, and all that only memory holds is written, the best first."""

from __future__ import annotations

from dataclasses import replace

from kvtier.messages.cluster import SERVICE, Drain
from kvtier.messages.tiers import DiskWrite
from kvtier.node.events import Received
from kvtier.testing.core_rig import CoreRig
from kvtier.testing.rig_checks import drain, problems
from kvtier.testing.rig_cluster import RigCluster, end_well


def begin(rig: CoreRig) -> None:
    rig.tell(Received(SERVICE, Drain()))


def test_what_only_memory_holds_is_written_and_survives() -> None:
    rig = CoreRig()
    worker = rig.attach()
    for number in range(3):
        rig.park(worker, f"chat-{number}", range(100 * number, 100 * number + 10))
        rig.run()
    dirty = rig.core.state.dirty_bytes
    assert dirty
    begin(rig)
    assert rig.core.cluster.draining.progress().dirty_bytes == dirty
    while not rig.core.cluster.draining.progress().done:
        rig.run()
        rig.tick(0.2)
    progress = rig.core.cluster.draining.progress()
    assert (progress.dirty_bytes, progress.flushed_bytes) == (0, dirty)
    reborn = rig.restarted()
    for number in range(3):
        tokens = range(100 * number, 100 * number + 10)
        assert reborn.resume(reborn.attach(), f"chat-{number}", tokens).receipt.tokens == 10
    drain(rig)
    assert problems(rig) == []


def test_no_park_begins_and_restores_go_on() -> None:
    rig = CoreRig()
    worker = rig.attach()
    rig.park(worker, "chat", range(10))
    rig.run()
    begin(rig)
    late = rig.park(worker, "late", range(50, 60))
    rig.run()
    assert (late.receipt.level, late.receipt.reason) == ("none", "backpressure")
    assert rig.resume(worker, "chat", range(10)).receipt.tokens == 10


def test_without_a_disk_it_is_over_at_once_and_says_what_is_lost() -> None:
    rig = CoreRig(disk=None)
    rig.park(rig.attach(), "chat", range(10))
    rig.run()
    begin(rig)
    progress = rig.core.cluster.draining.progress()
    assert progress.done and progress.dirty_bytes == rig.core.state.dirty_bytes > 0


def test_the_control_without_the_word_nothing_is_written() -> None:
    rig = CoreRig()
    rig.park(rig.attach(), "chat", range(10))
    rig.run()
    rig.tick(1.0)
    assert not [op for op in rig.ops if isinstance(op.message, DiskWrite)]
    assert rig.core.state.dirty_bytes


def three_chats(**how):
    """A node with three conversations beside an empty one; the last is worth the most."""
    cluster = RigCluster("a", "b", wishes={"move_bytes_per_s": 1 << 30}, **how)
    a, b = cluster.rigs.values()
    worker = a.attach()
    for number in range(3):
        a.park(worker, f"chat-{number}", range(100 * number, 100 * number + 10))
        a.run()
        a.tick(1.0)
    cluster.announce()
    return a, b


def moved(b, count=3):
    return [number for number in range(count) if ("acme", f"chat-{number}") in b.core.state.conversations]


def finish(rig) -> None:
    for _ in range(4):
        rig.run()
        rig.tick(0.2)


def test_what_memory_holds_is_given_to_another_node() -> None:
    a, b = three_chats(disk=None)
    begin(a)
    assert not a.core.cluster.draining.progress().done
    finish(a)
    progress = a.core.cluster.draining.progress()
    assert progress.done and progress.dirty_bytes == 0
    assert progress.moved_bytes == b.core.state.counters.kept_bytes > 0
    a.cluster.lose("a")
    for number in range(3):
        tokens = range(100 * number, 100 * number + 10)
        assert b.resume(b.attach(), f"chat-{number}", tokens).receipt.sources == {"host": 10}
    end_well(b)


def test_no_more_than_may_be_given_in_a_second_the_most_worth_first() -> None:
    a, b = three_chats(disk=None)
    a.core.state.settings = replace(a.core.state.settings, move_bytes_per_s=4096)
    begin(a)
    a.run()
    assert moved(b) == [2]
    dirty = a.core.cluster.draining.progress().dirty_bytes
    assert dirty == 2 * a.core.state.dirty_bytes // 3
    a.tick(2.0)
    a.run()
    assert moved(b) == [2]
    a.tick(4.0)
    a.run()
    assert moved(b) == [1, 2]


def test_nothing_is_given_where_nothing_may_be() -> None:
    a, b = three_chats()
    a.core.state.settings = replace(a.core.state.settings, move_bytes_per_s=0)
    begin(a)
    a.run()
    assert not moved(b)
    a.tick(0.2)
    a.run()
    assert a.core.cluster.draining.progress().done


def test_with_nobody_to_take_it_the_drain_ends_all_the_same() -> None:
    a, b = three_chats()
    a.cluster.cut.add("b")
    begin(a)
    for _ in range(20):
        a.run()
        a.tick(0.2)
    progress = a.core.cluster.draining.progress()
    assert progress.done and progress.moved_bytes == 0
    assert not moved(b)


def test_what_the_other_node_has_already_does_not_travel() -> None:
    a, b = three_chats()
    for number in range(3):
        b.resume(b.attach(), f"chat-{number}", range(100 * number, 100 * number + 10))
    begin(a)
    finish(a)
    assert moved(b) == [0, 1, 2]
    assert a.core.cluster.draining.progress().moved_bytes == 0
