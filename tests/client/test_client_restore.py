"""Plan and restore against a scripted node, with an engine whose batches end on command."""

from __future__ import annotations

import threading

import numpy as np

from kvtier.client.page_use import PageUse
from kvtier.client.worker_inputs import Front
from kvtier.messages.calls import (
    CopiesEnded,
    DropPlan,
    MakePlan,
    Planned,
    Restore,
    RestoreDone,
    RestoreStarted,
)
from kvtier.messages.tiers import Copied
from kvtier.receipts import Plan, RestoreReceipt, TokenRange

TOKENS = list(range(40))
PAGES = [2, 5, 7]


def restored(tokens=40, reason=""):
    return RestoreReceipt("chat", "acme", tokens, 40, reason=reason)


# --- plan -------------------------------------------------------------------------------------------------


def test_plan_and_going_on_from_its_front(wired):
    _kit, worker, wires = wired
    plan = worker.plan("chat", np.arange(40, dtype=np.uint32), tenant="acme")
    assert wires.control.next(MakePlan).tokens == np.arange(40, dtype="<u4").tobytes()
    assert (plan.load_tokens, plan.front) == (40, Front(b"f" * 32, 40))
    worker.plan(None, range(50), after=Front(b"f" * 32, 32))
    sent = wires.control.next(MakePlan)
    assert (sent.conversation, sent.after_key, sent.after_tokens) == ("", b"f" * 32, 32)
    assert np.frombuffer(sent.tokens, "<u4").tolist() == list(range(32, 50))


def test_a_plan_that_is_not_used_is_dropped(wired):
    _kit, worker, wires = wired
    plan = worker.plan("chat", TOKENS)
    worker.drop(plan)
    assert wires.control.next(DropPlan).plan_id == plan.plan_id


# --- restore ----------------------------------------------------------------------------------------------


def test_restore(wired):
    kit, _worker, wires = wired
    handle, sent = wires.restore()
    wires.copy.send(kit.copy(sent, "j"))
    kit.runs("j")
    assert kit.engine.running["j", 0][0].direction == "scatter" and not handle.done()
    kit.engine.finish("j")
    wires.events.send(RestoreDone(request=sent.request, receipt=restored()))
    assert handle.result() == restored()


def test_restore_of_nothing_and_of_an_old_plan(wired):
    kit, worker, _wires = wired
    miss = Plan("", "c", "t", 3, (TokenRange(0, 3, "compute"),), reason="no_match")
    kit.node.answers[MakePlan] = lambda peer, m: Planned(id=m.id, plan=miss)
    missed = worker.restore(worker.plan("c", TOKENS), [], deadline_s=1)
    assert (missed.reason, missed.ok) == ("no_match", False)
    del kit.node.answers[MakePlan]
    plan = worker.plan("c", TOKENS)
    kit.node.drop("events")
    kit.until(lambda: worker.attached and kit.node.attached == 2, "it is attached again")
    assert worker.restore(plan, PAGES, deadline_s=1).reason == "lease_expired"


def test_restore_over_at_once(wired):
    kit, worker, _wires = wired
    gone = restored(0, "lease_expired")
    kit.node.answers[Restore] = lambda peer, m: RestoreStarted(id=m.id, job="", receipt=gone)
    assert worker.restore(worker.plan("chat", TOKENS), PAGES, deadline_s=1) == gone


def test_a_late_restore_returns_only_after_its_copy_ended(wired, monkeypatch):
    kit, worker, wires = wired
    monkeypatch.setattr("kvtier.client.worker.RESTORE_GRACE_S", 0.0)
    got = []
    plan = worker.plan("chat", TOKENS, tenant="acme")
    thread = threading.Thread(target=lambda: got.append(worker.restore(plan, PAGES, deadline_s=0.2)))
    thread.start()
    sent = wires.control.next(Restore)
    wires.copy.send(kit.copy(sent, "j"))
    kit.runs("j")
    kit.until(lambda: "j" in kit.engine.cancelled, "the deadline passed")
    use = worker._attachment.agent.uses[0]
    assert not use.finished.is_set() and thread.is_alive() and got == []
    wires.events.send(RestoreDone(request=sent.request, receipt=restored()))
    wires.copy.send(kit.copy(sent, "j", batch=1))
    assert not wires.copy.next(Copied).ok, "no further batch begins"
    assert thread.is_alive() and got == []
    kit.engine.finish("j")
    thread.join(10)
    assert (got[0].tokens, got[0].reason, got[0].busy) == (0, "deadline", ())
    assert "j" in wires.control.next(CopiesEnded).jobs


def test_control_a_restore_returns_under_its_copy_without_the_count(wired, monkeypatch):
    """Negative control for the test above."""
    monkeypatch.setattr("kvtier.client.worker.RESTORE_GRACE_S", 0.0)
    real = PageUse.admit

    def uncounted(self, job, direction):
        took = real(self, job, direction)
        self._running = 0
        return took

    monkeypatch.setattr(PageUse, "admit", uncounted)
    kit, _worker, wires = wired
    handle, sent = wires.restore(deadline_s=0.2)
    wires.copy.send(kit.copy(sent, "j"))
    kit.runs("j")
    assert handle.result(10).reason == "deadline"
    assert ("j", 0) in kit.engine.running
    monkeypatch.undo()


def test_a_copy_that_does_not_end_makes_its_pages_busy(wired, monkeypatch):
    kit, _worker, wires = wired
    monkeypatch.setattr("kvtier.client.worker.RESTORE_GRACE_S", 0.0)
    monkeypatch.setattr("kvtier.client.handles.QUIET_S", 0.01)
    handle, sent = wires.restore(deadline_s=0.05)
    wires.copy.send(kit.copy(sent, "j"))
    kit.runs("j")
    got = handle.result()
    assert (got.tokens, got.reason, got.busy) == (0, "deadline", (2, 5, 7))
    kit.engine.finish("j")
    assert handle.result(10).busy == ()


def test_a_park_that_the_node_forgets_ends(wired, monkeypatch):
    monkeypatch.setattr("kvtier.client.worker.PARK_GRACE_S", 0.0)
    handle, _ = wired[2].park(timeout_s=0.05)
    assert handle.released.wait(10) and handle.result(10).reason == "deadline"
