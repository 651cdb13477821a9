"""Where objects lie in one sub-arena: an allocator of byte extents of any length, side by side.

Best fit, the lowest address among equals, with immediate coalescing: a freed room meets its free
neighbours at once, so no size class keeps memory from another.  Everything is in units of 4096 bytes,
since disks write whole units straight from here.  Pure bookkeeping: no memory is touched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from kvtier.host.sorted_ints import SortedInts

ALIGN_BYTES = 4096
# (units << 40 | offset) in one integer orders free extents by length, then address: 4 PiB at most.
_OFFSET_BITS = 40
_OFFSET_MASK = (1 << _OFFSET_BITS) - 1


def room_bytes(nbytes: int) -> int:
    """The room that an object of nbytes takes: rounded up to ALIGN_BYTES."""
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES


@dataclass(frozen=True, slots=True)
class Window:
    """Neighbouring extents, used ones at `offsets` in ascending order, that can become one room."""

    cost: float
    offsets: tuple[int, ...]


class ExtentAllocator:
    """Extents in [0, capacity_bytes). Only [0, ready_bytes) is given out; `grow` moves that end.

    capacity_bytes: a multiple of ALIGN_BYTES.  Not thread-safe.  Costs O(log n) for n free extents, and
    about 200 bytes of Python objects an extent.
    """

    def __init__(self, capacity_bytes: int, *, ready_bytes: int = 0) -> None:
        if capacity_bytes <= 0 or capacity_bytes % ALIGN_BYTES:
            raise ValueError(f"capacity_bytes {capacity_bytes} is not a positive multiple of {ALIGN_BYTES}")
        self.capacity_bytes = capacity_bytes
        self.ready_bytes = 0
        self.used_bytes = 0
        self._used: dict[int, int] = {}  # offset -> units
        self._free: dict[int, int] = {}  # offset -> units
        self._free_ends: dict[int, int] = {}  # offset after the extent -> offset
        self._by_size = SortedInts()
        if ready_bytes:
            self.grow(ready_bytes)

    def grow(self, ready_bytes: int) -> None:
        """Let [0, ready_bytes) be given out. It never shrinks; ready_bytes is a multiple of ALIGN_BYTES."""
        if not self.ready_bytes <= ready_bytes <= self.capacity_bytes or ready_bytes % ALIGN_BYTES:
            raise ValueError(f"cannot grow from {self.ready_bytes} to {ready_bytes} bytes")
        if ready_bytes > self.ready_bytes:
            start, units = self.ready_bytes, (ready_bytes - self.ready_bytes) // ALIGN_BYTES
            self.ready_bytes = ready_bytes
            self._add_free(start, units)

    def allocate(self, nbytes: int) -> int | None:
        """Take room for nbytes; answers its byte offset, or None when no free extent is long enough."""
        if nbytes <= 0:
            raise ValueError(f"cannot allocate {nbytes} bytes")
        units = -(-nbytes // ALIGN_BYTES)
        best = self._by_size.first_from(units << _OFFSET_BITS)
        if best is None:
            return None
        offset = (best & _OFFSET_MASK) * ALIGN_BYTES
        rest = self._drop_free(offset) - units
        if rest:
            self._put_free(offset + units * ALIGN_BYTES, rest)
        self._used[offset] = units
        self.used_bytes += units * ALIGN_BYTES
        return offset

    def free(self, offset: int) -> int:
        """Give the room at `offset` back; answers its bytes. Raises KeyError when none starts there."""
        units = self._used.pop(offset)
        self.used_bytes -= units * ALIGN_BYTES
        self._add_free(offset, units)
        return units * ALIGN_BYTES

    def largest_free_bytes(self) -> int:
        """The longest room that `allocate` would give now."""
        last = self._by_size.last()
        return 0 if last is None else (last >> _OFFSET_BITS) * ALIGN_BYTES

    def extents(self) -> list[tuple[int, int, bool]]:
        """(offset, bytes, used) in address order; together they tile [0, ready_bytes)."""
        found, at = [], 0
        while at < self.ready_bytes:
            used = at in self._used
            length = (self._used if used else self._free)[at] * ALIGN_BYTES
            found.append((at, length, used))
            at += length
        return found

    def cheapest_window(self, nbytes: int, cost_of: Callable[[int], float | None]) -> Window | None:
        """The cheapest run of neighbours, free or evictable, that is at least nbytes long.

        cost_of(offset): what losing the used extent at `offset` costs, finite and not negative, or None
        when it must stay; asked once for each.  Answers None when there is no such run.  O(extents): it
        is for an owner that found no room, not for every allocation.
        """
        best: Window | None = None
        window: deque[tuple[int, int, float, bool]] = deque()
        length, cost = 0, 0.0
        for offset, size, used in self.extents():
            price = cost_of(offset) if used else 0.0
            if price is None:
                window.clear()
                length, cost = 0, 0.0
                continue
            window.append((offset, size, price, used))
            length, cost = length + size, cost + price
            while length - window[0][1] >= nbytes:
                _, gone, saved, _ = window.popleft()
                length, cost = length - gone, cost - saved
            if length >= nbytes and (best is None or cost < best.cost):
                best = Window(cost, tuple(at for at, _, _, is_used in window if is_used))
        return best

    def _add_free(self, offset: int, units: int) -> None:
        """Make the extent free, as one with the free extents before and behind it."""
        before = self._free_ends.get(offset)
        if before is not None:
            units += self._drop_free(before)
            offset = before
        behind = offset + units * ALIGN_BYTES
        if behind in self._free:
            units += self._drop_free(behind)
        self._put_free(offset, units)

    def _put_free(self, offset: int, units: int) -> None:
        self._free[offset] = units
        self._free_ends[offset + units * ALIGN_BYTES] = offset
        self._by_size.add(units << _OFFSET_BITS | offset // ALIGN_BYTES)

    def _drop_free(self, offset: int) -> int:
        units = self._free.pop(offset)
        del self._free_ends[offset + units * ALIGN_BYTES]
        self._by_size.remove(units << _OFFSET_BITS | offset // ALIGN_BYTES)
        return units
