"""The CUDA engine on a fake device: failing items, generations, order, events, cancelling, ends, races."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvtier.checksum import checksum
from kvtier.errors import GeometryError, TierUnavailable
from kvtier.gpu.cuda.engine import CudaCopyEngine
from kvtier.gpu.cuda.events import mark
from kvtier.gpu.cuda.lane import Lane, Settings
from kvtier.gpu.cuda.ways import always
from kvtier.gpu.engine import CopyBatch, CopyItem, CopyResult
from kvtier.gpu.pool import Pool
from kvtier.testing.fake_device import FakeDevice
from kvtier.testing.fake_device_slots import NBYTES, Slots, items, parked, run

# -- wrong bytes


def test_a_flipped_bit_in_the_slot_fails_its_item_alone(
    engine: CudaCopyEngine, slots: Slots, pool: Pool
) -> None:
    _, sums = parked(engine, pool, 3)
    slots.bytes[NBYTES + 100] ^= 4
    result = run(engine, CopyBatch("r", 7, "scatter", pool.bind(range(40, 52)), items(3, sums)))
    assert (result.job, result.batch, result.ok) == ("r", 7, False)
    assert result.failed == ((1, "corrupt"),) and result.bytes == 2 * NBYTES


@pytest.mark.parametrize("where", ["registered", "device"])
def test_a_bit_that_flips_on_the_way_is_seen_at_the_restore(
    engine: CudaCopyEngine, pool: Pool, device: FakeDevice, where: str
) -> None:
    """On the way to the slot, or on the way to the pages, whichever way the bytes move."""
    if where == "registered":
        device.flip_next = where
    _, sums = parked(engine, pool, 2)
    if where == "device":
        device.flip_next = where
    result = run(engine, CopyBatch("r", 0, "scatter", pool.bind(range(40, 48)), items(2, sums)))
    assert not device.flip_next
    assert [reason for _, reason in result.failed] == ["corrupt"]


def test_checksums_only_where_asked(
    engine: CudaCopyEngine, slots: Slots, pool: Pool, device: FakeDevice
) -> None:
    _, sums = parked(engine, pool, 2)
    assert sums == tuple(checksum(slots.bytes[i * NBYTES : (i + 1) * NBYTES]) for i in range(2))
    device.launched.clear()
    plain = run(engine, CopyBatch("p", 0, "gather", pool.bind(range(8)), items(2), verify=False))
    assert plain.ok and plain.checksums == (None, None) and "checksum" not in device.launched


# -- generations


@pytest.mark.parametrize("direction", ["gather", "scatter"])
def test_a_stale_slot_is_not_touched(
    engine: CudaCopyEngine, slots: Slots, pool: Pool, tensors: list[np.ndarray], direction: str
) -> None:
    binding, sums = parked(engine, pool, 2)
    slots.generations[1] = 2
    slots.bytes[:] = 7
    before = [t[:, 4:8].copy() for t in tensors]
    batch = CopyBatch("j", 0, direction, binding, items(2, sums), verify=False)  # type: ignore[arg-type]
    assert run(engine, batch).failed == ((1, "stale"),)
    assert (slots.bytes[NBYTES : 2 * NBYTES] == 7).all()
    assert all((t[:, 4:8] == b).all() for t, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("direction", ["gather", "scatter"])
def test_a_generation_that_changes_during_the_copy_is_stale(
    engine: CudaCopyEngine, slots: Slots, pool: Pool, direction: str
) -> None:
    binding, sums = parked(engine, pool, 1)
    looks = []

    def bump_after_the_first_look(slot_id: int) -> None:
        looks.append(slot_id)
        slots.generations[slot_id] = len(looks)

    slots.on_generation = bump_after_the_first_look
    result = run(engine, CopyBatch("j", 0, direction, binding, items(1, sums)))  # type: ignore[arg-type]
    assert len(looks) == 2
    assert result.failed == ((0, "stale"),) and result.checksums == (None,) and result.bytes == 0


def test_control_an_engine_that_looks_only_before_is_caught(
    engine: CudaCopyEngine, slots: Slots, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    looking = Lane.changed

    def only_before(self: Lane, item: CopyItem) -> str:
        seen.append(1)
        return looking(self, item) if len(seen) % 2 else ""

    monkeypatch.setattr(Lane, "changed", only_before)
    with pytest.raises(AssertionError):
        test_a_generation_that_changes_during_the_copy_is_stale(engine, slots, pool, "gather")


# -- errors


def test_errors_of_slot_memory_fail_the_item(engine: CudaCopyEngine, slots: Slots, pool: Pool) -> None:
    bad = replace(items(2)[1], address=(1, 0))
    result = run(engine, CopyBatch("j", 0, "gather", pool.bind(range(8)), (items(2)[0], bad)))
    assert result.failed == ((1, "error: there is one arena"),) and result.checksums[0] is not None
    assert run(engine, CopyBatch("j", 0, "gather", pool.bind(range(8)), (bad,))).failed[0][0] == 0

    def gone(slot_id: int) -> None:
        raise OSError("gone")

    slots.on_generation = gone
    result = run(engine, CopyBatch("j", 0, "gather", pool.bind(range(8)), items(1)))
    assert result.failed == ((0, "error: gone"),)


def test_memory_that_is_not_registered_fails_the_item(
    engine: CudaCopyEngine, slots: Slots, pool: Pool
) -> None:
    slots.bytes = np.zeros_like(slots.bytes)
    result = run(engine, CopyBatch("j", 0, "gather", pool.bind(range(8)), items(1)))
    assert result.failed == ((0, "error: the slot's memory is not registered with the device"),)


@pytest.mark.parametrize(
    "change",
    [{"start": 3}, {"start": 64}, {"tokens": 17}, {"first_valid": 16}, {"nbytes": NBYTES - 1}, {"group": 1}],
    ids=str,
)
def test_bad_items_are_refused_before_anything_is_copied(
    engine: CudaCopyEngine, slots: Slots, pool: Pool, change: dict[str, Any]
) -> None:
    good = items(2)
    batch = CopyBatch("j", 0, "gather", pool.bind(range(16)), (good[0], replace(good[1], **change)))
    with pytest.raises(GeometryError):
        engine.submit(batch, lambda result: pytest.fail("answered"))
    assert engine.busy_jobs() == frozenset() and not slots.bytes.any()


def test_what_the_engine_cannot_do_is_refused(engine: CudaCopyEngine, pool: Pool, device: FakeDevice) -> None:
    binding = pool.bind(range(4))
    with pytest.raises(GeometryError):
        engine.submit(CopyBatch("j", 0, "scatter", binding, items(1)), print)
    stream = device.stream()
    few = CopyBatch("j", 0, "gather", binding, items(1), after_layers=(mark(device, stream),))
    with pytest.raises(GeometryError, match="1 events for 4 layers"):
        engine.submit(few, print)
    device.destroy_stream(stream)


def test_an_empty_batch_is_answered(engine: CudaCopyEngine, pool: Pool) -> None:
    assert run(engine, CopyBatch("j", 0, "gather", pool.bind(range(4)), ())).ok


CALLS = ["copy", "launch", "record", "wait", "event", "pinned", "allocate", "synchronize", "copy_batch"]


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_call_that_fails_is_answered_and_the_engine_goes_on(
    engine: CudaCopyEngine, pool: Pool, device: FakeDevice, slots: Slots, method: str, after: int
) -> None:
    device.fail(method, after)
    # Either the call was never reached, or its failure is every item's.
    result = run(engine, CopyBatch("j", 0, "gather", pool.bind(range(12)), items(3)))
    assert result.ok or {reason for _, reason in result.failed} == {f"error: {method} failed"}
    device._failing.clear()
    again = run(engine, CopyBatch("k", 0, "gather", pool.bind(range(12)), items(3)))
    assert again.ok
    assert again.checksums == tuple(checksum(slots.bytes[i * NBYTES : (i + 1) * NBYTES]) for i in range(3))
    assert not device.races
    # A failed wait leaves it open whether the work has ended, so what it used is used no more.
    device.leaks = lambda: []  # type: ignore[method-assign]


def test_a_lost_device_answers_everything_with_its_error(
    engine: CudaCopyEngine, pool: Pool, device: FakeDevice
) -> None:
    device.break_down("an illegal address")
    result = run(engine, CopyBatch("j", 0, "gather", pool.bind(range(12)), items(3)))
    assert [i for i, _ in result.failed] == [0, 1, 2]
    assert all("an illegal address" in reason for _, reason in result.failed)
    engine.close()
    assert engine.busy_jobs() == frozenset()


def test_an_engine_that_finds_no_room_gives_back_what_it_took(slots: Slots, device: FakeDevice) -> None:
    for method in ("register", "allocate", "stream", "event"):
        for after in (0, 1):
            device.fail(method, after)
            if (method, after) == ("register", 1):
                continue
            with pytest.raises(TierUnavailable):
                CudaCopyEngine(device, slots, [slots.bytes])
            assert not device.leaks(), (method, after)


# -- order and cancelling


class Gate:
    """Holds a lane's issuing thread inside the first batch until opened."""

    def __init__(self, slots: Slots) -> None:
        self.entered, self.go = threading.Event(), threading.Event()
        self._slots = slots
        slots.on_generation = self._hold

    def _hold(self, slot_id: int) -> None:
        self._slots.on_generation = lambda slot_id: None
        self.entered.set()
        assert self.go.wait(10)


