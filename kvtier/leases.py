"""Who may use which slot until when, and whose copies may still run: the lease book of any tier.

A holder's right on a slot is *active* until its end time, then in *limbo*: the right is withdrawn, but a
copy that the holder began may still touch the bytes.  Only `release` (the holder has proven that its copies
ended) and `holder_ended` (its process is gone) take a holder out.  Pure: time is an argument, nothing here
knows what a slot is, and equal calls give equal answers in equal order.
"""

from __future__ import annotations

import heapq
from math import inf

_LIMBO = -inf
# A heap that is mostly superseded end times is rebuilt from the book; below this length never.
_SMALL_HEAP = 64


class LeaseBook:
    """Rights by slot id and holder. Not thread-safe: its owner has a lock.

    lease_count and limbo_count are the numbers of (slot, holder) pairs in either state.
    """

    def __init__(self) -> None:
        self._ends: dict[int, dict[str, float]] = {}
        self._slots: dict[str, dict[int, None]] = {}
        self._heap: list[tuple[float, int, str]] = []
        self.lease_count = 0
        self.limbo_count = 0

    def hold(self, slot_id: int, holder: str) -> None:
        """Give a right without an end time: `lease` can put an end to it."""
        self._set(slot_id, holder, inf)

    def lease(self, slot_id: int, holder: str, until_s: float) -> None:
        """Give a right until `until_s`, or extend it.

        An earlier end than the present one changes nothing: another plan of the same holder may count on
        it.  A holder in limbo is active again.
        """
        present = self._ends.get(slot_id, {}).get(holder, _LIMBO)
        if present != inf and present >= until_s:
            return
        self._set(slot_id, holder, until_s)
        heapq.heappush(self._heap, (until_s, slot_id, holder))
        if len(self._heap) > _SMALL_HEAP + 2 * self.lease_count:
            self._rebuild_heap()

    def release(self, slot_id: int, holder: str) -> bool:
        """Take the holder out of the slot, active or in limbo; answers whether it was in."""
        holders = self._ends.get(slot_id)
        if holders is None or holder not in holders:
            return False
        self._count(holders.pop(holder), -1)
        if not holders:
            del self._ends[slot_id]
        slots = self._slots[holder]
        del slots[slot_id]
        if not slots:
            del self._slots[holder]
        return True

    def withdraw(self, slot_id: int) -> None:
        """Put every active right on the slot into limbo now."""
        for holder, end_s in list(self._ends.get(slot_id, {}).items()):
            if end_s != _LIMBO:
                self._set(slot_id, holder, _LIMBO)

    def expire(self, now_s: float) -> list[tuple[int, str]]:
        """Put every right that ended before `now_s` into limbo; answers them, the earliest end first."""
        ended: list[tuple[int, str]] = []
        while self._heap and self._heap[0][0] < now_s:
            entry = heapq.heappop(self._heap)
            if self._is_current(entry):
                _, slot_id, holder = entry
                self._set(slot_id, holder, _LIMBO)
                ended.append((slot_id, holder))
        return ended

    def holder_ended(self, holder: str) -> list[int]:
        """Take the holder out everywhere; answers the slot ids that it was in, in ascending order."""
        slot_ids = sorted(self._slots.get(holder, ()))
        for slot_id in slot_ids:
            self.release(slot_id, holder)
        return slot_ids

    def active(self, slot_id: int) -> bool:
        """Whether anybody has a right on the slot that did not expire."""
        holders = self._ends.get(slot_id)
        return holders is not None and any(end_s != _LIMBO for end_s in holders.values())

    def held(self, slot_id: int) -> bool:
        """Whether anybody is in the slot, active or in limbo: then its room must not be reused."""
        return slot_id in self._ends

    def holders(self, slot_id: int) -> tuple[str, ...]:
        """Everybody in the slot, active or in limbo, in the order they came."""
        return tuple(self._ends.get(slot_id, ()))

    def next_end_s(self) -> float | None:
        """The first end time of an active right, or None when no active right has one."""
        while self._heap and not self._is_current(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def _is_current(self, entry: tuple[float, int, str]) -> bool:
        """Whether an entry of the heap is the holder's end time still, and not superseded."""
        end_s, slot_id, holder = entry
        return self._ends.get(slot_id, {}).get(holder) == end_s

    def _set(self, slot_id: int, holder: str, end_s: float) -> None:
        holders = self._ends.setdefault(slot_id, {})
        before = holders.get(holder)
        if before is None:
            self._slots.setdefault(holder, {})[slot_id] = None
        else:
            self._count(before, -1)
        holders[holder] = end_s
        self._count(end_s, 1)

    def _count(self, end_s: float, change: int) -> None:
        if end_s == _LIMBO:
            self.limbo_count += change
        else:
            self.lease_count += change

    def _rebuild_heap(self) -> None:
        self._heap = [
            (end_s, slot_id, holder)
            for slot_id, holders in self._ends.items()
            for holder, end_s in holders.items()
            if end_s not in (_LIMBO, inf)
        ]
        heapq.heapify(self._heap)
