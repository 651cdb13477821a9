"""Parking: levels, what is stored once, what is released when, and what is refused."""

import pytest

from kvtier.keys import pack_tokens
from kvtier.messages.calls import Park
from kvtier.messages.tiers import Copy, DiskWrite
from kvtier.testing.rig_uses import HYBRID, PLAIN, UNIT


def names(receipt):
    return receipt.level, receipt.reason


def test_a_park_to_host_is_released_and_done_when_its_copies_have_ended(rig, worker):
    park = rig.park(worker, "chat", range(10))
    assert park.job
    assert not park.released
    assert not park.receipts
    rig.run_copies()
    assert park.released
    receipt = park.receipt
    assert (receipt.level, receipt.tokens, receipt.objects_stored) == ("host", 10, 3)
    assert receipt.bytes_stored == 10 * UNIT // 2
    assert not rig.store.objects


def test_a_park_to_disk_is_released_before_the_disk_has_written_anything(rig, worker):
    park = rig.park(worker, "chat", range(10), level="disk")
    rig.run_copies()
    assert park.released
    assert not park.receipts
    rig.run()
    assert park.receipt.level == "disk"
    assert len(rig.store.objects) == 3
    assert ("acme", "chat") in rig.store.records


def test_batches_are_bounded_and_only_some_run_at_once(rig, worker):
    rig.park(worker, "chat", range(24))
    assert [op.message.batch for op in rig.copies()] == [0, 1]
    assert all(sum(i.nbytes for i in op.message.items) <= 2 * UNIT for op in rig.copies())
    assert not any(op.message.last for op in rig.copies())
    rig.finish(rig.copies()[0])
    assert [op.message.batch for op in rig.copies()] == [1, 2]


def test_the_release_waits_for_the_last_batch_whatever_the_order(rig, worker):
    park = rig.park(worker, "chat", range(12))
    while rig.copies():
        assert not park.released
        rig.finish(rig.copies()[-1])
    assert park.released


def test_parked_again_nothing_is_copied(rig, worker):
    rig.park(worker, "chat", range(10))
    rig.run()
    again = rig.park(worker, "chat", range(10))
    assert not rig.ops
    assert (again.receipt.objects_stored, again.receipt.objects_shared) == (0, 3)


def test_conversations_of_a_tenant_share_their_prefix(rig, worker):
    rig.park(worker, "one", range(12))
    rig.run()
    two = rig.park(worker, "two", [*range(8), 90, 91])
    rig.run()
    assert (two.receipt.objects_stored, two.receipt.objects_shared) == (1, 2)
    assert rig.resume(worker, "two", [*range(8), 90, 91]).receipt.tokens == 10


@pytest.mark.parametrize("other", ["tenant", "model", "shard", "extra"])
def test_nothing_is_shared_across_tenants_models_shards_and_extras(rig, worker, other):
    rig.park(worker, "chat", range(8))
    rig.run()
    wishes = {"tenant": {"tenant": "rival"}, "extra": {"extras": [(0, b"an image")]}}.get(other, {})
    if other == "model":
        worker = rig.attach(fingerprint=b"n" * 32)
    if other == "shard":
        worker = rig.attach(shard="s1")
    if other != "extra":
        assert rig.plan(worker, "chat", range(8), **wishes).plan.load_tokens == 0
    park = rig.park(worker, "chat", range(8), **wishes)
    rig.run()
    assert park.receipt.objects_stored == 2


def test_two_workers_that_park_the_same_at_once_store_it_once(rig, worker):
    twin = rig.attach()
    first, second = rig.park(worker, "one", range(8)), rig.park(twin, "two", range(8))
    assert {op.message.request for op in rig.copies()} == {first.message.request}
    rig.run()
    assert (first.receipt.objects_stored, second.receipt.objects_stored) == (2, 0)
    assert second.receipt.objects_shared == 2


def test_the_second_of_two_stores_what_the_first_fails_to(rig, worker):
    twin = rig.attach()
    first, second = rig.park(worker, "one", range(4)), rig.park(twin, "two", range(4))
    rig.finish(rig.copies()[0], "error: of the device")
    rig.run()
    assert names(first.receipt) == ("none", "copy_failed")
    assert (second.receipt.level, second.receipt.objects_stored) == ("host", 1)


def test_a_park_after_a_known_front_sends_and_stores_only_what_is_new(rig, worker):
    rig.park(worker, "chat", range(10), level="disk")
    rig.run()
    front = rig.plan(worker, "chat", range(14))
    assert front.front_tokens == 8
    park = rig.park(worker, "chat", range(14), after=front, level="disk")
    rig.run()
    assert (park.receipt.level, park.receipt.tokens) == ("disk", 14)
    assert park.receipt.objects_stored == 2
    assert rig.resume(worker, "chat", range(14)).receipt.tokens == 14


def test_level_disk_after_a_front_in_host_memory_writes_the_front_too(rig, worker):
    rig.park(worker, "chat", range(8))
    rig.run()
    front = rig.plan(worker, "chat", range(12))
    park = rig.park(worker, "chat", range(12), after=front, level="disk")
    rig.run()
    assert park.receipt.level == "disk"
    reborn = rig.restarted()
    assert reborn.plan(reborn.attach(), "chat", range(12)).plan.load_tokens == 12


def test_a_front_that_has_lost_a_block_is_gathered_again_where_the_pool_has_it(rig, worker):
    rig.park(worker, "chat", range(8))
    rig.run()
    front = rig.plan(worker, "chat", range(12))
    rig.corrupt_host(rig.restore(worker, front, range(8)) and rig.copies()[0].message.items[0])
    rig.run()
    park = rig.park(worker, "chat", range(12), after=front)
    rig.run()
    assert park.receipt.objects_stored == 2
    assert rig.resume(worker, "chat", range(12)).receipt.tokens == 12


