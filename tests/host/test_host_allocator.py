"""The extent allocator against a brute-force one, and its window search against all windows."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, given, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvtier.host.allocator import ALIGN_BYTES, ExtentAllocator, room_bytes
from kvtier.host.sorted_ints import SortedInts

UNITS = 40
CAPACITY_BYTES = UNITS * ALIGN_BYTES
PICK = st.integers(0, 1 << 16)


class BruteForce:
    """One cell per unit: None is free, False not ready, otherwise the offset of its extent."""

    def __init__(self) -> None:
        self.cells: list[int | bool | None] = [False] * UNITS

    def grow(self, ready_bytes: int) -> None:
        for i in range(ready_bytes // ALIGN_BYTES):
            if self.cells[i] is False:
                self.cells[i] = None

    def free_runs(self) -> list[tuple[int, int]]:
        """(units, first unit) of every maximal free run."""
        runs, start = [], None
        for i, cell in enumerate([*self.cells, False]):
            if cell is None and start is None:
                start = i
            elif cell is not None and start is not None:
                runs.append((i - start, start))
                start = None
        return runs

    def allocate(self, nbytes: int) -> int | None:
        units = -(-nbytes // ALIGN_BYTES)
        fits = sorted(run for run in self.free_runs() if run[0] >= units)
        if not fits:
            return None
        first = fits[0][1]
        for i in range(first, first + units):
            self.cells[i] = first * ALIGN_BYTES
        return first * ALIGN_BYTES

    def free(self, offset: int) -> None:
        self.cells = [None if cell is not False and cell == offset else cell for cell in self.cells]


class AllocatorMachine(RuleBasedStateMachine):
    allocator_class = ExtentAllocator

    def __init__(self) -> None:
        super().__init__()
        self.tested = self.allocator_class(CAPACITY_BYTES)
        self.model = BruteForce()
        self.rooms: dict[int, int] = {}

    @rule(units=st.integers(0, UNITS))
    def grow(self, units: int) -> None:
        ready_bytes = max(self.tested.ready_bytes, units * ALIGN_BYTES)
        self.tested.grow(ready_bytes)
        self.model.grow(ready_bytes)

    @rule(nbytes=st.integers(1, 12 * ALIGN_BYTES))
    def allocate(self, nbytes: int) -> None:
        offset = self.tested.allocate(nbytes)
        assert offset == self.model.allocate(nbytes)
        if offset is not None:
            assert offset % ALIGN_BYTES == 0
            self.rooms[offset] = nbytes

    @precondition(lambda self: self.rooms)
    @rule(pick=PICK)
    def free(self, pick: int) -> None:
        offset = list(self.rooms)[pick % len(self.rooms)]
        assert self.tested.free(offset) == room_bytes(self.rooms.pop(offset))
        self.model.free(offset)

    @invariant()
    def extents_tile_what_is_ready(self) -> None:
        at, used, before_was_free = 0, {}, False
        for offset, nbytes, is_used in self.tested.extents():
            assert offset == at
            assert is_used or not before_was_free
            before_was_free = not is_used
            at += nbytes
            if is_used:
                used[offset] = nbytes
        assert at == self.tested.ready_bytes
        assert used == {offset: room_bytes(nbytes) for offset, nbytes in self.rooms.items()}
        assert self.tested.used_bytes == sum(used.values())
        longest = max((units for units, _ in self.model.free_runs()), default=0)
        assert self.tested.largest_free_bytes() == longest * ALIGN_BYTES

    def teardown(self) -> None:
        for offset in list(self.rooms):
            self.tested.free(offset)
        assert self.tested.used_bytes == 0
        assert self.tested.largest_free_bytes() == self.tested.ready_bytes


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(max_examples=80, stateful_step_count=50)


class NeverCoalesces(ExtentAllocator):
    def _add_free(self, offset: int, units: int) -> None:
        self._put_free(offset, units)


class LosesTheRest(ExtentAllocator):
    def allocate(self, nbytes: int) -> int | None:
        offset = super().allocate(nbytes)
        if offset is not None and offset + room_bytes(nbytes) in self._free:
            self._drop_free(offset + room_bytes(nbytes))
        return offset


class FreesTooMuch(ExtentAllocator):
    def free(self, offset: int) -> int:
        freed = super().free(offset)
        behind = offset + freed
        if behind in self._used:
            self._add_free(behind, self._used.pop(behind))
        return freed


@pytest.mark.parametrize("broken", [NeverCoalesces, LosesTheRest, FreesTooMuch])
def test_the_machine_catches_a_broken_allocator(broken: type[ExtentAllocator]) -> None:
    machine = type("Broken", (AllocatorMachine,), {"allocator_class": broken})
    quick = settings(max_examples=3000, phases=[Phase.generate])
    with pytest.raises((AssertionError, KeyError)):
        run_state_machine_as_test(machine, settings=quick)


def test_mixed_geometries_fill_up_and_give_every_byte_back() -> None:
    mib = 1 << 20
    allocator = ExtentAllocator(1024 * mib, ready_bytes=1024 * mib)
    random_ = random.Random(7)
    rooms: list[int] = []
    for _ in range(3):
        while True:
            nbytes = random_.choice([2 * mib, 32 * mib, random_.randrange(1, 3 * mib)])
            offset = allocator.allocate(nbytes)
            if offset is None:
                break
            rooms.append(offset)
        assert allocator.used_bytes > 900 * mib
        random_.shuffle(rooms)
        for offset in rooms[len(rooms) // 3 :]:
            allocator.free(offset)
        del rooms[len(rooms) // 3 :]
    for offset in rooms:
        allocator.free(offset)
    assert allocator.used_bytes == 0
    assert allocator.allocate(1024 * mib) == 0


def test_best_fit_keeps_large_rooms_whole() -> None:
    allocator = ExtentAllocator(CAPACITY_BYTES, ready_bytes=CAPACITY_BYTES)
    small, _, large = (allocator.allocate(n * ALIGN_BYTES) for n in (2, 1, 10))
    allocator.allocate(CAPACITY_BYTES - 13 * ALIGN_BYTES)
    assert small is not None
    assert large is not None
    allocator.free(small)
    allocator.free(large)
    assert allocator.allocate(ALIGN_BYTES + 1) == small
    assert allocator.allocate(10 * ALIGN_BYTES) == large


@pytest.mark.parametrize("nbytes", [0, -1])
def test_nothing_cannot_be_allocated(nbytes: int) -> None:
    with pytest.raises(ValueError):
        ExtentAllocator(CAPACITY_BYTES, ready_bytes=CAPACITY_BYTES).allocate(nbytes)


def test_what_is_not_allocated_cannot_be_freed() -> None:
    allocator = ExtentAllocator(CAPACITY_BYTES, ready_bytes=CAPACITY_BYTES)
    offset = allocator.allocate(3 * ALIGN_BYTES)
    assert offset == 0
    with pytest.raises(KeyError):
        allocator.free(ALIGN_BYTES)
    allocator.free(0)
    with pytest.raises(KeyError):
        allocator.free(0)


@pytest.mark.parametrize("ready_bytes", [ALIGN_BYTES, CAPACITY_BYTES + ALIGN_BYTES, 3 * ALIGN_BYTES + 1])
def test_it_grows_by_whole_units_within_its_capacity(ready_bytes: int) -> None:
    allocator = ExtentAllocator(CAPACITY_BYTES, ready_bytes=2 * ALIGN_BYTES)
    with pytest.raises(ValueError):
        allocator.grow(ready_bytes)


# -- windows


def cheapest_by_trying_all(
    extents: list[tuple[int, int, bool]], nbytes: int, cost: dict[int, int | None]
) -> float | None:
    best: float | None = None
    for first in range(len(extents)):
        length, total = 0, 0
        for offset, size, used in extents[first:]:
            price = cost[offset] if used else 0
            if price is None:
                break
            length, total = length + size, total + price
            if length >= nbytes:
                best = total if best is None else min(best, total)
                break
    return best


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=14),
    prices=st.lists(st.one_of(st.none(), st.integers(0, 9)), min_size=14, max_size=14),
    kept=st.lists(st.booleans(), min_size=14, max_size=14),
    wanted=st.integers(1, UNITS),
)
@settings(max_examples=300)
def test_the_window_is_the_cheapest_there_is(
    sizes: list[int], prices: list[int | None], kept: list[bool], wanted: int
) -> None:
    allocator = ExtentAllocator(CAPACITY_BYTES, ready_bytes=CAPACITY_BYTES)
    offsets = [allocator.allocate(units * ALIGN_BYTES) for units in sizes]
    cost: dict[int, int | None] = {}
    for offset, price, keep in zip(offsets, prices, kept, strict=False):
        if offset is not None and keep:
            cost[offset] = price
        elif offset is not None:
            allocator.free(offset)
    nbytes = wanted * ALIGN_BYTES - 1
    window = allocator.cheapest_window(nbytes, cost.__getitem__)
    best = cheapest_by_trying_all(allocator.extents(), nbytes, cost)
    if best is None:
        assert window is None
        return
    assert window is not None
    assert window.cost == best == sum(cost[offset] or 0 for offset in window.offsets)
    assert list(window.offsets) == sorted(window.offsets)
    for offset in window.offsets:
        allocator.free(offset)
    assert allocator.allocate(nbytes) is not None


def test_small_rooms_never_calcify() -> None:
    """Every second 2-unit room is dear; a 6-unit room still costs only the cheapest neighbours."""
    allocator = ExtentAllocator(CAPACITY_BYTES, ready_bytes=CAPACITY_BYTES)
    offsets = [allocator.allocate(2 * ALIGN_BYTES) for _ in range(UNITS // 2)]
    assert allocator.allocate(6 * ALIGN_BYTES) is None
    cost = {offset: 1.0 + abs(i - 9) for i, offset in enumerate(offsets) if offset is not None}
    window = allocator.cheapest_window(6 * ALIGN_BYTES, cost.__getitem__)
    assert window is not None
    assert window.offsets == tuple(offsets[8:11])


# -- the sorted collection


@given(st.lists(st.integers(0, 3000), max_size=1500, unique=True), st.integers(0, 3000))
@settings(max_examples=40)
def test_sorted_ints_are_a_sorted_list(values: list[int], asked: int) -> None:
    tested = SortedInts()
    for value in values:
        tested.add(value)
    for value in values[::3]:
        tested.remove(value)
    left = sorted(set(values) - set(values[::3]))
    assert list(tested) == left
    assert tested.first_from(asked) == next((value for value in left if value >= asked), None)
    assert tested.last() == (left[-1] if left else None)
    with pytest.raises(KeyError):
        tested.remove(5000)


def test_sorted_ints_split_and_vanish_chunks() -> None:
    tested = SortedInts()
    order = list(range(5000))
    random.Random(3).shuffle(order)
    for value in order:
        tested.add(value)
    assert len(tested._chunks) > 5
    assert list(tested) == list(range(5000))
    for value in order:
        tested.remove(value)
    assert tested.last() is None
    assert tested._chunks == []
