"""Objects as rows of arrays, the table that finds them by name, and the sweep over all of them."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvtier.disk.name_table import NameTable
from kvtier.disk.rows import FREE, LISTED, QUARANTINED, ROW_BYTES, ObjectRow, Rows
from kvtier.disk.sweep import Sweep
from kvtier.objects import ObjectId, ObjectMeta, Root
from kvtier.testing.tier_kit import default_meta

ROOTS = [Root(bytes([n]) * 32, f"t{n}", b"f" * 32, "exact", 256) for n in range(3)]
MOST = (1 << 63) - 1


def row(n: int, *, key: bytes | None = None, sequence: int | None = None) -> ObjectRow:
    object_id = ObjectId(key or n.to_bytes(32, "big"), n % 2, f"L{n % 3}")
    meta = ObjectMeta(object_id, ROOTS[n % 3], b"p" * 32, n, 256, 1, 100 + n, (1 << 64) - 1 - n)
    sealed = n % 5 == 0
    return ObjectRow(meta, n if sequence is None else sequence, n % 4, n * 4096, 90 + n, "lz4", sealed=sealed)


def filled(*of: ObjectRow) -> Rows:
    rows = Rows()
    for each in of:
        rows.put(rows.add(), each)
    return rows


def table_of(rows: Rows) -> NameTable:
    return NameTable(rows)


# -- rows


def test_a_row_comes_back_as_it_was() -> None:
    whole = replace(row(1), quarantined=True)
    meta = replace(
        row(2).meta, nbytes=MOST, start=MOST, tokens=MOST, first_valid=MOST, checksum=(1 << 64) - 1
    )
    extreme = ObjectRow(meta, MOST, MOST, MOST, MOST, "raw", sealed=True)
    rows = filled(row(0), whole, extreme)
    assert list(rows) == [row(0), whole, extreme]
    assert rows.slot(2).address == (MOST, MOST)
    assert ROW_BYTES == 160


def test_single_rows_and_columns_are_the_same_memory() -> None:
    rows = filled(*(row(n) for n in range(50)))
    numbers = rows.numbers(LISTED)
    for field in ("sequence", "segment", "at", "stored_bytes"):
        assert rows.column(field, numbers).tolist() == [getattr(row(n), field) for n in range(50)]
    assert rows.column("checksum", numbers).tolist() == [row(n).meta.checksum for n in range(50)]
    rows.put_checksums(numbers[3:5], np.array([7, 8], dtype=np.uint64))
    assert [rows.get(n).meta.checksum for n in (2, 3, 4)] == [row(2).meta.checksum, 7, 8]


def test_rows_go_on_behind_the_end_of_an_array() -> None:
    rows = Rows()
    count = (1 << 15) + 3
    for _ in range(count - 1):
        rows.add()
    rows.put(rows.add(), row(9))
    assert rows.count == count
    assert rows.numbers(LISTED).tolist() == [count - 1]
    assert rows.get(count - 1) == row(9)
    assert rows.holds(count - 1, 9)
    assert [len(chunk) for _, chunk in rows.chunks()] == [1 << 15, 3]
    columns = {"sequence": np.arange(1 << 15), "state": np.full(1 << 15, LISTED)}
    rows.extend(columns)
    assert rows.column("sequence", np.array([count, rows.count - 1])).tolist() == [0, (1 << 15) - 1]


def test_what_a_row_is() -> None:
    rows = filled(row(0), replace(row(1), quarantined=True), row(2))
    rows.clear(2)
    assert [rows.numbers(state).tolist() for state in (LISTED, QUARANTINED, FREE)] == [[0], [1], [2]]
    assert [rows.holds(n, n) for n in (-1, 0, 1, 2, 3)] == [False, True, False, False, False]
    assert not rows.holds(0, 1)
    assert rows.drop(np.array([0, 1])) == [0, 1]
    assert list(rows) == []


@pytest.mark.parametrize(
    "meta",
    [
        replace(row(1).meta, checksum=None),
        replace(row(1).meta, parent_key=b"p"),
        replace(row(1).meta, object_id=ObjectId(b"k" * 33, 0, "s")),
    ],
)
def test_what_does_not_fit_into_a_row_is_refused(meta: ObjectMeta) -> None:
    with pytest.raises(ValueError):
        filled(replace(row(1), meta=meta))


def test_slots_from_a_place_on_are_of_one_segment_in_order() -> None:
    rows = filled(*(row(n) for n in (9, 5, 1, 2, 6, 10, 3)))
    rows.clear(4)
    assert [slot.address for slot in rows.slots_from(1, 2 * 4096)] == [(1, 5 * 4096), (1, 9 * 4096)]
    assert [slot.generation for slot in rows.slots_from(1, 9 * 4096 + 1)] == [2, 10]
    assert rows.slots_from(0, 0) == rows.slots_from(1, 0)
    assert rows.slots_from(3, 3 * 4096 + 1) == []


# -- the table


def test_an_unknown_name_is_not_found() -> None:
    table = table_of(filled(row(1)))
    name = row(1).meta.object_id
    assert table.find(name) == 0
    for other in (name._replace(shard="new"), name._replace(group=7), name._replace(block_key=b"short")):
        assert table.find(other) == -1


class CrowdedTable(NameTable):
    """Almost all rows have one of four tags."""

    def _tag(self, name: tuple[bytes, int, int]) -> int:
        return super()._tag(name) % 4 << 29

    def _fill(self, numbers: object) -> None:
        """As the table's own, one by one."""
        self._bits, self._shift = 6, 25
        self._cells = np.full((1 << 6) + 2048, -1, dtype=np.int64).data
        self.count = 0
        for number in numbers.tolist():  # type: ignore[attr-defined]
            self.count += 1
            tag = self._tag(self._rows.name(number))
            at = tag >> self._shift
            while self._cells[at] != -1:
                at += 1
            self._cells[at] = tag << 32 | number


