"""The second mode on a fake device: two processes' views of one GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvtier.checksum import checksum
from kvtier.errors import GeometryError, TierUnavailable
from kvtier.gpu.cuda.engine import CudaCopyEngine
from kvtier.gpu.cuda.events import mark
from kvtier.gpu.cuda.ipc import EventRing, EventRings, MappedPool, PeerEvents, Prober, export_pool
from kvtier.gpu.cuda.ipc_pool import IpcPool
from kvtier.gpu.cuda.lane import Settings
from kvtier.gpu.cuda.make import CudaPlace
from kvtier.gpu.cuda.measure import copy_once
from kvtier.gpu.cuda.ways import always
from kvtier.gpu.engine import CopyBatch, CopyItem
from kvtier.testing.fake_device import FakeDevice
from kvtier.testing.fake_device_gpu import FakeGpu
from kvtier.testing.fake_device_rig import flat
from kvtier.testing.pool_cases import BUILDERS, Case, Slots


class Two:
    """A worker with a pool, and the actor that maps it."""

    def __init__(self, build: Callable[..., Case] = BUILDERS[0], kind: str = "device") -> None:
        self.gpu = FakeGpu(3)
        self.worker, self.actor = FakeDevice(gpu=self.gpu), FakeDevice(gpu=self.gpu)
        self.case = build("uint16", 4, 2, 8)
        self.case.fill(1)
        for tensor in self.case.tensors:
            self.worker.adopt(flat(tensor), kind=kind)
        self.pool = self.case.pool()

    def mapped(self) -> MappedPool:
        return MappedPool.attach(self.actor, export_pool(self.worker, self.pool))


@pytest.mark.parametrize("build", BUILDERS)
def test_the_actor_copies_the_worker_s_pages(build: Callable[..., Case]) -> None:
    two = Two(build)
    there, slots = two.mapped(), Slots(1 << 18)
    engine = CudaCopyEngine(two.actor, slots, [slots.bytes], settings=Settings(always("staged"), 2, 8192))
    item = CopyItem(0, 0, 16, 0, 0, 1, (0, 0), two.case.layout.geometry.groups[0].object_bytes(16))
    wanted = two.case.expected(0, [7, 3, 1, 9], 0, 16, 0)
    _, result = copy_once(engine, "gather", there.pool.bind([7, 3, 1, 9]), [item], True)
    assert result.checksums == (checksum(wanted),)
    two.case.fill(2)
    back = replace(item, checksum=result.checksums[0])
    copy_once(engine, "scatter", there.pool.bind([20, 21, 22, 23]), [back], True)
    assert two.case.expected(0, [20, 21, 22, 23], 0, 16, 0) == wanted
    engine.close()
    there.close()
    there.close()
    assert not two.actor.leaks() and not two.gpu.races and not two.gpu.fault


def test_each_allocation_is_mapped_once() -> None:
    two = Two(BUILDERS[9])
    assert len(two.case.tensors) > 1
    assert len(export_pool(two.worker, two.pool)["handles"]) == 1


@pytest.mark.parametrize("build", [BUILDERS[0], BUILDERS[5]])
def test_the_probe_sees_both_directions(build: Callable[..., Case]) -> None:
    two = Two(build)
    there = two.mapped()
    worker, actor = Prober(two.worker, two.pool), Prober(two.actor, there.pool)
    challenge = worker.challenge([1, 5])
    two.actor.hears(two.worker)
    answer = actor.answer(challenge)
    two.worker.hears(two.actor)
    assert worker.judge(answer)
    there.close()
    assert not two.gpu.races


def test_control_a_mapping_of_other_memory_fails_the_probe() -> None:
    two, other = Two(), Two()
    other.actor.gpu = two.gpu
    there = MappedPool.attach(other.actor, export_pool(two.worker, two.pool))
    worker = Prober(two.worker, two.pool)
    stranger = Prober(other.worker, other.pool)
    challenge = worker.challenge([1, 5])
    assert not worker.judge(stranger.answer(challenge))
    assert not Prober(two.worker, two.pool).judge(stranger.answer(challenge))
    there.close()


def test_memory_without_a_handle_is_refused_with_the_fix() -> None:
    two = Two(kind="virtual")
    with pytest.raises(GeometryError, match="expandable segments"):
        export_pool(two.worker, two.pool)


def _without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda said: said.pop(key)


def _buffer(key: str, value: int) -> Callable[[dict[str, Any]], None]:
    return lambda said: said["buffers"][-1].update({key: value})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda said: said.update(version=2),
        lambda said: said.update(device="0000:01:00.0"),
        _without("handles"),
        _without("layout"),
        _without("buffers"),
        _buffer("offset", 1 << 30),
        _buffer("offset", -8),
        _buffer("nbytes", 1 << 40),
        _buffer("handle", 99),
        _buffer("handle", -1),
        _buffer("handle", 0.0),
        _buffer("offset", True),
        lambda said: said.update(handles=[1 << 20] * len(said["handles"])),
        lambda said: said.update(handles=["text"] * len(said["handles"])),
        lambda said: said.update(handles=[b""] * len(said["handles"])),
        lambda said: said.update(handles=b"bytes themselves are integers"),
        lambda said: said["layout"].update(planes=[[]]),
        lambda said: said["layout"]["planes"][0][0].update(pages=1 << 20),
        lambda said: said.update(buffers=[]),
    ],
)
def test_a_wrong_description_maps_nothing(spoil: Callable[[dict[str, Any]], None]) -> None:
    two = Two()
    said = export_pool(two.worker, two.pool)
    spoil(said)
    with pytest.raises(GeometryError):
        MappedPool.attach(two.actor, said)
    assert not two.actor.leaks()


def test_a_handle_that_cannot_be_opened_maps_nothing() -> None:
    two = Two()
    said = export_pool(two.worker, two.pool)
    two.actor.fail("open_memory", 2)
    with pytest.raises(TierUnavailable):
        MappedPool.attach(two.actor, said)
    assert not two.actor.leaks()


def test_events_order_the_two_processes_both_ways() -> None:
    """The model writes late, and the park waits; then the model overwrites, after the actor's event."""
    two = Two()
    there, slots = two.mapped(), Slots(1 << 18)
    engine = CudaCopyEngine(two.actor, slots, [slots.bytes], settings=Settings(always("batch"), 2, 8192))
    ring, model = EventRing(two.worker, 2), two.worker.stream()
    theirs = PeerEvents(two.actor, ring.handles())
    back = EventRing(two.actor, 2)
    ours = PeerEvents(two.worker, back.handles())
    page = two.case.tensors[0][4]
    two.worker.write(page, np.full_like(page, 9), model)
    after = theirs.event(ring.mark(model))
    item = CopyItem(0, 0, 4, 0, 0, 1, (0, 0), two.case.layout.geometry.groups[0].object_bytes(4))
    numbers: list[int] = []
    batch = CopyBatch("p", 0, "gather", there.pool.bind([4]), (item,), after=after)
    batch = replace(batch, on_layer=lambda layer, event: numbers.append(back.relay(event)))
    engine.submit(batch, lambda result: None)
    assert engine.wait_idle(20)
    assert (slots.bytes[: page.nbytes].view(np.uint16) == 9).all()
    ours.event(numbers[-1]).wait(model)
    two.worker.write(page, np.full_like(page, 11), model)
    two.worker.run_all()
    assert not two.gpu.races
    with pytest.raises(GeometryError):
        ours.event(7)
    assert ours.event(0).done()
    ours.event(0).synchronize()
    # An event stays open as long as somebody has it.
    del after, batch
    ours.close()
    theirs.close()
    engine.close()
    for each in (ring, back):
        each.close()
    there.close()
    two.worker.destroy_stream(model)
    assert not two.actor.leaks() and not two.worker.leaks()


