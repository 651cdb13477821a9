"""What a node keeps in its own memory has bounds; beyond them it refuses, and says why."""

import pytest

from kvtier.messages.calls import Failed, Forget, Forgotten
from kvtier.node import limits


def park(rig, worker, name, first, **how):
    parked = rig.park(worker, name, range(first, first + 8), **how)
    rig.run()
    return parked.receipt


def test_conversations_have_a_bound_and_room_comes_with_forgetting(rig, worker, monkeypatch):
    monkeypatch.setattr(limits, "MOST_CONVERSATIONS", 2)
    assert [park(rig, worker, name, 100 * n).level for n, name in enumerate("ab")] == ["host", "host"]
    refused = park(rig, worker, "c", 300)
    assert (refused.level, refused.reason, refused.released) == ("none", "backpressure", True)
    assert "2 conversations" in refused.detail
    assert refused.retry_after_s > 0
    assert len(rig.core.state.conversations) == 2
    # Those that are known go on.
    assert park(rig, worker, "a", 500).level == "host"
    rig.ask(Forget(conversation="a", tenant="acme"))
    assert park(rig, worker, "c", 300).level == "host"


def test_blocks_have_a_bound_and_what_is_stored_already_is_free(rig, worker, monkeypatch):
    monkeypatch.setattr(limits, "MOST_BLOCKS", 5)
    assert park(rig, worker, "a", 0).level == "host"
    assert park(rig, worker, "b", 100).level == "host"
    refused = park(rig, worker, "c", 200)
    assert (refused.level, refused.reason) == ("none", "backpressure")
    assert "5 blocks" in refused.detail
    assert len(rig.core.state.tree) == 4
    assert park(rig, worker, "twin", 0).level == "host"
    assert rig.resume(worker, "b", range(100, 110)).receipt.tokens == 8


def test_parks_under_way_have_a_bound(rig, worker, monkeypatch):
    monkeypatch.setattr(limits, "MOST_PARKS", 2)
    parks = [rig.park(worker, f"chat-{n}", range(100 * n, 100 * n + 8)) for n in range(3)]
    assert (parks[2].receipt.level, parks[2].receipt.reason) == ("none", "backpressure")
    rig.run()
    assert [p.receipt.level for p in parks] == ["host", "host", "none"]
    assert park(rig, worker, "chat-2", 200).level == "host"


def test_workers_have_a_bound(rig, worker, monkeypatch):
    monkeypatch.setattr(limits, "MOST_WORKERS", 2)
    rig.attach()
    refused = rig.attach()
    assert refused.name == ""
    (answer,) = [a for answers in rig.answers.values() for a in answers if isinstance(a, Failed)]
    assert (answer.error, "2 workers" in answer.message) == ("ProtocolError", True)
    rig.kill(worker.proc)
    assert rig.attach().name


def test_plans_that_nobody_uses_have_a_bound_and_the_oldest_goes(rig, worker, monkeypatch):
    monkeypatch.setattr(limits, "MOST_PLANS", 3)
    park(rig, worker, "chat", 0)
    plans = [rig.plan(worker, "chat", range(8)) for _ in range(4)]
    assert len(rig.core._plans._held) == 3
    first = rig.restore(worker, plans[0], range(8))
    rig.run()
    assert (first.receipt.tokens, first.receipt.reason) == (0, "lease_expired")
    last = rig.restore(worker, plans[3], range(8))
    rig.run()
    assert last.receipt.tokens == 8


def test_those_who_wait_for_a_park_have_a_bound(rig, worker, monkeypatch):
    monkeypatch.setattr(limits, "MOST_WAITING", 1)
    rig.park(worker, "chat", range(8))
    assert rig.plan(worker, "chat", range(8)) is None
    at_once = rig.plan(worker, "chat", range(8))
    assert at_once.plan.load_tokens == 0
    rig.run()


def test_forgetting_without_the_disk_has_a_bound_and_says_so(rig, worker, monkeypatch):
    monkeypatch.setattr(limits, "MOST_FORGOTTEN", 1)
    park(rig, worker, "one", 0, level="disk")
    park(rig, worker, "two", 100, level="disk")
    late = rig.restarted(started=False)
    late.start_gpu()
    receipts = [late.ask(Forget(conversation=name, tenant="acme")).receipt for name in ("one", "one", "two")]
    assert ["ask again" in receipt.detail for receipt in receipts] == [False, False, True]
    assert not any(receipt.durable for receipt in receipts)
    late.start_disk()
    late.run()
    assert list(late.core.state.conversations) == [("acme", "two")]
    late.ask(Forget(conversation="two", tenant="acme"))
    late.run()
    assert not (late.store.objects or late.store.records)


def test_those_who_wait_for_an_erasure_have_a_bound_and_it_is_carried_out(rig, worker, monkeypatch):
    monkeypatch.setattr(limits, "MOST_WAITING", 1)
    for n, name in enumerate(["one", "two"]):
        park(rig, worker, name, 100 * n, level="disk")
    assert rig.ask(Forget(conversation="one", tenant="acme")) is None
    told = rig.ask(Forget(conversation="two", tenant="acme"))
    assert isinstance(told, Forgotten)
    assert (told.receipt.durable, told.receipt.reason) == (False, "disk_error")
    rig.run()
    assert not (rig.store.objects or rig.store.records)


@pytest.mark.parametrize("most", ["MOST_CONVERSATIONS", "MOST_BLOCKS", "MOST_PARKS"])
@pytest.mark.parametrize(("bound", "level"), [(0, "none"), (4, "host")])
def test_it_is_the_bound_that_refuses_and_nothing_else_that_is_full(
    rig, worker, monkeypatch, most, bound, level
):
    monkeypatch.setattr(limits, most, bound)
    assert park(rig, worker, "chat", 0).level == level
