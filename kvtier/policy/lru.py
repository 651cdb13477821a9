"""Least recently used, over leaves: a block goes only when no block of the tier stands on it."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterator, Sequence

# Below this many entries the heap is never swept: the saving would not pay.
_SWEEP_FROM = 1024


class LeafLru:
    """Evicts the leaf that was used longest ago.

    Amortised O(log n) an operation: the heap holds leaves by the stamp of their last use; entries that
    are out of date are skipped when they come up, and swept once they are most of the heap.  Parents are
    counted by key and not by entry, since a tier may get a chain's later blocks before its front.
    """

    def __init__(self) -> None:
        self._stamps: dict[bytes, int] = {}
        self._parents: dict[bytes, bytes] = {}
        self._children: dict[bytes, int] = {}
        self._heap: list[tuple[int, bytes]] = []
        self._clock = 0

    def __len__(self) -> int:
        return len(self._stamps)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._stamps)

    def added(self, key: bytes, parent: bytes, nbytes: int, now_s: float) -> None:
        """See EvictionPolicy."""
        if key not in self._stamps:
            self._parents[key] = parent
            self._children[parent] = self._children.get(parent, 0) + 1
        self._touch(key)

    def used(self, key: bytes, now_s: float) -> None:
        """See EvictionPolicy."""
        if key in self._stamps:
            self._touch(key)

    def removed(self, key: bytes) -> None:
        """See EvictionPolicy."""
        if self._stamps.pop(key, None) is None:
            return
        parent = self._parents.pop(key)
        left = self._children.pop(parent) - 1
        if left:
            self._children[parent] = left
        elif parent in self._stamps:
            self._push(parent)

    def victims(self, now_s: float) -> Iterator[bytes]:
        """See EvictionPolicy."""
        skipped: dict[tuple[int, bytes], None] = {}
        try:
            while self._heap:
                item = heapq.heappop(self._heap)
                # A leaf that was a parent for a while may be in the heap twice.
                if item in skipped or not self._is_current_leaf(item):
                    continue
                skipped[item] = None
                yield item[1]
        finally:
            for item in skipped:
                if self._is_current_leaf(item):
                    heapq.heappush(self._heap, item)

    def ranks(self, keys: Sequence[bytes], now_s: float) -> list[tuple[int, int]]:
        """See EvictionPolicy: by last use."""
        leaves = sorted(stamp for key, stamp in self._stamps.items() if key not in self._children)
        own = (self._stamps.get(key, self._clock) for key in keys)
        return [(bisect.bisect_left(leaves, stamp), len(leaves)) for stamp in own]

    def _is_current_leaf(self, item: tuple[int, bytes]) -> bool:
        stamp, key = item
        return self._stamps.get(key) == stamp and key not in self._children

    def _touch(self, key: bytes) -> None:
        self._clock += 1
        self._stamps[key] = self._clock
        if key not in self._children:
            self._push(key)

    def _push(self, key: bytes) -> None:
        heapq.heappush(self._heap, (self._stamps[key], key))
        if len(self._heap) > max(_SWEEP_FROM, 4 * len(self._stamps)):
            self._heap = [item for item in set(self._heap) if self._is_current_leaf(item)]
            heapq.heapify(self._heap)
