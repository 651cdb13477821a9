"""A copy that another node says to have on disk: it comes back there after power loss, until it goes on."""

import pytest

from kvtier.messages.calls import Explain, Forget
from kvtier.node import naming
from kvtier.node.coverage import restored_end
from kvtier.node.disk_side import DiskSide
from kvtier.node.keeping import Keeping
from kvtier.node.room import Room
from kvtier.testing.rig_checks import best_of_slices
from kvtier.testing.rig_cluster import NodeRig, RigCluster, end_well, objects_of, pair, park_at
from kvtier.testing.rig_uses import HYBRID


@pytest.fixture
def nodes():
    """What memory alone holds is written at once, with the records that there are."""
    cluster = RigCluster("a", "b", wishes={"spill_above": 0.0})
    cluster.announce()
    for rig in cluster.rigs.values():
        rig.attach()
    return cluster.rigs["a"], cluster.rigs["b"]


def spilled(rig):
    for _ in range(3):
        rig.tick(0.2)
        rig.run()
    assert all(stored.durable for stored in objects_of(rig, "chat"))


def comes_back(rig, count):
    """Tokens of the conversation's first `count` that the node alone has after power loss."""
    worker = next(iter(rig.core.state.workers.values()))
    (pieces,) = best_of_slices(rig.restarted(), worker, ("acme", "chat"), range(count))
    return restored_end(pieces)


def recording(a, b):
    """A park at `a` of what `b` has on disk, and no record of: that is on its way."""
    park_at(a)
    b.resume(b.attach(), "chat", range(10))
    spilled(b)
    assert not b.store.records
    park = a.park(a.workers[0], "chat", range(10), level="copies=2")
    a.run_copies()
    assert b.disk_ops() and not park.receipts
    return park


def test_what_was_read_for_a_restore_is_on_disk_once_a_record_names_it(nodes):
    a, b = nodes
    park = recording(a, b)
    b.run()
    assert park.receipt.copies == {"b": "disk"}
    assert comes_back(b, 10) == 10
    end_well(a, b)


def test_and_without_its_record_it_is_gone(nodes, monkeypatch):
    def hasty(self, job):
        job.recorded = True
        self._finish(job)

    monkeypatch.setattr(Keeping, "_record", hasty)
    a, b = nodes
    park_at(a)
    b.resume(b.attach(), "chat", range(10))
    spilled(b)
    assert park_at(a, level="copies=2").receipt.copies == {"b": "disk"}
    assert comes_back(b, 10) == 0


def test_an_end_stays_until_the_next_one_is_on_disk(nodes):
    a, b = nodes
    park_at(a, level="copies=2")
    spilled(b)
    assert park_at(a, level="copies=2").receipt.copies == {"b": "disk"}
    assert park_at(a, 15, level="copies=2").receipt.copies == {"b": "host"}
    assert comes_back(b, 10) == 10
    spilled(b)
    assert comes_back(b, 10) == 10
    assert park_at(a, 15, level="copies=2").receipt.copies == {"b": "disk"}
    assert comes_back(b, 15) == 15
    assert [head.tokens for head in b.core.state.conversations["acme", "chat"].heads] == [15]
    end_well(a, b)


def test_a_disk_that_refuses_the_record_has_no_copy(nodes):
    a, b = nodes
    park = recording(a, b)
    b.store.broken = True
    b.run()
    assert (park.receipt.level, park.receipt.copies) == ("copies=2", {"b": "host"})
    b.store.broken = False
    end_well(a, b)


def test_a_disk_that_does_not_answer_holds_up_nobody(nodes):
    a, b = nodes
    park = recording(a, b)
    b.tick(20.0)
    assert park.receipt.copies == {"b": "host"}
    end_well(a, b)


def test_what_is_forgotten_while_its_record_is_written_is_not_kept(nodes):
    a, b = nodes
    park = recording(a, b)
    a.ask(Forget(conversation="chat", tenant="acme"))
    a.run()
    b.run()
    assert park.receipt.reason == "forgotten"
    assert not objects_of(b, "chat") and not b.store.records
    end_well(a, b)


# --- while the disk is away ---------------------------------------------------------------------------------


def fill(rig, level="host", parks=8):
    """Receipts of parks, one after the other, that together need more than host memory has."""
    done = []
    for first in range(1000, 1000 * (parks + 1), 1000):
        done.append(rig.park(rig.workers[0], f"filler-{first}", range(first, first + 40), level=level))
        rig.run()
    return [park.receipt for park in done]


def copied_without_disks():
    a, b = pair()
    for rig in (a, b):
        rig.attach()
    for rig in (a, b):
        rig.kill(rig.disk)
    assert park_at(a, level="copies=2").receipt.copies == {"b": "host"}
    return a, b


def test_a_copy_waits_in_memory_for_a_disk_that_starts_again():
    for rig in copied_without_disks():
        (run,) = rig.ask(Explain(conversation="chat", tenant="acme")).explanation.runs
        assert "one of the copies asked for" in run.decision
        assert {receipt.level for receipt in fill(rig)} == {"host"}
        assert all(stored.slot is not None for stored in objects_of(rig, "chat"))
        rig.start_disk()
        rig.run()
        fill(rig)
        assert comes_back(rig, 10) == 10
        end_well(rig)


def test_and_would_be_gone_if_it_were_dropped_like_anything_else(monkeypatch):
    monkeypatch.setattr(DiskSide, "returns", lambda self: False)
    for rig in copied_without_disks():
        fill(rig)
        assert not objects_of(rig, "chat")


