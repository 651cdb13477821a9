"""Commits that come together share one flush and one transaction; none returns before its own is durable."""

from __future__ import annotations

import errno
import gc
import sqlite3
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from kvtier.checksum import checksum
from kvtier.disk.grouping import Group
from kvtier.disk.index import Batch, ConversationRecord
from kvtier.errors import TierUnavailable
from kvtier.testing.tier_kit import content, default_meta, found, get
from kvtier.tier import Slot

if TYPE_CHECKING:
    from tests.disk.conftest import Bench

NBYTES = 70_001
CALLERS = 8
PATIENCE_S = 20.0


class Gate:
    """Carries out works: holds the first call until `open` is set, and notes what each call was given."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()
        self.calls: list[list[int]] = []
        self.failures: dict[int, BaseException] = {}
        self.fatal: BaseException | None = None

    def carry_out(self, works: Sequence[int]) -> list[BaseException | None]:
        self.calls.append(list(works))
        self.entered.set()
        assert self.open.wait(PATIENCE_S)
        if self.fatal is not None and len(works) > 1:
            raise self.fatal
        return [self.failures.get(work) for work in works]


def run_group(gate: Gate, pool: ThreadPoolExecutor) -> dict[int, Future[None]]:
    """Caller 0 leads and is held; callers 1 to 7 come meanwhile; then the gate opens."""
    group: Group[int] = Group()
    futures = {0: pool.submit(group.submit, 0, gate.carry_out)}
    assert gate.entered.wait(PATIENCE_S)
    queued = threading.Semaphore(0)

    class Told(list):  # type: ignore[type-arg]
        def append(self, waiting: object) -> None:
            super().append(waiting)
            queued.release()

    group._queue = Told()
    for n in range(1, CALLERS):
        futures[n] = pool.submit(group.submit, n, gate.carry_out)
    for _ in range(1, CALLERS):
        assert queued.acquire(timeout=PATIENCE_S)
    assert not any(future.done() for future in futures.values()), "nobody returns before it is carried out"
    gate.open.set()
    return futures


def test_those_who_wait_are_carried_out_together() -> None:
    gate = Gate()
    with ThreadPoolExecutor(CALLERS) as pool:
        for future in run_group(gate, pool).values():
            future.result(PATIENCE_S)
    assert gate.calls[0] == [0], "who comes first waits for nobody"
    assert len(gate.calls) == 2
    assert sorted(gate.calls[1]) == list(range(1, CALLERS))


def test_each_is_told_its_own_failure() -> None:
    gate = Gate()
    gate.failures = {3: KeyError("three")}
    with ThreadPoolExecutor(CALLERS) as pool:
        for n, future in run_group(gate, pool).items():
            assert isinstance(future.exception(PATIENCE_S), KeyError) == (n == 3)


def test_a_call_that_breaks_down_is_told_to_all_of_it_and_the_next_goes_on() -> None:
    gate = Gate()
    gate.fatal = OSError("no power")
    with ThreadPoolExecutor(CALLERS) as pool:
        futures = run_group(gate, pool)
        futures[0].result(PATIENCE_S)
        assert all(futures[n].exception(PATIENCE_S) is gate.fatal for n in range(1, CALLERS))
    group: Group[int] = Group()
    group.submit(9, gate.carry_out)
    assert gate.calls[-1] == [9]


def test_many_callers_over_and_over_lose_no_work() -> None:
    done: list[int] = []

    def carry_out(works: Sequence[int]) -> list[BaseException | None]:
        done.extend(works)
        return [None] * len(works)

    group: Group[int] = Group()

    def caller(first: int) -> None:
        for n in range(first, first + 200):
            group.submit(n, carry_out)
            assert n in done[-200 * CALLERS :]

    with ThreadPoolExecutor(CALLERS) as pool:
        for future in [pool.submit(caller, 1000 * n) for n in range(CALLERS)]:
            future.result(PATIENCE_S)
    assert sorted(done) == sorted(1000 * c + n for c in range(CALLERS) for n in range(200))


# -- over a tier


def prepared(bench: Bench) -> list[tuple[Slot, int]]:
    ready = []
    for n in range(CALLERS):
        slot = bench.tier.reserve(default_meta(n, NBYTES), holder="w")
        bench.tier.write(slot, content(n, NBYTES))
        ready.append((slot, checksum(content(n, NBYTES))))
    return ready


def commit_at_once(bench: Bench, pool: ThreadPoolExecutor) -> list[Future[None]]:
    """Caller 0 is held in its transaction until all others wait; each has a record and a state."""
    ready = prepared(bench)
    index = bench.tier._store.index
    apply, entered, go = index.apply, threading.Event(), threading.Event()

    def held(batch: Batch) -> None:
        if not entered.is_set():
            entered.set()
            assert go.wait(PATIENCE_S)
        apply(batch)

    index.apply = held  # type: ignore[method-assign]

    def commit(n: int) -> None:
        record = ConversationRecord("t", str(n), 1, b"x")
        bench.tier.commit_with_records([ready[n]], [record], {f"s{n}": b"x"})

    futures = [pool.submit(commit, 0)]
    assert entered.wait(PATIENCE_S)
    futures += [pool.submit(commit, n) for n in range(1, CALLERS)]
    pause = threading.Event()
    for _ in range(2000):
        if len(bench.tier._commits._queue) == CALLERS - 1:
            break
        pause.wait(0.01)
    assert not any(future.done() for future in futures)
    assert all(bench.find(n) is None for n in range(CALLERS)), "nothing is seen before it is durable"
    go.set()
    return futures


def test_eight_callers_need_two_flushes_and_everything_is_there(bench: Bench) -> None:
    with ThreadPoolExecutor(CALLERS) as pool:
        for future in commit_at_once(bench, pool):
            future.result(PATIENCE_S)
    assert bench.tier.stats().flushes == 2
    tier = bench.reopen()
    for n in range(CALLERS):
        assert get(tier, found(tier, default_meta(n, NBYTES).object_id)) == content(n, NBYTES)
        assert tier.record("t", str(n)) is not None
        assert tier.state(f"s{n}") == b"x"


def test_one_that_cannot_be_listed_takes_no_other_with_it(bench: Bench) -> None:
    index = bench.tier._store.index
    write = index._write

    def picky(batch: Batch) -> None:
        if any(record.conversation == "5" for record in batch.records):
            raise sqlite3.OperationalError("not this one")
        write(batch)

    index._write = picky  # type: ignore[method-assign]
    with ThreadPoolExecutor(CALLERS) as pool:
        futures = commit_at_once(bench, pool)
        failed = [n for n, future in enumerate(futures) if future.exception(PATIENCE_S) is not None]
    assert failed == [5]
    assert isinstance(futures[5].exception(), TierUnavailable)
    tier = bench.reopen()
    assert [n for n in range(CALLERS) if bench.find(n) is None] == [5]
    assert tier.record("t", "5") is None


def test_a_flush_that_fails_fails_all_who_shared_it(bench: Bench) -> None:
    with ThreadPoolExecutor(CALLERS) as pool:
        bench.ops.fail["fdatasync"] = errno.EIO
        ready = prepared(bench)
        futures = [pool.submit(bench.tier.commit, [one]) for one in ready]
        failures = [future.exception(PATIENCE_S) for future in futures]
    assert all(failure is not None for failure in failures)
    bench.ops.fail.clear()
    assert all(bench.find(n) is None for n in range(CALLERS))
    bench.tier.holder_ended("w")
    assert bench.tier.usage().used_bytes == 0


def test_an_answer_before_the_flush_is_caught(bench: Bench) -> None:
    """The check of this page, on a tier that answers too early."""
    bench.tier._commits.submit = lambda work, carry_out: None  # type: ignore[method-assign]
    with pytest.raises(AssertionError):
        bench.put(1)


# -- what a closed tier leaves


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("cycle", [False, True])
def test_a_closed_tier_is_freed_without_the_cycle_collector(bench: Bench, sealed: bool, cycle: bool) -> None:
    """A process may have set it aside (daemon/collector.py): then no cycle of a store is ever freed."""
    other = type(bench)(bench.directory.parent / "other", bytes(32) if sealed else None)
    other.tier.make_room_ahead()
    other.tier.start_scrub(1 << 20)
    other.put(1)
    other.tier.close()
    tier = vars(other).pop("tier")
    books = weakref.ref(tier._ledger), weakref.ref(tier._store._keys)
    if cycle:
        # The control: held by what it holds.
        tier._commits.owner = tier
    gc.disable()
    try:
        del tier
        assert [book() is not None for book in books] == [cycle, cycle]
    finally:
        gc.enable()
