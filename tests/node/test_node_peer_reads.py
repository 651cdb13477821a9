"""A conversation parked at one node comes back at another: by tokens, whole or cut, and never wrong."""

from __future__ import annotations

import msgspec
import pytest

from kvtier.messages import cluster as c
from kvtier.messages.tiers import WireItem
from kvtier.node.events import Received
from kvtier.node.reports import status_report
from kvtier.states import State
from kvtier.testing.rig_cluster import NodeRig, RigCluster, begun, end_well, objects_of, pair, park_at
from kvtier.testing.rig_uses import HYBRID, PLAIN, UNIT
from kvtier.tier import Slot


@pytest.mark.parametrize("geometry", [PLAIN, HYBRID])
@pytest.mark.parametrize("level", ["host", "disk"])
def test_what_one_node_has_comes_back_at_another(geometry, level):
    a, b = pair()
    park_at(a, geometry=geometry, level=level)
    restore = b.resume(b.attach(geometry), "chat", range(12))
    assert restore.receipt.tokens == 10
    assert restore.receipt.sources == {"peer": 10}
    assert b.core.state.counters.pulled_bytes == restore.receipt.bytes
    again = b.resume(b.attach(geometry), "chat", range(10))
    assert again.receipt.sources == {"host": 10}
    end_well(a, b)


def test_what_lies_on_the_holders_disk_alone_is_read_there_first():
    a, b = pair()
    park_at(a, level="disk")
    # Room is needed at a: the conversation leaves its host memory.
    for filler in range(8):
        first = 1000 * (filler + 1)
        a.park(a.attach(), f"filler-{filler}", range(first, first + 40), level="disk")
        a.run()
    assert not any(a.host.find(s.meta.object_id) for s in objects_of(a, "chat"))
    assert b.resume(b.attach(), "chat", range(10)).receipt.tokens == 10
    end_well(a, b)


def test_a_local_hit_asks_nobody():
    a, _ = pair()
    cluster = a.cluster
    park_at(a)
    told: list[object] = []
    cluster.at_directory = lambda rig, message: told.append(message)  # type: ignore[method-assign]
    assert a.resume(a.attach(), "chat", range(10)).receipt.tokens == 10
    assert a.resume(a.attach(), "chat", range(12)).receipt.tokens == 10
    assert not [message for message in told if isinstance(message, c.FindBranches)]


def test_a_directory_that_does_not_answer_costs_a_bounded_wait():
    a, b = pair()
    cluster = a.cluster
    park_at(a)
    worker = b.attach()
    cluster.at_directory = lambda rig, message: None  # type: ignore[method-assign]
    planned = b.plan(worker, "chat", range(10))
    assert planned is None
    b.tick(0.26)
    (answer,) = b.answers[max(b.answers)]
    assert answer.plan.load_tokens == 0 and answer.plan.reason == "unknown_conversation"
    # What was asked for is answered later: nobody waits for it.
    b.tell(Received(c.DIRECTORY, c.Branches(job="e2.1")))
    end_well(b)


def test_what_is_here_counts_when_the_other_node_is_cut_off():
    a, b = pair()
    cluster = a.cluster
    park_at(a, 20)
    park_at(b, 8)
    cluster.cut.add("a")
    restore = b.resume(b.attach(), "chat", range(20))
    assert restore.receipt.tokens == 8
    assert restore.receipt.sources == {"host": 8}


def test_only_what_is_missing_is_pulled():
    a, b = pair()
    park_at(b, 8)
    park_at(a, 20)
    restore = b.resume(b.attach(), "chat", range(20))
    assert restore.receipt.tokens == 20
    assert restore.receipt.sources == {"host": 8, "peer": 12}
    assert b.core.state.counters.pulled_bytes == 12 * UNIT // 2


def test_a_read_tells_how_wide_the_numbers_are_and_counts_how_they_came():
    a, b = pair()
    park_at(a, 8)
    begun(b, 8)
    pull = b.pulls[0]
    assert set(pull.item_bytes) == {PLAIN.item_bytes} and len(pull.item_bytes) == len(pull.slots)
    done = c.PeerReadDone(job=pull.job, received_bytes=100, coded_bytes=80, wire_bytes=75)
    for _ in range(2):
        # Also where the read had been given up.
        b.tell(Received(c.PEERS, done))
    counters = b.core.state.counters
    seen = (counters.peer_received_bytes, counters.peer_coded_bytes, counters.peer_wire_bytes)
    assert seen == (200, 160, 150)
    reported = status_report(b.core.state, 0).counters
    assert [reported[f"peer_{name}_bytes"] for name in ("received", "coded", "wire")] == [200, 160, 150]