def test_lower_priority_numbers_go_first_and_directions_do_not_wait_for_each_other(
    engine: CudaCopyEngine, slots: Slots, pool: Pool
) -> None:
    gate, order = Gate(slots), []
    scattered = threading.Event()
    binding = pool.bind(range(4))

    def note(result: CopyResult) -> None:
        order.append(result.job)

    engine.submit(CopyBatch("running", 0, "gather", binding, items(1)), note)
    assert gate.entered.wait(10)
    engine.submit(CopyBatch("park-late", 0, "gather", binding, items(1), priority=5), note)
    engine.submit(CopyBatch("park", 0, "gather", binding, items(1)), note)
    back = CopyBatch("restore", 0, "scatter", pool.bind(range(8, 12)), items(1), verify=False)
    engine.submit(back, lambda result: scattered.set())
    assert scattered.wait(10)
    assert {"running", "park-late", "park"} <= engine.busy_jobs()
    gate.go.set()
    assert engine.wait_idle(20)
    assert order == ["running", "park", "park-late"] and engine.busy_jobs() == frozenset()


def test_cancel_answers_what_is_queued_and_lets_the_running_end(
    engine: CudaCopyEngine, slots: Slots, pool: Pool
) -> None:
    gate = Gate(slots)
    results: dict[tuple[str, int], CopyResult] = {}

    def note(result: CopyResult) -> None:
        results[result.job, result.batch] = result

    binding = pool.bind(range(8))
    for job, number in (("a", 0), ("a", 1), ("b", 0)):
        engine.submit(CopyBatch(job, number, "gather", binding, items(2)), note)
        assert gate.entered.wait(10)
    engine.cancel("a")
    engine.cancel("nobody")
    assert list(results) == [("a", 1)]
    assert results["a", 1].failed == ((0, "cancelled"), (1, "cancelled"))
    assert results["a", 1].seconds == 0 and results["a", 1].bytes == 0
    assert engine.busy_jobs() == {"a", "b"}
    gate.go.set()
    assert engine.wait_idle(20)
    assert results["a", 0].failed == ((0, "cancelled"), (1, "cancelled"))
    assert results["b", 0].ok


