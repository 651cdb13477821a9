"""One engine's code against both copy engines in both modes: streams, layers and status, through a node."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import pytest

import kvtier
from kvtier.client.worker import Worker
from kvtier.daemon.embedded import Embedded, start
from kvtier.gpu.cuda.make import cuda_engine
from kvtier.gpu.engine import Place, StreamEvent
from kvtier.gpu.layers import LayerReady
from kvtier.gpu.places import CpuPlace
from kvtier.testing.fake_device import FakeDevice
from kvtier.testing.kv_memory import LAYERS, SHARD, KvMemory, tokens_of
from kvtier.testing.shared_gpu import COUNT, OTHER, PAGES, SETTINGS, World


class Case:
    """A node, and what a worker attaches to it with. engine: 'cpu' or 'cuda'; mode: 'worker' or 'shared'."""

    def __init__(self, engine: str, mode: str, stack: ExitStack) -> None:
        self.engine, self.mode = engine, mode
        self.place: Place = CpuPlace()
        if (engine, mode) == ("cuda", "shared"):
            world = World()
            stack.callback(world.end)
            self.node, self.memory = world.daemon, world.memory
            self.pool: Any = world.pool
            self.place = world.pool.place
        else:
            self.node = stack.enter_context(closing(start()))
            self.memory = stack.enter_context(closing(KvMemory(shared=mode == "shared")))
            self.pool = self.memory.pool
        if (engine, mode) == ("cuda", "worker"):
            device = FakeDevice(11)
            for plane in self.memory.planes:
                device.adopt(plane.reshape(-1).view(np.uint8))
            self.place = cuda_engine(device, SETTINGS)
        self.memory.put(1, PAGES, COUNT)
        self.kv = stack.enter_context(kvtier.connect(str(self.node.socket_path)))
        # What copies a pool that the service maps is said by the pool.
        self.make: dict[str, Any] = {"make_engine": self.place} if mode == "worker" else {}


@pytest.fixture(params=["cpu worker", "cuda worker", "cpu shared", "cuda shared"])
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    with ExitStack() as stack:
        engine, mode = request.param.split()
        yield Case(engine, mode, stack)


@pytest.fixture
def memory(case: Case) -> KvMemory:
    return case.memory


@pytest.fixture
def place(case: Case) -> Place:
    return case.place


@pytest.fixture
def node(case: Case) -> Embedded:
    return case.node


@pytest.fixture
def worker(case: Case) -> Iterator[Worker]:
    with case.kv.attach(case.memory.model, case.pool, shard=SHARD, **case.make) as made:
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
    case: Case, node: Embedded, memory: KvMemory, place: Place, monkeypatch: pytest.MonkeyPatch
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
            await kv.attach(memory.model, case.pool, shard=SHARD, **case.make) as worker,
        ):
            for how in ({}, {"stream": worker.mark()}, {"layer_events": [worker.mark()] * LAYERS}):
                park = await worker.park("chat", tokens_of(1, COUNT), PAGES, **how)
                assert (await park.result(20)).ok
            plan = await worker.plan("chat", tokens_of(1, COUNT))
            assert (await worker.restore(plan, OTHER, deadline_s=20)).tokens == COUNT

    asyncio.run(turn())
    assert len(marked) == 4 and set(marked) == {threading.current_thread()}


def test_status_names_the_engine_its_place_and_the_mode(case: Case, worker: Worker) -> None:
    (info,) = case.kv.status().workers
    assert (info.engine, info.mode) == (case.engine, case.mode)
    assert info.place == ("cpu" if case.engine == "cpu" else "cpu fake")
    if case.mode == "worker":
        assert info.gpu_bytes == case.place.device_bytes
