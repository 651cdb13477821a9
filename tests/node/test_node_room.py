"""Making room in host memory: who goes first, what is written before it goes, and what is refused."""

import pytest

from kvtier.geometry import Geometry, GroupGeometry
from kvtier.messages.tiers import DiskWrite
from kvtier.node.settings import NodeSettings
from kvtier.testing.rig_uses import FULL, HYBRID, UNIT


def small(make_rig, units=8, **how):
    """A rig whose arena holds `units` / 2 full blocks, and a worker of it."""
    rig = make_rig(arena_bytes=[units * UNIT], **how)
    return rig, rig.attach()


def park(rig, worker, name, tokens, **how):
    park = rig.park(worker, name, tokens, **how)
    rig.run()
    return park


def in_host(rig, worker, name, tokens):
    planned = rig.plan(worker, name, tokens, lease_s=0.0)
    rig.tick()
    return sum(r.end - r.start for r in planned.plan.ranges if r.source == "host")


def test_the_end_of_what_was_used_longest_ago_goes_first(make_rig):
    rig, worker = small(make_rig, disk=None)
    park(rig, worker, "old", range(8))
    park(rig, worker, "new", range(50, 58))
    park(rig, worker, "newest", range(90, 94))
    assert in_host(rig, worker, "old", range(8)) == 4
    assert in_host(rig, worker, "new", range(50, 58)) == 8
    assert in_host(rig, worker, "newest", range(90, 94)) == 4


def test_using_it_makes_it_stay(make_rig):
    rig, worker = small(make_rig, disk=None)
    park(rig, worker, "old", range(8))
    park(rig, worker, "new", range(50, 58))
    rig.resume(worker, "old", range(8))
    park(rig, worker, "newest", range(90, 94))
    assert in_host(rig, worker, "old", range(8)) == 8
    assert in_host(rig, worker, "new", range(50, 58)) == 4


def test_a_front_that_another_branch_stands_on_stays(make_rig):
    rig, worker = small(make_rig, disk=None)
    park(rig, worker, "chat", range(8))
    park(rig, worker, "fork", [*range(4), *range(60, 64)])
    park(rig, worker, "next", range(50, 58))
    assert in_host(rig, worker, "fork", [*range(4), *range(60, 64)]) == 8
    assert in_host(rig, worker, "chat", range(8)) == 4


def test_conversations_end_where_their_blocks_do(make_rig):
    rig, worker = small(make_rig, disk=None)
    park(rig, worker, "old", range(16))
    park(rig, worker, "new", range(50, 58))
    (old,) = [c for c in rig.core.state.conversations.values() if c.name == "old"]
    assert [head.tokens for head in old.heads] == [8]
    park(rig, worker, "new", range(50, 66))
    assert ("acme", "old") not in rig.core.state.conversations


def test_what_is_on_disk_goes_without_a_write_and_is_read_again(make_rig):
    rig, worker = small(make_rig)
    park(rig, worker, "old", range(16), level="disk")
    new = rig.park(worker, "new", range(50, 66))
    rig.run_copies()
    assert new.receipt.level == "host"
    assert not rig.ops
    assert rig.resume(worker, "old", range(16)).receipt.sources == {"disk": 16}


def test_what_is_not_on_disk_is_written_before_it_goes(make_rig):
    rig, worker = small(make_rig)
    park(rig, worker, "old", range(16))
    new = rig.park(worker, "new", range(50, 54))
    assert rig.core.status().waiting_parks == 1
    assert isinstance(rig.ops[0].message, DiskWrite)
    assert not new.receipts
    rig.tick(0.5)
    assert len(rig.ops) == 1, "waiting does not make more writes"
    rig.run()
    assert new.receipt.level == "host"
    assert rig.core.status().counters["spilled_bytes"] == 2 * UNIT
    assert rig.core.status().counters["backpressure_s"] == pytest.approx(0.5)
    assert rig.resume(worker, "old", range(16)).receipt.tokens == 16


def test_what_the_disk_refuses_is_dropped_since_the_room_is_needed(make_rig):
    rig, worker = small(make_rig, disk=2 * UNIT)
    park(rig, worker, "old", range(16))
    new = park(rig, worker, "new", range(50, 66))
    assert new.receipt.level == "host"
    assert rig.plan(worker, "old", range(16)).plan.load_tokens == 0


def test_what_the_disk_fails_to_write_is_dropped_too(make_rig):
    rig, worker = small(make_rig)
    park(rig, worker, "old", range(16))
    rig.store.broken = True
    new = park(rig, worker, "new", range(50, 66))
    assert new.receipt.level == "host"
    rig.store.broken = False


