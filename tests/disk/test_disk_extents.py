"""The extent allocator against a bitmap."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvtier.disk.extents import ExtentAllocator

LENGTHS = {0: 64, 3: 40, 7: 1}


def taken_over(segments: dict[int, int], used: list[tuple[int, int, int]]) -> ExtentAllocator:
    extents = ExtentAllocator()
    places = np.array(used, dtype=np.int64).reshape(-1, 3)
    extents.take_over(segments, places[:, 0], places[:, 1], places[:, 2])
    return extents


class ExtentMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.extents = ExtentAllocator()
        self.used: list[tuple[int, int, int]] = []
        self.bitmap = {segment: [False] * n for segment, n in LENGTHS.items()}
        for segment, nbytes in LENGTHS.items():
            self.extents.add_segment(segment, nbytes)

    def runs(self) -> list[tuple[int, int, int]]:
        found = []
        for segment, bits in self.bitmap.items():
            at = 0
            while at < len(bits):
                end = at
                while end < len(bits) and not bits[end]:
                    end += 1
                if end > at:
                    found.append((segment, at, end - at))
                at = end + 1
        return found

    @rule(length=st.integers(1, 70))
    def allocate(self, length: int) -> None:
        fitting = [(n, segment, at) for segment, at, n in self.runs() if n >= length]
        got = self.extents.allocate(length)
        if not fitting:
            assert got is None
            return
        assert got == min(fitting)[1:], "not the best fit nearest to the front"
        segment, at = got
        self.bitmap[segment][at : at + length] = [True] * length
        self.used.append((segment, at, length))

    @rule(pick=st.integers(0, 1000))
    def free(self, pick: int) -> None:
        if not self.used:
            return
        segment, at, length = self.used.pop(pick % len(self.used))
        self.extents.free(segment, at, length)
        self.bitmap[segment][at : at + length] = [False] * length
        with pytest.raises(ValueError):
            self.extents.free(segment, at, length)

    @invariant()
    def free_extents_are_the_gaps(self) -> None:
        runs = self.runs()
        assert self.extents.extents() == runs
        assert self.extents.free_bytes == sum(length for _, _, length in runs)
        assert self.extents.largest == max((length for _, _, length in runs), default=0)
        for segment, bits in self.bitmap.items():
            assert self.extents.is_empty(segment) == (not any(bits))


TestExtentMachine = ExtentMachine.TestCase


def test_a_segment_is_taken_over_with_its_used_extents() -> None:
    extents = taken_over({1: 100, 4: 30, 2: 50, 0: 7}, [(1, 0, 10), (1, 10, 20), (1, 50, 50), (2, 5, 45)])
    assert extents.extents() == [(0, 0, 7), (1, 30, 20), (2, 0, 5), (4, 0, 30)]
    assert (extents.total_bytes, extents.free_bytes, extents.largest) == (187, 62, 30)
    assert extents.allocate(7) == (0, 0)
    extents.free(1, 10, 20)
    assert extents.extents() == [(1, 10, 40), (2, 0, 5), (4, 0, 30)]


@pytest.mark.parametrize(
    "used",
    [
        [(1, 0, 10), (1, 5, 10)],
        [(1, 20, 5), (1, 0, 5)],
        [(1, 90, 20)],
        [(1, 5, 0)],
        [(1, -5, 10)],
        [(3, 0, 10)],
        [(0, 0, 10)],
        [(2, 10, 5), (1, 0, 5)],
    ],
)
def test_used_extents_that_cannot_be_are_refused(used: list[tuple[int, int, int]]) -> None:
    with pytest.raises(ValueError):
        taken_over({1: 100, 2: 100}, used)


@given(st.dictionaries(st.integers(0, 5), st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)))))
def test_taking_over_is_as_good_as_allocating(layout: dict[int, list[tuple[int, int]]]) -> None:
    """A layout: by segment, what is left free before each used extent, and its length."""
    used, whole, lengths = [], ExtentAllocator(), {}
    for segment, runs in sorted(layout.items()):
        at = 0
        for gap, length in runs:
            used.append((segment, at + gap, length))
            at += gap + length
        lengths[segment] = at + 3
        whole.add_segment(segment, at + 3)
        whole.allocate(at + 3)
    taken = taken_over(lengths, used)
    for segment, nbytes in lengths.items():
        at = 0
        for _, offset, length in [each for each in used if each[0] == segment]:
            if offset > at:
                whole.free(segment, at, offset - at)
            at = offset + length
        whole.free(segment, at, nbytes - at)
    assert taken.extents() == whole.extents()
    assert (taken.free_bytes, taken.largest) == (whole.free_bytes, whole.largest)


def test_only_an_empty_segment_can_be_removed() -> None:
    extents = ExtentAllocator()
    extents.add_segment(1, 100)
    place = extents.allocate(100)
    with pytest.raises(ValueError):
        extents.remove_segment(1)
    assert place is not None
    extents.free(*place, 100)
    extents.remove_segment(1)
    assert (extents.free_bytes, extents.total_bytes, extents.allocate(1)) == (0, 0, None)


def test_nonsense_is_refused() -> None:
    extents = ExtentAllocator()
    extents.add_segment(1, 100)
    with pytest.raises(ValueError):
        extents.add_segment(1, 100)
    with pytest.raises(ValueError):
        extents.allocate(0)
    with pytest.raises(ValueError):
        extents.free(1, 90, 20)
