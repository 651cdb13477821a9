"""A copy that another node says to have on disk: it comes back there after power loss, until it goes on."""

import pytest

from kvtier.messages import Forget
from kvtier.node.coverage import restored_end
from kvtier.node.keeping import Keeping
from kvtier.testing.rig_checks import best_of_slices
from kvtier.testing.rig_cluster import RigCluster, end_well, objects_of, park_at


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
