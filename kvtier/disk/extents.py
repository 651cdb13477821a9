"""Which byte ranges of the segments are free: best fit, neighbours joined. Pure: no I/O, no locks."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Places: TypeAlias = npt.NDArray[np.int64]


class ExtentAllocator:
    """Free extents over several segments.

    Best fit takes the smallest extent that is long enough, and among equals the one nearest to the
    front.  Lengths and offsets are whatever the caller rounds them to.
    """

    def __init__(self) -> None:
        self._by_length: list[tuple[int, int, int]] = []
        self._length_at: dict[tuple[int, int], int] = {}
        self._by_place: list[tuple[int, int]] = []
        self._segment_bytes: dict[int, int] = {}
        self._free_bytes = 0
        self._total_bytes = 0

    @property
    def free_bytes(self) -> int:
        """Sum of all free extents."""
        return self._free_bytes

    @property
    def segments(self) -> tuple[int, ...]:
        """Numbers of the segments."""
        return tuple(self._segment_bytes)

    @property
    def total_bytes(self) -> int:
        """Length of all segments together, free or not."""
        return self._total_bytes

    @property
    def largest(self) -> int:
        """Length of the longest free extent; 0 when there is none."""
        return self._by_length[-1][0] if self._by_length else 0

    def extents(self) -> list[tuple[int, int, int]]:
        """Every free extent as (segment, offset, length), in order of place."""
        return sorted((segment, offset, length) for length, segment, offset in self._by_length)

    def add_segment(self, segment: int, nbytes: int) -> None:
        """Take over a segment that is wholly free."""
        if segment in self._segment_bytes:
            raise ValueError(f"segment {segment} is known already")
        self._segment_bytes[segment] = nbytes
        self._total_bytes += nbytes
        self._insert(segment, 0, nbytes)

    def take_over(self, segments: Mapping[int, int], segment: Places, offset: Places, length: Places) -> None:
        """Take over segments by their lengths, and what is used of them, in order of place.

        For an allocator that has none yet.  Raises ValueError when used extents overlap, are not in order,
        or are not within their segment.
        """
        end = offset + length
        numbers = np.array(sorted(segments), dtype=np.int64)
        lengths = np.array([segments[n] for n in numbers.tolist()], dtype=np.int64)
        # From where on the used extents are of each segment, and the end of all.
        bounds = np.append(np.searchsorted(segment, numbers), len(segment))
        # A gap lies before each used extent, and one at the end of each segment.
        before = np.roll(end, 1)
        before[bounds[:-1][bounds[:-1] < len(end)]] = 0
        last = np.where(np.diff(bounds) > 0, end[bounds[1:] - 1] if len(end) else 0, 0)
        gaps = np.concatenate([offset - before, lengths - last])
        ordered = (np.diff(segment) >= 0).all() and np.isin(segment, numbers).all()
        if not ordered or (gaps < 0).any() or (length <= 0).any():
            raise ValueError("used extents overlap, are out of order, or are not within their segment")
        some = np.flatnonzero(gaps)
        columns = gaps, np.concatenate([segment, numbers]), np.concatenate([before, last])
        free = list(zip(*(column[some].tolist() for column in columns), strict=True))
        self._by_length = sorted(free)
        self._length_at = {(number, at): nbytes for nbytes, number, at in free}
        self._by_place = sorted(self._length_at)
        self._free_bytes = int(gaps.sum())
        self._segment_bytes = dict(segments)
        self._total_bytes = sum(segments.values())

    def remove_segment(self, segment: int) -> None:
        """Give up a segment that is wholly free. Raises ValueError when it is not."""
        if not self.is_empty(segment):
            raise ValueError(f"segment {segment} is in use")
        self._take(segment, 0)
        self._total_bytes -= self._segment_bytes.pop(segment)

    def is_empty(self, segment: int) -> bool:
        """Whether nothing in the segment is in use."""
        return self._length_at.get((segment, 0)) == self._segment_bytes[segment]

    def allocate(self, length: int) -> tuple[int, int] | None:
        """(segment, offset) of an extent of `length` bytes, or None when no free one is long enough."""
        if length <= 0:
            raise ValueError(f"an extent of {length} bytes")
        at = bisect_left(self._by_length, (length, -1, -1))
        if at == len(self._by_length):
            return None
        _, segment, offset = self._by_length[at]
        rest = self._take(segment, offset) - length
        self._insert(segment, offset + length, rest)
        return segment, offset

    def free(self, segment: int, offset: int, length: int) -> None:
        """Give an extent back and join it with free neighbours. Raises ValueError when it is free."""
        end = offset + length
        if length <= 0 or offset < 0 or end > self._segment_bytes.get(segment, 0):
            raise ValueError(f"extent {offset}+{length} is not within segment {segment}")
        at = bisect_left(self._by_place, (segment, offset))
        before = self._neighbour(at - 1, segment)
        after = self._neighbour(at, segment)
        if (before and sum(before) > offset) or (after and after[0] < end):
            raise ValueError(f"extent {offset}+{length} of segment {segment} is free already")
        if after and after[0] == end:
            length += self._take(segment, end)
        if before and sum(before) == offset:
            offset = before[0]
            length += self._take(segment, offset)
        self._insert(segment, offset, length)

    def _neighbour(self, at: int, segment: int) -> tuple[int, int] | None:
        """(offset, length) of the free extent at a position in order of place, if it is in the segment."""
        if not 0 <= at < len(self._by_place) or self._by_place[at][0] != segment:
            return None
        place = self._by_place[at]
        return place[1], self._length_at[place]

    def _insert(self, segment: int, offset: int, length: int) -> None:
        if length == 0:
            return
        insort(self._by_length, (length, segment, offset))
        insort(self._by_place, (segment, offset))
        self._length_at[segment, offset] = length
        self._free_bytes += length

    def _take(self, segment: int, offset: int) -> int:
        length = self._length_at.pop((segment, offset))
        del self._by_length[bisect_left(self._by_length, (length, segment, offset))]
        del self._by_place[bisect_left(self._by_place, (segment, offset))]
        self._free_bytes -= length
        return length
