"""What a receipt of level 'disk' promises, and what is said when that cannot be reached."""

import msgspec
import pytest

from kvtier.messages.calls import Hint
from kvtier.messages.tiers import DiskRead, DiskWrite, DiskWritten
from kvtier.node.events import Received
from kvtier.node.settings import NodeSettings
from kvtier.testing.rig_uses import HYBRID, UNIT


def said(receipt):
    return receipt.level, receipt.reason


def test_what_is_on_disk_survives_the_loss_of_everything_else(rig, worker):
    rig.park(worker, "chat", range(10), level="disk")
    rig.run()
    reborn = rig.restarted()
    twin = reborn.attach()
    restore = reborn.resume(twin, "chat", range(12))
    assert (restore.receipt.tokens, restore.receipt.sources) == (10, {"disk": 10})
    assert reborn.violations == []


def test_what_was_only_in_host_memory_is_a_miss_after_a_restart(rig, worker):
    rig.park(worker, "chat", range(10))
    rig.run()
    reborn = rig.restarted()
    plan = reborn.plan(reborn.attach(), "chat", range(10)).plan
    assert (plan.load_tokens, plan.reason) == (0, "unknown_conversation")


def test_the_receipt_waits_for_objects_and_then_for_the_record(rig, worker):
    park = rig.park(worker, "chat", range(10), level="disk")
    rig.run_copies()
    while rig.disk_ops():
        assert not park.receipts
        rig.finish(rig.disk_ops()[0])
    assert park.receipt.level == "disk"


def test_a_write_of_another_park_is_waited_for_and_not_repeated(rig, worker):
    rig.park(worker, "one", range(8), level="disk")
    rig.run_copies()
    two = rig.park(worker, "two", range(8), level="disk")
    written = [meta.block_key for op in rig.disk_ops() for meta in op.message.metas]
    assert len(written) == len(set(written)) == 2
    rig.run()
    assert said(two.receipt) == ("disk", "")
    reborn = rig.restarted()
    assert reborn.plan(reborn.attach(), "two", range(8)).plan.load_tokens == 8


def test_without_a_disk_the_level_is_host(make_rig):
    rig = make_rig(disk=None)
    park = rig.park(rig.attach(), "chat", range(4), level="disk")
    rig.run()
    assert said(park.receipt) == ("host", "no_disk")
    assert not park.receipt.ok


def test_a_disk_that_has_not_announced_yet_is_none(make_rig):
    rig = make_rig(started=False)
    rig.start_gpu()
    rig.start_disk(last=False)
    park = rig.park(rig.attach(), "chat", range(4), level="disk")
    rig.run()
    assert said(park.receipt) == ("host", "no_disk")


def test_a_disk_that_refuses_writes_lowers_the_level(rig, worker):
    rig.store.broken = True
    park = rig.park(worker, "chat", range(4), level="disk")
    rig.run()
    assert said(park.receipt) == ("host", "disk_error")
    # It has said that it is degraded, so it is not asked again.
    again = rig.park(worker, "next", range(50, 54), level="disk")
    rig.run_copies()
    assert said(again.receipt) == ("host", "no_disk")
    assert again.receipt.detail == "broken"


def test_a_conversation_that_is_larger_than_the_disk_stays_in_host_memory(make_rig):
    rig = make_rig(disk=8 * UNIT)
    park = rig.park(rig.attach(), "chat", range(16), level="disk")
    rig.run()
    assert said(park.receipt) == ("host", "disk_full")
    assert rig.store.used_bytes <= 8 * UNIT


def test_a_full_disk_makes_room_from_the_end_of_what_was_used_longest_ago(make_rig):
    rig = make_rig(disk=14 * UNIT)
    worker = rig.attach()
    for name, first in (("old", 0), ("new", 50), ("newest", 90)):
        park = rig.park(worker, name, range(first, first + 8), level="disk")
        rig.run()
        assert park.receipt.level == "disk"
    reborn = rig.restarted()
    twin = reborn.attach()
    plans = [
        reborn.plan(twin, *chat).plan.load_tokens for chat in (("old", range(8)), ("new", range(50, 58)))
    ]
    assert plans == [0, 8]
    assert set(reborn.core.state.conversations) == {("acme", "new"), ("acme", "newest")}


def test_after_the_end_of_a_chain_was_evicted_its_front_survives_a_restart(make_rig):
    rig = make_rig(disk=14 * UNIT)
    worker = rig.attach()
    rig.park(worker, "old", range(16), level="disk")
    rig.run()
    rig.park(worker, "new", range(50, 54), level="disk")
    rig.run()
    reborn = rig.restarted()
    assert reborn.plan(reborn.attach(), "old", range(16)).plan.load_tokens == 12