@pytest.mark.parametrize("direction", ["gather", "scatter"])
def test_what_was_queued_before_a_cancel_counts(
    slots: Slots, pool: Pool, device: FakeDevice, direction: str
) -> None:
    """The engine is cancelled between two loads: whole items are right, with their checksums."""
    engine = CudaCopyEngine(device, slots, [slots.bytes], settings=Settings(always("staged"), 2, NBYTES))
    _, sums = parked(engine, pool, 3)
    lane = engine._lanes[direction]  # type: ignore[index]
    loading, loads = lane._load, []

    def cancel_after_two(*args: Any) -> None:
        loading(*args)
        loads.append(1)
        if len(loads) == 2:
            engine.cancel("j")

    lane._load = cancel_after_two  # type: ignore[method-assign]
    binding = pool.bind(range(12) if direction == "gather" else range(40, 52))
    result = run(engine, CopyBatch("j", 0, direction, binding, items(3, sums)))  # type: ignore[arg-type]
    assert result.failed == ((2, "cancelled"),) and result.bytes == 2 * NBYTES
    assert result.checksums == ((*sums[:2], None) if direction == "gather" else (None,) * 3)
    engine.close()
    assert not device.races and not device.leaks()


def test_close_answers_everything(slots: Slots, pool: Pool, device: FakeDevice, settings: Settings) -> None:
    engine = CudaCopyEngine(device, slots, [slots.bytes], settings=settings)
    gate = Gate(slots)
    results: list[CopyResult] = []
    binding = pool.bind(range(4))
    engine.submit(CopyBatch("a", 0, "gather", binding, items(1)), results.append)
    assert gate.entered.wait(10)
    engine.submit(CopyBatch("b", 0, "gather", binding, items(1)), results.append)
    closing = threading.Thread(target=engine.close)
    closing.start()
    while len(results) < 1:
        closing.join(0.001)
    gate.go.set()
    closing.join(20)
    assert not closing.is_alive()
    assert [(r.job, r.ok) for r in results] == [("b", False), ("a", False)]
    with pytest.raises(TierUnavailable):
        engine.submit(CopyBatch("c", 0, "gather", binding, items(1)), results.append)
    engine.close()
    assert not device.leaks()


def test_many_batches_from_many_threads(
    engine: CudaCopyEngine, pool: Pool, device: FakeDevice, tensors: list[np.ndarray]
) -> None:
    """Each thread moves its own blocks to and fro; every answer comes once and all bytes are right."""
    answers: list[CopyResult] = []

    def to_and_fro(lane: int) -> None:
        pages = range(16 * lane, 16 * lane + 16)
        mine = tuple(replace(item, slot_id=lane, address=(0, lane * NBYTES)) for item in items(4))
        for turn in range(6):
            got: list[CopyResult] = []
            for direction in ("gather", "scatter"):
                item = replace(mine[turn % 4], checksum=got[0].checksums[0] if got else None)
                heard = threading.Event()

                def note(
                    result: CopyResult, got: list[CopyResult] = got, heard: threading.Event = heard
                ) -> None:
                    got.append(result)
                    heard.set()

                engine.submit(CopyBatch(f"{lane}", turn, direction, pool.bind(pages), (item,)), note)  # type: ignore[arg-type]
                assert heard.wait(20)
            answers.extend(got)

    before = [t.copy() for t in tensors]
    threads = [threading.Thread(target=to_and_fro, args=(lane,)) for lane in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == 48 and all(result.ok for result in answers)
    assert all((t == b).all() for t, b in zip(tensors, before, strict=True))
    assert not device.races
