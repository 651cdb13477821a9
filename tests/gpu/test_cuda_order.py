"""A worker's parks and restores in the order of the engine's streams: a fake device, a real node."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import kvtier
from kvtier.daemon.embedded import start
from kvtier.errors import CopiesHang, GeometryError
from kvtier.gpu.cuda.lane import Settings
from kvtier.gpu.cuda.make import CudaPlace, cuda_engine
from kvtier.gpu.cuda.ways import always
from kvtier.gpu.places import CpuPlace
from kvtier.testing.fake_device import FakeDevice
from kvtier.testing.kv_memory import LAYERS, SHARD, KvMemory, pages_for, tokens_of, truth

COUNT = 200
PAGES = pages_for(COUNT)
OTHER = pages_for(COUNT, 20)
STAGED = Settings(always("staged"), 2, 16384)


class Desk:
    """A node, a device, a pool on it, an attached worker."""

    def __init__(self, seed: int, settings: Settings = STAGED) -> None:
        self.node, self.device, self.memory = start(), FakeDevice(seed), KvMemory()
        for plane in self.memory.planes:
            self.device.adopt(plane.reshape(-1).view(np.uint8))
        self.place = cuda_engine(self.device, settings)
        self.kv = kvtier.connect(str(self.node.socket_path))
        self.worker = self.kv.attach(self.memory.model, self.memory.pool, shard=SHARD, make_engine=self.place)

    def compute(self, stream: int, pages: list[int], *, layers: range = range(LAYERS)) -> None:
        """Queue what a model would write: the conversation's KV, layer by layer."""
        other = KvMemory(64)
        other.put(1, pages, COUNT)
        for layer in layers:
            for plane in (2 * layer, 2 * layer + 1):
                for page in pages:
                    self.device.write(self.memory.planes[plane][page], other.planes[plane][page], stream)

    def read(self, page: int, plane: int, into: Any, stream: int) -> None:
        """Queue what a prefill does with a restored page."""
        memory = self.memory.planes[plane][page]
        self.device.copy(int(into.ctypes.data), int(memory.ctypes.data), memory.nbytes, stream)

    def parked(self) -> None:
        self.memory.put(1, PAGES, COUNT)
        assert self.worker.park("chat-1", tokens_of(1, COUNT), PAGES).result(20).ok

    def end(self) -> None:
        self.device.run_all()
        self.worker.close()
        self.kv.close()
        self.node.close()
        assert not self.device.leaks() and not self.device.gpu.fault


@pytest.fixture(params=[3, 4, 5])
def desk(request: pytest.FixtureRequest) -> Iterator[Desk]:
    made = Desk(request.param)
    yield made
    made.end()


@pytest.mark.parametrize("how", ["current", "handle", "torch", "cupy", "mark"])
def test_a_park_comes_after_the_stream(desk: Desk, how: str) -> None:
    stream = desk.device.current if how == "current" else desk.device.stream()
    desk.compute(stream, PAGES)
    given: Any = {
        "current": lambda: None,
        "handle": lambda: stream,
        "torch": lambda: type("Stream", (), {"cuda_stream": stream})(),
        "cupy": lambda: type("Stream", (), {"ptr": stream})(),
        "mark": lambda: desk.worker.mark(stream),
    }[how]()
    receipt = desk.worker.park("chat-1", tokens_of(1, COUNT), PAGES, stream=given).result(20)
    assert receipt.ok and not desk.device.races
    desk.memory.poison(range(64))
    plan = desk.worker.plan("chat-1", tokens_of(1, COUNT))
    assert desk.worker.restore(plan, OTHER, deadline_s=20).tokens == COUNT
    assert desk.memory.front(1, OTHER, COUNT) == COUNT
    if how != "current":
        desk.device.destroy_stream(stream)


def test_control_a_park_after_another_stream_is_a_race(desk: Desk) -> None:
    model, idle = desk.device.stream(), desk.device.stream()
    desk.compute(model, PAGES)
    desk.worker.park("chat-1", tokens_of(1, COUNT), PAGES, stream=idle).result(20)
    desk.device.run_all()
    assert desk.device.races
    for stream in (model, idle):
        desk.device.destroy_stream(stream)