def test_plans_and_parks_keep_their_blocks_from_being_evicted_from_disk(make_rig):
    rig = make_rig(disk=14 * UNIT)
    worker = rig.attach()
    rig.park(worker, "old", range(16), level="disk")
    rig.run()
    rig = rig.restarted()
    worker = rig.attach()
    planned = rig.plan(worker, "old", range(16))
    park = rig.park(worker, "new", range(50, 58), level="disk")
    rig.run()
    assert said(park.receipt) == ("host", "disk_full")
    restore = rig.restore(worker, planned, range(16))
    rig.run()
    assert restore.receipt.tokens == 16
    assert rig.violations == []


def test_when_the_disk_has_less_room_than_was_thought_more_is_evicted_and_the_write_tried_again(make_rig):
    rig = make_rig(disk=20 * UNIT)
    worker = rig.attach()
    rig.park(worker, "old", range(12), level="disk")
    rig.run()
    park = rig.park(worker, "new", range(50, 58), level="disk")
    rig.run_copies()
    # Its free room is in pieces, say.
    rig.store.capacity_bytes = 12 * UNIT
    rig.run()
    assert said(park.receipt) == ("disk", "")
    assert rig.store.used_bytes <= 12 * UNIT


def test_a_disk_that_stays_full_lowers_the_level(make_rig):
    rig = make_rig(disk=20 * UNIT)
    park = rig.park(rig.attach(), "chat", range(8), level="disk")
    rig.run_copies()
    rig.store.capacity_bytes = UNIT
    rig.run()
    assert said(park.receipt) == ("host", "disk_full")


def test_a_disk_that_hangs_is_not_waited_for_longer_than_was_asked(rig, worker):
    park = rig.park(worker, "chat", range(4), level="disk", timeout_s=5.0)
    rig.run_copies()
    rig.tick(4.9)
    assert not park.receipts
    rig.tick(0.2)
    assert said(park.receipt) == ("host", "deadline")


@pytest.mark.parametrize("tokens_left", [8, 12, 16])
def test_a_record_that_is_written_late_does_not_say_what_left_the_disk_meanwhile(make_rig, tokens_left):
    rig = make_rig(disk=14 * UNIT)
    worker = rig.attach()
    rig.park(worker, "chat", range(8), level="disk")
    rig.run()
    late = rig.park(worker, "chat", range(16), level="disk", timeout_s=5.0)
    rig.run_copies()
    while not (record := [op for op in rig.disk_ops() if op.message.records]):
        rig.finish(rig.disk_ops()[0])
    rig.tick(6.0)
    assert said(late.receipt) == ("host", "deadline")
    # Nobody holds it on disk any more.
    rig.park(worker, "new", range(50, 66 - tokens_left), level="disk")
    rig.run_copies()
    while others := [op for op in rig.disk_ops() if op not in record]:
        rig.finish(others[0])
    rig.finish(record[0])
    rig.run()
    chat = rig.core.state.conversations["acme", "chat"]
    assert (chat.heads[0].key in chat.durable) == (tokens_left == 16)
    # Whatever else makes the record be written again.
    rig.ask(Hint(conversation="chat", tenant="acme", returns_in_s=5.0))
    rig.tick()
    rig.run()
    reborn = rig.restarted()
    assert reborn.plan(reborn.attach(), "chat", range(16)).plan.load_tokens == tokens_left


def test_the_disk_service_dies_during_a_write_and_comes_back_with_what_was_durable(rig, worker):
    park = rig.park(worker, "chat", range(10), level="disk")
    rig.run_copies()
    rig.finish(rig.disk_ops()[0])
    rig.kill(rig.disk)
    assert said(park.receipt) == ("host", "no_disk")
    assert rig.host.usage().limbo_bytes == 0
    rig.start_disk()
    again = rig.park(worker, "chat", range(10), level="disk")
    rig.run_copies()
    assert sum(len(op.message.metas) for op in rig.disk_ops() if isinstance(op.message, DiskWrite)) == 2
    rig.run()
    assert said(again.receipt) == ("disk", "")


def test_slots_of_a_lost_disk_service_are_free_when_it_is_known_to_touch_none(rig, worker):
    rig.park(worker, "chat", range(4), level="disk")
    rig.run_copies()
    service = rig.disk
    rig.disconnect(service)
    slot = rig.host.find(next(rig.host.objects()).object_id)
    assert rig.host._book.held(slot.slot_id)
    rig.finish(rig.disk_ops()[0])
    rig.start_disk(pid=service.pid)
    assert not rig.host._book.held(slot.slot_id)


