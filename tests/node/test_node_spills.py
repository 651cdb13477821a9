"""Spills: ahead of need, many in one write, behind everything that somebody waits for."""

from dataclasses import replace

import pytest

from kvtier.messages.calls import Forget, Hint
from kvtier.messages.tiers import DiskRead, DiskWrite
from kvtier.node import room as room_module
from kvtier.node import spills as spills_module
from kvtier.node.disk_requests import DiskRequests
from kvtier.node.room import Room
from kvtier.node.settings import NodeSettings
from kvtier.testing.rig_uses import UNIT

BLOCK = 2 * UNIT


def settings(**how):
    return NodeSettings(batch_bytes=2 * UNIT, **how)


def spills(rig):
    return [op for op in rig.disk_ops() if isinstance(op.message, DiskWrite) and op.message.spill]


def finish_spills(rig):
    while spills(rig):
        rig.finish(spills(rig)[0])


def park(rig, worker, name, tokens, **how):
    park = rig.park(worker, name, tokens, **how)
    rig.run()
    look_again(rig)
    rig.run()
    return park


def look_again(rig):
    """What was held by the park that has just ended is free by now."""
    rig.tick(2 * spills_module._LOOK_AGAIN_S)


def count_writes(rig):
    """Every DiskWrite from now on."""
    seen = []
    arrive = rig._at_disk

    def watched(peer, message):
        if isinstance(message, DiskWrite):
            seen.append(message)
        arrive(peer, message)

    rig._at_disk = watched
    return seen


def objects_of(messages):
    return [meta.block_key for message in messages for meta in message.metas]


# --- ahead of need ------------------------------------------------------------------------------------------


def test_what_is_above_the_mark_is_written_ahead_and_stays_where_it_is(make_rig):
    rig = make_rig(arena_bytes=[64 * UNIT], settings=settings(spill_above=0.25))
    worker = rig.attach()
    for first in range(0, 960, 40):
        rig.park(worker, f"chat-{first}", range(first, first + 4))
        rig.run_copies()
    assert rig.core.state.dirty_bytes == 24 * BLOCK
    finish_spills(rig)
    # Of 24 blocks: 8 may be dirty, and a write takes up to 4.
    assert 4 * BLOCK < rig.core.state.dirty_bytes <= 8 * BLOCK
    assert rig.host.usage().objects == 24
    # Now there is room for 16 more, and 8 of what was written may go for it without a write.
    writes = count_writes(rig)
    rig.core.state.settings = settings(spill_above=1.0)
    for first in range(2000, 2000 + 14 * 40, 40):
        new = rig.park(worker, f"new-{first}", range(first, first + 4))
        rig.run_copies()
        assert new.receipt.level == "host"
    assert rig.core.state.counters.evicted_objects == 6
    assert writes == []


def test_below_the_mark_nothing_is_written(make_rig):
    rig = make_rig(arena_bytes=[64 * UNIT], settings=settings(spill_above=0.5))
    worker = rig.attach()
    for first in range(0, 16 * 40, 40):
        park(rig, worker, f"chat-{first}", range(first, first + 4))
    assert rig.core.state.dirty_bytes == 16 * BLOCK
    assert rig.store.objects == {}


def test_what_is_written_ahead_has_its_name_after_power_loss(make_rig):
    rig = make_rig(arena_bytes=[64 * UNIT], settings=settings(spill_above=0.0))
    worker = rig.attach()
    park(rig, worker, "chat", range(32))
    assert rig.core.state.dirty_bytes == 0
    reborn = rig.restarted()
    assert reborn.plan(reborn.attach(), "chat", range(32)).plan.load_tokens == 32


def test_many_go_with_one_write_and_one_record(make_rig):
    rig = make_rig(arena_bytes=[128 * UNIT], settings=settings(spill_above=0.1))
    worker = rig.attach()
    rig.park(worker, "chat", range(120))
    rig.run_copies()
    look_again(rig)
    first = spills(rig)[0].message
    # An eighth of host memory at most, of the end of one chain.
    assert len(first.metas) == 8
    assert [record.conversation for record in first.records] == ["chat"]
    assert len({meta.start for meta in first.metas}) == 8