def slot_of(item: WireItem) -> Slot:
    return Slot(item.slot_id, item.generation, (item.arena, item.offset), item.nbytes)


@pytest.mark.parametrize("given_up", [False, True])
def test_a_slot_that_may_still_be_written_to_is_kept_until_it_is_quiet(given_up):
    a, b = pair()
    park_at(a, 8)
    begun(b, 8)
    pulls = list(b.pulls)
    kept = slot_of(pulls[0].slots[-1])
    if given_up:
        b.tick(max(pull.timeout_s for pull in pulls) + 11.0)
        assert b.host.state(kept) is State.LIMBO
    for pull in pulls:
        last = len(pull.slots) - 1
        failed = tuple((index, "deadline") for index in range(last + 1))
        busy = (last,) if pull is pulls[0] else ()
        b.tell(Received(c.PEERS, c.PeerReadDone(job=pull.job, failed=failed, busy=busy)))
    b.tick(1000.0)
    assert b.host.state(kept) is State.LIMBO
    assert given_up or b.host.usage().limbo_bytes == b.host.usage().used_bytes > 0
    b.tell(Received(c.PEERS, c.PeerReadDone(job=pulls[0].job)))
    assert b.host.usage().limbo_bytes == b.host.usage().used_bytes == 0


def test_the_longest_branch_by_tokens_wins_and_not_the_newest():
    a, b = pair()
    cluster = a.cluster
    park_at(a, 20)
    a.now_s += 50
    shorter = [*range(6), *range(100, 104)]
    a.park(a.attach(), "chat", shorter)
    a.run()
    cluster.announce()
    assert b.resume(b.attach(), "chat", range(22)).receipt.tokens == 20
    assert b.resume(b.attach(), "chat", [*shorter, 7]).receipt.tokens == 10


def test_what_nobody_else_shares_is_found_by_its_salt():
    a, b = pair()
    park_at(a, 14, private_from=4)
    assert b.resume(b.attach(), "chat", range(14)).receipt.tokens == 14
    assert b.resume(b.attach(), "other", range(14)).receipt.tokens == 4
    end_well(a, b)


def test_a_new_conversation_pulls_the_front_that_it_shares():
    a, b = pair()
    park_at(a, 16, "one")
    assert b.resume(b.attach(), "two", [*range(12), 77]).receipt.tokens == 12


def test_other_tenants_and_models_see_nothing():
    a, b = pair()
    park_at(a)
    assert b.plan(b.attach(), "chat", range(10), tenant="rival").plan.load_tokens == 0
    assert b.plan(b.attach(fingerprint=b"n" * 32), "chat", range(10)).plan.load_tokens == 0
    assert b.plan(b.attach(shard="s1"), "chat", range(10)).plan.load_tokens == 0


@pytest.mark.parametrize("why", ["peer_lost", "missing", "busy", "corrupt", "deadline", "cancelled"])
def test_a_read_that_fails_is_a_miss_from_there_on(why):
    a, b = pair()
    park_at(a, 24)
    restore = begun(b, 24)
    b.finish_pull(b.pulls[0])
    b.run_copies()
    while b.pulls:
        b.finish_pull(b.pulls[0], why)
    b.run()
    receipt = restore.receipt
    assert receipt.tokens == 4
    assert receipt.reason == {"corrupt": "corrupt", "deadline": "deadline"}.get(why, "peer_lost")
    end_well(a, b)


def test_a_flipped_bit_on_the_way_is_a_miss_and_is_not_kept():
    a, b = pair()
    park_at(a)
    restore = begun(b)
    for pull in list(b.pulls):
        b.finish_pull(pull, flip=True)
    b.run()
    assert (restore.receipt.tokens, restore.receipt.reason) == (0, "corrupt")
    assert not list(b.core.state.tree)
    assert b.resume(b.attach(), "chat", range(10)).receipt.tokens == 10
    end_well(a, b)


def test_the_control_bytes_that_nobody_checks_are_noticed(monkeypatch):
    a, b = pair()
    park_at(a)
    monkeypatch.setattr(NodeRig, "_pull", _unchecked)
    begun(b)
    for pull in list(b.pulls):
        b.finish_pull(pull, flip=True)
    b.run()
    # The sum on the way to the pool catches it: nothing wrong is said to be in place.
    assert b.violations == []
    assert b.core.state.counters.errors.get("corrupt")


def _unchecked(self, node, key, item, *, flip):
    other = self.cluster.reach(self.name, node)
    lent = other.question(c.Lend(block_key=key[0], group=key[1], shard=key[2]))
    self.memory.write(item, ("flipped", *other.memory.read(lent.item)))
    other.tell(Received(f"{c.PEER}0", c.GaveBack(loan=lent.loan)))
    return ""


