"""A device that takes its time to map a pool: the GPU service goes on for everybody else, and says so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvtier.daemon import gpu_copies, gpu_maps
from kvtier.daemon.gpu_service import GpuService
from kvtier.errors import TierUnavailable
from kvtier.gpu.cpu_engine import CpuCopyEngine
from kvtier.gpu.cuda.engine import CudaCopyEngine
from kvtier.messages.tiers import ProbePool
from kvtier.testing.fake_device import FakeDevice
from kvtier.testing.kv_memory import LAYERS, tokens_of
from kvtier.testing.pool_cases import Slots
from kvtier.testing.shared_gpu import COUNT, PAGES, SCRATCH, SETTINGS, Second, World
from kvtier.waiting import wait_until


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.end()


class Hang:
    """Calls of the service's device, made to map, that wait. came: when one does. going: lets them go on."""

    def __init__(self, world: World, name: str, monkeypatch: pytest.MonkeyPatch, inline: bool) -> None:
        self.came, self.going = threading.Event(), threading.Event()
        real = getattr(world.theirs, name)

        def late(*given: Any) -> Any:
            if inline or threading.current_thread().name.startswith("kvtier-map"):
                self.came.set()
                assert self.going.wait(120)
            return real(*given)

        monkeypatch.setattr(world.theirs, name, late)


@pytest.fixture
def hang(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Hang]]:
    made: list[Hang] = []

    def begin(name: str, inline: bool = False) -> Hang:
        made.append(Hang(world, name, monkeypatch, inline))
        return made[-1]

    yield begin
    for each in made:
        each.going.set()


def turns(service: GpuService) -> bool:
    """Whether the service's loop comes round."""
    called = threading.Event()
    service._loop.call(called.set)
    return called.wait(20)


