"""Blocks and their holders against a dict of dicts, while the table grows, shrinks and forgets the dead."""

import hashlib

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvtier.directory import block_table
from kvtier.directory.block_table import BlockTable, holders_of

HOLDERS = st.integers(0, 7)
NUMBERS = st.sets(st.integers(0, 60), max_size=40)


def keys_of(numbers):
    digests = (hashlib.sha256(bytes([n % 256, n // 256])).digest() for n in sorted(numbers))
    return np.array([int.from_bytes(digest[:8], "big") for digest in digests], np.uint64)


def words_of(holder, value, count):
    return np.full(count, holder << 48 | value, np.uint64)


class Table(RuleBasedStateMachine):
    """model: {number: {holder: value}} of living holders."""

    table_class = BlockTable

    def __init__(self):
        super().__init__()
        self.table = self.table_class()
        self.model = {}
        self.value = 0
        self.table.alive[:8] = True

    def rows_of(self, holder):
        return sum(holder in holders for holders in self.model.values())

    @rule(numbers=NUMBERS, holder=HOLDERS)
    def put(self, numbers, holder):
        self.value += 1
        words = words_of(holder, self.value, len(numbers))
        had = self.table.put(keys_of(numbers), words, holder)
        expected = [holder << 48 | h[holder] for n, h in self.model.items() if n in numbers and holder in h]
        assert sorted(had.tolist()) == sorted(expected)
        for number in numbers:
            self.model.setdefault(number, {})[holder] = self.value

    @rule(numbers=NUMBERS, holder=HOLDERS, former=HOLDERS)
    def supersede(self, numbers, holder, former):
        """A holder takes over from another one that had never been beside it at a block."""
        numbers = {n for n in numbers if not {holder, former} <= set(self.model.get(n, ()))}
        self.value += 1
        self.table.put(keys_of(numbers), words_of(holder, self.value, len(numbers)), former)
        for number in numbers:
            holders = self.model.setdefault(number, {})
            holders.pop(former, None)
            holders[holder] = self.value

    @rule(numbers=NUMBERS, holder=HOLDERS)
    def drop(self, numbers, holder):
        had = self.table.drop(keys_of(numbers), holder, holder)
        expected = [
            h.pop(holder) | holder << 48 for n, h in self.model.items() if n in numbers and holder in h
        ]
        assert sorted(had.tolist()) == sorted(expected)

    @rule(holder=HOLDERS)
    def die(self, holder):
        """Its number may be used again after two rebuilds, which is what its owner waits for."""
        self.table.alive[holder] = False
        self.table.holder_died(self.rows_of(holder))
        for holders in self.model.values():
            holders.pop(holder, None)
        self.probe()
        until = self.table.cleansed + 1 + self.table.rebuilding
        while self.table.cleansed < until:
            self.table.rebuild()
            self.table.step(64)
        self.probe()
        self.table.alive[holder] = True

    @rule(slots=st.integers(8, 600))
    def step(self, slots):
        self.table.step(slots)

    @rule()
    def rebuild(self):
        self.table.rebuild()

    @precondition(lambda self: not self.table.rebuilding and not self.table.dead_rows)
    @invariant()
    def counts(self):
        assert self.table.rows == sum(map(len, self.model.values()))
        assert self.table.blocks == sum(1 for holders in self.model.values() if holders)

    @invariant()
    def probe(self):
        of, words = self.table.find(keys_of(range(61)))
        assert (np.diff(of) >= 0).all()
        seen = {}
        for number, word in zip(of.tolist(), words.tolist(), strict=True):
            assert word >> 48 not in seen.setdefault(number, {}), "a holder is listed twice"
            seen[number][word >> 48] = word & 0xFFFFFFFF
        assert seen == {n: h for n, h in self.model.items() if h}


def run(table_class, examples):
    machine = type("Machine", (Table,), {"table_class": table_class})
    phases = [Phase.explicit, Phase.generate] if table_class is not BlockTable else list(Phase)
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=examples, stateful_step_count=25, deadline=None, phases=phases),
    )


@pytest.fixture(autouse=True)
def small_tables(monkeypatch):
    monkeypatch.setattr(block_table, "_LEAST_SLOTS", 16)
    monkeypatch.setattr(block_table, "_STEP", 8)
    monkeypatch.setattr(block_table, "_PACE", 1)


def test_the_table_is_a_dict_of_holders():
    run(BlockTable, 60)


class ForgetsToMove(BlockTable):
    def _bring(self, keys):
        return self._first(self._rows, keys)


class LeavesLastRow(BlockTable):
    def _choose(self, block, holder, former, *, dead):
        chosen = super()._choose(block, holder, former, dead=dead)
        return np.where(block.number[chosen] > 0, -1, chosen) if dead else chosen


class KeepsTheDead(BlockTable):
    def find(self, keys):
        self.alive[:] = True
        return super().find(keys)


@pytest.mark.parametrize("broken", [ForgetsToMove, LeavesLastRow, KeepsTheDead])
def test_a_broken_table_is_seen(broken):
    with pytest.raises((AssertionError, KeyError, IndexError)):
        run(broken, 200)


def test_many_holders_of_one_block():
    table = BlockTable()
    table.alive[:300] = True
    keys = keys_of(range(5))
    for holder in range(300):
        table.put(keys, words_of(holder, 1, 5), holder)
    of, words = table.find(keys)
    assert np.bincount(of).tolist() == [300] * 5
    assert set(holders_of(words).tolist()) == set(range(300))
    for holder in range(0, 300, 2):
        assert len(table.drop(keys, holder, holder)) == 5
    _, words = table.find(keys)
    assert set(holders_of(words).tolist()) == set(range(1, 300, 2))


def test_memory_follows_what_is_there():
    table = BlockTable()
    table.alive[:2] = True
    keys = keys_of(range(20_000))
    for first in range(0, 20_000, 1000):
        table.put(keys[first : first + 1000], words_of(0, 1, 1000), 0)
        assert table.table_bytes < 100 * max(table.rows, 1000)
    for first in range(0, 20_000, 1000):
        table.drop(keys[first : first + 1000], 0, 0)
    for _ in range(1000):
        table.step()
    assert table.table_bytes < 20_000
