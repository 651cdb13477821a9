"""Faults in giving back what the GPU service mapped: tried again where copies may run, and never twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from kvtier.daemon import gpu_copies, gpu_maps
from kvtier.errors import GeometryError
from kvtier.gpu.cuda import ipc
from kvtier.testing.shared_gpu import COUNT, PAGES, World
from kvtier.waiting import wait_until


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.end()


def _answers(*values: bool | Exception) -> Callable[[], bool]:
    left = list(values)

    def answer() -> bool:
        value = left.pop(0)
        if isinstance(value, Exception):
            raise value
        return value

    return answer


def test_what_cannot_be_closed_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    faults = (GeometryError("a"), OSError("b"), RuntimeError("c"))
    closing = gpu_maps.Closing("kvtier-test", _answers(*faults, False, True))
    assert closing.over(20)
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"kvtier-test failed, and is tried again: {fault!r}" for fault in faults]


def test_a_node_is_joined_again_after_a_fault_in_giving_the_lost_one_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, close = world.daemon.gpu, gpu_copies.GpuCopies.close
    faults = [RuntimeError("a fault"), OSError("another")]

    def faulty(self: gpu_copies.GpuCopies, *timeout_s: float) -> bool:
        if faults:
            raise faults.pop()
        return close(self, *timeout_s)

    monkeypatch.setattr(gpu_copies.GpuCopies, "close", faulty)
    with world.attach() as worker:
        world.memory.put(1, PAGES, COUNT)
        world.turn(worker)
        node = service._node
        service._loop.call(lambda: service._lose_node("a test"))
        assert wait_until(lambda: service._node not in (None, node), 20)
        assert not faults


def test_a_fault_in_unmapping_holds_up_nothing_else(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What failed is not closed twice: a handle may be somebody else's by then."""
    faults: list[ipc.EventRing] = []
    give = ipc.EventRings.give

    def faulty(self: ipc.EventRings, ring: ipc.EventRing) -> None:
        give(self, ring)
        faults.append(ring)
        raise RuntimeError("a fault")

    worker = world.attach()
    world.memory.put(1, PAGES, COUNT)
    world.turn(worker)
    maps = world.daemon.gpu._node.copies.maps  # type: ignore[union-attr]
    monkeypatch.setattr(ipc.EventRings, "give", faulty)
    worker.close()
    assert wait_until(lambda: not world.theirs.leaks().count("mapping"), 20)
    assert wait_until(lambda: not maps.device_bytes and not maps.unmapping(float("inf")), 20)
    assert len(faults) == 1
    assert any("stays until this process ends: a fault" in r.getMessage() for r in caplog.records)