def test_a_write_that_became_durable_before_its_answer_was_lost_is_adopted(rig, worker):
    park = rig.park(worker, "chat", range(4), level="disk")
    rig.run_copies()
    rig.finish(rig.disk_ops()[0], answer=False)
    rig.kill(rig.disk)
    assert said(park.receipt) == ("host", "no_disk")
    rig.start_disk()
    again = rig.park(worker, "chat", range(4), level="disk")
    assert [len(op.message.metas) for op in rig.disk_ops()] == [0]
    rig.run()
    assert said(again.receipt) == ("disk", "")


def test_a_restore_whose_disk_service_dies_says_so_and_the_next_one_works(rig, worker):
    rig.park(worker, "chat", range(12), level="disk")
    rig.run()
    rig = rig.restarted()
    worker = rig.attach()
    restore = rig.restore(worker, rig.plan(worker, "chat", range(12)), range(12))
    assert isinstance(rig.ops[0].message, DiskRead)
    rig.kill(rig.disk)
    assert (restore.receipt.tokens, restore.receipt.reason) == (0, "disk_error")
    assert rig.host.usage().used_bytes == 0
    assert rig.plan(worker, "chat", range(12)).plan.load_tokens == 0
    rig.start_disk()
    assert rig.resume(worker, "chat", range(12)).receipt.tokens == 12
    assert rig.violations == []


def test_a_read_that_runs_on_after_its_service_was_lost_writes_into_nobodys_slot(rig, worker):
    rig.park(worker, "chat", range(8), level="disk")
    rig.run()
    rig = rig.restarted()
    worker = rig.attach()
    rig.restore(worker, rig.plan(worker, "chat", range(8)), range(8))
    service = rig.disk
    rig.disconnect(service)
    assert rig.host.usage().limbo_bytes > 0
    other = rig.park(worker, "other", range(60, 92))
    rig.run_copies()
    rig.run_disk()
    assert other.receipt.level == "host"
    assert rig.resume(worker, "other", range(60, 92)).receipt.tokens == 32
    rig.kill(service)
    assert rig.host.usage().limbo_bytes == 0
    assert rig.violations == []


def test_a_read_that_hangs_is_given_up_and_its_slot_kept_until_it_ends(rig, worker):
    rig.park(worker, "chat", range(4), level="disk")
    rig.run()
    rig = rig.restarted()
    worker = rig.attach()
    restore = rig.restore(worker, rig.plan(worker, "chat", range(4)), range(4), deadline_s=500.0)
    rig.tick(61.0)
    assert restore.receipt.reason == "disk_error"
    assert rig.host.usage().limbo_bytes == 2 * UNIT
    rig.run()
    assert rig.host.usage().limbo_bytes == 0
    assert rig.violations == []


def test_more_rows_of_a_window_replace_fewer_on_disk(make_rig):
    rig = make_rig()
    worker = rig.attach(HYBRID)
    rig.park(worker, "chat", range(12), level="disk", held_from=[0, 7, 0])
    rig.run()
    partial = [o for o in rig.store.objects.values() if o.meta.first_valid]
    assert len(partial) == 1
    again = rig.park(worker, "fork", range(11), level="disk")
    rig.run()
    assert said(again.receipt) == ("disk", "")
    assert [o for o in rig.store.objects.values() if o.meta.first_valid] == []
    reborn = rig.restarted()
    twin = reborn.attach(HYBRID)
    assert reborn.resume(twin, "fork", range(11)).receipt.tokens == 11
    assert reborn.resume(twin, "chat", range(12)).receipt.tokens == 12
    assert reborn.violations == []


@pytest.mark.parametrize("reason", ["wear", "disk_error", "power loss"])
def test_fewer_rows_stay_on_disk_until_more_are_there(make_rig, reason):
    rig = make_rig()
    worker = rig.attach(HYBRID)
    rig.park(worker, "chat", range(12), level="disk", held_from=[0, 7, 0])
    rig.run()
    held_bytes = rig.core.state.disk_held_bytes
    again = rig.park(worker, "fork", range(11), level="disk")
    rig.run_copies()
    assert all(isinstance(op.message, DiskWrite) for op in rig.disk_ops())
    if reason != "power loss":
        while rig.ops:
            rig.finish(rig.ops[0], reason)
        assert said(again.receipt) == ("host", reason)
        assert rig.core.state.disk_held_bytes == held_bytes
        assert rig.resume(worker, "chat", range(12)).receipt.tokens == 12
    reborn = rig.restarted()
    assert reborn.resume(reborn.attach(HYBRID), "chat", range(12)).receipt.tokens == 12


@pytest.mark.parametrize("level", ["host", "disk"])
def test_a_wish_travels_with_the_park(rig, worker, level):
    rig.park(worker, "chat", range(4), level=level, returns_in_s=60.0, keep_for_s=600.0)
    rig.run()
    (known,) = rig.core.state.conversations.values()
    assert (known.returns_at_s, known.keep_until_s) == (1060.0, 1600.0)