@pytest.mark.parametrize("call", ["open_memory", "open_event", "pinned", "export_event"])
def test_a_mapping_that_hangs_holds_up_nobody_else(
    world: World,
    hang: Callable[..., Hang],
    call: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The handles of memory and events, the probe's copies, and the answer."""
    with Second(world) as second:
        second.memory.put(1, PAGES, COUNT)
        # It is mapped by then.
        assert second.worker.park("first", tokens_of(1, COUNT), PAGES, stream=second.stream).result(20).ok
        held = hang(call)
        worker = world.attach()
        assert held.came.wait(20) and turns(world.daemon.gpu)
        park = second.worker.park("other", tokens_of(2, COUNT), PAGES, stream=second.stream)
        assert park.result(20).ok and world.mode() == "shared"
        monkeypatch.setattr(gpu_copies, "LATE_S", 0.0)
        assert wait_until(lambda: any("mapping the pool of" in r.getMessage() for r in caplog.records), 20)
        assert wait_until(lambda: any("do not end" in said for said in world.kv.status().warnings), 20)
        held.going.set()
        world.memory.put(1, PAGES, COUNT)
        world.turn(worker)
        assert [each.mode for each in world.kv.status().workers] == ["shared"] * 2
        worker.close()


def test_control_probing_in_the_loop_stalls_it(
    world: World, hang: Callable[..., Hang], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def at_once(thread: threading.Thread) -> None:
        thread.run() if thread.name.startswith("kvtier-map") else start(thread)

    monkeypatch.setattr(threading.Thread, "start", at_once)
    held, service = hang("open_memory", inline=True), world.daemon.gpu
    with world.attach():
        assert held.came.wait(20)
        called = threading.Event()
        service._loop.call(called.set)
        assert not called.wait(0.2)
        held.going.set()
        assert called.wait(20)


def test_a_worker_that_left_while_it_was_mapped_leaves_nothing(
    world: World, hang: Callable[..., Hang]
) -> None:
    held = hang("open_memory")
    worker = world.attach()
    assert held.came.wait(20)
    maps = world.daemon.gpu._node.copies.maps  # type: ignore[union-attr]
    worker.close()
    assert wait_until(lambda: bool(maps.unmapping(float("inf"))), 20)
    held.going.set()
    assert wait_until(lambda: not maps.unmapping(float("inf")), 20)
    assert not world.theirs.leaks().count("mapping") and not maps.device_bytes


def test_a_node_lost_while_a_pool_was_mapped_is_joined_once_that_is_over(
    world: World, hang: Callable[..., Hang], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arena stays registered and mapped until then, since the device may be at it."""
    monkeypatch.setattr(gpu_maps, "CLOSE_S", 0.05)
    held, service = hang("open_memory"), world.daemon.gpu
    with world.attach() as worker:
        assert held.came.wait(20)
        node = service._node
        assert node is not None
        service._loop.call(lambda: service._lose_node("a test"))
        assert wait_until(lambda: bool(service._lost), 20) and turns(service)
        assert node.copies.maps._arena is not None and service._node is None
        held.going.set()
        assert wait_until(lambda: service._node not in (None, node), 20)
        assert node.copies.maps._arena is None

        def parks() -> bool:
            return bool(worker.park("chat", tokens_of(1, COUNT), PAGES).result(5).ok)

        world.memory.put(1, PAGES, COUNT)
        assert wait_until(parks, 30) and world.theirs.leaks().count("mapping") == 2 * LAYERS


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Beginnings of names of threads that cannot be had now."""
    start, refused = threading.Thread.start, list[str]()

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith(tuple(refused)):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    return refused


def test_a_service_without_a_thread_for_it_leaves_the_copies_to_the_worker(
    world: World, no_threads: list[str]
) -> None:
    """Not even for giving back what it never mapped, which it tries again."""
    no_threads += ["kvtier-map", "kvtier-unmap"]
    with world.attach() as worker:
        assert wait_until(lambda: worker.attached and world.mode() == "worker", 20)
        world.memory.put(1, PAGES, COUNT)
        world.turn(worker)
        assert "gather" in world.mine.launched and turns(world.daemon.gpu)
        maps = world.daemon.gpu._node.copies.maps  # type: ignore[union-attr]
        assert maps.unmapping(float("inf"))
        no_threads.clear()
        assert wait_until(lambda: not maps.unmapping(float("inf")), 20)


def test_an_engine_that_gets_no_thread_leaves_nothing(no_threads: list[str]) -> None:
    device, before = FakeDevice(), set(threading.enumerate())
    no_threads += ["kvtier-answer-scatter", "kvtier-scatter"]
    with pytest.raises(TierUnavailable, match="can't start"):
        CudaCopyEngine(device, Slots(1 << 16), [], settings=SETTINGS)
    with pytest.raises(TierUnavailable, match="can't start"):
        CpuCopyEngine(Slots(1 << 16), threads=1)
    assert not device.leaks() and set(threading.enumerate()) <= before


def test_a_node_lost_without_a_thread_to_give_it_back_is_given_back_later(
    world: World, no_threads: list[str]
) -> None:
    service = world.daemon.gpu
    with world.attach() as worker:
        world.memory.put(1, PAGES, COUNT)
        world.turn(worker)
        no_threads.append("kvtier-gpu-end")
        node = service._node
        service._loop.call(lambda: service._lose_node("a test"))
        assert wait_until(lambda: bool(service._lost), 20) and turns(service)
        assert service._node is None
        no_threads.clear()
        assert wait_until(lambda: service._node not in (None, node), 20)


@pytest.mark.parametrize("call", ["open_memory", "pinned"])
def test_a_probe_that_was_overtaken_does_not_write_into_the_next_one_s_pages(
    world: World, hang: Callable[..., Hang], call: str
) -> None:
    held, service = hang(call), world.daemon.gpu
    with world.attach() as worker:
        assert held.came.wait(20)
        maps = service._node.copies.maps  # type: ignore[union-attr]
        (mapped,) = maps._maps.values()
        first = mapped.latest
        service._loop.call(next(iter(service._workers.values())).close)
        assert wait_until(lambda: mapped.latest not in (None, first), 20)
        held.going.set()
        world.memory.put(1, PAGES, COUNT)
        world.turn(worker)
        assert world.mode() == "shared" and not world.mine.launched


def test_a_probe_does_not_write_once_the_worker_has_left(
    world: World, hang: Callable[..., Hang], no_threads: list[str]
) -> None:
    """Whether or not somebody has begun to unmap."""
    held = hang("pinned")
    worker = world.attach()
    assert held.came.wait(20)
    maps = world.daemon.gpu._node.copies.maps  # type: ignore[union-attr]
    no_threads.append("kvtier-unmap")
    worker.close()
    assert wait_until(lambda: bool(maps.unmapping(float("inf"))), 20)
    before = [plane[SCRATCH].tobytes() for plane in world.memory.planes]
    held.going.set()
    assert wait_until(lambda: not any(t.name.startswith("kvtier-map") for t in threading.enumerate()), 20)
    assert [plane[SCRATCH].tobytes() for plane in world.memory.planes] == before
    no_threads.clear()
    assert wait_until(lambda: not maps.unmapping(float("inf")), 20)


def test_a_pool_that_left_before_its_thread_came_to_it_is_not_mapped() -> None:
    made: list[int] = []

    def make() -> gpu_maps._Mapped:
        made.append(1)
        raise TierUnavailable("no device")

    held = gpu_maps._Map(make)
    probe = held.latest = ProbePool(pages=[1], nonce=b"n")
    assert (held.probe(probe).ok, len(made)) == (False, 1)
    assert held.close()
    assert held.probe(probe).detail == "the worker has left" and len(made) == 1
