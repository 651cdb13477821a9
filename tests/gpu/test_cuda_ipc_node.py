"""The second mode through a node: the GPU service maps a worker's pool on a fake GPU, and copies."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvtier.config.load import load
from kvtier.daemon import gpu_copies, gpu_maps, gpu_service
from kvtier.daemon.gpu_service import GpuService
from kvtier.errors import GeometryError, TierUnavailable
from kvtier.gpu.cuda import ipc
from kvtier.gpu.cuda.engine import CudaCopyEngine
from kvtier.gpu.cuda.events import mark
from kvtier.gpu.cuda.ipc_pool import IpcPool
from kvtier.gpu.cuda.make import cuda_engine
from kvtier.gpu.engine import CopyBatch, CopyItem
from kvtier.gpu.pool import Pool
from kvtier.messages.tiers import PoolProven
from kvtier.testing.fake_device import FakeDevice
from kvtier.testing.kv_memory import LAYERS, tokens_of
from kvtier.testing.pool_cases import Slots
from kvtier.testing.shared_gpu import COUNT, OTHER, PAGES, SCRATCH, SETTINGS, Second, World
from kvtier.waiting import wait_until


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.end()


def test_the_service_copies_after_the_worker_s_stream(world: World) -> None:
    with world.attach() as worker:
        world.compute(world.mine.current)
        world.turn(worker)
        assert world.mode() == "shared" and world.theirs.leaks().count("mapping") == 2 * LAYERS
        assert "gather" in world.theirs.launched and not world.mine.launched
        info = world.kv.status().workers[0]
        assert (info.engine, info.place) == ("cuda", "cpu fake")
    assert wait_until(lambda: not world.theirs.leaks().count("mapping"), 10)
    assert not world.gpu.races


def test_the_service_follows_the_layers_of_a_park(world: World) -> None:
    with world.attach() as worker:
        events = []
        for layer in range(LAYERS):
            world.compute(world.mine.current, range(layer, layer + 1))
            events.append(worker.mark())
        world.turn(worker, layer_events=events)
        assert world.mode() == "shared"
    assert not world.gpu.races


def test_control_without_the_worker_s_events_it_is_a_race(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtier.client.worker_inputs.WorkerPool.event_numbers", lambda pool, order: [])
    with world.attach() as worker:
        world.compute(world.mine.current)
        worker.park("chat", tokens_of(1, COUNT), PAGES).result(20)
        world.mine.run_all()
    assert world.gpu.races


def falls_back(world: World) -> None:
    """The worker notices, attaches again, and copies by itself."""
    worker = world.attach()
    assert wait_until(lambda: worker.attached and world.mode() == "worker", 20)
    world.memory.put(1, PAGES, COUNT)
    world.turn(worker)
    assert "gather" in world.mine.launched and not world.theirs.launched
    worker.close()


def test_a_service_without_the_device_leaves_the_copies_to_the_worker(world: World) -> None:
    def nothing(identity: str) -> FakeDevice:
        raise TierUnavailable("there is no CUDA device")

    world.found = nothing
    falls_back(world)


def test_a_mapping_of_other_memory_is_not_used(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe's answer is right for the memory that the service sees, which is not the pool's."""
    real = ipc.Prober._read

    def elsewhere(self: Any, challenge: Any) -> bytes:
        return b"another memory's" if self._device is world.theirs else real(self, challenge)

    monkeypatch.setattr(ipc.Prober, "_read", elsewhere)
    falls_back(world)