def test_small_batches_and_one_at_a_time_are_enough(make_rig):
    rig = make_rig(settings=NodeSettings(batch_bytes=1, batches_in_flight=1))
    park = rig.park(rig.attach(), "chat", range(20), level="disk")
    assert len(rig.copies()) == 1
    rig.run()
    assert said(park.receipt) == ("disk", "")


# --- a drive that was written enough today ----------------------------------------------------------------


def worn(rig, left_bytes, limit_bytes=1 << 30):
    """The disk service says what its drive may still be written."""
    said = rig.core.state.disk.said
    usage = msgspec.structs.replace(said, wear_limit_bytes=limit_bytes, wear_left_bytes=left_bytes)
    rig.tell(Received(rig.disk.peer, usage))


def test_a_worn_drive_lowers_the_level_and_says_when_to_come_again(rig, worker):
    park = rig.park(worker, "chat", range(8), level="disk")
    rig.run_copies()
    write = rig.disk_ops()[0]
    rig.ops.remove(write)
    answer = DiskWritten(job=write.message.job, ok=False, reason="wear", detail="enough", retry_after_s=600.0)
    rig.tell(Received(rig.disk.peer, answer))
    receipt = park.receipt
    assert (said(receipt), receipt.retry_after_s) == (("host", "wear"), 600.0)
    assert rig.resume(worker, "chat", range(8)).receipt.tokens == 8


def test_what_would_wear_the_drive_too_much_is_dropped_and_not_spilled(make_rig):
    rig = make_rig(arena_bytes=[8 * UNIT])
    worker = rig.attach()
    rig.park(worker, "old", range(16))
    rig.run()
    worn(rig, left_bytes=2 * UNIT)
    new = rig.park(worker, "new", range(50, 66))
    rig.run_copies()
    assert new.receipt.level == "host"
    assert not rig.store.objects
    assert any("a day" in warning for warning in rig.core.status().warnings)
    # There is room for one block and its header again.
    worn(rig, left_bytes=3 * UNIT)
    rig.park(worker, "last", range(90, 94))
    (write,) = rig.disk_ops()
    assert len(write.message.metas) == 1
    rig.run()


def test_nothing_is_written_ahead_beyond_what_the_drive_may_take(make_rig):
    rig = make_rig(settings=NodeSettings(batch_bytes=2 * UNIT, spill_above=0.0))
    worker = rig.attach()
    worn(rig, left_bytes=7 * UNIT)
    rig.park(worker, "chat", range(32))
    rig.run_copies()
    rig.tick(0.5)
    (write,) = rig.disk_ops()
    assert len(write.message.metas) == 2
    worn(rig, left_bytes=UNIT)
    rig.tick(0.5)
    assert rig.disk_ops() == [write]


# --- codecs -----------------------------------------------------------------------------------------------


def codecs(rig):
    """Of the writes that wait, by their first tokens."""
    return {
        meta.start: codec
        for op in rig.disk_ops()
        for meta, codec in zip(
            op.message.metas, op.message.codecs or [""] * len(op.message.metas), strict=True
        )
    }


def test_the_wish_for_a_codec_goes_with_the_conversation_over_a_restart(make_rig):
    base = NodeSettings(batch_bytes=2 * UNIT, tenant_codecs=(("rival", "lz4"),))
    rig = make_rig(settings=base)
    worker = rig.attach()
    rig.park(worker, "chat", range(4), level="disk", codec="planes-lz4")
    rig.run_copies()
    assert codecs(rig) == {0: "planes-lz4"}
    rig.run()
    reborn = rig.restarted()
    worker = reborn.attach()
    reborn.park(worker, "chat", range(8))
    reborn.run()
    reborn.park(worker, "chat", range(8), level="disk")
    assert codecs(reborn) == {4: "planes-lz4"}
    reborn.run()
    reborn.park(worker, "other", range(50, 54), level="disk")
    reborn.run_copies()
    assert codecs(reborn) == {0: ""}
    reborn.run()


def test_a_tenants_codec_is_used_where_no_conversation_wants_another(make_rig):
    rig = make_rig(settings=NodeSettings(batch_bytes=2 * UNIT, tenant_codecs=(("rival", "lz4"),)))
    worker = rig.attach()
    rig.park(worker, "chat", range(4), level="disk", tenant="rival")
    rig.run_copies()
    assert codecs(rig) == {0: "lz4"}
    rig.run()


def test_an_unknown_codec_is_the_callers_mistake(rig, worker):
    failed = rig.park(worker, "chat", range(4), codec="gzip").failed
    assert failed.error == "KvtierError"
    assert "planes-zstd" in failed.fix
