"""Layers of a restore that the GPU service copies: a prefill follows them before the receipt."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import pytest

import kvtier
from kvtier.client.handles import RestoreHandle
from kvtier.client.worker import Worker
from kvtier.daemon import gpu_service
from kvtier.daemon.embedded import Embedded, start
from kvtier.daemon.gpu_layers import RestoreLayers
from kvtier.errors import KvtierError, TierUnavailable
from kvtier.gpu.cuda.ipc import EventRing, EventRings
from kvtier.gpu.cuda.lane import Lane
from kvtier.gpu.engine import CopyBatch, Reached
from kvtier.gpu.layers import LayerEvents
from kvtier.gpu.schedule import Bounds
from kvtier.messages.calls import Message
from kvtier.messages.tiers import Copied, Copy, LayerQueued
from kvtier.node import restores
from kvtier.receipts import RestoreReceipt
from kvtier.testing.kv_memory import LAYERS, SHARD, KvMemory, tokens_of
from kvtier.testing.shared_gpu import COUNT, OTHER, PAGES, World
from kvtier.waiting import wait_until


@contextmanager
def a_world() -> Iterator[World]:
    made = World()
    yield made
    made.end()


@pytest.fixture
def world() -> Iterator[World]:
    with a_world() as made:
        yield made


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No batch of a restore is answered before it is set."""
    opened = threading.Event()
    conclude = Lane.conclude

    def late(self: Lane, run: Any) -> Any:
        assert run.batch.direction == "gather" or opened.wait(60)
        return conclude(self, run)

    monkeypatch.setattr(Lane, "conclude", late)
    yield opened
    opened.set()


def restoring(
    worker: Worker, memory: KvMemory, *, by_layer: bool = True, level: Any = "host"
) -> RestoreHandle:
    memory.put(1, PAGES, COUNT)
    assert worker.park("chat", tokens_of(1, COUNT), PAGES, level=level).result(20).level == level
    plan = worker.plan("chat", tokens_of(1, COUNT))
    return worker.restore_async(plan, OTHER, deadline_s=60, by_layer=by_layer)


def prefill(world: World, got: RestoreHandle, stream: int, into: Any) -> None:
    """Queue a read of each layer after the layer's event, as a prefill does."""
    for layer in range(LAYERS):
        assert got.wait_on(stream, layer, 20)
        page = world.memory.planes[2 * layer][OTHER[0]]
        world.mine.copy(int(into.ctypes.data), int(page.ctypes.data), page.nbytes, stream)


# -- on a GPU


def test_a_prefill_runs_on_all_layers_before_the_receipt(world: World, gate: threading.Event) -> None:
    stream, seen = world.mine.stream(), world.mine.pinned(1 << 16)
    with world.attach() as worker:
        got = restoring(worker, world.memory)
        prefill(world, got, stream, seen)
        assert got.events[LAYERS - 1].synchronize(20) and all(got.layer_ready(n) for n in range(LAYERS))
        assert world.memory.front(1, OTHER, COUNT) == COUNT
        assert world.mode() == "shared" and not got.done()
        gate.set()
        assert got.result(20).ok
    world.mine.run_all()
    assert not world.gpu.races
    world.mine.destroy_stream(stream)
    world.mine.free_pinned(seen)


def test_control_events_that_do_not_follow_the_copies_are_a_race(
    world: World, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EventRing, "relay", lambda self, *events: self.mark(self._stream))
    stream, seen = world.mine.stream(), world.mine.pinned(1 << 16)
    with world.attach() as worker:
        got = restoring(worker, world.memory)
        prefill(world, got, stream, seen)
        world.mine.run_all()
        gate.set()
        got.result(20)
    assert world.gpu.races
    world.mine.destroy_stream(stream)
    world.mine.free_pinned(seen)