def test_an_answer_that_never_comes_ends_with_the_deadline_and_its_slots_wait():
    a, b = pair()
    park_at(a)
    restore = begun(b, deadline_s=1.0)
    assert all(0 < pull.timeout_s <= 1.0 for pull in b.pulls)
    b.tick(2.1)
    assert restore.receipt.tokens == 0 and restore.receipt.reason == "deadline"
    used = b.core.status().tiers[1].used_bytes
    assert used
    b.tick(30.0)
    assert b.core.status().tiers[1].limbo_bytes, "who writes may be writing still"
    for pull in list(b.pulls):
        b.finish_pull(pull, "deadline")
    assert b.core.status().tiers[1].used_bytes == 0
    end_well(a, b)


def test_what_is_lent_stays_while_it_is_sent():
    a, _ = pair(arena_bytes=(8 * UNIT,), disk=None)
    park_at(a, 16)
    meta = objects_of(a, "chat")[0].meta
    lent = a.question(c.Lend(block_key=meta.object_id.block_key, group=0, shard="s0"))
    other = a.park(a.attach(), "other", range(50, 66))
    a.run()
    found = a.host.find(meta.object_id)
    assert found is not None and found.slot_id == lent.item.slot_id
    a.tick(61.0)
    assert a.host.state(found).name in ("LEASED", "LIMBO", "PRESENT")
    a.tell(Received(f"{c.PEER}9", c.GaveBack(loan=lent.loan)))
    assert other.receipts
    end_well(a)


def test_a_loan_waits_for_room_and_not_for_ever():
    a, _ = pair(arena_bytes=(8 * UNIT,))
    park_at(a, 16, level="disk")
    meta = objects_of(a, "chat")[0].meta
    lend = c.Lend(block_key=meta.object_id.block_key, group=0, shard="s0")
    # All of host memory is dirty and about to be written.
    a.park(a.attach(), "other", range(50, 66))
    a.run_copies()
    assert not a.host.find(meta.object_id)
    asked = len(a.replies)
    assert a.question(lend) is None
    a.run_disk()
    a.tick()
    a.run_disk()
    (lent,) = a.replies[asked:]
    assert lent.item is not None and not lent.reason
    a.tell(Received(f"{c.PEER}9", c.GaveBack(loan=lent.loan)))
    end_well(a)


def test_a_loan_that_finds_no_room_is_refused_in_time():
    a, _ = pair(arena_bytes=(8 * UNIT,))
    park_at(a, 16, level="disk")
    meta = objects_of(a, "chat")[0].meta
    a.park(a.attach(), "other", range(50, 66))
    a.run_copies()
    worker = a.attach()
    a.plan(worker, "other", range(50, 66), lease_s=30.0)
    asked = len(a.replies)
    a.question(c.Lend(block_key=meta.object_id.block_key, group=0, shard="s0"))
    a.tick(2.1)
    (refused,) = a.replies[asked:]
    assert refused.reason == "busy"


def test_what_a_node_claims_of_other_blocks_is_not_taken():
    a, b = pair()
    park_at(a)
    ask = NodeRig._ask_holder

    def lies(self, message):
        said = ask(self, message)
        metas = tuple(msgspec.structs.replace(meta, start=meta.start + 4) for meta in said.metas)
        return msgspec.structs.replace(said, metas=metas)

    NodeRig._ask_holder = lies  # type: ignore[method-assign]
    try:
        assert b.plan(b.attach(), "chat", range(10)).plan.load_tokens == 0
    finally:
        NodeRig._ask_holder = ask  # type: ignore[method-assign]


def test_the_next_node_is_asked_when_the_best_one_is_gone():
    cluster = RigCluster("a", "b", "d")
    a, b, d = cluster.rigs.values()
    park_at(a, 20)
    park_at(d, 12)
    cluster.cut.add("a")
    restore = b.resume(b.attach(), "chat", range(20))
    assert (restore.receipt.tokens, restore.receipt.sources) == (12, {"peer": 12})


def test_a_stranger_may_not_speak_for_the_cluster():
    a, _ = pair()
    for message in (c.Branches(job="e1.1"), c.Erase(stone=c.Stone("x", "acme", "chat", 0.0))):
        assert type(a.ask(message)).__name__ == "Failed"


def test_an_answer_that_names_a_root_which_it_lacks_is_taken_as_nothing_and_at_once():
    a, b = pair()
    park_at(a)
    honest = b._ask_holder

    def mangled(message: c.AskHolder) -> c.TheseAre:
        answer = honest(message)
        return msgspec.structs.replace(answer, roots=())

    b._ask_holder = mangled  # type: ignore[method-assign]
    assert b.plan(b.attach(), "chat", range(10)).plan.load_tokens == 0
    end_well(b)
