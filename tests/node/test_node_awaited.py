"""Answers that come by a time although the disk gives none."""

import pytest

from kvtier.messages.calls import Forget, Forgotten
from kvtier.node import admin
from kvtier.node.awaited import Awaited


def test_forgetting_is_answered_within_a_bound_when_the_disk_does_not_answer(make_rig):
    rig = make_rig()
    worker = rig.attach()
    rig.park(worker, "chat", range(8), level="disk")
    rig.run()
    assert rig.ask(Forget(conversation="chat", tenant="acme")) is None
    rig.tick(admin._ERASE_MOST_S - 1)
    assert not [a for got in rig.answers.values() for a in got if isinstance(a, Forgotten)]
    rig.tick(2.0)
    (answer,) = [a for got in rig.answers.values() for a in got if isinstance(a, Forgotten)]
    receipt = answer.receipt
    assert (receipt.found, receipt.durable, receipt.reason) == (True, False, "disk_error")
    assert "did not answer within 30 s" in receipt.detail
    # The late answer is not told to anyone, and it is gone.
    rig.run()
    rig.tick(100.0)
    assert len([a for got in rig.answers.values() for a in got if isinstance(a, Forgotten)]) == 1
    assert not rig.store.objects


@pytest.mark.parametrize("late", [False, True])
def test_whoever_waits_is_told_once(late):
    told = []
    awaited = Awaited(5.0)
    once = awaited.bounded(10.0, lambda ok, detail: told.append(ok))
    awaited.tick(14.9)
    assert not told
    if late:
        awaited.tick(15.0)
    once(True, "")
    once(True, "")
    awaited.tick(100.0)
    assert told == [not late]