def test_with_everything_leased_a_park_is_refused_with_a_time_and_then_taken(make_rig):
    rig, worker = small(make_rig)
    park(rig, worker, "chat", range(16))
    rig.plan(worker, "chat", range(16), lease_s=3.0)
    refused = rig.park(worker, "next", range(50, 54))
    receipt = refused.receipt
    assert (receipt.level, receipt.reason, receipt.released) == ("none", "backpressure", True)
    assert receipt.retry_after_s == pytest.approx(3.0)
    rig.tick(receipt.retry_after_s + 0.1)
    assert park(rig, worker, "next", range(50, 54)).receipt.level == "host"


def test_a_park_waits_for_others_that_will_give_room_but_not_for_ever(make_rig):
    rig, worker = small(make_rig, disk=None, settings=NodeSettings(batch_bytes=8 * UNIT))
    first = rig.park(worker, "one", range(16))
    second = rig.park(worker, "two", range(50, 66), timeout_s=5.0)
    assert not second.receipts
    rig.tick(4.0)
    assert not second.receipts
    rig.tick(1.0)
    assert (second.receipt.level, second.receipt.reason) == ("none", "backpressure")
    rig.run()
    assert first.receipt.level == "host"


def test_the_longest_waiting_is_served_first(make_rig):
    rig, worker = small(make_rig, disk=None)
    rig.park(worker, "holder", range(16))
    second = rig.park(worker, "second", range(50, 66))
    third = rig.park(worker, "third", range(90, 94))
    rig.run()
    assert second.receipt.level == "host"
    done = [u.message.conversation for _, u in sorted(rig.requests.items()) if u.receipts]
    assert done == ["holder", "second", "third"]
    assert third.receipt.level == "host"


def test_a_park_that_waits_does_not_hold_up_the_end_of_a_later_one(make_rig):
    rig, worker = small(make_rig)
    rig.park(worker, "one", range(12))
    twin = rig.attach()
    later = rig.park(twin, "later", range(90, 94), level="disk")
    waiting = rig.park(worker, "waiting", range(50, 66))
    rig.run()
    assert later.receipt.level == "disk"
    assert waiting.receipt.level == "host"


def test_what_can_never_fit_is_said_to_be_too_large(make_rig):
    rig, worker = small(make_rig, disk=None)
    receipt = rig.park(worker, "chat", range(20)).receipt
    assert (receipt.level, receipt.reason, receipt.retry_after_s) == ("none", "too_large", None)
    huge = rig.attach(Geometry(4, 2, (GroupGeometry("full", token_bytes=4 * UNIT),)), fingerprint=b"h" * 32)
    assert rig.park(huge, "huge", range(4)).receipt.reason == "too_large"
    assert rig.host.usage().used_bytes == 0


