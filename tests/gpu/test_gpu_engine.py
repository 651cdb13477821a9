"""The CPU copy engine: failures of single items, generations, order, cancelling, ends."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvtier.background import NICER
from kvtier.checksum import checksum
from kvtier.errors import GeometryError, TierUnavailable
from kvtier.gpu.cpu_copy import BlockCopy
from kvtier.gpu.cpu_engine import CpuCopyEngine
from kvtier.gpu.describe import paged
from kvtier.gpu.engine import CopyBatch, CopyItem, CopyResult
from kvtier.gpu.plan import Unit
from kvtier.gpu.pool import Binding, Pool
from kvtier.waiting import wait_until

P, PAGES, BLOCK = 4, 64, 16
NBYTES = 2 * BLOCK * 2 * 8 * 2


class Slots:
    """Slots of NBYTES each; `on_generation` runs at each look at a generation."""

    def __init__(self) -> None:
        self.bytes = np.zeros(16 * NBYTES, np.uint8)
        self.generations = [1] * 16
        self.on_generation: Callable[[int], None] = lambda slot_id: None

    def view(self, address: tuple[int, int], nbytes: int) -> np.ndarray:
        if address[0]:
            raise TierUnavailable("there is one arena")
        return self.bytes[address[1] : address[1] + nbytes]

    def generation(self, slot_id: int) -> int:
        self.on_generation(slot_id)
        return self.generations[slot_id]


@pytest.fixture
def slots() -> Slots:
    return Slots()


@pytest.fixture
def engine(slots: Slots) -> Iterator[CpuCopyEngine]:
    made = CpuCopyEngine(slots, threads=2)
    yield made
    made.close()


@pytest.fixture
def pool() -> Pool:
    rng = np.random.default_rng(0)
    tensor = rng.integers(0, 65536, (2, PAGES, P, 2, 8), dtype=np.uint16)
    return Pool(paged([(tensor,)], "kv page token head dim", block_tokens=BLOCK), [tensor])


def items(count: int, sums: tuple[int | None, ...] = ()) -> tuple[CopyItem, ...]:
    return tuple(
        CopyItem(0, i * BLOCK, BLOCK, 0, i, 1, (0, i * NBYTES), NBYTES, sums[i] if sums else None)
        for i in range(count)
    )


def run(engine: CpuCopyEngine, batch: CopyBatch) -> CopyResult:
    results: list[CopyResult] = []
    engine.submit(batch, results.append)
    assert engine.wait_idle(10)
    assert len(results) == 1
    return results[0]


def parked(engine: CpuCopyEngine, pool: Pool, count: int) -> tuple[Binding, tuple[int | None, ...]]:
    binding = pool.bind(range(4 * count))
    result = run(engine, CopyBatch("park", 0, "gather", binding, items(count)))
    assert result.ok and result.bytes == count * NBYTES and result.seconds > 0
    return binding, result.checksums


# -- wrong bytes


def test_a_flipped_bit_fails_its_item_alone(engine: CpuCopyEngine, slots: Slots, pool: Pool) -> None:
    _, sums = parked(engine, pool, 3)
    slots.bytes[NBYTES + 100] ^= 4
    result = run(engine, CopyBatch("r", 7, "scatter", pool.bind(range(40, 52)), items(3, sums)))
    assert (result.job, result.batch, result.ok) == ("r", 7, False)
    assert result.failed == ((1, "corrupt"),)
    assert result.bytes == 2 * NBYTES


def test_control_without_verify_the_wrong_byte_is_delivered(
    engine: CpuCopyEngine, slots: Slots, pool: Pool
) -> None:
    _, sums = parked(engine, pool, 1)
    slots.bytes[100] ^= 4
    target = pool.bind(range(40, 44))
    assert run(engine, CopyBatch("r", 0, "scatter", target, items(1, sums), verify=False)).ok
    wrong = slots.bytes[:NBYTES].tobytes()
    slots.bytes[:] = 0
    run(engine, CopyBatch("g", 0, "gather", target, items(1)))
    assert slots.bytes[:NBYTES].tobytes() == wrong
    assert checksum(wrong) != sums[0]


def test_checksums_only_where_asked(engine: CpuCopyEngine, slots: Slots, pool: Pool) -> None:
    _, sums = parked(engine, pool, 2)
    assert sums == tuple(checksum(slots.bytes[i * NBYTES : (i + 1) * NBYTES]) for i in range(2))
    plain = run(engine, CopyBatch("p", 0, "gather", pool.bind(range(8)), items(2), verify=False))
    assert plain.ok and plain.checksums == (None, None)


# -- generations


@pytest.mark.parametrize("direction", ["gather", "scatter"])
def test_a_stale_slot_is_not_touched(engine: CpuCopyEngine, slots: Slots, pool: Pool, direction: str) -> None:
    binding, sums = parked(engine, pool, 2)
    slots.generations[1] = 2
    slots.bytes[:] = 7
    before = [memory.copy() for memory in pool.memory]
    batch = CopyBatch("j", 0, direction, binding, items(2, sums), verify=False)  # type: ignore[arg-type]
    result = run(engine, batch)
    assert result.failed == ((1, "stale"),)
    assert (slots.bytes[NBYTES : 2 * NBYTES] == 7).all()
    if direction == "scatter":
        rows = before[0].reshape(2, PAGES, -1)[:, 4:8]
        assert (pool.memory[0].reshape(2, PAGES, -1)[:, 4:8] == rows).all()


@pytest.mark.parametrize("direction", ["gather", "scatter"])
def test_a_generation_that_changes_during_the_copy_is_stale(
    engine: CpuCopyEngine, slots: Slots, pool: Pool, direction: str
) -> None:
    binding, sums = parked(engine, pool, 1)
    looks = []

    def bump_after_the_first_look(slot_id: int) -> None:
        looks.append(slot_id)
        slots.generations[slot_id] = len(looks)

    slots.on_generation = bump_after_the_first_look
    result = run(engine, CopyBatch("j", 0, direction, binding, items(1, sums)))  # type: ignore[arg-type]
    assert len(looks) == 2
    assert result.failed == ((0, "stale"),)
    assert result.checksums == (None,)
    assert result.bytes == 0


def test_control_an_engine_that_looks_only_before_is_caught(
    slots: Slots, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuCopyEngine, "_changed", lambda self, item: "")
    engine = CpuCopyEngine(slots, threads=1)
    try:
        with pytest.raises(AssertionError):
            test_a_generation_that_changes_during_the_copy_is_stale(engine, slots, pool, "gather")
    finally:
        engine.close()


# -- errors


def test_errors_of_slot_memory_fail_the_item(engine: CpuCopyEngine, slots: Slots, pool: Pool) -> None:
    bad = replace(items(2)[1], address=(1, 0))
    result = run(engine, CopyBatch("j", 0, "gather", pool.bind(range(8)), (items(2)[0], bad)))
    assert result.failed == ((1, "error: there is one arena"),)
    assert result.checksums[0] is not None

    def gone(slot_id: int) -> None:
        raise OSError("gone")

    slots.on_generation = gone
    result = run(engine, CopyBatch("j", 0, "gather", pool.bind(range(8)), items(1)))
    assert result.failed == ((0, "error: gone"),)


def test_an_error_in_the_copy_fails_the_item(
    engine: CpuCopyEngine, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: BlockCopy, unit: Unit, hashing: bool) -> int:
        raise ValueError("no")

    monkeypatch.setattr(BlockCopy, "gather", broken)
    result = run(engine, CopyBatch("j", 0, "gather", pool.bind(range(4)), items(1)))
    assert result.failed == ((0, "error: no"),)


@pytest.mark.parametrize(
    "change",
    [
        {"start": 3},
        {"start": 64},
        {"tokens": 17, "nbytes": NBYTES // 16 * 17},
        {"first_valid": 16},
        {"first_valid": -1},
        {"nbytes": NBYTES - 1},
        {"group": 1},
        {"tokens": 0},
    ],
    ids=str,
)
def test_bad_items_are_refused_before_anything_is_copied(
    engine: CpuCopyEngine, slots: Slots, pool: Pool, change: dict[str, Any]
) -> None:
    good = items(2)
    batch = CopyBatch("j", 0, "gather", pool.bind(range(16)), (good[0], replace(good[1], **change)))
    with pytest.raises(GeometryError):
        engine.submit(batch, lambda result: pytest.fail("answered"))
    assert engine.busy_jobs() == frozenset()
    assert not slots.bytes.any()


def test_verify_needs_a_checksum(engine: CpuCopyEngine, pool: Pool) -> None:
    with pytest.raises(GeometryError):
        engine.submit(CopyBatch("j", 0, "scatter", pool.bind(range(4)), items(1)), print)


def test_an_empty_batch_is_answered(engine: CpuCopyEngine, pool: Pool) -> None:
    assert run(engine, CopyBatch("j", 0, "gather", pool.bind(range(4)), ())).ok


# -- order and cancelling


class Gate:
    """Holds who copies a slot first inside that copy, until opened."""

    def __init__(self, slots: Slots, slot_id: int = 0) -> None:
        self.entered, self.go = threading.Event(), threading.Event()
        self._slot_id, self._others = slot_id, slots.on_generation
        slots.on_generation = self._hold

    def _hold(self, slot_id: int) -> None:
        if slot_id != self._slot_id or self.entered.is_set():
            self._others(slot_id)
            return
        self.entered.set()
        assert self.go.wait(10)


@pytest.fixture
def single(slots: Slots) -> Iterator[CpuCopyEngine]:
    made = CpuCopyEngine(slots, threads=1)
    yield made
    made.close()


def order_of(engine: CpuCopyEngine, slots: Slots, pool: Pool) -> list[str]:
    """How jobs end that were queued while a park and a restore were at work; that park is let go first."""
    parking, restoring, order = Gate(slots, 0), Gate(slots, 1), []
    binding = pool.bind(range(8))
    for gate, job, direction, item in (
        (parking, "parking", "gather", items(1)),
        (restoring, "restoring", "scatter", items(2)[1:]),
    ):
        batch = CopyBatch(job, 0, direction, binding, item, verify=False)  # type: ignore[arg-type]
        engine.submit(batch, lambda result: order.append(result.job))
        assert gate.entered.wait(10)
    for job, priority in (("park-late", 5), ("park", 0), ("restore-late", 9), ("restore", 1)):
        direction = "gather" if job.startswith("park") else "scatter"
        batch = CopyBatch(job, 0, direction, binding, items(1), verify=False, priority=priority)  # type: ignore[arg-type]
        engine.submit(batch, lambda result: order.append(result.job))
    assert engine.busy_jobs() == {"parking", "restoring", "park-late", "park", "restore-late", "restore"}
    assert not engine.wait_idle(0)
    parking.go.set()
    # Whoever gathers and should wait would go on at once.
    wait_until(lambda: len(order) > 1, 0.05)
    restoring.go.set()
    assert engine.wait_idle(10)
    assert engine.busy_jobs() == frozenset()
    return order


def test_restores_go_before_parks_and_lower_priority_numbers_first(
    single: CpuCopyEngine, slots: Slots, pool: Pool
) -> None:
    order = order_of(single, slots, pool)
    assert [job for job in order if job.startswith("park")] == ["parking", "park", "park-late"]
    assert [job for job in order if job.startswith("restor")] == ["restoring", "restore", "restore-late"]
    # The last restore is under way when the first park begins.
    assert order.index("park") > order.index("restore")


def test_control_an_engine_that_gathers_while_restores_wait_is_caught(
    single: CpuCopyEngine, slots: Slots, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuCopyEngine, "_may_take", lambda self, direction: bool(self._queues[direction]))
    order = order_of(single, slots, pool)
    assert order.index("park") < order.index("restore")


def nice_now() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_a_gather_leaves_the_processor_to_others_and_a_scatter_does_not(
    engine: CpuCopyEngine, slots: Slots, pool: Pool
) -> None:
    seen: set[int] = set()
    slots.on_generation = lambda slot_id: seen.add(nice_now())
    sums = run(engine, CopyBatch("park", 0, "gather", pool.bind(range(16)), items(4))).checksums
    assert seen == {min(19, nice_now() + NICER)}
    seen.clear()
    assert run(engine, CopyBatch("r", 0, "scatter", pool.bind(range(16)), items(4, sums))).ok
    assert seen == {nice_now()}


def test_cancel_answers_what_is_queued_and_lets_the_running_end(
    single: CpuCopyEngine, slots: Slots, pool: Pool
) -> None:
    gate = Gate(slots)
    results: dict[tuple[str, int], CopyResult] = {}

    def note(result: CopyResult) -> None:
        results[result.job, result.batch] = result

    binding = pool.bind(range(8))
    for job, number in (("a", 0), ("a", 1), ("b", 0)):
        single.submit(CopyBatch(job, number, "gather", binding, items(2)), note)
        assert gate.entered.wait(10)
    single.cancel("a")
    single.cancel("nobody")
    assert list(results) == [("a", 1)]
    assert results["a", 1].failed == ((0, "cancelled"), (1, "cancelled"))
    assert results["a", 1].seconds == 0 and results["a", 1].bytes == 0
    assert single.busy_jobs() == {"a", "b"}
    gate.go.set()
    assert single.wait_idle(10)
    assert results["a", 0].failed == ((1, "cancelled"),)
    assert results["a", 0].checksums[0] is not None
    assert results["b", 0].ok
    assert slots.bytes[:NBYTES].any()


def test_close_answers_everything(slots: Slots, pool: Pool) -> None:
    engine = CpuCopyEngine(slots, threads=1)
    gate = Gate(slots)
    results: list[CopyResult] = []
    binding = pool.bind(range(4))
    engine.submit(CopyBatch("a", 0, "gather", binding, items(1)), results.append)
    assert gate.entered.wait(10)
    engine.submit(CopyBatch("b", 0, "gather", binding, items(1)), results.append)
    closing = threading.Thread(target=engine.close)
    closing.start()
    gate.go.set()
    closing.join(10)
    assert not closing.is_alive()
    assert [(r.job, r.ok) for r in results] == [("b", False), ("a", True)]
    with pytest.raises(TierUnavailable):
        engine.submit(CopyBatch("c", 0, "gather", binding, items(1)), results.append)


def test_many_batches_from_many_threads(engine: CpuCopyEngine, slots: Slots, pool: Pool) -> None:
    """Each thread moves its own blocks to and fro; every answer comes once and all bytes are right."""
    answers: list[CopyResult] = []
    wrong: list[int] = []

    def to_and_fro(lane: int) -> None:
        pages = range(16 * lane, 16 * lane + 16)
        mine = tuple(replace(item, slot_id=lane, address=(0, lane * NBYTES)) for item in items(4))
        for turn in range(20):
            item = mine[turn % 4]
            heard = threading.Event()
            got: list[CopyResult] = []

            def note(result: CopyResult, got: list[CopyResult] = got, heard: threading.Event = heard) -> None:
                got.append(result)
                heard.set()

            engine.submit(CopyBatch(f"{lane}", turn, "gather", pool.bind(pages), (item,)), note)
            assert heard.wait(10)
            checked = replace(item, checksum=got[0].checksums[0])
            engine.submit(CopyBatch(f"{lane}", turn, "scatter", pool.bind(pages), (checked,)), note)
            assert engine.wait_idle(10)
            wrong.extend(1 for result in got if not result.ok)
            answers.extend(got)

    before = pool.memory[0].copy()
    threads = [threading.Thread(target=to_and_fro, args=(lane,)) for lane in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(answers) == 160 and not wrong
    assert (pool.memory[0] == before).all()
