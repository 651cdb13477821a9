"""Plans and restores: leases, deadlines, what is wrong in memory or on disk, and what two want at once."""

import dataclasses

import pytest

from kvtier.geometry import Geometry
from kvtier.messages.calls import DropPlan, MakePlan, Restore
from kvtier.messages.tiers import Copy, DiskRead
from kvtier.node.settings import NodeSettings
from kvtier.testing.rig_uses import FULL, UNIT


def spread(plan):
    return [(r.start, r.end, r.source) for r in plan.ranges]


@pytest.fixture
def cold(make_rig):
    """A rig with a conversation of 12 tokens on disk only, and a worker of it."""
    rig = make_rig()
    rig.park(rig.attach(), "chat", range(12), level="disk")
    rig.run()
    return make_rig(disk=rig.store, epoch=2)


def test_a_plan_tells_where_what_comes_from(rig, worker):
    rig.park(worker, "chat", range(10))
    rig.run()
    planned = rig.plan(worker, "chat", range(13))
    plan = planned.plan
    assert spread(plan) == [(0, 10, "host"), (10, 13, "compute")]
    assert (plan.tokens, plan.load_tokens, plan.bytes, plan.version) == (13, 10, 10 * UNIT // 2, 1)
    assert 0 < plan.eta_s[0] < plan.eta_s[1]
    assert (planned.front_tokens, len(planned.front_key)) == (8, 32)


def test_what_lies_in_both_tiers_comes_from_memory_and_the_rest_from_disk(cold):
    worker = cold.attach()
    cold.resume(worker, "chat", range(4))
    plan = cold.plan(worker, "chat", range(12)).plan
    assert spread(plan) == [(0, 4, "host"), (4, 12, "disk")]


@pytest.mark.parametrize(
    ("name", "tokens", "reason"),
    [
        ("chat", [99], "no_match"),
        ("other", [99], "unknown_conversation"),
        ("", [99], "no_match"),
        ("chat", [], "no_match"),
    ],
)
def test_a_miss_is_a_value_with_its_reason(rig, worker, name, tokens, reason):
    rig.park(worker, "chat", range(8))
    rig.run()
    plan = rig.plan(worker, name, tokens).plan
    assert (plan.plan_id, plan.load_tokens, plan.reason, plan.lease_s) == ("", 0, reason, 0.0)
    assert rig.core.status().counters[f"misses.{reason}"] == 1


def test_a_block_that_has_fewer_rows_by_now_ends_the_restore_at_once(rig, worker):
    rig.park(worker, "chat", range(12))
    rig.run()
    planned = rig.plan(worker, "chat", range(12))
    # As when it was to come from another node, and was parked here meanwhile.
    block = rig.core.state.tree.named(("acme", "chat"))[0]
    [(part, planned_as)] = block.parts.items()
    less = dataclasses.replace(planned_as.meta, first_valid=1)
    block.parts[part] = dataclasses.replace(planned_as, meta=less)
    restore = rig.restore(worker, planned, range(12), deadline_s=1000.0)
    rig.run()
    block.parts[part] = planned_as
    assert (restore.receipt.tokens, restore.receipt.reason) == (0, "incomplete")


@pytest.mark.parametrize("wrong", [{"lease_s": float("nan")}, {"tokens": b"123"}, {"worker": "worker:9"}])
def test_a_callers_mistake_in_a_plan_is_answered(rig, worker, wrong):
    message = {"worker": worker.name, "conversation": "chat", "tenant": "acme", "tokens": b""} | wrong
    assert type(rig.ask(MakePlan(**message), worker.peer)).__name__ == "Failed"


def test_a_wrong_deadline_is_refused_and_the_plan_stays(rig, worker):
    rig.park(worker, "chat", range(8))
    rig.run()
    planned = rig.plan(worker, "chat", range(8))
    assert rig.restore(worker, planned, range(8), deadline_s=float("nan")).failed.error == "ProtocolError"
    restore = rig.restore(worker, planned, range(8))
    rig.run()
    assert restore.receipt.tokens == 8


# --- holding ----------------------------------------------------------------------------------------------


def test_a_plan_waits_shortly_for_a_park_of_its_conversation(rig, worker):
    rig.park(worker, "chat", range(8))
    assert rig.plan(worker, "other", range(8)).plan.load_tokens == 0
    assert rig.plan(worker, "chat", range(8)) is None
    rig.run_copies()
    assert [a for answers in rig.answers.values() for a in answers][-1].plan.load_tokens == 8


def test_a_plan_does_not_wait_long(rig, worker):
    rig.park(worker, "chat", range(8))
    rig.plan(worker, "chat", range(8))
    rig.tick(0.6)
    assert [a for answers in rig.answers.values() for a in answers][-1].plan.load_tokens == 0


def test_a_mistake_in_a_plan_that_waited_is_answered_too(rig, worker):
    rig.park(worker, "chat", range(8))
    front = {"after_key": b"k" * 32, "after_tokens": 4}
    message = MakePlan(worker=worker.name, conversation="chat", tenant="acme", tokens=b"", **front)
    assert rig.ask(message, worker.peer) is None
    rig.run_copies()
    assert [a for answers in rig.answers.values() for a in answers][-1].error == "TokensError"


def test_what_a_plan_holds_is_not_evicted_until_its_lease_ends(make_rig):
    rig = make_rig(arena_bytes=[8 * UNIT], disk=None)
    worker = rig.attach()
    rig.park(worker, "chat", range(16))
    rig.run()
    planned = rig.plan(worker, "chat", range(16), lease_s=10.0)
    refused = rig.park(worker, "next", range(50, 54))
    assert refused.receipt.reason == "backpressure"
    assert 0 < refused.receipt.retry_after_s <= 5.0
    rig.tick(10.1)
    accepted = rig.park(worker, "next", range(50, 54))
    rig.run()
    assert accepted.receipt.level == "host"
    late = rig.restore(worker, planned, range(16))
    assert (late.receipt.tokens, late.receipt.reason) == (0, "lease_expired")


def test_a_dropped_plan_holds_nothing(make_rig):
    rig = make_rig(arena_bytes=[8 * UNIT], disk=None)
    worker = rig.attach()
    rig.park(worker, "chat", range(16))
    rig.run()
    planned = rig.plan(worker, "chat", range(16))
    assert type(rig.ask(DropPlan(plan_id=planned.plan.plan_id))).__name__ == "Done"
    assert type(rig.ask(DropPlan(plan_id=planned.plan.plan_id))).__name__ == "Done"
    park = rig.park(worker, "next", range(50, 54))
    rig.run()
    assert park.receipt.level == "host"


def test_a_plan_is_good_for_one_restore_of_its_own_worker(rig, worker):
    rig.park(worker, "chat", range(8))
    rig.run()
    twin = rig.attach()
    planned = rig.plan(worker, "chat", range(8))
    assert rig.restore(twin, planned, range(8)).receipt.reason == "lease_expired"
    restore = rig.restore(worker, planned, range(8))
    rig.run()
    assert (restore.receipt.tokens, restore.receipt.ok) == (8, True)
    again = rig.restore(worker, planned, range(8)).receipt
    assert (again.reason, again.tokens, again.requested_tokens, again.ok) == ("lease_expired", 0, 0, False)


def test_a_lease_is_not_longer_than_the_settings_say(rig, worker):
    rig.park(worker, "chat", range(8))
    rig.run()
    assert rig.plan(worker, "chat", range(8), lease_s=1e6).plan.lease_s == rig.settings.plan_lease_s


# --- deadlines --------------------------------------------------------------------------------------------


def test_what_comes_too_late_is_cut_off_and_what_is_in_place_counts(rig, worker):
    rig.park(worker, "chat", range(16))
    rig.run()
    restore = rig.restore(worker, rig.plan(worker, "chat", range(16)), range(16), deadline_s=1.0)
    rig.finish(rig.copies()[0])
    rig.tick(1.0)
    assert not restore.receipts
    rig.run()
    assert (restore.receipt.tokens, restore.receipt.reason) == (4, "deadline")


@pytest.mark.parametrize(("mode", "busy"), [("worker", ()), ("shared", tuple(range(8)))])
def test_copies_that_do_not_end_make_pages_busy(make_rig, mode, busy):
    rig = make_rig()
    worker = rig.attach(mode=mode)
    rig.park(worker, "chat", range(16))
    rig.run()
    restore = rig.restore(worker, rig.plan(worker, "chat", range(16)), range(16), deadline_s=1.0)
    for op in rig.copies():
        rig.begin(op)
    rig.tick(2.1)
    assert (restore.receipt.tokens, restore.receipt.reason, restore.receipt.busy) == (0, "deadline", busy)
    rig.run()
    assert len(restore.receipts) == 1


def test_a_restore_that_waits_for_the_disk_too_long_ends(cold):
    worker = cold.attach()
    restore = cold.restore(worker, cold.plan(worker, "chat", range(12)), range(12), deadline_s=3.0)
    assert isinstance(cold.ops[0].message, DiskRead)
    cold.tick(4.1)
    assert (restore.receipt.tokens, restore.receipt.reason) == (0, "deadline")
    cold.run()
    assert cold.host.usage().limbo_bytes == 0


# --- wrong bytes ------------------------------------------------------------------------------------------


def flip_next_scatter(rig):
    rig.corrupt_host(next(op for op in rig.copies() if op.message.direction == "scatter").message.items[0])


def test_a_wrong_block_in_memory_is_read_again_from_disk(rig, worker):
    rig.park(worker, "chat", range(12), level="disk")
    rig.run()
    restore = rig.restore(worker, rig.plan(worker, "chat", range(12)), range(12))
    flip_next_scatter(rig)
    rig.run()
    assert restore.receipt.tokens == 12
    assert rig.host.usage().quarantined == 1
    assert rig.resume(worker, "chat", range(12)).receipt.tokens == 12


def test_a_wrong_block_that_is_only_in_memory_is_a_miss_and_healed_by_the_next_park(rig, worker):
    rig.park(worker, "chat", range(12))
    rig.run()
    restore = rig.restore(worker, rig.plan(worker, "chat", range(12)), range(12))
    flip_next_scatter(rig)
    rig.run()
    assert (restore.receipt.tokens, restore.receipt.reason) == (0, "corrupt")
    again = rig.park(worker, "chat", range(12))
    rig.run()
    assert (again.receipt.objects_stored, again.receipt.objects_shared) == (1, 2)
    assert rig.resume(worker, "chat", range(12)).receipt.tokens == 12


def test_a_wrong_block_on_disk_is_a_miss_and_healed_by_the_next_park(cold):
    worker = cold.attach()
    cold.corrupt_disk(1)
    restore = cold.resume(worker, "chat", range(12))
    assert restore.receipt.reason == "corrupt"
    assert restore.receipt.tokens <= 4
    assert cold.resume(worker, "chat", range(12)).receipt.tokens == 4
    again = cold.park(worker, "chat", range(12), level="disk")
    cold.run()
    assert (again.receipt.level, again.receipt.objects_stored) == ("disk", 1)
    reborn = cold.restarted()
    assert reborn.resume(reborn.attach(), "chat", range(12)).receipt.tokens == 12


def test_a_block_that_is_wrong_in_memory_and_on_disk_is_not_tried_for_ever(rig, worker):
    rig.park(worker, "chat", range(4), level="disk")
    rig.run()
    restore = rig.restore(worker, rig.plan(worker, "chat", range(4)), range(4))
    flip_next_scatter(rig)
    rig.corrupt_disk()
    rig.run()
    assert (restore.receipt.tokens, restore.receipt.reason) == (0, "corrupt")
    assert rig.plan(worker, "chat", range(4)).plan.load_tokens == 0


def test_a_copy_from_disk_that_is_wrong_again_in_memory_ends_the_restore(rig, worker):
    rig.park(worker, "chat", range(4), level="disk")
    rig.run()
    restore = rig.restore(worker, rig.plan(worker, "chat", range(4)), range(4))
    for _ in range(2):
        flip_next_scatter(rig)
        rig.run_copies()
        rig.run_disk()
    assert (restore.receipt.tokens, restore.receipt.reason) == (0, "corrupt")
    assert not rig.ops
    assert not rig.store.objects


def test_without_verifying_wrong_bytes_would_be_restored(make_rig):
    """A control: it is the check on the way to the pool that keeps the promise, and the rig that notices."""
    rig = make_rig(settings=NodeSettings(verify=False))
    worker = rig.attach()
    rig.park(worker, "chat", range(4))
    rig.run()
    rig.restore(worker, rig.plan(worker, "chat", range(4)), range(4))
    flip_next_scatter(rig)
    rig.run()
    assert "are wrong" in rig.violations[0]
    rig.violations.clear()


def test_an_object_of_another_size_is_a_miss(make_rig):
    rig = make_rig()
    worker = rig.attach()
    rig.park(worker, "chat", range(8), level="disk")
    rig.run()
    wider = Geometry(4, 2, (FULL.__class__("full", token_bytes=UNIT),))
    rig = make_rig(disk=rig.store, epoch=2)
    assert rig.plan(rig.attach(wider), "chat", range(8)).plan.load_tokens == 0


# --- two at once ------------------------------------------------------------------------------------------


def test_two_restores_of_one_block_read_it_once(cold):
    left, right = cold.attach(), cold.attach()
    plans = [cold.plan(w, "chat", range(12)) for w in (left, right)]
    restores = [cold.restore(w, p, range(12)) for w, p in zip((left, right), plans, strict=True)]
    cold.run()
    assert [restore.receipt.tokens for restore in restores] == [12, 12]
    reads = [s for _, s in cold.stimuli if type(getattr(s, "message", None)).__name__ == "DiskReadDone"]
    assert sum(s.message.bytes for s in reads) == 12 * UNIT // 2


def test_the_other_one_reads_what_the_first_gave_up(cold):
    left, right = cold.attach(), cold.attach()
    plans = [cold.plan(w, "chat", range(12)) for w in (left, right)]
    first = cold.restore(left, plans[0], range(12), deadline_s=1.0)
    second = cold.restore(right, plans[1], range(12))
    cold.tick(2.1)
    assert first.receipt.reason == "deadline"
    cold.run()
    assert second.receipt.tokens == 12


def test_a_block_that_is_parked_again_while_it_is_read_is_stored_once(cold):
    worker = cold.attach()
    restore = cold.restore(worker, cold.plan(worker, "chat", range(12)), range(12))
    park = cold.park(worker, "other", range(12))
    cold.run()
    assert (restore.receipt.tokens, park.receipt.level, park.receipt.objects_stored) == (12, "host", 0)


# --- larger than memory -----------------------------------------------------------------------------------


def test_a_conversation_larger_than_the_arena_streams_through_it_to_disk_and_back(make_rig):
    rig = make_rig(arena_bytes=[8 * UNIT])
    worker = rig.attach()
    park = rig.park(worker, "long", range(40), level="disk")
    rig.run()
    assert (park.receipt.level, park.receipt.tokens) == ("disk", 40)
    restore = rig.resume(worker, "long", range(40))
    assert restore.receipt.tokens == 40
    assert restore.receipt.reason == ""


def test_a_restore_for_which_there_is_no_memory_says_so(make_rig):
    rig = make_rig(arena_bytes=[8 * UNIT])
    rig.park(rig.attach(), "chat", range(12), level="disk")
    rig.run()
    rig = make_rig(disk=rig.store, epoch=2, arena_bytes=[8 * UNIT])
    worker = rig.attach()
    rig.park(worker, "other", range(50, 66))
    rig.run()
    rig.plan(worker, "other", range(50, 66))
    restore = rig.resume(worker, "chat", range(12))
    assert (restore.receipt.tokens, restore.receipt.reason) == (0, "backpressure")


def test_batches_of_a_restore_are_bounded(rig, worker):
    rig.park(worker, "chat", range(40))
    rig.run()
    rig.restore(worker, rig.plan(worker, "chat", range(40)), range(40))
    sizes = [sum(i.nbytes for i in op.message.items) for op in rig.copies()]
    assert len(sizes) == rig.settings.batches_in_flight
    assert max(sizes) <= rig.settings.batch_bytes
    assert all(isinstance(op.message, Copy) and not op.message.last for op in rig.copies())


def test_an_unknown_plan_is_a_receipt(rig, worker):
    answer = rig.ask(Restore(worker=worker.name, request=7, plan_id="n9", deadline_s=1.0), worker.peer)
    assert (answer.job, answer.receipt.reason) == ("", "lease_expired")