def _lost(world: World, gate: threading.Event) -> None:
    """A node that the service loses while a layer that a worker was told of is not reached, and is asked."""
    service, asked, over = world.daemon.gpu, threading.Event(), threading.Event()
    with world.attach() as worker:
        got = restoring(worker, world.memory)
        assert got.wait_on(world.mine.current, 0, 20)
        layers = got.events[0]._all
        # It goes on asking, as who waits for a layer does, until it hears that the restore is over.
        events = list(layers._events[0])
        assert events and layers.told

        def ask() -> None:
            while not over.is_set():
                asked.set()
                for event in events:
                    event.done()

        thread = threading.Thread(target=ask)
        thread.start()
        assert asked.wait(20)
        node = service._node
        service._loop.call(lambda: service._lose_node("a test"))
        gate.set()
        assert not got.result(20).ok
        assert wait_until(lambda: service._node not in (None, node), 20)
        over.set()
        thread.join()
        assert all(event.done() for event in events)
        events.clear()
    world.mine.run_all()


def test_events_stay_what_they_are_when_the_node_is_lost_while_a_worker_waits(
    world: World, gate: threading.Event
) -> None:
    _lost(world, gate)
    assert not world.gpu.races


def test_control_events_that_are_destroyed_then_are_asked_afterwards(
    world: World, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EventRings, "give", lambda self, ring: ring.close())
    _lost(world, gate)
    assert any("had destroyed it" in race for race in world.gpu.races)


def test_without_a_copy_connection_layers_come_with_the_receipt(
    world: World, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = world.daemon.gpu
    with world.attach() as worker:
        sent: list[Message] = []
        monkeypatch.setattr(service, "_say_to", lambda name, message: sent.append(message))
        got = restoring(worker, world.memory)
        assert wait_until(lambda: len(sent) == LAYERS, 20)
        assert not got.layer_ready(0) and not got.wait_on(None, 1, 0)
        gate.set()
        assert got.result(20).ok and all(got.layer_ready(layer) for layer in range(LAYERS))


def what_was_told_is_not_written_again(world: World, by_layer: bool) -> None:
    """A flipped bit on the link: read again from disk, unless a prefill may run on the layer by then."""
    with world.attach() as worker:
        world.memory.put(1, PAGES, COUNT)
        assert worker.park("chat", tokens_of(1, COUNT), PAGES, level="disk").result(20).level == "disk"
        world.theirs.flip_next = "mapped"
        plan = worker.plan("chat", tokens_of(1, COUNT))
        receipt = worker.restore_async(plan, OTHER, deadline_s=60, by_layer=by_layer).result(60)
        assert not world.theirs.flip_next
        assert receipt.ok != by_layer
        if receipt.ok:
            assert world.memory.front(1, OTHER, COUNT) == COUNT


@pytest.mark.parametrize("by_layer", [True, False])
def test_what_was_told_is_not_written_again(world: World, by_layer: bool) -> None:
    what_was_told_is_not_written_again(world, by_layer)


def test_control_a_service_that_forgets_what_it_told_writes_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LayerEvents, "told", False)
    with pytest.raises(AssertionError):
        what_was_told_is_not_written_again(world, True)


def read_again_behind_what_was_told(monkeypatch: pytest.MonkeyPatch) -> RestoreReceipt:
    """A restore's first batch ends corrupt; its last, on its way by then, tells of all layers without it.

    One batch runs at a time, as where each fills what may be under way.
    """
    monkeypatch.setattr(gpu_service, "Bounds", lambda max_batches, max_bytes: Bounds(1, max_bytes))
    monkeypatch.setattr(restores, "_BY_LAYER_OBJECTS", 4)
    said: list[Any] = []
    begin, over, tell = RestoreLayers.begin, RestoreLayers.over, RestoreLayers._push

    def begun(self: RestoreLayers, copy: Copy, *more: Any) -> CopyBatch:
        if copy.direction == "scatter":
            said.append(("begins", copy.batch, copy.last))
        return begin(self, copy, *more)

    def ended(self: RestoreLayers, worker: str, job: str, number: int, ok: bool) -> None:
        if job.startswith("s"):
            said.append(("ends", number, ok))
        over(self, worker, job, number, ok)

    def told(self: RestoreLayers, *more: Any) -> None:
        said.append("told")
        tell(self, *more)

    monkeypatch.setattr(RestoreLayers, "begin", begun)
    monkeypatch.setattr(RestoreLayers, "over", ended)
    monkeypatch.setattr(RestoreLayers, "_push", told)
    with a_world() as world, world.attach() as worker:
        world.memory.put(1, PAGES, COUNT)
        assert worker.park("chat", tokens_of(1, COUNT), PAGES, level="disk").result(20).level == "disk"
        state = world.daemon.node._core.state
        monkeypatch.setattr(state, "settings", replace(state.settings, batch_bytes=1))
        world.theirs.flip_next = "mapped"
        plan = worker.plan("chat", tokens_of(1, COUNT))
        receipt = worker.restore_async(plan, OTHER, deadline_s=60, by_layer=True).result(60)
    so_far = [
        ("begins", 0, False),
        ("ends", 0, False),
        ("begins", 1, True),
        "told",
        "told",
        ("ends", 1, True),
    ]
    assert said[: len(so_far) + 1] == [*so_far, ("begins", 2, True)]
    return receipt


