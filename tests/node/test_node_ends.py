"""A conversation ends with its last end, and the disk's objects are known until they are removed."""

import pytest

from kvtier.messages.calls import Forget
from kvtier.messages.tiers import DiskRead
from kvtier.node.settings import NodeSettings
from kvtier.testing.rig_uses import UNIT


@pytest.fixture
def continued(make_rig):
    """A turn on disk, continued by one that only host memory had, which is lost: its tail is left on disk."""
    rig = make_rig(arena_bytes=[4 * UNIT], disk=6 * UNIT)
    worker = rig.attach()
    rig.park(worker, "chat", range(1), level="disk")
    rig.run()
    rig.kill(rig.disk)
    rig.park(worker, "chat", range(4))
    rig.run()
    rig.park(worker, "other", range(50, 58))
    rig.run()
    return rig


def test_when_the_continuation_is_lost_the_end_before_it_is_the_head_again(continued):
    rig = continued
    known = rig.core.state.conversations["acme", "chat"]
    assert [head.tokens for head in known.heads] == [1]
    assert known.earlier == []
    rig.start_disk()
    assert rig.resume(rig.workers[0], "chat", range(4)).receipt.tokens == 1


def test_a_conversation_whose_last_end_leaves_the_disk_is_over(continued):
    rig = continued
    rig.start_disk()
    rig.park(rig.workers[0], "other", range(50, 58), level="disk")
    rig.run()
    assert [name for _, name in rig.core.state.conversations] == ["other"]
    assert rig.ask(Forget(conversation="other", tenant="acme")) is None
    rig.run()
    assert not (rig.store.objects or rig.store.records)


@pytest.mark.parametrize("why", ["disk_error", "wear", "something new"])
def test_what_could_not_be_read_is_still_on_disk(rig, worker, why):
    rig.park(worker, "chat", range(8), level="disk")
    rig.run()
    reborn = rig.restarted()
    twin = reborn.attach()
    restore = reborn.restore(twin, reborn.plan(twin, "chat", range(8)), range(8))
    read = reborn.disk_ops()[0]
    assert isinstance(read.message, DiskRead)
    reborn.finish(read, why)
    reborn.run()
    assert (restore.receipt.tokens, restore.receipt.reason) == (0, "disk_error")
    assert reborn.core.state.disk_held_bytes == rig.core.state.disk_held_bytes
    assert reborn.resume(twin, "chat", range(8)).receipt.tokens == 8
    reborn.ask(Forget(conversation="chat", tenant="acme"))
    reborn.run()
    assert not (reborn.store.objects or reborn.store.records)


def test_what_is_missing_on_disk_is_not_counted_there(rig, worker):
    rig.park(worker, "chat", range(8), level="disk")
    rig.run()
    reborn = rig.restarted()
    twin = reborn.attach()
    restore = reborn.restore(twin, reborn.plan(twin, "chat", range(8)), range(8))
    reborn.store.objects.clear()
    reborn.run()
    assert (restore.receipt.tokens, restore.receipt.reason) == (0, "disk_error")
    assert reborn.core.state.disk_held_bytes == 0
    assert not reborn.core.state.conversations


# --- of what was spilled and never asked to be on disk ------------------------------------------------------

SPILLS = NodeSettings(batch_bytes=2 * UNIT, spill_above=0.0)


def spilled(rig, worker, name):
    """Four blocks, in host memory and on disk."""
    rig.park(worker, name, range(16))
    rig.run()
    rig.tick(1.0)
    rig.run()
    assert rig.core.state.dirty_bytes == 0


@pytest.mark.parametrize("evictions", [1, 2])
def test_when_its_end_leaves_the_disk_its_front_has_the_name_after_power_loss(make_rig, evictions):
    """It was never asked to be on disk; its record is there, since it was spilled."""
    rig = make_rig(arena_bytes=[64 * UNIT], disk=14 * UNIT, settings=SPILLS)
    worker = rig.attach()
    spilled(rig, worker, "chat")
    for number in range(evictions):
        rig.park(worker, f"new-{number}", range(50 * number + 50, 50 * number + 54), level="disk")
        rig.run()
    left = 16 - 4 * evictions
    chat = rig.core.state.conversations["acme", "chat"]
    assert [end.tokens for end in chat.ends] == [left, 16], "host memory has all of it"
    reborn = rig.restarted()
    assert reborn.plan(reborn.attach(), "chat", range(16)).plan.load_tokens == left


def test_when_its_middle_leaves_the_disk_what_is_before_has_the_name_after_power_loss(make_rig):
    rig = make_rig(arena_bytes=[64 * UNIT], settings=SPILLS)
    worker = rig.attach()
    spilled(rig, worker, "chat")
    rig.remove_from_disk(
        [s for block in rig.core.state.tree if block.start == 8 for s in block.parts.values()]
    )
    # It is written again otherwise.
    while others := [op for op in rig.disk_ops() if not getattr(op.message, "spill", False)]:
        rig.finish(others[0])
    reborn = rig.restarted()
    assert reborn.plan(reborn.attach(), "chat", range(16)).plan.load_tokens == 8