class TableMachine(RuleBasedStateMachine):
    """A table, and one in which everything collides, against a dict."""

    kinds: tuple[type[NameTable], ...] = (NameTable, CrowdedTable)

    def __init__(self) -> None:
        super().__init__()
        self.rows = Rows()
        self.tables = [kind(self.rows) for kind in self.kinds]
        self.known: dict[ObjectId, int] = {}

    @rule(n=st.integers(0, 300))
    def add(self, n: int) -> None:
        name = row(n).meta.object_id
        if name in self.known:
            return
        number = self.rows.add()
        self.rows.put(number, row(n))
        self.known[name] = number
        for table in self.tables:
            table.add(number)

    @rule(first=st.integers(0, 300), count=st.integers(1, 60))
    def add_some(self, first: int, count: int) -> None:
        for n in range(first, first + count):
            self.add(n)

    @rule(draw=st.randoms(use_true_random=False), count=st.integers(1, 40))
    def remove(self, draw: random.Random, count: int) -> None:
        for name in draw.sample(sorted(self.known), min(count, len(self.known))):
            number = self.known.pop(name)
            for table in self.tables:
                table.remove(number)
            self.rows.clear(number)

    @rule()
    def make_anew(self) -> None:
        self.tables = [kind(self.rows) for kind in self.kinds]

    @invariant()
    def all_are_found(self) -> None:
        for table in self.tables:
            assert table.count == len(self.known)
            for n in range(0, 361, 7):
                name = row(n).meta.object_id
                assert table.find(name) == self.known.get(name, -1)

    def teardown(self) -> None:
        for table in self.tables:
            assert all(table.find(name) == number for name, number in self.known.items())


TableMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestTableMachine = TableMachine.TestCase


class LazyTable(CrowdedTable):
    """Wrong on purpose: what stands behind a removed row does not move up."""

    def remove(self, number: int) -> None:
        at = 0
        while self._cells[at] & 0xFFFFFFFF != number or self._cells[at] < 0:
            at += 1
        self._cells[at] = -1
        self.count -= 1


def test_a_hole_in_a_run_would_be_noticed() -> None:
    machine = TableMachine()
    machine.tables = [LazyTable(machine.rows)]
    machine.add_some(0, 40)
    machine.all_are_found()
    machine.remove(random.Random(1), 20)
    with pytest.raises(AssertionError):
        machine.all_are_found()


def test_a_table_made_at_once_is_as_good_as_one_made_row_by_row() -> None:
    rows, one_by_one = Rows(), NameTable(Rows())
    one_by_one._rows = rows
    for n in range(3000):
        number = rows.add()
        rows.put(number, row(n))
        one_by_one.add(number)
    at_once = NameTable(rows)
    names = [row(n).meta.object_id for n in range(3100)]
    assert [at_once.find(name) for name in names] == [one_by_one.find(name) for name in names]
    assert at_once.count == 3000
    assert len(at_once._cells) < 3 * 3000


# -- the sweep


def names_of(rows: Rows, sweep: Sweep, most: int) -> list[ObjectId]:
    told = []
    while (part := sweep.next(most)) is not None:
        told += [meta.object_id for meta in rows.metas(part)]
    return told


def test_a_sweep_tells_everything_in_parts() -> None:
    rows = filled(*(row(n) for n in range(20)))
    rows.clear(3)
    told = names_of(rows, Sweep(rows, NameTable(rows)), 6)
    assert told == [row(n).meta.object_id for n in range(20) if n != 3]
    assert names_of(Rows(), Sweep(Rows(), NameTable(Rows())), 6) == []


@pytest.mark.parametrize("told_of_it", [True, False], ids=["told", "not told"])
def test_what_moves_behind_a_sweep_is_told_at_its_end(told_of_it: bool) -> None:
    rows = filled(*(row(n) for n in range(10)))
    rows.clear(0)
    table = NameTable(rows)
    sweep = Sweep(rows, table)
    first = sweep.next(5)
    assert first is not None
    moved = row(7)
    table.remove(7)
    rows.clear(7)
    rows.put(0, replace(moved, sequence=100))
    table.add(0)
    if told_of_it:
        sweep.replaced(moved.meta.object_id, 7, 0)
    told = [*(meta.object_id for meta in rows.metas(first)), *names_of(rows, sweep, 5)]
    missing = {row(n).meta.object_id for n in range(1, 10)} - set(told)
    assert missing == (set() if told_of_it else {moved.meta.object_id})
    assert len(told) == len(set(told))


def test_a_moved_object_that_is_gone_at_the_end_is_not_told() -> None:
    rows = filled(row(0), row(1))
    table = NameTable(rows)
    sweep = Sweep(rows, table)
    sweep.next(1)
    sweep.replaced(default_meta(1, 10).object_id, 1, 0)
    assert names_of(rows, sweep, 5) == [row(1).meta.object_id]
