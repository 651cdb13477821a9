"""Ranks of one model park a conversation as one act, at one node and at several."""

import pytest

from kvtier.geometry import Geometry
from kvtier.messages.calls import Attach, Failed, Forget
from kvtier.node.park_writes import ParkWrites
from kvtier.testing.core_rig import CoreRig
from kvtier.testing.rig_cluster import RigCluster, end_well, pair
from kvtier.testing.rig_ranks import PAIR, at_rest, levels, park_all, ranks_of, resume_all, tokens_of
from kvtier.testing.rig_uses import FULL, PLAIN, SLIDING, UNIT


@pytest.fixture
def rig():
    return CoreRig()


# --- parks ------------------------------------------------------------------------------------------------


def test_pages_are_free_at_once_and_the_receipts_come_when_all_is_there(rig):
    one, two = ranks_of(rig)
    first = rig.park(one, "chat", range(10), level="disk")
    rig.run()
    assert first.released and not first.receipts
    assert rig.plan(one, "chat", range(10)) is None, "the plan waits for the park"
    second = rig.park(two, "chat", range(10), level="disk")
    rig.run()
    assert levels([first, second]) == [("disk", "")] * 2
    assert [use.receipt.tokens for use in (first, second)] == [10, 10]
    assert [use.receipt.version for use in (first, second)] == [1, 1]
    assert [use.receipt.objects_stored for use in (first, second)] == [3, 3]
    reborn = rig.restarted()
    again = ranks_of(reborn)
    _, got = resume_all(reborn, again)
    reborn.run()
    assert tokens_of(got) == [10, 10]
    at_rest(reborn)
    at_rest(rig)


@pytest.mark.parametrize("level", ["host", "disk"])
def test_all_receipts_come_in_one_go(rig, level):
    ranks = ranks_of(rig, [f"L0+2.H{i}+1" for i in range(4)])
    parks = [rig.park(rank, "chat", range(10), level=level) for rank in ranks]
    seen = set()
    while rig.ops:
        rig.finish(rig.ops[0])
        seen.add(sum(len(park.receipts) for park in parks))
    assert seen == {0, 4}
    assert levels(parks) == [(level, "")] * 4
    at_rest(rig)


def test_a_rank_that_never_comes_ends_the_wait_at_the_deadline(rig):
    one, two = ranks_of(rig)
    park = rig.park(one, "chat", range(10), level="disk", timeout_s=5.0)
    rig.run()
    rig.tick(4.9)
    assert not park.receipts
    rig.tick(0.2)
    assert levels([park]) == [("none", "shard_missing")]
    assert PAIR[1] in park.receipt.detail
    plan = rig.plan(one, "chat", range(10)).plan
    assert (plan.load_tokens, plan.reason) == (0, "shard_missing")
    assert plan.detail == f"beyond 0 tokens nobody has {PAIR[1]}"
    # What it left counts when the other one comes after all.
    late = rig.park(two, "chat", range(10), level="disk")
    rig.run()
    assert levels([late]) == [("disk", "")]
    assert rig.plan(one, "chat", range(10)).plan.load_tokens == 10
    at_rest(rig)


def test_a_rank_that_dies_while_it_copies_ends_the_wait_at_once(rig):
    one, two = ranks_of(rig)
    park = rig.park(one, "chat", range(10))
    rig.run()
    rig.park(two, "chat", range(10))
    rig.kill(two.proc)
    assert levels([park]) == [("none", "shard_missing")]
    assert rig.plan(one, "chat", range(10)).plan.reason == "shard_missing"
    at_rest(rig, died=True)


def test_who_tries_again_does_not_end_with_those_who_still_stop(rig):
    one, two = ranks_of(rig)
    parks = [rig.park(rank, "chat", range(10)) for rank in (one, two)]
    theirs = next(op for op in rig.copies() if op.executor is two.proc)
    rig.begin(theirs)
    while ours := [op for op in rig.copies() if op.executor is one.proc]:
        rig.finish(ours[0], "error: of the device")
    assert levels(parks[:1]) == [("none", "copy_failed")]
    again = [rig.park(one, "chat", range(10))]
    rig.run()
    assert levels(parks[1:]) == [("none", "shard_missing")]
    assert not again[0].receipts, "the other one may try again, too"
    again.append(rig.park(two, "chat", range(10)))
    rig.run()
    assert levels(again) == [("host", "")] * 2
    at_rest(rig)


@pytest.mark.parametrize("level", ["host", "disk"])
def test_a_rank_that_dies_after_its_part_is_there_takes_nothing_away(rig, level):
    one, two = ranks_of(rig)
    park = rig.park(one, "chat", range(10), level=level)
    rig.park(two, "chat", range(10), level=level)
    while copies := [op for op in rig.copies() if op.executor is two.proc]:
        rig.finish(copies[0])
    rig.kill(two.proc)
    rig.run()
    assert levels([park]) == [(level, "")]
    at_rest(rig, died=True)