@pytest.mark.parametrize("side", ["theirs", "mine"])
def test_events_that_cannot_be_opened_leave_nothing_mapped(
    world: World, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(getattr(world, side), "open_event", _refuse)
    falls_back(world)
    assert not world.theirs.leaks().count("mapping")


def _refuse(what: object) -> int:
    raise TierUnavailable("refused")


def test_memory_without_a_handle_is_refused_at_attach() -> None:
    world = World("virtual")
    with pytest.raises(GeometryError, match="expandable segments"):
        world.attach()
    world.end()


def test_a_pool_elsewhere_or_without_scratch_pages_is_refused(world: World) -> None:
    other = type("Other", (FakeDevice,), {})()
    other.location = "cuda:1"
    pool = world.memory.pool
    assert isinstance(pool, Pool)
    with pytest.raises(GeometryError, match="not on cuda:1"):
        IpcPool(pool, cuda_engine(other, SETTINGS), SCRATCH)
    with pytest.raises(GeometryError, match="scratch"):
        IpcPool(pool, cuda_engine(world.mine, SETTINGS), [])


def test_a_lost_service_maps_again_when_it_is_back(world: World) -> None:
    with world.attach() as worker:
        world.memory.put(1, PAGES, COUNT)
        world.turn(worker)
        world.daemon.gpu.stop(5)
        again = GpuService(world.daemon.config, make_maps=world.maps)
        world.daemon._started[world.daemon._started.index(world.daemon.gpu)] = again
        world.daemon.gpu = again
        again.start()

        def parks() -> bool:
            return bool(worker.park("chat-2", tokens_of(2, COUNT), PAGES).result(5).ok)

        assert wait_until(parks, 30)
        assert world.mode() == "shared" and world.theirs.leaks().count("mapping") == 2 * LAYERS


# --- streams that stand still ---------------------------------------------------------------------------


def late(world: World) -> list[str]:
    return [warning for warning in world.kv.status().warnings if "do not end" in warning]


def test_a_worker_whose_stream_stands_still_holds_up_nobody_else(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = world.attach()
    second = Second(world)
    world.memory.put(1, PAGES, COUNT)
    second.memory.put(1, PAGES, COUNT)
    world.gpu.stand(world.mine.current)
    waits = first.park("chat", tokens_of(1, COUNT), PAGES)
    for _ in range(3):
        park = second.worker.park("other", tokens_of(1, COUNT), PAGES, stream=second.stream)
        assert park.result(20).ok
    plan = second.worker.plan("other", tokens_of(1, COUNT))
    assert second.worker.restore(plan, OTHER, deadline_s=20, stream=second.stream).tokens == COUNT
    assert not waits.done()
    assert not late(world)
    monkeypatch.setattr(gpu_copies, "LATE_S", 0.0)
    assert wait_until(lambda: bool(late(world)), 10)
    assert sum("has run for more than" in record.message for record in caplog.records) == 1
    world.gpu.go_on()
    assert waits.result(20).ok
    assert wait_until(lambda: not late(world), 10)
    second.close()
    first.close()


def test_a_node_lost_while_a_stream_stands_still_is_joined_only_once_it_went_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Joining says that no copy runs any more. Until then nothing is unmapped, and the service lives."""
    monkeypatch.setattr("kvtier.daemon.gpu_service._QUIET_S", 0.05)
    service = world.daemon.gpu
    with world.attach() as worker:
        world.memory.put(1, PAGES, COUNT)
        world.gpu.stand(world.mine.current)
        park = worker.park("chat", tokens_of(1, COUNT), PAGES)
        assert wait_until(lambda: bool(service._node and service._node.copies._running), 10)
        service._loop.call(lambda: service._lose_node("a test"))
        assert wait_until(lambda: "do not end" in service.health()["failure"], 10)
        assert not service.health()["ready"] and world.theirs.leaks().count("mapping") == 2 * LAYERS
        world.gpu.go_on()
        assert wait_until(lambda: bool(service.health()["ready"]), 20)
        assert not park.result(20).ok

        def parks() -> bool:
            return bool(worker.park("chat-2", tokens_of(2, COUNT), PAGES).result(5).ok)

        assert wait_until(parks, 30)


def test_an_engine_that_cannot_end_gives_nothing_back_until_it_can(world: World) -> None:
    slots = Slots(1 << 18)
    engine = CudaCopyEngine(world.mine, slots, [slots.bytes], settings=SETTINGS)
    before, model = len(world.mine.leaks()), world.mine.stream()
    world.gpu.stand(model)
    binding = world.pool.pool.bind(PAGES, tokens=COUNT)
    nbytes = world.pool.pool.layout.geometry.groups[0].object_bytes(32)
    item = CopyItem(0, 0, 32, 0, 0, 1, (0, 0), nbytes)
    engine.submit(
        CopyBatch("p", 0, "gather", binding, (item,), after=mark(world.mine, model)), lambda _: None
    )
    assert wait_until(lambda: bool(engine._lanes["gather"]._ahead), 10)
    assert not engine.close(0.05) and not engine.close(0)
    assert len(world.mine.leaks()) >= before
    world.gpu.go_on()
    assert engine.close(10) and engine.close(0)
    world.mine.destroy_stream(model)


# --- a device that takes its time to free and to unmap ------------------------------------------------------


@pytest.fixture
def slow(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Freeing and unmapping at the service wait for it, as CUDA waits for all that runs on the device."""
    going, device = threading.Event(), world.theirs
    for name in ("free", "close_memory"):
        real = getattr(device, name)

        def late(address: int, real: Any = real) -> None:
            # Pinned memory goes at once, as that of the probe.
            assert device._regions[address].kind == "pinned" or going.wait(120)
            real(address)

        monkeypatch.setattr(device, name, late)
    yield going
    going.set()
    assert wait_until(lambda: not world.theirs.leaks().count("mapping"), 20)


def test_giving_back_one_worker_s_memory_holds_up_nobody_else(
    world: World, slow: threading.Event, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = world.attach(), Second(world)
    world.memory.put(1, PAGES, COUNT)
    second.memory.put(1, PAGES, COUNT)
    world.turn(first)
    monkeypatch.setattr(gpu_copies, "LATE_S", 0.0)
    first.close()
    park = second.worker.park("other", tokens_of(1, COUNT), PAGES, stream=second.stream)
    assert park.result(20).ok

    def stuck() -> list[str]:
        return [warning for warning in world.kv.status().warnings if "cannot be unmapped" in warning]

    assert wait_until(lambda: bool(stuck()), 20)
    assert any("may hang" in record.message for record in caplog.records)
    assert world.theirs.leaks().count("mapping") == 4 * LAYERS
    slow.set()
    assert wait_until(lambda: not stuck() and world.theirs.leaks().count("mapping") == 2 * LAYERS, 20)
    second.close()


def test_control_unmapping_in_the_loop_holds_up_everybody(
    world: World, slow: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = world.attach(), Second(world)
    world.memory.put(1, PAGES, COUNT)
    second.memory.put(1, PAGES, COUNT)
    world.turn(first)
    with monkeypatch.context() as inline:
        inline.setattr(gpu_maps.Closing, "__init__", _close_at_once)
        first.close()
        service = world.daemon.gpu
        assert wait_until(lambda: service._loop.still_s() > 1.0, 20)
        park = second.worker.park("other", tokens_of(1, COUNT), PAGES, stream=second.stream)
        assert not park.result(0.2).ok and not park.done()
        slow.set()
        assert park.result(20).ok
        second.close()
        assert wait_until(lambda: not world.theirs.leaks().count("mapping"), 20)


def _close_at_once(self: Any, name: str, close: Callable[[], bool]) -> None:
    self.since_s, self._over = 0.0, threading.Event()
    self._starting, self._started = threading.Lock(), True
    assert close()
    self._over.set()


def test_a_lost_node_is_given_back_in_the_background(world: World, slow: threading.Event) -> None:
    """The service hears and answers meanwhile, joins no node, and says why."""
    service = world.daemon.gpu
    with world.attach() as worker:
        world.memory.put(1, PAGES, COUNT)
        world.turn(worker)
        service._loop.call(lambda: service._lose_node("a test"))
        assert wait_until(lambda: "do not end" in service.health()["failure"], 20)
        assert not service.health()["ready"]
        called = threading.Event()
        service._loop.call(called.set)
        assert called.wait(20)
        slow.set()
        assert wait_until(lambda: bool(service.health()["ready"]), 20)


def test_a_device_that_is_lost_takes_nothing_back_and_nobody_waits_for_it(world: World) -> None:
    closing = gpu_maps.Closing("kvtier-test", _answers(False, False, True))
    assert closing.over(20)
    worker = world.attach()
    world.memory.put(1, PAGES, COUNT)
    world.turn(worker)
    maps = world.daemon.gpu._node.copies.maps  # type: ignore[union-attr]
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(world.theirs, "close_memory", _refuse)
        worker.close()
        assert wait_until(lambda: not maps.device_bytes and not maps.unmapping(float("inf")), 20)
    # As the end of the process would.
    for address in world.theirs._mapped:
        del world.theirs._regions[address]
    world.theirs._mapped.clear()


def _answers(*values: bool) -> Callable[[], bool]:
    left = list(values)
    return lambda: left.pop(0)


# --- probes that come again -----------------------------------------------------------------------------


def test_a_repeated_probe_that_fails_ends_the_mapping(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new connection of the worker's brings a new probe; the worker then copies by itself."""
    worker = world.attach()
    world.memory.put(1, PAGES, COUNT)
    world.turn(worker)
    assert world.mode() == "shared"
    launched = len(world.theirs.launched)
    monkeypatch.setattr(ipc.Prober, "judge", lambda self, answer: False)
    service = world.daemon.gpu
    service._loop.call(lambda: next(iter(service._workers.values())).close())
    assert wait_until(lambda: worker.attached and world.mode() == "worker", 20)
    world.turn(worker)
    assert len(world.theirs.launched) == launched and not world.theirs.leaks().count("mapping")
    worker.close()


def test_a_worker_that_does_not_attach_again_gets_no_copies(world: World) -> None:
    """What the service maps was judged wrong, so it is unmapped, and what is asked of it fails."""
    service = world.daemon.gpu
    with world.attach() as worker:
        world.memory.put(1, PAGES, COUNT)
        world.turn(worker)
        name = world.kv.status().workers[0].worker
        service._loop.call(lambda: service._worker_said(name, PoolProven(ok=False), []))
        assert wait_until(lambda: not world.theirs.leaks().count("mapping"), 10)
        receipt = worker.park("chat-2", tokens_of(2, COUNT), PAGES).result(20)
        assert (receipt.ok, receipt.reason) == (False, "copy_failed")


def test_a_mapping_judged_wrong_stays_until_its_copies_ended(world: World) -> None:
    service = world.daemon.gpu
    with world.attach() as worker:
        world.memory.put(1, PAGES, COUNT)
        world.gpu.stand(world.mine.current)
        park = worker.park("chat", tokens_of(1, COUNT), PAGES)
        assert wait_until(lambda: bool(service._node and service._node.copies._running), 10)
        name = world.kv.status().workers[0].worker
        service._loop.call(lambda: service._worker_said(name, PoolProven(ok=False), []))
        assert wait_until(lambda: service._modes[name] == "unmapped", 10)
        assert world.theirs.leaks().count("mapping") == 2 * LAYERS
        world.gpu.go_on()
        assert wait_until(lambda: not world.theirs.leaks().count("mapping"), 10)
        park.result(20)


# --- what it takes --------------------------------------------------------------------------------------


def test_status_says_what_the_service_takes_for_a_worker(world: World) -> None:
    world.theirs.context_bytes = 300 << 20
    with world.attach() as worker:
        world.memory.put(1, PAGES, COUNT)
        world.turn(worker)
        rings = 2 * SETTINGS.staging_slots * SETTINGS.staging_slot_bytes
        assert wait_until(lambda: world.kv.status().workers[0].gpu_bytes > rings, 10)
        gpu = next(tier for tier in world.kv.status().tiers if tier.name == "gpu")
        assert "300 MiB" in gpu.detail


def test_a_device_is_made_once_whatever_nodes_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made again, it would find its context there, and say that it takes nothing."""
    made: list[str] = []

    def make(identity: str) -> FakeDevice:
        made.append(identity)
        return FakeDevice()

    monkeypatch.setattr(gpu_service, "device_of", make)
    service = GpuService(load())
    of_no_node: Any = None
    first, second = (service._make_maps(of_no_node) for _ in range(2))
    assert first._find("0000:01:00.0") is second._find("0000:01:00.0")
    assert made == ["0000:01:00.0"]


def test_a_node_that_does_not_know_of_it_is_told_nothing(world: World) -> None:
    """It would take the message for a fault, and close the connection."""
    service = world.daemon.gpu
    assert wait_until(lambda: service._node is not None, 10)
    node = service._node
    assert node is not None and node.takes_usage
    node.takes_usage = False
    with world.attach() as worker:
        world.memory.put(1, PAGES, COUNT)
        world.turn(worker)
        assert wait_until(lambda: bool(service._said.workers), 10)
        assert world.kv.status().workers[0].gpu_bytes == 0