def test_a_park_begins_while_the_last_layers_are_computed(desk: Desk) -> None:
    events = []
    for layer in range(LAYERS):
        desk.compute(desk.device.current, PAGES, layers=range(layer, layer + 1))
        events.append(desk.worker.mark())
    park = desk.worker.park("chat-1", tokens_of(1, COUNT), PAGES, layer_events=events)
    assert park.result(20).ok and not desk.device.races
    plan = desk.worker.plan("chat-1", tokens_of(1, COUNT))
    assert desk.worker.restore(plan, OTHER, deadline_s=20).tokens == COUNT
    assert desk.memory.front(1, OTHER, COUNT) == COUNT


def test_control_layer_events_that_come_too_early_are_a_race(desk: Desk) -> None:
    events = [desk.worker.mark() for _ in range(LAYERS)]
    desk.compute(desk.device.current, PAGES)
    desk.worker.park("chat-1", tokens_of(1, COUNT), PAGES, layer_events=events).result(20)
    desk.device.run_all()
    assert desk.device.races


def test_a_restore_comes_after_what_still_uses_the_pages(desk: Desk) -> None:
    desk.parked()
    old = desk.memory.planes[0][OTHER[0]]
    desk.device.write(old, np.zeros_like(old), desk.device.current)
    plan = desk.worker.plan("chat-1", tokens_of(1, COUNT))
    assert desk.worker.restore(plan, OTHER, deadline_s=20).tokens == COUNT
    assert desk.memory.front(1, OTHER, COUNT) == COUNT and not desk.device.races


@pytest.mark.parametrize("by_layer", [True, False])
def test_a_prefill_follows_the_layers_of_a_restore(desk: Desk, by_layer: bool) -> None:
    """It reads each layer's pages as soon as the layer's event allows, without a race."""
    desk.parked()
    plan = desk.worker.plan("chat-1", tokens_of(1, COUNT))
    prefill, seen = desk.device.stream(), desk.device.pinned(1 << 16)
    got = desk.worker.restore_async(plan, OTHER, deadline_s=20, by_layer=by_layer)
    for layer, event in enumerate(got.events):
        assert got.wait_on(prefill, layer, 20) and event.synchronize(20)
        assert event.done() and got.layer_ready(layer)
        for plane in (2 * layer, 2 * layer + 1):
            rows = np.ascontiguousarray(desk.memory.planes[plane][OTHER]).view(np.uint8)
            assert (rows.reshape(-1, 256)[:COUNT] == truth(1, plane, COUNT)).all()
            desk.read(OTHER[0], plane, seen, prefill)
    assert got.result(20).ok
    desk.device.run_all()
    assert not desk.device.races
    desk.device.destroy_stream(prefill)
    desk.device.free_pinned(seen)


def test_control_a_prefill_that_does_not_wait_is_a_race(desk: Desk) -> None:
    desk.parked()
    plan = desk.worker.plan("chat-1", tokens_of(1, COUNT))
    prefill, seen = desk.device.stream(), desk.device.pinned(1 << 16)
    desk.read(OTHER[0], 0, seen, prefill)
    # The restore comes after another stream, so not after this reader.
    got = desk.worker.restore_async(plan, OTHER, deadline_s=20, by_layer=True)
    got.result(20)
    desk.device.run_all()
    assert desk.device.races
    desk.device.destroy_stream(prefill)
    desk.device.free_pinned(seen)


def test_a_restore_by_layer_is_one_batch(desk: Desk) -> None:
    desk.parked()
    plan = desk.worker.plan("chat-1", tokens_of(1, COUNT))
    began = desk.device.launched.count("scatter")
    assert desk.worker.restore_async(plan, OTHER, deadline_s=20, by_layer=True).result().tokens == COUNT
    assert desk.device.launched.count("scatter") > began


def test_a_miss_tells_of_no_layer(desk: Desk) -> None:
    plan = desk.worker.plan("nobody", tokens_of(9, COUNT))
    got = desk.worker.restore_async(plan, OTHER, deadline_s=20)
    assert not got.layer_ready(0) and not got.wait_on(None, 0) and not got.events[1].wait()


