"""The CUDA engine's order on a fake device: streams, layers, staging, marks; races as controls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvtier.checksum import checksum
from kvtier.gpu.cuda import movers
from kvtier.gpu.cuda.engine import CudaCopyEngine
from kvtier.gpu.cuda.events import mark
from kvtier.gpu.cuda.lane import Settings
from kvtier.gpu.cuda.ways import always
from kvtier.gpu.engine import CopyBatch
from kvtier.gpu.pool import Pool
from kvtier.testing.fake_device import FakeDevice
from kvtier.testing.fake_device_slots import LAYERS, NBYTES, Slots, items, parked, run


def test_a_park_waits_for_what_the_model_still_writes(
    engine: CudaCopyEngine, pool: Pool, device: FakeDevice, tensors: list[np.ndarray], slots: Slots
) -> None:
    """The model's kernels are queued, and run late; the park is marked after them."""
    model = device.stream()
    new = np.full_like(tensors[0][:, :4], 17)
    device.write(tensors[0][0, :4], new[0], model)
    batch = CopyBatch("p", 0, "gather", pool.bind(range(4)), items(1), after=mark(device, model))
    assert run(engine, batch).ok
    assert (slots.bytes[: NBYTES // LAYERS // 2].view(np.uint16) == 17).all()
    assert not device.races
    device.destroy_stream(model)


def test_control_a_park_without_the_event_is_a_race(
    engine: CudaCopyEngine, pool: Pool, device: FakeDevice, tensors: list[np.ndarray]
) -> None:
    model = device.stream()
    device.write(tensors[0][0, :4], np.zeros_like(tensors[0][0, :4]), model)
    run(engine, CopyBatch("p", 0, "gather", pool.bind(range(4)), items(1)))
    device.run_all()
    assert device.races
    device.destroy_stream(model)


def test_a_park_begins_while_later_layers_are_still_computed(
    engine: CudaCopyEngine, pool: Pool, device: FakeDevice, tensors: list[np.ndarray], slots: Slots
) -> None:
    """An event for each layer; what the model writes after a layer's event is of other layers."""
    model, events = device.stream(), []
    for number, tensor in enumerate(tensors):
        for half in range(2):
            device.write(tensor[half, :8], np.full_like(tensor[half, :8], number + 1), model)
        events.append(mark(device, model))
    batch = CopyBatch("p", 0, "gather", pool.bind(range(8)), items(2), after_layers=tuple(events))
    result = run(engine, batch)
    stored = slots.bytes[:NBYTES].view(np.uint16).reshape(LAYERS, -1)
    assert [set(row.tolist()) for row in stored] == [{1}, {2}, {3}, {4}]
    assert result.checksums == tuple(checksum(slots.bytes[i * NBYTES : (i + 1) * NBYTES]) for i in range(2))
    assert not device.races
    del batch, events
    device.destroy_stream(model)


def test_a_layer_can_be_read_after_its_event_and_not_before(
    engine: CudaCopyEngine, pool: Pool, device: FakeDevice, tensors: list[np.ndarray]
) -> None:
    """A prefill on its own stream overwrites each layer as soon as the layer's event allows."""
    _, sums = parked(engine, pool, 2)
    prefill, seen = device.stream(), []

    def on_layer(layer: int, event: Any) -> None:
        event.wait(prefill)
        seen.append(layer)

    batch = CopyBatch(
        "r", 0, "scatter", pool.bind(range(40, 48)), items(2, sums), verify=False, on_layer=on_layer
    )
    assert run(engine, batch).ok and seen == [0, 1, 2, 3]
    for tensor in tensors:
        device.write(tensor[0, 40:48], np.zeros_like(tensor[0, 40:48]), prefill)
    device.run_all()
    assert not device.races
    device.destroy_stream(prefill)


def test_control_reading_a_layer_without_its_event_is_a_race(
    engine: CudaCopyEngine, pool: Pool, device: FakeDevice, tensors: list[np.ndarray]
) -> None:
    _, sums = parked(engine, pool, 2)
    prefill = device.stream()

    def on_layer(layer: int, event: Any) -> None:
        device.write(tensors[layer][0, 40:48], np.zeros_like(tensors[layer][0, 40:48]), prefill)

    batch = CopyBatch(
        "r", 0, "scatter", pool.bind(range(40, 48)), items(2, sums), verify=False, on_layer=on_layer
    )
    run(engine, batch)
    device.run_all()
    assert device.races
    device.destroy_stream(prefill)


def test_control_staging_that_is_filled_again_too_early_is_a_race(
    slots: Slots, pool: Pool, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Careless(movers.StagedMover):
        def move(self, track: Any, *args: Any) -> int:
            for slot in track.ring._slots:
                slot.used = False
            return super().move(track, *args)

    monkeypatch.setitem(movers.MOVERS, "staged", Careless())
    engine = CudaCopyEngine(device, slots, [slots.bytes], settings=Settings(always("staged"), 2, 4096))
    engine.submit(CopyBatch("p", 0, "gather", pool.bind(range(16)), items(4)), lambda result: None)
    assert engine.wait_idle(20)
    engine.close()
    assert device.races


def test_marks_end_with_their_users(engine: CudaCopyEngine, device: FakeDevice) -> None:
    model = device.stream()
    before = device.leaks().count("event")
    event = mark(device, model)
    assert device.leaks().count("event") == before + 1
    event.synchronize()
    assert event.done()
    del event
    assert device.leaks().count("event") == before
    device.destroy_stream(model)
