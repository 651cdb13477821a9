"""A worker that loses its node or its GPU service, starts without them, or ends."""

from __future__ import annotations

import threading
import time

import pytest

import kvtier.client.agent as agent_module
from kvtier import errors
from kvtier.messages.calls import (
    Attach,
    CopiesEnded,
    Detach,
    DropPlan,
    ParkDone,
    Ping,
    Released,
)
from kvtier.messages.tiers import Copied
from kvtier.messages.wire import Channel, ChannelLost, ChannelTimeout
from kvtier.receipts import ParkReceipt

TOKENS = list(range(40))
PAGES = [2, 5, 7]


def parked(level="disk"):
    return ParkReceipt("chat", "acme", level, "disk", True, tokens=40)


# --- the node is lost -------------------------------------------------------------------------------------


def test_a_hung_node_costs_a_worker_one_time_out(kit):
    kv = kit.connect(timeout_s=5.0)
    worker = kv.attach(kit.model, kit.pool, shard=kit.shard, call_timeout_s=0.5, make_engine=kit.make_engine)
    with kv, worker:
        kit.node.peer("client")
        wires = kit.wires(worker)
        handle, _sent = wires.park()
        kit.node.hung = True
        began_s = time.monotonic()
        assert worker.plan("c", TOKENS).reason == "daemon_unavailable"
        assert time.monotonic() - began_s >= 0.5, "the one time-out"
        assert handle.released.wait(10) and handle.result(10).reason == "daemon_unavailable"
        asked = wires.control.received.qsize()
        for _ in range(50):
            missed = worker.plan("c", TOKENS)
            assert (missed.plan_id, missed.load_tokens, missed.reason) == ("", 0, "daemon_unavailable")
            assert worker.park("c", TOKENS, PAGES).result(0).reason == "daemon_unavailable"
            assert worker.restore(missed, PAGES, deadline_s=1).reason == "daemon_unavailable"
        assert wires.control.received.qsize() <= asked + 1
        kit.node.hung = False
        kit.until(lambda: worker.attached, "it is attached again")
        assert worker.plan("c", TOKENS).load_tokens == 40


def test_restart_of_the_node_attaches_again(wired):
    kit, worker, wires = wired
    handle, sent = wires.park()
    wires.copy.send(kit.copy(sent, "j"))
    kit.runs("j")
    first = kit.engine
    kit.node.stop()
    kit.until(lambda: not worker.attached, "the loss was seen")
    assert worker.park("c", TOKENS, PAGES).result(0).reason == "daemon_unavailable"
    kit.node.start()
    assert not handle.released.is_set() and not first.closed, "the gather still runs"
    first.finish("j")
    assert handle.released.wait(10) and handle.result(10).reason == "daemon_unavailable"
    kit.until(lambda: worker.attached, "it is attached again")
    assert first.closed and kit.engine is not first
    again = kit.wires(worker)
    assert again.control.next(Attach).geometry == kit.pool.layout.geometry
    handle, sent = again.park()
    assert sent.worker == "worker:2"
    again.events.send(ParkDone(request=sent.request, receipt=parked("host")))
    assert handle.result(10).level == "host"


def test_a_call_after_a_restart_of_the_node_is_answered(kit):
    with kit.connect() as kv:
        kv.ping()
        kit.node.stop()
        kit.node.start()
        kv.ping()


def test_control_a_connection_that_does_not_look_loses_the_call(kit, monkeypatch):
    monkeypatch.setattr(Channel, "hung_up", lambda channel: False)
    with kit.connect() as kv:
        kv.ping()
        kit.node.stop()
        kit.node.start()
        with pytest.raises(ChannelLost):
            kv.ping()


def test_a_call_after_the_end_of_the_node_fails_after_one_attempt(kit):
    with kit.connect() as kv:
        kv.ping()
        kit.node.stop()
        with pytest.raises(errors.DaemonNotFound, match="tried again in the background"):
            kv.ping()
        kit.node.start()
        kit.until(lambda: kv.connected, "it is connected again")
        kv.ping()


@pytest.mark.parametrize("role", ["client", "events"])
def test_each_lost_connection_is_the_loss_of_the_node(wired, role):
    kit, worker, wires = wired
    handle, _ = wires.park()
    kit.node.drop(role)
    if role == "client":
        assert worker.plan("c", TOKENS).reason == "daemon_unavailable"
    assert handle.released.wait(10) and handle.result(10).reason == "daemon_unavailable"
    kit.until(lambda: worker.attached and kit.node.attached == 2, "it is attached again")


def test_garbage_by_events_is_the_loss_of_the_node(wired):
    kit, worker, wires = wired
    wires.events.send(Ping())
    kit.until(lambda: worker.attached and kit.node.attached == 2, "it is attached again")


def test_a_worker_starts_without_the_daemon(kit):
    kit.node.stop()
    with (
        kit.connect(required=False) as kv,
        kv.attach(kit.model, kit.pool, shard=kit.shard, make_engine=kit.make_engine) as worker,
    ):
        assert not worker.attached
        handle = worker.park("c", TOKENS, PAGES)
        assert handle.released.is_set() and handle.result(0).reason == "daemon_unavailable"
        with pytest.raises(errors.GeometryError):
            worker.park("c", TOKENS, [1])
        kit.node.start()
        kit.until(lambda: worker.attached, "it is attached")
        assert worker.plan("c", TOKENS).load_tokens == 40


