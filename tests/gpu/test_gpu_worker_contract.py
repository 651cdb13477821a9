"""One engine's code against both copy engines: streams, layers and status, through a node."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import numpy as np
import pytest

import kvtier
from kvtier.daemon.embedded import Embedded, start
from kvtier.gpu.cuda.lane import Settings
from kvtier.gpu.cuda.make import cuda_engine
from kvtier.gpu.cuda.ways import always
from kvtier.gpu.engine import Place, StreamEvent
from kvtier.gpu.layers import LayerReady
from kvtier.gpu.places import CpuPlace
from kvtier.testing.fake_device import FakeDevice
from kvtier.testing.kv_memory import LAYERS, SHARD, KvMemory, pages_for, tokens_of
from kvtier.worker import Worker

COUNT = 200
PAGES, OTHER = pages_for(COUNT), pages_for(COUNT, 20)


@pytest.fixture(scope="module")
def node() -> Iterator[Embedded]:
    made = start()
    yield made
    made.close()


@pytest.fixture
def memory() -> KvMemory:
    made = KvMemory()
    made.put(1, PAGES, COUNT)
    return made


@pytest.fixture(params=["cpu", "cuda"])
def place(request: pytest.FixtureRequest, memory: KvMemory) -> Place:
    if request.param == "cpu":
        return CpuPlace()
    device = FakeDevice(11)
    for plane in memory.planes:
        device.adopt(plane.reshape(-1).view(np.uint8))
    return cuda_engine(device, Settings(always("staged"), 2, 16384))


@pytest.fixture
def worker(node: Embedded, memory: KvMemory, place: Place) -> Iterator[Worker]:
    with (
        kvtier.connect(str(node.socket_path)) as kv,
        kv.attach(memory.model, memory.pool, shard=SHARD, make_engine=place) as made,
    ):
        yield made


def park(worker: Worker, name: str, **how: object) -> None:
    assert worker.park(name, tokens_of(1, COUNT), PAGES, **how).result(20).ok  # type: ignore[arg-type]


@pytest.mark.parametrize("by_layer", [True, False])
def test_a_turn_layer_by_layer(worker: Worker, memory: KvMemory, by_layer: bool) -> None:
    park(worker, "chat", layer_events=[worker.mark() for _ in range(LAYERS)])
    plan = worker.plan("chat", tokens_of(1, COUNT))
    memory.poison(OTHER)
    got = worker.restore_async(plan, OTHER, deadline_s=20, by_layer=by_layer)
    assert len(got.events) == LAYERS and all(isinstance(event, LayerReady) for event in got.events)
    for layer, event in enumerate(got.events):
        assert got.wait_on(None, layer, 20)
        assert event.synchronize(20) and event.done() and got.layer_ready(layer)
    assert memory.front(1, OTHER, COUNT) == COUNT
    receipt = got.result(20)
    assert receipt.ok and receipt.tokens == COUNT and not receipt.reason


def test_the_stream_may_be_left_out_or_a_mark(worker: Worker, memory: KvMemory) -> None:
    for stream in (None, worker.mark()):
        park(worker, "chat", stream=stream)
        plan = worker.plan("chat", tokens_of(1, COUNT))
        assert worker.restore(plan, OTHER, deadline_s=20, stream=worker.mark()).tokens == COUNT


def test_after_the_receipt_every_layer_is_there(worker: Worker) -> None:
    park(worker, "chat")
    got = worker.restore_async(worker.plan("chat", tokens_of(1, COUNT)), OTHER, deadline_s=20)
    assert got.result(20).ok
    assert all(event.done() for event in got.events)


def test_a_plan_that_was_used_brings_no_layer(worker: Worker) -> None:
    park(worker, "chat")
    plan = worker.plan("chat", tokens_of(1, COUNT))
    assert worker.restore(plan, OTHER, deadline_s=20).ok
    again = worker.restore_async(plan, OTHER, deadline_s=20)
    assert again.result(20).reason == "lease_expired"
    assert not again.layer_ready(0) and not again.wait_on(None, 1) and not again.events[0].synchronize()


def test_the_asynchronous_client_marks_the_stream_of_the_caller(
    node: Embedded, memory: KvMemory, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of the threads that carry its calls out."""
    marked: list[threading.Thread] = []
    mark = type(place).mark

    def noted(self: Place, stream: object = None) -> StreamEvent:
        marked.append(threading.current_thread())
        return mark(self, stream)

    monkeypatch.setattr(type(place), "mark", noted)

    async def turn() -> None:
        async with (
            await kvtier.connect_async(str(node.socket_path)) as kv,
            await kv.attach(memory.model, memory.pool, shard=SHARD, make_engine=place) as worker,
        ):
            for how in ({}, {"stream": worker.mark()}, {"layer_events": [worker.mark()] * LAYERS}):
                park = await worker.park("chat", tokens_of(1, COUNT), PAGES, **how)
                assert (await park.result(20)).ok
            plan = await worker.plan("chat", tokens_of(1, COUNT))
            assert (await worker.restore(plan, OTHER, deadline_s=20)).tokens == COUNT

    asyncio.run(turn())
    assert len(marked) == 4 and set(marked) == {threading.current_thread()}


def test_status_names_the_engine_and_its_place(node: Embedded, worker: Worker, place: Place) -> None:
    with kvtier.connect(str(node.socket_path)) as kv:
        (info,) = kv.status().workers
    assert (info.engine, info.mode, info.gpu_bytes) == (place.engine, "worker", place.device_bytes)
    assert info.place == ("cpu" if place.engine == "cpu" else "cpu fake")