def test_a_layer_that_was_told_is_not_written_again(desk: Desk) -> None:
    """A flipped bit on the link: the node would read the block again, but a prefill runs on the layer."""
    desk.memory.put(1, PAGES, COUNT)
    assert desk.worker.park("chat-1", tokens_of(1, COUNT), PAGES, level="disk").result(20).level == "disk"
    plan = desk.worker.plan("chat-1", tokens_of(1, COUNT))
    desk.device.flip_next = "device"
    got = desk.worker.restore_async(plan, OTHER, deadline_s=20, by_layer=True)
    told = got.wait_on(desk.device.current, 0, 20)
    receipt = got.result(20)
    assert receipt.ok != (told and desk.memory.front(1, OTHER, COUNT) < COUNT)
    if receipt.ok:
        assert desk.memory.front(1, OTHER, COUNT) == COUNT


@pytest.mark.parametrize("given", ["stream", "events", "both", "few", "captured"])
def test_what_is_no_stream_or_event_is_refused(desk: Desk, given: str) -> None:
    desk.device.captured = {12345}
    one = desk.worker.mark()
    unrecorded = type("Event", (), {"cuda_event": 0})()
    options: dict[str, Any] = {
        "stream": {"stream": "main"},
        "events": {"layer_events": [one, unrecorded]},
        "both": {"layer_events": [one, one], "stream": desk.device.current},
        "few": {"layer_events": [one]},
        "captured": {"stream": 12345},
    }[given]
    with pytest.raises(GeometryError):
        desk.worker.park("chat-1", tokens_of(1, COUNT), PAGES, **options)


def test_a_framework_s_own_events_order_a_park(desk: Desk) -> None:
    desk.compute(desk.device.current, PAGES)
    raw = [desk.device.event() for _ in range(LAYERS)]
    for event in raw:
        desk.device.record(event, desk.device.current)
    own = [type("Event", (), {"cuda_event": raw[0]})(), type("Event", (), {"ptr": raw[1]})()]
    assert desk.worker.park("chat-1", tokens_of(1, COUNT), PAGES, layer_events=own).result(20).ok
    assert not desk.device.races
    for event in raw:
        desk.device.destroy_event(event)


def test_a_cache_on_another_device_is_refused_before_anything_is_sent(desk: Desk) -> None:
    class Elsewhere(CpuPlace):
        location = "cuda:9"

    with (
        desk.kv.attach(desk.memory.model, desk.memory.pool, shard=SHARD, make_engine=Elsewhere()) as worker,
        pytest.raises(GeometryError, match=r"the KV is on cpu"),
    ):
        worker.park("chat-1", tokens_of(1, COUNT), PAGES)


def test_a_place_names_its_device_and_bytes() -> None:
    place = cuda_engine(FakeDevice(), Settings(always("staged"), 2, 8192))
    assert isinstance(place, CudaPlace)
    assert (place.engine, place.device, place.location, place.device_bytes) == ("cuda", "fake", "cpu", 32768)


def test_waiting_for_a_layer_ends_when_the_device_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine holds back what does not fit ahead, so the last layers are never queued."""
    monkeypatch.setattr("kvtier.client.handles.QUIET_S", 0.1)
    desk = Desk(3, Settings(always("staged"), 2, 16384, 16384))
    model, prefill = desk.device.stream(), desk.device.stream()
    desk.parked()
    plan = desk.worker.plan("chat-1", tokens_of(1, COUNT))
    desk.device.gpu.stand(model)
    got = desk.worker.restore_async(plan, OTHER, deadline_s=0.2, stream=model, by_layer=True)
    with pytest.raises(CopiesHang, match="deadline"):
        got.wait_on(prefill, LAYERS - 1)
    with pytest.raises(CopiesHang):
        got.events[LAYERS - 1].synchronize()
    assert not got.wait_on(prefill, LAYERS - 1, timeout_s=0.01)
    receipt = got.result()
    assert not receipt.ok and set(receipt.busy) == set(OTHER)
    desk.device.gpu.go_on()
    assert got.result(20).reason == "deadline"
    for stream in (model, prefill):
        desk.device.destroy_stream(stream)
    del got
    desk.end()