def test_control_without_the_worker_s_event_it_is_a_race() -> None:
    two = Two()
    there, slots = two.mapped(), Slots(1 << 18)
    engine = CudaCopyEngine(two.actor, slots, [slots.bytes])
    model = two.worker.stream()
    page = two.case.tensors[0][4]
    two.worker.write(page, np.full_like(page, 9), model)
    item = CopyItem(0, 0, 4, 0, 0, 1, (0, 0), two.case.layout.geometry.groups[0].object_bytes(4))
    copy_once(engine, "gather", there.pool.bind([4]), [item], True)
    two.worker.run_all()
    engine.close()
    assert two.gpu.races


def test_a_worker_s_end_in_the_middle_of_a_park_gives_all_back() -> None:
    """The actor cancels, waits for its own copies, and unmaps: nothing of the worker's stays."""
    two = Two()
    there, slots = two.mapped(), Slots(1 << 18)
    engine = CudaCopyEngine(two.actor, slots, [slots.bytes], settings=Settings(always("staged"), 2, 8192))
    before = two.actor.leaks().count("mapping")
    nbytes = two.case.layout.geometry.groups[0].object_bytes(16)
    items = tuple(CopyItem(0, 16 * n, 16, 0, n, 1, (0, n * nbytes), nbytes) for n in range(4))
    answers: list[Any] = []
    for number in range(3):
        engine.submit(CopyBatch("w", number, "gather", there.pool.bind(range(16)), items), answers.append)
    engine.cancel("w")
    assert engine.wait_idle(20)
    there.close()
    assert before and not two.actor.leaks().count("mapping")
    assert len(answers) == 3
    engine.close()
    assert not two.actor.leaks() and not two.gpu.fault


