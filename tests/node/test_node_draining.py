"""A node goes out of service: no park begins, and all that only memory holds is written, the best first."""

from __future__ import annotations

from kvtier.cluster_messages import SERVICE, Drain
from kvtier.node.events import Received
from kvtier.testing.core_rig import CoreRig
from kvtier.testing.rig_checks import drain, problems
from kvtier.tier_messages import DiskWrite


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