def test_a_turn_that_only_some_ranks_have_written_does_not_end_the_turn_before(rig):
    """Power loss between the ranks' writes: the turn before, with its tail, is what was promised."""
    one, two = ranks_of(rig)
    park_all(rig, [one, two], 10, level="disk")
    rig.park(one, "chat", range(15), level="disk")
    rig.run()
    reborn = rig.restarted()
    again = ranks_of(reborn)
    assert reborn.plan(again[0], "chat", range(15)).plan.load_tokens == 10


def power_lost_between_the_writes(rig):
    """Both ranks have parked a longer turn, but only one of them is on disk."""
    one, two = ranks_of(rig)
    park_all(rig, [one, two], 10, level="disk")
    parks = [rig.park(rank, "chat", range(15), level="disk") for rank in (one, two)]
    rig.run_copies()
    theirs = {meta for op in rig.disk_ops() for meta in op.message.metas if meta.shard == PAIR[1]}
    assert theirs
    while ours := [op for op in rig.disk_ops() if not theirs & set(op.message.metas)]:
        rig.finish(ours[0])
    assert not any(park.receipts for park in parks)
    reborn = rig.restarted()
    return reborn.plan(ranks_of(reborn)[0], "chat", range(15)).plan.load_tokens


def test_the_record_waits_for_the_last_slice(rig):
    assert power_lost_between_the_writes(rig) == 10


def test_and_without_waiting_the_turn_before_is_lost(rig, monkeypatch):
    monkeypatch.setattr(ParkWrites, "_may_record", lambda self, job: True)
    assert power_lost_between_the_writes(rig) < 10


def test_equal_slices_are_stored_once(rig):
    shards = ["L0+2.H0+1"] * 3
    ranks = ranks_of(rig, shards)
    parks = park_all(rig, ranks, level="disk")
    assert levels(parks) == [("disk", "")] * 3
    assert sorted(park.receipt.objects_stored for park in parks) == [0, 0, 3]
    assert len(rig.store.objects) == 3
    planned, got = resume_all(rig, ranks)
    assert planned.plan.bytes == 10 * FULL.token_bytes
    rig.run()
    assert tokens_of(got) == [10] * 3
    at_rest(rig)


def test_a_rank_whose_slice_another_one_has_brought_may_come_late(rig):
    ranks = ranks_of(rig, [PAIR[0], PAIR[0], PAIR[1], PAIR[1]])
    first = park_all(rig, [ranks[0], ranks[2]], level="disk")
    assert levels(first) == [("disk", "")] * 2
    late = park_all(rig, [ranks[1]], level="disk")
    assert levels(late) == [("disk", "")]
    at_rest(rig)


def test_what_is_shared_with_nobody_has_one_salt(rig):
    ranks = ranks_of(rig)
    parks = park_all(rig, ranks, private_from=0, level="disk")
    assert levels(parks) == [("disk", "")] * 2
    _, got = resume_all(rig, ranks)
    rig.run()
    assert tokens_of(got) == [10, 10]
    at_rest(rig)


def test_who_is_told_of_the_disk_may_count_on_those_who_asked_for_less(rig):
    """Power loss right after the receipt: the other slices were asked to be in host memory only."""
    shards = [f"L0+2.H{i}+1" for i in range(3)]
    parks = []
    for rank, level in zip(ranks_of(rig, shards), ("disk", "host", "host"), strict=True):
        parks.append(rig.park(rank, "chat", range(10), level=level))
        rig.run_copies()
        while not parks[0].receipts and rig.disk_ops():
            rig.finish(rig.disk_ops()[0])
    assert levels(parks) == [("disk", ""), ("host", ""), ("host", "")]
    reborn = rig.restarted()
    assert reborn.plan(ranks_of(reborn, shards)[0], "chat", range(10)).plan.load_tokens == 10
    at_rest(reborn)
    at_rest(rig)


def test_a_disk_that_refuses_lowers_all(rig):
    ranks = ranks_of(rig)
    parks = [rig.park(rank, "chat", range(10), level="disk") for rank in ranks]
    rig.run_copies()
    rig.finish(rig.disk_ops()[0], "disk_error")
    rig.run()
    assert levels(parks) == [("host", "disk_error")] * 2
    at_rest(rig)


def test_no_room_for_one_is_no_room_for_all():
    rig = CoreRig(arena_bytes=[8 * UNIT], disk=None)
    ranks = ranks_of(rig)
    parks = park_all(rig, ranks, 16)
    assert {park.receipt.level for park in parks} == {"none"}
    assert {park.receipt.reason for park in parks} <= {"too_large", "shard_missing"}
    at_rest(rig)


def test_all_are_told_when_to_try_again():
    rig = CoreRig(arena_bytes=[20 * UNIT], disk=None)
    ranks = ranks_of(rig)
    rig.park(rig.attach(), "other", range(100, 124))
    rig.run()
    rig.plan(rig.workers[-1], "other", range(100, 124), lease_s=30.0)
    parks = park_all(rig, ranks, 12)
    assert {park.receipt.level for park in parks} == {"none"}
    assert {park.receipt.reason for park in parks} == {"backpressure", "shard_missing"}
    assert all(park.receipt.retry_after_s for park in parks)
    at_rest(rig)