def test_a_batch_that_comes_after_the_last_one_told_of_all_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    receipt = read_again_behind_what_was_told(monkeypatch)
    assert (receipt.ok, receipt.reason) == (False, "copy_failed") and "written again" in receipt.detail


def test_control_a_restore_forgotten_with_its_last_batch_ends_ok_over_garbage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LayerEvents, "told", False)
    assert read_again_behind_what_was_told(monkeypatch).ok


def test_a_worker_that_does_not_ask_is_told_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of an earlier release would take the message for a fault, and close the connection."""
    sent: list[Any] = []
    say = world.daemon.gpu._say_to

    def noted(name: str, message: Any) -> None:
        sent.append(message)
        say(name, message)

    monkeypatch.setattr(world.daemon.gpu, "_say_to", noted)
    with world.attach() as worker:
        assert restoring(worker, world.memory, by_layer=False).result(20).ok
        assert not sent
        assert restoring(worker, world.memory).result(20).ok
        assert [message.layer for message in sent] == list(range(LAYERS))


def test_a_plan_says_whether_it_is_restored_by_layer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cut off at the deadline leaves nothing then, so nothing may be planned that may be late."""
    asked: list[bool] = []
    policy = world.daemon.node._core.state.policies.restore
    choose = policy.choose

    def noted(segments: Any, tokens: int, wish: Any) -> Any:
        asked.append(wish.by_layer)
        return choose(segments, tokens, wish)

    with world.attach() as worker:
        world.memory.put(1, PAGES, COUNT)
        assert worker.park("chat", tokens_of(1, COUNT), PAGES).result(20).ok
        monkeypatch.setattr(policy, "choose", noted)
        for by_layer in (True, False):
            worker.drop(worker.plan("chat", tokens_of(1, COUNT), by_layer=by_layer))
    assert asked == [True, False]


# -- in shared memory


@pytest.fixture
def node() -> Iterator[Embedded]:
    with closing(start()) as made:
        yield made