def test_a_ring_that_is_closed_records_nothing() -> None:
    two = Two()
    ring = EventRing(two.worker, 2)
    ring.close()
    ring.close()
    for call in (lambda: ring.mark(two.worker.current), ring.relay, ring.handles):
        with pytest.raises(TierUnavailable, match="closed"):
            call()
    assert not two.worker.leaks()


def test_rings_are_used_again_those_of_the_same_device_the_oldest_first() -> None:
    two, rings = Two(), EventRings()
    first, second, other = rings.take(two.worker), rings.take(two.worker), rings.take(two.actor)
    assert first is not second
    for ring in (other, second, first):
        rings.give(ring)
    assert [rings.take(two.worker), rings.take(two.worker)] == [second, first]
    third = rings.take(two.worker)
    assert third not in (first, second, other)
    for ring in (first, second, third):
        rings.give(ring)
    rings.close()
    assert not two.worker.leaks() and not two.actor.leaks()


def test_a_worker_s_events_stay_for_whoever_waits_for_them_after_its_end() -> None:
    """A copy of the service's may not be queued yet; the place's next pool takes them over."""
    two = Two()
    place = CudaPlace(two.worker, Settings())
    first = IpcPool(two.pool, place, [1])
    theirs = PeerEvents(two.actor, first.export()["events"])
    after = theirs.event(first.relay(mark(two.worker, two.worker.current)))
    made = len(two.worker.leaks())
    first.close()
    first.close()
    with pytest.raises(TierUnavailable, match="closed"):
        first.relay(after)
    stream = two.actor.stream()
    after.wait(stream)
    after.synchronize()
    second = IpcPool(two.pool, place, [1])
    assert len(two.worker.leaks()) <= made and not two.gpu.races
    second.close()
    del after
    theirs.close()
    place.rings.close()
    two.actor.destroy_stream(stream)
    assert not two.worker.leaks() and not two.actor.leaks()


def test_a_probe_that_may_not_write_changes_nothing() -> None:
    two = Two()
    there = two.mapped()
    challenge = Prober(two.worker, two.pool).challenge([1, 5])
    before = [tensor.tobytes() for tensor in two.case.tensors]

    def may_write() -> None:
        raise TierUnavailable("the pages are another's")

    with pytest.raises(TierUnavailable, match="another's"):
        Prober(two.actor, there.pool).answer(challenge, may_write)
    assert [tensor.tobytes() for tensor in two.case.tensors] == before
    Prober(two.actor, there.pool).answer(challenge)
    assert [tensor.tobytes() for tensor in two.case.tensors] != before
    there.close()
    assert not two.actor.leaks()


def test_control_an_event_is_used_after_its_process_destroyed_it() -> None:
    two = Two()
    ring = EventRing(two.worker, 1)
    theirs = PeerEvents(two.actor, ring.handles())
    event = theirs.event(ring.mark(two.worker.current))
    event.synchronize()
    assert not two.gpu.races
    ring.close()
    event.done()
    assert two.gpu.races
