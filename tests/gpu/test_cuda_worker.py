"""A worker whose engine is the CUDA one, on a fake device, against a node that is really there."""

from __future__ import annotations

import numpy as np
import pytest

import kvtier
from kvtier.daemon.embedded import start
from kvtier.errors import GeometryError
from kvtier.gpu.cuda.lane import Settings
from kvtier.gpu.cuda.make import cuda_engine, mappings_of
from kvtier.gpu.cuda.ways import WAYS, Way, always
from kvtier.host.arena import Arena
from kvtier.testing.fake_device import FakeDevice
from kvtier.testing.kv_memory import SHARD, KvMemory, pages_for, tokens_of
from kvtier.testing.pool_cases import Slots

COUNT = 200


@pytest.mark.parametrize("way", WAYS)
def test_park_and_restore_through_a_node(way: Way) -> None:
    node, device, memory = start(), FakeDevice(4), KvMemory()
    for plane in memory.planes:
        device.adopt(plane.reshape(-1).view(np.uint8))
    make = cuda_engine(device, Settings(always(way), 2, 16384))
    pages, other = pages_for(COUNT), pages_for(COUNT, 20)
    memory.put(1, pages, COUNT)
    with kvtier.connect(str(node.socket_path)) as kv:
        worker = kv.attach(memory.model, memory.pool, shard=SHARD, make_engine=make)
        receipt = worker.park("chat-1", tokens_of(1, COUNT), pages).result(timeout_s=20)
        assert receipt.level == "host" and receipt.released, receipt
        memory.poison(range(64))
        plan = worker.plan("chat-1", tokens_of(1, COUNT))
        got = worker.restore(plan, other, deadline_s=20)
        assert got.tokens == COUNT
        assert memory.front(1, other, COUNT) == COUNT
        assert memory.strange(1, other, COUNT) == 0
        worker.close()
    node.close()
    assert {"gather", "scatter"} <= set(device.launched) or way == "batch"
    assert "checksum" in device.launched
    assert not device.races and not device.leaks() and not device.gpu.fault


def test_without_settings_the_ways_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    device, arena = FakeDevice(), Arena([1 << 16], max_slots=1)
    monkeypatch.setattr("kvtier.gpu.cuda.make.fit", lambda used: always("direct") if used is device else None)
    engine = cuda_engine(device)(arena)
    assert {lane.table for lane in engine._lanes.values()} == {always("direct")}
    engine.close()
    arena.close()
    assert not device.leaks()


def test_the_whole_of_each_mapping_is_registered() -> None:
    arena = Arena([1 << 20, 1 << 16], max_slots=4)
    assert [m.nbytes for m in mappings_of(arena)] == [1 << 20, 1 << 16]
    arena.close()
    with pytest.raises(GeometryError):
        mappings_of(Slots(64))