@pytest.mark.parametrize("batch_bytes", [1, BLOCK, 3 * BLOCK, 1 << 30])
def test_writes_are_bounded_in_bytes_and_in_number(make_rig, batch_bytes):
    rig = make_rig(arena_bytes=[64 * UNIT], settings=settings(spill_above=0.1, spill_batch_bytes=batch_bytes))
    worker = rig.attach()
    for first in range(0, 1200, 40):
        rig.park(worker, f"chat-{first}", range(first, first + 4))
        rig.run_copies()
    while spills(rig):
        assert len(spills(rig)) <= spills_module._AT_ONCE
        for op in spills(rig):
            assert len(op.message.metas) <= max(1, min(batch_bytes, 8 * UNIT) // BLOCK)
        rig.finish(spills(rig)[0])
    assert rig.core.state.dirty_bytes <= 0.1 * 64 * UNIT


# --- a slow disk --------------------------------------------------------------------------------------------


def a_slow_disk(make_rig):
    """Host memory full of two conversations: the older one is dirty, the newer one is on disk as well."""
    rig = make_rig(arena_bytes=[16 * UNIT])
    worker = rig.attach()
    park(rig, worker, "dirty", range(16))
    park(rig, worker, "clean", range(50, 66), level="disk")
    assert rig.host.usage().free_bytes == 0
    return rig, worker


def test_parks_go_on_while_there_are_clean_victims(make_rig):
    rig, worker = a_slow_disk(make_rig)
    new = rig.park(worker, "new", range(90, 106))
    rig.run_copies()
    assert new.receipt.level == "host"
    assert rig.plan(worker, "dirty", range(16), lease_s=0.0).plan.ranges[0].source == "host"
    # Now all is dirty: the next one has to wait for the disk.
    more = rig.park(worker, "more", range(190, 194))
    rig.run_copies()
    assert not more.receipts
    assert spills(rig)
    rig.run()
    assert more.receipt.level == "host"


def test_a_room_that_does_not_look_further_makes_them_wait(make_rig, monkeypatch):
    """The control."""
    rig, worker = a_slow_disk(make_rig)
    monkeypatch.setattr(Room, "_has_clean", lambda self: False)
    new = rig.park(worker, "new", range(90, 106))
    rig.run_copies()
    assert not new.receipts
    rig.run()
    assert new.receipt.level == "host"


def test_the_search_for_a_clean_victim_ends(make_rig, monkeypatch):
    monkeypatch.setattr(room_module, "_PASS_OVER", 0.0)
    rig, worker = a_slow_disk(make_rig)
    new = rig.park(worker, "new", range(90, 94))
    assert not new.receipts
    assert spills(rig)
    rig.run()
    assert new.receipt.level == "host"


def held_by_a_park(rig, worker):
    """Four dirty blocks that a park holds which is at work: they cannot be written. Answers that park."""
    rig.park(worker, "held", range(16))
    rig.run()
    rig.tick(1.0)
    return rig.park(worker, "held", range(24))


def copy_all_but(rig, park):
    while others := [op for op in rig.copies() if op.message.request != park.message.request]:
        rig.finish(others[0])


@pytest.mark.parametrize("bound", ["_PASS_OVER", "_PASS_OVER_BLOCKS"])
def test_behind_what_cannot_be_written_the_search_goes_on(make_rig, monkeypatch, bound):
    monkeypatch.setattr(room_module, bound, {"_PASS_OVER": 0.1, "_PASS_OVER_BLOCKS": 2}[bound])
    rig = make_rig(arena_bytes=[16 * UNIT], settings=settings(spill_above=1.0))
    worker = rig.attach()
    at_work = held_by_a_park(rig, worker)
    rig.tick(1.0)
    clean = rig.park(worker, "clean", range(50, 58), level="disk")
    copy_all_but(rig, at_work)
    rig.run_disk()
    assert clean.receipt.level == "disk"
    new = rig.park(worker, "new", range(90, 94))
    copy_all_but(rig, at_work)
    assert new.receipt.level == "host"
    assert not at_work.receipts


def test_behind_what_cannot_be_written_another_is_written(make_rig):
    rig = make_rig(arena_bytes=[16 * UNIT], settings=settings(spill_above=1.0))
    worker = rig.attach()
    at_work = held_by_a_park(rig, worker)
    rig.tick(1.0)
    rig.park(worker, "dirty", range(50, 58))
    copy_all_but(rig, at_work)
    new = rig.park(worker, "new", range(90, 94))
    assert len(spills(rig)) == 1
    rig.run_disk()
    copy_all_but(rig, at_work)
    assert new.receipt.level == "host"
    assert not at_work.receipts


def test_a_search_in_vain_for_much_room_says_nothing_of_little(make_rig):
    rig = make_rig(arena_bytes=[16 * UNIT], settings=settings(spill_above=1.0))
    room = rig.core._parks._room
    searches = []
    search = room._evict_for
    room._evict_for = lambda meta, holder: searches.append(meta.nbytes) or search(meta, holder)
    worker = rig.attach()
    park(rig, worker, "chat", range(32))
    new = rig.park(worker, "new", range(90, 94))
    assert spills(rig) and not new.receipts
    (meta,) = [
        stored.meta for block in rig.core.state.tree if block.start == 28 for stored in block.parts.values()
    ]
    del searches[:]
    for nbytes in (BLOCK, 2 * BLOCK, BLOCK // 2, BLOCK):
        other = replace(meta, object_id=meta.object_id._replace(block_key=bytes(32)), nbytes=nbytes)
        assert room.reserve(other, "somebody") == "wait"
    assert searches == [BLOCK // 2], "what was looked for in vain is not looked for again, nor is more"
    rig.run()


def test_what_was_used_last_does_not_go_for_what_is_dirty_and_was_used_long_ago(make_rig):
    """Although it would cost no write; the disk is slow, and most of host memory is dirty."""
    rig = make_rig(arena_bytes=[16 * UNIT])
    worker = rig.attach()
    for first in (0, 100, 200):
        park(rig, worker, f"dirty-{first}", range(first, first + 8))
    park(rig, worker, "hot", range(50, 58), level="disk")
    new = rig.park(worker, "new", range(90, 94))
    rig.run_copies()
    assert not new.receipts
    assert rig.resume(worker, "hot", range(50, 58)).receipt.sources == {"host": 8}
    rig.run()
    assert new.receipt.level == "host"


def test_a_park_to_disk_does_not_wait_for_the_spill_of_another_conversation(make_rig):
    rig = make_rig(arena_bytes=[64 * UNIT], settings=settings(spill_above=0.0))
    worker = rig.attach()
    rig.park(worker, "spilled", range(16))
    rig.run_copies()
    look_again(rig)
    slow = spills(rig)
    assert slow
    # Its record is being written by the spill, so these have to wait ...
    waiting = rig.park(worker, "spilled", range(20), level="disk")
    rig.run_copies()
    rig.ask(Hint(conversation="spilled", tenant="acme", returns_in_s=5.0))
    rig.tick()
    # ... and this one not.
    other = rig.park(worker, "other", range(50, 58), level="disk")
    while not other.receipts:
        rig.run_copies()
        quick = [op for op in rig.disk_ops() if op not in slow]
        rig.finish(quick[0])
    assert other.receipt.level == "disk"
    assert not waiting.receipts
    rig.run()
    assert waiting.receipt.level == "disk"


def test_a_queue_in_strict_order_makes_it_wait(make_rig, monkeypatch):
    """The control: whoever is behind one that is held back is held back too."""
    rig = make_rig(arena_bytes=[64 * UNIT], settings=settings(spill_above=0.0))
    worker = rig.attach()
    rig.park(worker, "spilled", range(16))
    rig.run_copies()
    look_again(rig)
    slow = spills(rig)
    held_back = DiskRequests._is_held_back
    stuck = []

    def strict(self, request):
        if held_back(self, request):
            stuck.append(request)
        return bool(stuck)

    monkeypatch.setattr(DiskRequests, "_is_held_back", strict)
    rig.ask(Hint(conversation="spilled", tenant="acme", returns_in_s=5.0))
    rig.tick()
    assert stuck
    other = rig.park(worker, "other", range(50, 58), level="disk")
    for _ in range(8):
        rig.run_copies()
        for op in [op for op in rig.disk_ops() if op not in slow]:
            rig.finish(op)
    assert not other.receipts
    monkeypatch.undo()
    rig.run()
    assert other.receipt.level == "disk"


# --- restores first -----------------------------------------------------------------------------------------


def waiting_for_room(make_rig):
    """A park and, after it, a restore from disk wait for the room that a running park's end gives."""
    rig = make_rig(arena_bytes=[8 * UNIT])
    worker = rig.attach()
    park(rig, worker, "old", range(8), level="disk")
    rig = rig.restarted()
    worker = rig.attach()
    planned = rig.plan(worker, "old", range(8))
    rig.park(worker, "busy", range(50, 66))
    rig.run_copies()
    rig.core.state.now_s = rig.now_s
    held = rig.plan(worker, "busy", range(50, 66), lease_s=5.0)
    assert held.plan.load_tokens == 16
    waiting = rig.restore(worker, held, range(50, 66))
    late = rig.park(worker, "late", range(90, 98))
    restore = rig.restore(worker, planned, range(8))
    return rig, waiting, late, restore


def test_room_that_comes_goes_to_a_restore_first(make_rig):
    rig, waiting, late, restore = waiting_for_room(make_rig)
    assert not any(isinstance(op.message, DiskRead) for op in rig.ops)
    assert not late.receipts
    while not any(isinstance(op.message, DiskRead) for op in rig.ops):
        assert not any(op.message.direction == "gather" for op in rig.copies())
        rig.finish(rig.ops[0])
    rig.run()
    assert (waiting.receipt.tokens, restore.receipt.tokens, late.receipt.level) == (16, 8, "host")


# --- what the disk refuses ----------------------------------------------------------------------------------


def test_after_a_refusal_what_is_needed_is_dropped_and_then_the_disk_is_asked_again(make_rig):
    rig = make_rig(arena_bytes=[8 * UNIT], disk=2 * UNIT)
    worker = rig.attach()
    writes = count_writes(rig)
    park(rig, worker, "one", range(16))
    assert park(rig, worker, "two", range(50, 66)).receipt.level == "host"
    assert writes == [], "a block needs 3 units on disk: the core knows that without asking"
    rig.store.capacity_bytes = 64 * UNIT
    rig.say_usage(rig.disk)
    rig.tick(1.5)
    assert park(rig, worker, "three", range(90, 106)).receipt.level == "host"
    assert len(objects_of(writes)) == 4


def test_what_fails_ahead_of_need_is_not_dropped(make_rig):
    rig = make_rig(arena_bytes=[64 * UNIT], settings=settings(spill_above=0.0))
    worker = rig.attach()
    rig.park(worker, "chat", range(16))
    rig.run_copies()
    look_again(rig)
    assert spills(rig)
    while spills(rig):
        rig.finish(spills(rig)[0], "disk_error")
    assert rig.resume(worker, "chat", range(16)).receipt.tokens == 16
    assert rig.core.state.dirty_bytes == 4 * BLOCK
    rig.tick(1.5)
    rig.run()
    assert rig.core.state.dirty_bytes == 0


def test_what_is_not_worth_a_write_is_not_written_ahead(make_rig, monkeypatch):
    rig = make_rig(arena_bytes=[64 * UNIT], settings=settings(spill_above=0.0))
    monkeypatch.setattr(type(rig.core.state.policies.admission), "demote", lambda *_: False)
    worker = rig.attach()
    park(rig, worker, "chat", range(16))
    assert rig.store.objects == {}


def test_a_disk_smaller_than_host_memory_is_not_written_over_and_over(make_rig):
    rig = make_rig(arena_bytes=[64 * UNIT], disk=15 * UNIT, settings=settings(spill_above=0.0))
    worker = rig.attach()
    writes = count_writes(rig)
    for first in range(0, 10 * 40, 40):
        park(rig, worker, f"chat-{first}", range(first, first + 4))
    for _ in range(20):
        rig.tick(1.5)
        rig.run()
    # A block takes 3 units there.
    assert len(rig.store.objects) == len(objects_of(writes)) == 5


# --- copies on disk are kept, and read once -----------------------------------------------------------------


def push_out(rig, worker, name):
    """Fill host memory with something else, and leave nothing of that behind."""
    park(rig, worker, name, range(500, 516))
    assert rig.host.usage().free_bytes == 0
    rig.ask(Forget(conversation=name, tenant="acme"))
    rig.run()


def test_a_block_that_was_read_back_is_not_written_again(make_rig):
    rig = make_rig(arena_bytes=[8 * UNIT])
    worker = rig.attach()
    writes = count_writes(rig)
    park(rig, worker, "chat", range(16))
    for turn in range(3):
        push_out(rig, worker, f"other-{turn}")
        assert rig.host.usage().objects == 0
        assert rig.resume(worker, "chat", range(16)).receipt.sources == {"disk": 16}
        assert rig.core.state.dirty_bytes == 0
    chat = [meta for message in writes for meta in message.metas if meta.start < 16]
    assert len(chat) == len({meta.block_key for meta in chat}) == 4
    assert sum(meta.nbytes for meta in chat) == 4 * BLOCK


def test_a_node_that_gives_the_copy_on_disk_up_writes_it_again(make_rig):
    """The control."""
    rig = make_rig(arena_bytes=[8 * UNIT])
    worker = rig.attach()
    writes = count_writes(rig)
    park(rig, worker, "chat", range(16))
    push_out(rig, worker, "other")
    rig.resume(worker, "chat", range(16))
    rig.remove_from_disk([rig.core.state.tree.stored(meta.object_id) for meta in rig.host.objects()])
    push_out(rig, worker, "another")
    chat = [meta.block_key for message in writes for meta in message.metas]
    assert len(chat) > len(set(chat))


def test_two_restores_of_a_block_read_it_once(make_rig):
    rig = make_rig()
    worker = rig.attach()
    park(rig, worker, "chat", range(16), level="disk")
    rig = rig.restarted()
    worker, twin = rig.attach(), rig.attach()
    plans = [rig.plan(w, "chat", range(16)) for w in (worker, twin)]
    restores = [rig.restore(w, planned, range(16)) for w, planned in zip((worker, twin), plans, strict=True)]
    read = []
    while rig.ops:
        for op in rig.disk_ops():
            read += [key for key, _, _ in op.message.object_keys] if isinstance(op.message, DiskRead) else []
            rig.finish(op)
        rig.run_copies()
    assert len(read) == len(set(read)) == 4
    assert [restore.receipt.tokens for restore in restores] == [16, 16]
    assert rig.violations == []


def test_when_the_one_read_fails_both_are_told(make_rig):
    rig = make_rig()
    worker = rig.attach()
    park(rig, worker, "chat", range(4), level="disk")
    rig = rig.restarted()
    worker, twin = rig.attach(), rig.attach()
    restores = [rig.restore(w, rig.plan(w, "chat", range(4)), range(4)) for w in (worker, twin)]
    (read,) = rig.disk_ops()
    rig.corrupt_disk()
    rig.finish(read)
    rig.run()
    assert {restore.receipt.tokens for restore in restores} == {0}
    assert all(restore.receipt.reason in ("corrupt", "disk_error") for restore in restores)
