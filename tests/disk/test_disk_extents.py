"""The extent allocator against a bitmap."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvtier.disk.extents import ExtentAllocator

LENGTHS = {0: 64, 3: 40, 7: 1}


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
    extents = ExtentAllocator()
    extents.add_segment(1, 100, [(0, 10), (10, 20), (50, 50)])
    assert extents.extents() == [(1, 30, 20)]
    assert extents.total_bytes == 100


@pytest.mark.parametrize("used", [[(0, 10), (5, 10)], [(20, 5), (0, 5)], [(90, 20)]])
def test_used_extents_that_cannot_be_are_refused(used: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError):
        ExtentAllocator().add_segment(1, 100, used)


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
