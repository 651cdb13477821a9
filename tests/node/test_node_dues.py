"""What the disk is told later: once it is there, once it works again, and with the next tick."""

import pytest

from kvtier.messages.calls import Forget, Forgotten, Hint
from kvtier.messages.tiers import Announce, DiskRemove
from kvtier.node.events import Received


def forget(rig, name="chat", tenant="acme"):
    answer = rig.ask(Forget(conversation=name, tenant=tenant))
    return None if answer is None else answer.receipt


def found(rig, worker, tokens, name=""):
    planned = rig.plan(worker, name, tokens, lease_s=0.0)
    rig.tick()
    return planned.plan.load_tokens


def late_receipt(rig):
    return [a.receipt for answers in rig.answers.values() for a in answers if isinstance(a, Forgotten)][-1]


@pytest.fixture
def late(rig, worker):
    """A node that begins with a conversation on its disk, which is not there yet."""
    rig.park(worker, "chat", range(8), level="disk")
    rig.run()
    late = rig.restarted(started=False)
    late.start_gpu()
    return late


def test_what_is_forgotten_before_the_disk_is_there_does_not_come_back(late):
    for _ in range(2):
        receipt = forget(late)
        assert (receipt.found, receipt.durable, receipt.reason) == (False, False, "no_disk")
    late.start_disk()
    assert not late.core.state.conversations
    late.run()
    assert not (late.store.objects or late.store.records)
    assert forget(late).durable
    assert not late.restarted().core.state.conversations


def test_what_is_forgotten_while_the_disk_announces_does_not_come_back(late):
    late.start_disk(last=False)
    assert not forget(late).durable
    late.tell(Received(late.disk.peer, Announce(last=True)))
    late.run()
    assert not (late.store.objects or late.store.records)


def test_a_name_that_is_used_again_before_the_disk_is_there_is_kept(late):
    forget(late)
    worker = late.attach()
    late.park(worker, "chat", range(50, 58))
    late.run()
    late.start_disk()
    again = late.park(worker, "chat", range(50, 60), level="disk")
    late.run_copies()
    removals = [op for op in late.disk_ops() if isinstance(op.message, DiskRemove)]
    for op in [op for op in late.disk_ops() if op not in removals]:
        late.finish(op)
    late.run()
    assert again.receipt.level == "disk"
    reborn = late.restarted()
    assert found(reborn, reborn.attach(), range(8)) == 0
    assert found(reborn, reborn.attach(), range(50, 60)) == 10


def test_a_removal_that_failed_is_tried_again(rig, worker):
    rig.park(worker, "chat", range(4), level="disk")
    rig.run()
    forget(rig)
    first = rig.disk_ops()[0]
    rig.finish(first, "it does not")
    rig.tick(0.5)
    assert not rig.disk_ops(), "it is too early"
    rig.store.broken = True
    rig.say_usage(rig.disk)
    rig.tick(5.0)
    assert not rig.disk_ops(), "the disk does not work"
    rig.store.broken = False
    rig.say_usage(rig.disk)
    (again,) = rig.disk_ops()
    assert (again.message.object_keys, again.message.records, again.message.durable) == (
        first.message.object_keys,
        first.message.records,
        True,
    )
    rig.run()
    rig.tick(5.0)
    assert not (rig.disk_ops() or rig.core.state.ended)


def test_whoever_asks_again_waits_for_a_removal_that_failed(rig, worker):
    rig.park(worker, "chat", range(4), level="disk")
    rig.run()
    forget(rig)
    rig.finish(rig.disk_ops()[0], "it does not")
    assert forget(rig) is None
    rig.run()
    assert late_receipt(rig).durable


def test_what_is_parked_again_is_not_removed_by_the_second_try(rig, worker):
    rig.park(worker, "chat", range(4), level="disk")
    rig.run()
    forget(rig)
    rig.finish(rig.disk_ops()[0], "it does not")
    again = rig.park(worker, "chat", range(4), level="disk")
    rig.run()
    rig.tick(5.0)
    rig.run()
    assert again.receipt.level == "disk"
    reborn = rig.restarted()
    assert found(reborn, reborn.attach(), range(4)) == 4


def test_many_hints_are_one_write(rig, worker):
    for name in ("chat", "other"):
        rig.park(worker, name, range(8), level="disk")
    rig.run()
    for n in range(10):
        rig.ask(Hint(conversation=("chat", "other")[n % 2], tenant="acme", returns_in_s=5.0 + n))
    assert not rig.disk_ops()
    rig.tick()
    (op,) = rig.disk_ops()
    assert [r.conversation for r in op.message.records] == ["chat", "other"]
    rig.run()
    rig.tick()
    assert not rig.disk_ops()
    times = {c.name: c.returns_at_s for c in rig.restarted().core.state.conversations.values()}
    assert times == {"chat": 1013.0, "other": 1014.0}


def test_a_hint_waits_for_a_disk_that_does_not_work(rig, worker):
    rig.park(worker, "chat", range(8), level="disk")
    rig.run()
    rig.store.broken = True
    rig.say_usage(rig.disk)
    rig.ask(Hint(conversation="chat", tenant="acme", returns_in_s=5.0))
    rig.tick()
    assert not rig.disk_ops()
    rig.store.broken = False
    rig.say_usage(rig.disk)
    rig.tick()
    rig.run()
    (known,) = rig.restarted().core.state.conversations.values()
    assert known.returns_at_s == 1005.0