def test_a_slice_with_windows_alone_waits_for_the_one_that_has_the_front(rig):
    """What is before the window is in no block that it stores."""
    window, full = Geometry(4, 2, (SLIDING,)), PLAIN
    ranks = ranks_of(rig, ["L0+1.H0+1", "L1+1.H0+1"], (window, full))
    assert levels(park_all(rig, ranks, 18, level="disk")) == [("disk", "")] * 2
    _, got = resume_all(rig, ranks, 18)
    rig.run()
    assert tokens_of(got) == [18, 18]
    at_rest(rig)


def test_a_conversation_larger_than_memory_streams_through_it():
    rig = CoreRig(arena_bytes=[8 * UNIT], disk=1 << 20)
    ranks = ranks_of(rig)
    parks = park_all(rig, ranks, 32, level="disk")
    assert levels(parks) == [("disk", "")] * 2
    at_rest(rig)


def test_forgetting_ends_the_parks_of_all_ranks(rig):
    ranks = ranks_of(rig)
    parks = [rig.park(rank, "chat", range(10), level="disk") for rank in ranks]
    rig.finish(rig.copies()[0])
    rig.ask(Forget(conversation="chat", tenant="acme"))
    rig.run()
    assert [park.receipt.level for park in parks] == ["none", "none"]
    assert not rig.core.state.conversations
    at_rest(rig)


# --- other nodes -------------------------------------------------------------------------------------------


def test_equal_slices_come_from_another_node():
    there, here = pair()
    shards = ["L0+2.H0+1"] * 2
    parks = park_all(there, ranks_of(there, shards))
    assert levels(parks) == [("host", "")] * 2
    there.cluster.announce()
    ranks = ranks_of(here, shards)
    planned, got = resume_all(here, ranks)
    assert [part.source for part in planned.plan.ranges] == ["peer", "compute"]
    here.run()
    assert tokens_of(got) == [10, 10]
    end_well(there, here)


def test_copies_of_all_slices_go_to_one_node():
    cluster = RigCluster("a", "b", "d")
    cluster.announce()
    here = cluster.rigs["a"]
    ranks = ranks_of(here)
    parks = park_all(here, ranks, level="copies=2")
    assert levels(parks) == [("copies=2", "")] * 2
    assert parks[0].receipt.copies == parks[1].receipt.copies
    (other,) = parks[0].receipt.copies
    cluster.lose("a")
    there = cluster.rigs[other]
    _, got = resume_all(there, ranks_of(there))
    there.run()
    assert tokens_of(got) == [10, 10]
    end_well(*cluster.rigs.values())


@pytest.mark.parametrize("asked", [("copies=2", "host"), ("host", "copies=2")])
def test_copies_are_of_all_slices_whoever_asked_for_them(asked):
    cluster = RigCluster("a", "b", "d")
    cluster.announce()
    here = cluster.rigs["a"]
    ranks = ranks_of(here)
    parks = [
        here.park(rank, "chat", range(10), level=level) for rank, level in zip(ranks, asked, strict=True)
    ]
    here.run()
    assert sorted(levels(parks)) == [("copies=2", ""), ("host", "")]
    (other,) = parks[asked.index("copies=2")].receipt.copies
    cluster.lose("a")
    there = cluster.rigs[other]
    _, got = resume_all(there, ranks_of(there))
    there.run()
    assert tokens_of(got) == [10, 10]
    end_well(*cluster.rigs.values())


def test_without_other_nodes_all_ranks_reach_the_disk():
    cluster = RigCluster("a")
    rig = cluster.rigs["a"]
    parks = park_all(rig, ranks_of(rig), level="copies=2")
    assert levels(parks) == [("disk", "no_peer")] * 2
    end_well(rig)


# --- who is who -------------------------------------------------------------------------------------------


def test_a_worker_is_one_of_its_ranks(rig):
    worker = rig.attach()
    message = Attach(
        fingerprint=b"m" * 32, model="m", geometry=PLAIN, shard="s0", layout="l", ranks=["s1", "s2"]
    )
    answer = rig.ask(message, worker.peer)
    assert isinstance(answer, Failed) and answer.error == "GeometryError"


def test_models_and_tenants_beside_each_other(rig):
    """Two engines with ranks and one without, two tenants: nobody is given what is another's."""
    ours, theirs = ranks_of(rig), ranks_of(rig, fingerprint=b"t" * 32)
    alone = rig.attach(shard=PAIR[0])
    for ranks in (ours, theirs):
        for tenant in ("acme", "rival"):
            assert levels(park_all(rig, ranks, tenant=tenant)) == [("host", "")] * 2
    for ranks in (ours, theirs):
        for tenant in ("acme", "rival"):
            _, got = resume_all(rig, ranks, tenant=tenant)
            rig.run()
            assert tokens_of(got) == [10, 10]
    # A worker of one of the slices needs no other.
    assert rig.resume(alone, "chat", range(10)).receipt.tokens == 10
    at_rest(rig)