def test_a_prefill_runs_before_the_receipt_in_shared_memory(
    node: Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU's engine has no streams: its layers are there when their batch is."""
    finish = node.gpu._finish
    held: list[Copied] = []
    with (
        closing(KvMemory(shared=True)) as memory,
        kvtier.connect(str(node.socket_path)) as kv,
        kv.attach(memory.model, memory.pool, shard=SHARD) as worker,
    ):
        memory.put(1, PAGES, COUNT)
        assert worker.park("chat", tokens_of(1, COUNT), PAGES).result(20).ok
        monkeypatch.setattr(node.gpu, "_finish", held.append)
        plan = worker.plan("chat", tokens_of(1, COUNT))
        got = worker.restore_async(plan, OTHER, deadline_s=60, by_layer=True)
        assert all(got.wait_on(None, layer, 20) for layer in range(LAYERS))
        assert memory.front(1, OTHER, COUNT) == COUNT
        assert not got.done() and held
        monkeypatch.setattr(node.gpu, "_finish", finish)
        node.gpu._loop.call(partial(finish, held[0]))
        assert got.result(20).ok


# -- the service's books


def asked(number: int, *, last: bool = True, layers: bool = True) -> Copy:
    return Copy(
        job="s1", batch=number, worker="w", request=7, direction="scatter", items=[], last=last, layers=layers
    )


def batch_of(memory: KvMemory, number: int) -> CopyBatch:
    pool: Any = memory.pool
    item: Any = type("Item", (), {"group": 0})
    return CopyBatch("s1", number, "scatter", pool.bind(PAGES), (item,))


def test_a_batch_after_a_told_layer_is_refused_until_the_worker_left() -> None:
    said: list[LayerQueued] = []
    books, memory = RestoreLayers(lambda worker, message: said.append(message)), KvMemory()
    batch = books.begin(asked(0), batch_of(memory, 0), None)
    assert batch.on_layer is not None
    for layer in range(LAYERS):
        batch.on_layer(layer, Reached())
    assert said == [LayerQueued(request=7, layer=layer) for layer in range(LAYERS)]
    books.over("w", "s1", 0, ok=False)
    with pytest.raises(KvtierError, match="written again"):
        books.begin(asked(1), batch_of(memory, 1), None)
    books.leave("w")
    assert not books._restores and not books._told
    assert books.begin(asked(2), batch_of(memory, 2), None).on_layer is not None


@pytest.mark.parametrize("ok", [True, False])
def test_a_restore_that_was_told_of_is_remembered_until_the_node_says_that_it_is_over(ok: bool) -> None:
    """However many others there are in between, of this worker and of others."""
    books, memory = RestoreLayers(lambda worker, message: None), KvMemory()
    ended: list[str] = []
    for number in range(5000):
        copy = msgspec.structs.replace(asked(0), job=f"s{number}", over=ended)
        books.ended(copy.worker, copy.over)
        batch = books.begin(copy, batch_of(memory, 0), None)
        assert batch.on_layer is not None
        batch.on_layer(0, Reached())
        books.over("w", copy.job, 0, ok)
        ended = [copy.job] if number else []
    assert not books._restores and books._told == {"w": {"s0", "s4999"}}
    with pytest.raises(KvtierError, match="written again"):
        books.begin(msgspec.structs.replace(asked(1), job="s0"), batch_of(memory, 1), None)
    books.ended("other", ["s0"])
    books.ended("w", ["s0", "of another service"])
    assert books._told == {"w": {"s4999"}}
    assert books.begin(msgspec.structs.replace(asked(1), job="s0"), batch_of(memory, 1), None).on_layer
    books.clear()
    assert not books._told and not books._restores


def _remembered(world: World) -> set[str]:
    """What the service remembers after several restores and a park."""
    with world.attach() as worker:
        # The service finds its node, and maps the pool, in its own time.
        assert wait_until(lambda: world.mode() == "shared", 20)
        books = world.daemon.gpu._node.copies._layers  # type: ignore[union-attr]
        for _ in range(4):
            assert restoring(worker, world.memory).result(20).ok
        world.memory.put(2, PAGES, COUNT)
        assert worker.park("chat-2", tokens_of(2, COUNT), PAGES).result(20).ok
        told = set[str]().union(*books._told.values())
    return told


def test_the_node_says_which_restores_are_over(world: World) -> None:
    assert not _remembered(world)


def test_control_a_service_that_does_not_listen_remembers_all(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RestoreLayers, "ended", lambda self, worker, jobs: None)
    assert len(_remembered(world)) == 4


def test_a_restore_that_went_well_leaves_no_record_of_a_batch() -> None:
    books, memory = RestoreLayers(lambda worker, message: None), KvMemory()
    for number in range(2):
        books.begin(asked(number, last=number == 1), batch_of(memory, number), None)
    for number in range(2):
        books.over("w", "s1", number, ok=True)
    assert not books._restores
    same = batch_of(memory, 3)
    assert books.begin(asked(3, layers=False), same, None) is same and not books._restores


def test_a_batch_that_failed_before_anything_was_told_may_come_again() -> None:
    said: list[LayerQueued] = []
    books, memory = RestoreLayers(lambda worker, message: said.append(message)), KvMemory()
    books.begin(asked(0), batch_of(memory, 0), None)
    books.over("w", "s1", 0, ok=False)
    assert not said and not books._restores
    books.begin(asked(1), batch_of(memory, 1), None)
    books.over("w", "s1", 1, ok=True)
    assert [message.layer for message in said] == list(range(LAYERS))


def test_a_lost_device_tells_of_nothing(world: World) -> None:
    said: list[LayerQueued] = []

    def lost(*events: Any) -> int:
        raise TierUnavailable("the device is lost")

    books = RestoreLayers(lambda worker, message: said.append(message))
    batch = books.begin(asked(0), batch_of(world.memory, 0), lost)
    assert batch.on_layer is not None
    batch.on_layer(0, world.pool.place.mark())
    assert not said
    books.leave("w")