def test_a_front_that_has_lost_a_block_is_refused_where_the_pool_has_it_no_longer(rig, worker):
    rig.park(worker, "chat", range(8))
    rig.run()
    front = rig.plan(worker, "chat", range(12))
    rig.corrupt_host(rig.restore(worker, front, range(8)) and rig.copies()[0].message.items[0])
    rig.run()
    park = rig.park(worker, "chat", range(12), after=front, held_from=[8])
    assert park.failed.error == "TokensError"
    assert "from the start" in park.failed.fix


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"tokens": b""}, "TokensError"),
        ({"tokens": b"123"}, "TokensError"),
        ({"after_key": b"k" * 32, "after_tokens": 4}, "TokensError"),
        ({"after_key": b"k" * 32}, "TokensError"),
        ({"after_tokens": 4}, "TokensError"),
        ({"after_tokens": -4}, "TokensError"),
        ({"held_from": [0, 0]}, "GeometryError"),
        ({"held_from": [1]}, "GeometryError"),
        ({"fidelity": "int8"}, "GeometryError"),
        ({"codec": "gzip"}, "KvtierError"),
        ({"extras": [(99, b"x")]}, "TokensError"),
        ({"share": "conversation", "private_from": -1}, "TokensError"),
        ({"tenant": ""}, "ConfigError"),
        ({"worker": "worker:none"}, "ProtocolError"),
        ({"timeout_s": float("nan")}, "ProtocolError"),
        ({"timeout_s": float("inf")}, "ProtocolError"),
    ],
)
def test_a_callers_mistake_is_answered_and_changes_nothing(rig, worker, wrong, error):
    good = {"worker": worker.name, "tokens": pack_tokens([1, 2, 3, 4, 5]), "tenant": "acme"}
    answer = rig.ask(Park(request=99, conversation="chat", **{**good, **wrong}), worker.peer)
    assert (type(answer).__name__, answer.error) == ("Failed", error)
    assert not rig.ops
    assert rig.host.usage().used_bytes == 0
    assert rig.core.state.conversations == {}
    assert rig.core.status().counters[f"errors.{error}"] == 1


def test_a_key_in_the_middle_of_the_conversation_is_no_front_at_another_place(rig, worker):
    rig.park(worker, "chat", range(8))
    rig.run()
    front = rig.plan(worker, "chat", range(8))
    message = Park(
        worker=worker.name, request=99, conversation="chat", tenant="acme", tokens=pack_tokens([9]),
        after_key=front.front_key, after_tokens=4,
    )  # fmt: skip
    assert rig.ask(message, worker.peer).error == "TokensError"


def test_without_a_gpu_service_a_park_ends_at_once(rig, worker):
    rig.disconnect(rig.gpu)
    park = rig.park(worker, "chat", range(4))
    assert names(park.receipt) == ("none", "copy_failed")
    assert park.released


def test_a_failed_copy_ends_the_park_when_all_of_its_copies_have_ended(rig, worker):
    park = rig.park(worker, "chat", range(16))
    first, second = rig.copies()
    rig.finish(first, "error: of the device")
    assert not park.receipts
    rig.finish(second)
    assert names(park.receipt) == ("none", "copy_failed")
    assert park.released
    assert rig.host.usage().used_bytes == 0


def test_the_whole_batch_counts_as_failed_when_one_object_did(rig):
    worker = rig.attach(HYBRID)
    park = rig.park(worker, "chat", range(4))
    op = rig.copies()[0]
    assert isinstance(op.message, Copy)
    rig.finish(op, "error: of one")
    rig.run()
    assert park.receipt.level == "none"


def test_what_a_failed_park_stored_is_found_by_the_next_one(rig, worker):
    rig.park(worker, "chat", range(16))
    first, second = rig.copies()
    rig.finish(first)
    rig.finish(second, "error: of the device")
    rig.run()
    again = rig.park(worker, "chat", range(16))
    rig.run()
    assert again.receipt.objects_shared > 0
    assert rig.resume(worker, "chat", range(16)).receipt.tokens == 16


def test_a_write_carries_what_was_gathered_and_its_checksum(rig, worker):
    rig.park(worker, "chat", range(4), level="disk")
    rig.run_copies()
    write = rig.disk_ops()[0].message
    assert isinstance(write, DiskWrite)
    assert write.models == [(worker.fingerprint, "model")]
    assert [meta.checksum for meta in write.metas] == [item.checksum for item in write.slots]
    assert write.metas[0].checksum is not None


def test_parks_of_shards_stand_side_by_side(rig):
    left, right = rig.attach(PLAIN, shard="s0"), rig.attach(PLAIN, shard="s1")
    rig.park(left, "chat", range(6))
    rig.run()
    assert rig.plan(left, "chat", range(6)).plan.load_tokens == 6
    assert rig.plan(right, "chat", range(6)).plan.reason == "incomplete"
    rig.park(right, "chat", range(6))
    rig.run()
    assert rig.resume(right, "chat", range(6)).receipt.tokens == 6
    assert len(rig.core.state.conversations) == 1


def test_a_park_whose_copies_are_slow_ends_for_the_time_and_not_for_want_of_room(make_rig):
    rig = make_rig()
    worker = rig.attach()
    park = rig.park(worker, "chat", range(8), timeout_s=1.0)
    rig.tick(2.0)
    for op in list(rig.ops):
        rig.finish(op, "cancelled")
    receipt = park.receipt
    assert (receipt.level, receipt.reason, receipt.detail) == (
        "none",
        "deadline",
        "its copies did not end in time",
    )
    assert receipt.retry_after_s is None