def test_an_object_must_fit_into_one_arena(make_rig):
    rig = make_rig(arena_bytes=[4 * UNIT, 4 * UNIT])
    wide = rig.attach(Geometry(4, 2, (GroupGeometry("full", token_bytes=UNIT + UNIT // 2),)))
    assert rig.park(wide, "chat", range(4)).receipt.reason == "too_large"


def test_two_parks_that_are_too_large_to_be_held_do_not_take_turns_for_ever(make_rig):
    rig = make_rig(arena_bytes=[8 * UNIT], disk=14 * UNIT)
    left, right = rig.attach(), rig.attach()
    parks = [rig.park(left, "one", range(16)), rig.park(right, "two", range(50, 66))]
    rig.run()
    for _ in range(8):
        rig.tick(5.0)
        rig.run()
    assert all(park.receipts for park in parks)


# --- layers with a window, and snapshots ------------------------------------------------------------------


def kept(rig, group):
    """Where the objects of a layer group end that are in host memory."""
    metas = [meta for meta in rig.host.objects() if meta.object_id.group == group]
    return sorted(meta.start + meta.tokens for meta in metas)


def test_a_window_and_a_snapshot_are_stored_as_far_as_a_restore_needs_them(make_rig):
    rig = make_rig()
    worker = rig.attach(HYBRID)
    chat = park(rig, worker, "chat", range(14))
    assert (kept(rig, 0), kept(rig, 1), kept(rig, 2)) == ([4, 8, 12, 14], [12, 14], [14])
    assert chat.receipt.objects_stored == 7
    assert rig.resume(worker, "chat", range(14)).receipt.tokens == 14


def test_a_pool_that_has_only_the_window_is_enough(make_rig):
    rig = make_rig()
    worker = rig.attach(HYBRID)
    park(rig, worker, "chat", range(14), held_from=[0, 9, 13])
    window = next(m for m in rig.host.objects() if m.object_id.group == 1 and m.start == 8)
    assert (window.first_valid, window.nbytes) == (1, 3 * UNIT // 4)
    assert rig.resume(worker, "chat", range(14)).receipt.tokens == 14


def test_a_pool_that_has_less_than_the_window_is_refused(make_rig):
    rig = make_rig()
    worker = rig.attach(HYBRID)
    refused = rig.park(worker, "chat", range(14), held_from=[0, 10, 0])
    assert refused.failed.error == "GeometryError"
    assert "drops these tokens" in refused.failed.fix


def test_without_the_whole_window_a_shorter_front_or_nothing_is_found(make_rig):
    rig = make_rig()
    worker = rig.attach(HYBRID)
    park(rig, worker, "chat", range(14))
    assert rig.plan(worker, "chat", range(12)).plan.reason == "incomplete"
    park(rig, worker, "fork", [*range(8), 50, 51])
    assert rig.plan(worker, "fork", [*range(8), 50, 51]).plan.load_tokens == 10


def test_more_rows_take_the_place_of_fewer(make_rig):
    rig = make_rig()
    worker = rig.attach(HYBRID)
    park(rig, worker, "chat", range(14), held_from=[0, 9, 0])
    more = park(rig, worker, "shorter", range(13))
    assert more.receipt.objects_stored == 4
    assert all(meta.first_valid == 0 for meta in rig.host.objects())
    assert rig.resume(worker, "shorter", range(13)).receipt.tokens == 13
    assert rig.resume(worker, "chat", range(14)).receipt.tokens == 14


def test_fewer_rows_in_use_are_replaced_when_they_are_free(make_rig):
    rig = make_rig()
    worker = rig.attach(HYBRID)
    park(rig, worker, "chat", range(14), held_from=[0, 9, 0])
    rig.plan(worker, "chat", range(14), lease_s=2.0)
    more = park(rig, worker, "shorter", range(13))
    assert not more.receipts
    rig.tick(2.1)
    rig.run()
    assert more.receipt.level == "host"


def test_what_is_behind_the_window_goes_first(make_rig):
    rig = make_rig(arena_bytes=[14 * UNIT], disk=None)
    worker = rig.attach(HYBRID)
    for length in (4, 8, 12):
        park(rig, worker, "chat", range(length))
    assert kept(rig, 1) == [4, 8, 12]
    assert kept(rig, 2) == [4, 8, 12]
    park(rig, worker, "next", range(50, 54))
    assert kept(rig, 2) == [4, 12], "the snapshots at 4 and 8 are gone, there is one of the next one"
    assert kept(rig, 0) == [4, 4, 8, 12]
    assert rig.resume(worker, "chat", range(12)).receipt.tokens == 12


def test_what_is_behind_one_window_and_in_anothers_stays(make_rig):
    rig = make_rig(arena_bytes=[14 * UNIT], disk=None)
    worker = rig.attach(HYBRID)
    park(rig, worker, "stays", range(8))
    park(rig, worker, "goes on", range(12))
    rig.core._parks._room._drop_behind_window()
    assert rig.resume(worker, "stays", range(8)).receipt.tokens == 8
    assert rig.resume(worker, "goes on", range(12)).receipt.tokens == 12


def test_objects_behind_a_window_are_remembered_once(make_rig):
    rig = make_rig()
    worker = rig.attach(HYBRID)
    for length in range(4, 40):
        park(rig, worker, "chat", range(length))
    room = rig.core._parks._room
    assert len(room._behind_window) <= len(list(rig.host.objects())) + 36


def test_shards_without_a_groups_layers_store_nothing_of_it(make_rig):
    rig = make_rig()
    empty = GroupGeometry("sliding", token_bytes=0, window_tokens=6)
    worker = rig.attach(Geometry(4, 2, (FULL, empty)))
    chat = park(rig, worker, "chat", range(8))
    assert chat.receipt.objects_stored == 2
    assert rig.resume(worker, "chat", range(8)).receipt.tokens == 8


def test_room_comes_while_memory_is_still_being_faulted_in(make_rig):
    rig = make_rig()
    rig.host = type(rig.host)([8 * UNIT], ready_bytes=[2 * UNIT], publish=rig.generations.__setitem__)
    rig.core.state.host = rig.host
    worker = rig.attach()
    refused = rig.park(worker, "chat", range(8))
    rig.run()
    assert refused.receipt.reason == "backpressure"
    assert refused.receipt.retry_after_s > 0
    rig.host.grow(0, 8 * UNIT)
    assert park(rig, worker, "chat", range(8)).receipt.level == "host"
