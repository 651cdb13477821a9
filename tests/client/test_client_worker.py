"""Attach and park against a scripted node, with an engine whose batches end on command."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from kvtier import errors
from kvtier.client.page_use import PageUse
from kvtier.client.worker_inputs import Front
from kvtier.gpu import describe
from kvtier.gpu.pool import bind_sequence
from kvtier.messages.calls import (
    Attach,
    CopiesEnded,
    Detach,
    Failed,
    Hello,
    Park,
    ParkDone,
    ParkStarted,
    Released,
)
from kvtier.messages.tiers import CancelCopies, Copied
from kvtier.receipts import ParkReceipt

TOKENS = list(range(40))
PAGES = [2, 5, 7]


def parked(level="disk"):
    return ParkReceipt("chat", "acme", level, "disk", True, tokens=40)


# --- attach -----------------------------------------------------------------------------------------------


def test_attach_tells_what_the_pool_is(wired):
    kit, worker, wires = wired
    sent = wires.control.next(Attach)
    layout = kit.pool.layout
    assert (sent.fingerprint, sent.model, sent.shard) == (b"w" * 32, "tiny", "L0+1.H0+2")
    assert (sent.geometry, sent.layout, sent.pool_pages) == (layout.geometry, layout.layout_id, 8)
    assert worker.attached
    assert {wires.events.next(Hello).worker, wires.copy.next(Hello).worker} == {"worker:1"}


@pytest.mark.parametrize("model", [None, object(), type("M", (), {"digest": b"short", "describe": "x"})()])
def test_attach_without_a_fingerprint(kit, model):
    with kit.connect() as kv, pytest.raises(errors.FingerprintError):
        kv.attach(model, kit.pool, shard=kit.shard)


def test_attach_with_something_else_than_a_pool(kit):
    with kit.connect() as kv:
        with pytest.raises(errors.GeometryError):
            kv.attach(kit.model, object(), shard=kit.shard)
        with pytest.raises(errors.GeometryError):
            kv.attach(kit.model, kit.pool, shard="all")


def test_attach_refused_leaves_nothing(kit):
    kit.node.answers[Attach] = lambda peer, m: Failed(id=m.id, error="GeometryError", message="other layers")
    with kit.connect() as kv:
        threads, fds = threading.active_count(), kit.open_fds()
        with pytest.raises(errors.GeometryError, match="other layers"):
            kv.attach(kit.model, kit.pool, shard=kit.shard)
        kit.until(lambda: (threading.active_count(), kit.open_fds()) <= (threads, fds), "all is given back")


def test_everything_is_given_back_at_close(kit):
    def in_use():
        mapped = Path("/proc/self/maps").read_text().count("kvtier-arena")
        return threading.active_count(), kit.open_fds(), mapped

    with kit.connect() as kv:
        kv.ping()
        before = in_use()
        with kv.attach(kit.model, kit.pool, shard=kit.shard) as worker:
            assert worker.attached and in_use() > before and in_use()[2] > before[2]
        worker.close()
        kit.until(lambda: in_use() == before, "threads, descriptors and mappings are as before")
        assert worker.park("chat", TOKENS, PAGES).result(0).reason == "daemon_unavailable"


def test_close_detaches_once_it_is_quiet(wired):
    kit, worker, wires = wired
    worker.close()
    assert wires.control.next(Detach).worker == "worker:1"
    assert kit.engine.closed


# --- park -------------------------------------------------------------------------------------------------


def test_park_from_start_to_disk(wired):
    kit, _worker, wires = wired
    handle, sent = wires.park(level="disk", returns_in_s=600, extras=[(3, b"lora")], timeout_s=7)
    assert np.frombuffer(sent.tokens, "<u4").tolist() == TOKENS
    assert (sent.level, sent.returns_in_s, sent.timeout_s) == ("disk", 600.0, 7.0)
    assert sent.extras == [(3, b"lora")]
    assert (sent.held_from, sent.pages) == ([0], [])
    wires.copy.send(kit.copy(sent, "j"))
    kit.runs("j")
    batch = kit.engine.running["j", 0][0]
    assert batch.direction == "gather" and batch.binding.tables[0].tolist() == PAGES
    assert not handle.released.is_set()
    kit.engine.finish("j")
    answer = wires.copy.next(Copied)
    assert (answer.job, answer.ok, answer.checksums) == ("j", True, [7])
    assert not handle.released.is_set(), "the node may still begin another batch"
    wires.events.send(Released(request=sent.request))
    assert handle.released.wait(10)
    assert not handle.done() and handle.result(0).reason == "deadline"
    wires.events.send(ParkDone(request=sent.request, receipt=parked()))
    assert handle.result(10) == parked()


def test_park_that_is_over_at_once(wired):
    kit, _worker, wires = wired
    full = ParkReceipt("chat", "acme", "none", "host", True, reason="backpressure", retry_after_s=0.5)
    kit.node.answers[Park] = lambda peer, m: ParkStarted(id=m.id, job="", receipt=full)
    handle, _ = wires.park()
    assert handle.released.is_set() and handle.result(0) == full


def test_events_before_the_answer_and_out_of_order(wired):
    kit, worker, wires = wired

    def answer(peer, message):
        wires.events.send(ParkDone(request=message.request, receipt=parked()))
        wires.events.send(Released(request=message.request))
        kit.until(lambda: not worker._attachment.agent.uses, "the events were taken")
        return ParkStarted(id=message.id, job="late")

    kit.node.answers[Park] = answer
    handle, _ = wires.park(level="disk")
    assert handle.released.is_set() and handle.result(0) == parked()


def test_released_is_not_believed_while_a_gather_runs(wired):
    kit, worker, wires = wired
    handle, sent = wires.park()
    wires.copy.send(kit.copy(sent, "j"))
    kit.runs("j")
    wires.events.send(Released(request=sent.request))
    wires.events.send(ParkDone(request=sent.request, receipt=parked()))
    use = worker._attachment.agent.uses[0]
    kit.until(lambda: not use.open, "the event was taken")
    assert not handle.released.is_set() and not handle.done()
    kit.engine.finish("j")
    assert handle.released.wait(10) and handle.result(10).released


def test_control_released_is_said_too_early_without_the_count(wired, monkeypatch):
    """Negative control: the test above sees the difference when running copies are not counted."""
    real = PageUse.admit

    def uncounted(self, job, direction):
        took = real(self, job, direction)
        self._running = 0
        return took

    monkeypatch.setattr(PageUse, "admit", uncounted)
    kit, _worker, wires = wired
    handle, sent = wires.park()
    wires.copy.send(kit.copy(sent, "j"))
    kit.runs("j")
    wires.events.send(Released(request=sent.request))
    assert handle.released.wait(10), "released although the gather runs"
    monkeypatch.undo()


def test_copies_of_nobody_are_refused(wired):
    kit, _worker, wires = wired
    handle, sent = wires.park()
    wires.copy.send(kit.copy(sent, "unknown", request=sent.request + 99))
    refused = wires.copy.next(Copied)
    assert (refused.job, refused.ok, refused.failed) == ("unknown", False, [(0, "cancelled")])
    wires.copy.send(kit.copy(sent, "wrong way", direction="scatter"))
    assert wires.copy.next(Copied).ok is False
    wires.events.send(Released(request=sent.request))
    assert handle.released.wait(10)
    wires.copy.send(kit.copy(sent, "too late"))
    assert wires.copy.next(Copied).ok is False
    assert kit.engine.running == {}


def test_a_batch_that_the_engine_refuses(wired, monkeypatch):
    kit, _worker, wires = wired

    def refuse(batch, on_done):
        raise errors.GeometryError("no such rows")

    monkeypatch.setattr(kit.engine, "submit", refuse)
    handle, sent = wires.park()
    wires.copy.send(kit.copy(sent, "j"))
    answer = wires.copy.next(Copied)
    assert not answer.ok and "no such rows" in answer.failed[0][1]
    wires.events.send(Released(request=sent.request))
    assert handle.released.wait(10)


def test_cancel_copies_reaches_the_engine(wired):
    kit, _worker, wires = wired
    kit.engine.hold = True
    _handle, sent = wires.park()
    wires.copy.send(kit.copy(sent, "j"))
    kit.until(lambda: kit.engine.queued, "it is queued")
    wires.copy.send(CancelCopies(job="j"))
    assert wires.copy.next(Copied).ok is False


def test_a_park_cancelled_by_its_caller(wired):
    kit, _worker, wires = wired
    handle, sent = wires.park()
    wires.copy.send(kit.copy(sent, "j"))
    kit.runs("j")
    handle.cancel()
    assert not handle.released.is_set()
    kit.engine.finish("j")
    assert handle.released.wait(10) and handle.result(10).reason == "cancelled"
    assert "j" in wires.control.next(CopiesEnded).jobs


@pytest.mark.parametrize(
    ("kind", "arguments", "options"),
    [
        (errors.TokensError, ("c", [], PAGES), {}),
        (errors.TokensError, ("c", [-1], PAGES), {}),
        (errors.TokensError, ("c", "text", PAGES), {}),
        (errors.TokensError, ("c", TOKENS, PAGES), {"extras": [(-1, b"x")]}),
        (errors.TokensError, ("c", TOKENS, PAGES), {"after": Front(b"k" * 32, 41)}),
        (errors.TokensError, ("c", TOKENS, PAGES), {"after": Front(b"k", 32)}),
        (errors.GeometryError, ("c", TOKENS, [1, 2]), {}),
        (errors.GeometryError, ("c", TOKENS, [1, 2, 99]), {}),
        (errors.GeometryError, ("c", TOKENS, [1, 2, 2]), {}),
        (errors.ConfigError, ("", TOKENS, PAGES), {}),
        (errors.ConfigError, ("c", TOKENS, PAGES), {"level": "none"}),
        (errors.ConfigError, ("c", TOKENS, PAGES), {"share": "all"}),
        (errors.ConfigError, ("c", TOKENS, PAGES), {"timeout_s": -1}),
    ],
)
def test_mistakes_in_a_park_are_raised_and_nothing_is_sent(wired, kind, arguments, options):
    _kit, worker, wires = wired
    with pytest.raises(kind):
        worker.park(*arguments, **options)
    assert not any(isinstance(message, Park) for message in list(wires.control.received.queue))
    assert worker._attachment.agent.uses == []


def test_a_refused_park_leaves_nothing_behind(wired):
    kit, worker, _wires = wired
    kit.node.answers[Park] = lambda peer, m: Failed(id=m.id, error="TokensError", message="shorter")
    with pytest.raises(errors.TokensError, match="shorter"):
        worker.park("c", TOKENS, PAGES)
    assert worker._attachment.agent.uses == [] and worker.attached


def test_a_contiguous_cache(kit):
    tensors = [np.zeros((1, 2, 40, 8), np.float16) for _ in range(2)]
    layout = describe.contiguous([tensors], block_tokens=32)
    binding = bind_sequence(layout, [tensors])
    with (
        kit.connect() as kv,
        kv.attach(kit.model, layout, shard=kit.shard, make_engine=kit.make_engine) as worker,
    ):
        with pytest.raises(errors.GeometryError, match="bind_sequence"):
            worker.park("c", TOKENS, PAGES)
        with pytest.raises(errors.GeometryError, match="too few"):
            worker.park("c", [*TOKENS, 1], binding)
        full = ParkReceipt("c", "default", "host", "host", True)
        kit.node.answers[Park] = lambda peer, m: ParkStarted(id=m.id, job="", receipt=full)
        assert worker.park("c", TOKENS, binding).result(0) == full