def test_a_node_that_starts_again_keeps_copies_before_its_disk_is_there():
    a, b = pair()
    a.cluster.lose("b")
    b = NodeRig(a.cluster, "b", epoch=9, disk=b.store)
    b.kill(b.disk)
    b.attach()
    assert park_at(a, level="copies=2").receipt.copies == {"b": "host"}
    fill(b)
    assert len(objects_of(b, "chat")) == 3


def test_a_disk_that_stays_away_is_not_waited_for():
    for rig in copied_without_disks():
        rig.tick(121.0)
        fill(rig)
        assert not objects_of(rig, "chat")


def test_nothing_waits_for_a_disk_that_this_node_does_not_have():
    a, b = pair(disk=None, wishes={"disk_expected": False})
    park_at(a, level="copies=2")
    for rig in (a, b):
        rig.attach()
        fill(rig)
        assert not objects_of(rig, "chat")


def test_memory_full_of_copies_refuses_parks_until_the_disk_is_back():
    a, b = copied_without_disks()
    refused = [receipt for receipt in fill(a, "copies=2") if receipt.level == "none"]
    assert {receipt.reason for receipt in refused} == {"backpressure"}
    assert {receipt.reason for receipt in fill(b) if receipt.level == "none"} <= {"backpressure"}
    for rig in (a, b):
        assert all(stored.slot is not None for stored in objects_of(rig, "chat"))
        rig.start_disk()
    a.run()
    again = a.park(a.workers[0], "new", range(5000, 5040))
    a.run()
    assert again.receipt.level == "host"
    end_well(a, b)


# --- a turn that goes on from a copy ------------------------------------------------------------------------


def gone_on(monkeypatch):
    """Two nodes have ten tokens, one goes on in memory alone: what it has left once memory is full."""
    a, _ = pair()
    park_at(a, 10, level="copies=2")
    park_at(a, 12)
    monkeypatch.setattr(a.core.state.policies.admission, "demote", lambda *about: False)
    fill(a)
    return comes_back(a, 12)


def test_the_block_that_takes_a_copied_tails_place_is_no_more_dropped_than_the_tail(monkeypatch):
    assert gone_on(monkeypatch) == 12


def test_and_without_that_the_copied_tokens_are_gone(monkeypatch):
    drop = naming.drop_tails

    def forgetful(state, disk, chain, tails):
        tails = list(tails)
        for tail in tails:
            tail.kept = False
        drop(state, disk, chain, tails)

    monkeypatch.setattr(naming, "drop_tails", forgetful)
    assert gone_on(monkeypatch) == 8


# --- a park that has more rows of a window than a copy ------------------------------------------------------


def parked_with_more_rows():
    """A node keeps the end of a window for another; a park there has all of it, and its copies fail."""
    a, b = pair()
    worker, end = a.attach(HYBRID), HYBRID.groups[1].needed_from(7)
    kept = a.park(worker, "chat", range(7), level="copies=2", held_from=[0, end, 0])
    a.run()
    a.cluster.announce()
    assert end > 0 and kept.receipt.copies == {"b": "host"}
    longer = b.park(b.attach(HYBRID), "other", range(7))
    while not b.copies():
        assert b.disk_ops(), "nothing is written, and nothing copied"
        b.run_disk()
    for op in b.copies():
        b.finish(op, "error: of the device")
    b.run()
    assert longer.receipt.reason == "copy_failed"
    a.cluster.lose("a")
    return b.resume(b.attach(HYBRID), "chat", range(8)).receipt.tokens


def test_a_park_that_waits_for_a_copy_to_make_way_holds_up_no_other():
    """The disk is away, so the copy stays; there is room for everybody else."""
    a, b = pair()
    worker, end = a.attach(HYBRID), HYBRID.groups[1].needed_from(7)
    a.park(worker, "chat", range(7), level="copies=2", held_from=[0, end, 0])
    a.run()
    b.kill(b.disk)
    other = b.attach(HYBRID)
    longer = b.park(other, "other", range(7))
    b.run()
    unrelated = b.park(other, "unrelated", range(1000, 1007))
    b.run()
    assert unrelated.receipt.level == "host"
    assert not longer.receipts and longer.message.timeout_s == 30.0
    b.start_disk()
    b.run()
    assert longer.receipt.level == "host"
    end_well(a, b)


def test_without_a_disk_a_copy_with_fewer_rows_makes_way_at_once_and_all_comes_back():
    a, b = pair(disk=None, wishes={"disk_expected": False})
    worker, end = a.attach(HYBRID), HYBRID.groups[1].needed_from(7)
    kept = a.park(worker, "chat", range(7), level="copies=2", held_from=[0, end, 0])
    a.run()
    assert kept.receipt.copies == {"b": "host"}
    (copy,) = [stored for stored in objects_of(b, "chat") if stored.meta.first_valid]
    longer = b.park(b.attach(HYBRID), "other", range(7))
    b.run()
    assert (longer.receipt.level, longer.receipt.objects_stored) == ("host", 1)
    (whole,) = [one for one in objects_of(b, "chat") if one.meta.object_id == copy.meta.object_id]
    assert whole.meta.first_valid == 0 < copy.meta.first_valid
    a.cluster.lose("a")
    back = b.resume(b.attach(HYBRID), "chat", range(8)).receipt
    assert (back.tokens, back.sources) == (7, {"host": 7})
    end_well(b)


def test_a_copy_with_fewer_rows_is_on_disk_before_it_makes_way():
    assert parked_with_more_rows() == 7


def test_and_would_be_gone_if_it_made_way_at_once(monkeypatch):
    monkeypatch.setattr(Room, "is_written_first", lambda self, block, stored: False)
    assert parked_with_more_rows() < 7