def test_attach_with_the_daemon_gone_raises_where_it_is_required(kit):
    with kit.connect() as kv:
        kit.node.stop()
        with pytest.raises(errors.DaemonNotFound):
            kv.attach(kit.model, kit.pool, shard=kit.shard)


def test_a_call_that_waits_for_a_hung_one_opens_the_circuit_too(kit):
    """What is posted in the background holds the connection while the node hangs: still one time-out."""
    kv = kit.connect(timeout_s=5.0)
    worker = kv.attach(kit.model, kit.pool, shard=kit.shard, call_timeout_s=0.5, make_engine=kit.make_engine)
    with kv, worker:
        kit.node.peer("client")
        control = kit.node.peer("client")
        plan = worker.plan("c", TOKENS)
        kit.node.hung = True
        worker.drop(plan)
        control.next(DropPlan)
        assert worker.plan("c", TOKENS).reason == "daemon_unavailable"
        assert not worker.attached
        kit.node.hung = False
        kit.until(lambda: worker.attached, "it is attached again")


# --- the GPU service is lost ------------------------------------------------------------------------------


def test_loss_of_the_copy_connection_in_mid_copy(wired):
    kit, worker, wires = wired
    handle, sent = wires.park(level="disk")
    wires.copy.send(kit.copy(sent, "j"))
    kit.runs("j")
    kit.engine.hold = True
    wires.copy.send(kit.copy(sent, "j", batch=1))
    kit.until(lambda: kit.engine.queued, "one is queued")
    kit.node.drop("copy")
    kit.until(lambda: not kit.engine.queued, "the queued one was cancelled")
    assert not handle.released.is_set()
    assert not any(isinstance(m, CopiesEnded) for m in list(wires.control.received.queue))
    kit.engine.finish("j")
    assert "j" in wires.control.next(CopiesEnded).jobs
    assert handle.released.wait(10) and not handle.done() and worker.attached
    again = kit.node.peer("copy")
    wires.events.send(ParkDone(request=sent.request, receipt=parked("host")))
    assert handle.result(10).level == "host"
    kit.engine.hold = False
    handle, sent = wires.park()
    again.send(kit.copy(sent, "k"))
    kit.runs("k")
    kit.engine.finish("k")
    answer = again.next(Copied)
    assert (answer.job, answer.ok) == ("k", True), "answers of the lost connection are not sent on this one"


def test_attach_before_the_gpu_service_is_there(node, kit):
    node.stop()
    node.with_gpu = False
    node.start()
    with (
        kit.connect() as kv,
        kv.attach(kit.model, kit.pool, shard=kit.shard, make_engine=kit.make_engine) as worker,
    ):
        assert worker.attached
        node.stop()
        node.with_gpu = True
        node.start()
        kit.until(lambda: worker.attached, "it is attached again")
        assert node.peer("copy").worker == "worker:2"


# --- its end ----------------------------------------------------------------------------------------------


def test_close_waits_for_parks_and_then_cancels(kit, monkeypatch):
    with kit.connect() as kv:
        worker = kv.attach(kit.model, kit.pool, shard=kit.shard, make_engine=kit.make_engine)
        kit.node.peer("client")
        wires = kit.wires(worker)
        handle, sent = wires.park()
        wires.copy.send(kit.copy(sent, "j"))
        kit.runs("j")
        closing = threading.Thread(target=lambda: worker.close(wait_s=0))
        closing.start()
        kit.until(lambda: "j" in kit.engine.cancelled, "it is being closed")
        assert not handle.released.is_set() and closing.is_alive()
        kit.engine.finish("j")
        closing.join(10)
        assert not closing.is_alive() and handle.result(0).reason == "cancelled" and kit.engine.closed
        assert wires.control.next(Detach).worker == "worker:1"


def test_close_with_a_copy_that_does_not_end_keeps_the_memory(kit, monkeypatch):
    monkeypatch.setattr("kvtier.client.worker.QUIET_S", 0.01)
    with kit.connect() as kv:
        worker = kv.attach(kit.model, kit.pool, shard=kit.shard, make_engine=kit.make_engine)
        kit.node.peer("client")
        wires = kit.wires(worker)
        handle, sent = wires.park()
        wires.copy.send(kit.copy(sent, "j"))
        kit.runs("j")
        with pytest.raises(errors.KvtierError, match="does not end"):
            worker.close(wait_s=0)
        assert not kit.engine.closed and not handle.released.is_set()
        assert not any(isinstance(m, Detach) for m in list(wires.control.received.queue))
        kit.engine.finish("j")
        assert handle.released.wait(10)
        worker.close(wait_s=0)
        assert kit.engine.closed


def test_a_hung_node_is_a_time_out_for_attach(kit):
    with kit.connect(timeout_s=0.5) as kv:
        kit.node.answers[Attach] = lambda peer, m: None
        with pytest.raises(ChannelTimeout):
            kv.attach(kit.model, kit.pool, shard=kit.shard)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_agent_that_dies_is_the_loss_of_the_node(wired, monkeypatch):
    kit, worker, wires = wired
    handle, sent = wires.park()
    monkeypatch.setattr(agent_module.Agent, "_take_event", lambda self, message: 1 / 0)
    wires.events.send(Released(request=sent.request))
    assert handle.released.wait(10) and handle.result(10).reason == "daemon_unavailable"
    monkeypatch.undo()
    kit.until(lambda: worker.attached and kit.node.attached >= 2, "it is attached again")
