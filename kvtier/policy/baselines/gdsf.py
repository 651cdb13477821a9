"""GDSF over leaves: uses times cost, plus an age that follows what was evicted.

Source: Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy", HP
Laboratories, 1998. Blocks are of one size; the cost of computing one grows with its position, so the key is
age + uses * (1 + end of the block in tokens / 30000). The age is the key of the last victim: it falls where
a leaf of a large key hid cheaper ancestors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from kvtier.policy.baselines.flat import NONE, Columns, FlatCache
from kvtier.policy.baselines.heap import heap_kernels
from kvtier.policy.baselines.interfaces import IntArray, Jit

# The attention term doubles the cost of computing a token at this position.
COST_DOUBLES_AT_TOKENS: Final = 30000
FloatArray = npt.NDArray[np.float64]


@cache
def _access_kernel(jit: Jit) -> Callable[..., Any]:
    put, drop = heap_kernels(jit)

    @jit
    def access(
        blocks: IntArray,
        pinned: IntArray,
        capacity: int,
        count: int,
        age: float,
        clock: int,
        resident: npt.NDArray[np.bool_],
        parent: IntArray,
        children: IntArray,
        uses: IntArray,
        cost: FloatArray,
        worth: FloatArray,
        stamp: npt.NDArray[np.int64],
        pinned_now: npt.NDArray[np.bool_],
        heap: IntArray,
        place: IntArray,
        size: int,
        out: IntArray,
    ) -> tuple[int, int, float, int]:
        gone = taken = 0
        for block in pinned:
            pinned_now[block] = True
            if place[block] != NONE:
                size = drop(heap, place, size, worth, stamp, block)
        for i in range(len(blocks) - 1, -1, -1):
            block = blocks[i]
            if place[block] != NONE:
                size = drop(heap, place, size, worth, stamp, block)
            if not resident[block]:
                if count + taken - gone >= capacity:
                    if size == 0:
                        continue
                    victim = heap[0]
                    size = drop(heap, place, size, worth, stamp, victim)
                    age = worth[victim]
                    resident[victim] = False
                    out[gone] = victim
                    gone += 1
                    up = parent[victim]
                    if up != NONE:
                        children[up] -= 1
                        if children[up] == 0 and resident[up] and not pinned_now[up]:
                            size = put(heap, place, size, worth, stamp, up)
                resident[block] = True
                taken += 1
                uses[block] = 0
                up = parent[block]
                if up != NONE:
                    children[up] += 1
                    if place[up] != NONE:
                        size = drop(heap, place, size, worth, stamp, up)
            uses[block] += 1
            worth[block] = age + uses[block] * cost[block]
            stamp[block] = clock + len(blocks) - i
            if children[block] == 0 and not pinned_now[block]:
                size = put(heap, place, size, worth, stamp, block)
        for block in blocks:
            if pinned_now[block]:
                worth[block] = age + uses[block] * cost[block]
        for block in pinned:
            pinned_now[block] = False
            if resident[block] and children[block] == 0:
                size = put(heap, place, size, worth, stamp, block)
        return gone, taken, age, size

    return access


class GdsfCache(FlatCache):
    """Evicts the leaf of the least key; of equal ones that which was used longest ago.

    Keys of a request's blocks are taken from the age after its own evictions.
    """

    COLUMNS: ClassVar[Columns] = {
        "children": (np.int32, 0),
        "uses": (np.int32, 0),
        "cost": (np.float64, 0),
        "worth": (np.float64, 0),
        "stamp": (np.int64, 0),
        "pinned_now": (np.bool_, 0),
        "place": (np.int32, NONE),
    }
    children: IntArray
    uses: IntArray
    cost: FloatArray
    worth: FloatArray
    stamp: npt.NDArray[np.int64]
    pinned_now: npt.NDArray[np.bool_]
    place: IntArray

    def __init__(self, capacity: int, block_tokens: int, jit: Jit) -> None:
        super().__init__(capacity, jit)
        self._block_tokens = block_tokens
        self._heap = np.zeros(capacity, np.int32)
        self._leaves = 0
        self._count = 0
        self._age = 0.0
        self._clock = 0
        self._access = _access_kernel(jit)

    def meet(self, path: IntArray) -> None:
        """See BlockTable."""
        super().meet(path)
        ends = np.arange(1, len(path) + 1) * self._block_tokens
        self.cost[path] = 1 + ends / COST_DOUBLES_AT_TOKENS

    def access(self, blocks: IntArray, pinned: IntArray) -> tuple[IntArray, int]:
        """See FlatCache."""
        out = np.empty(len(blocks), np.int32)
        gone, taken, self._age, self._leaves = self._access(
            blocks,
            pinned,
            self.capacity,
            self._count,
            self._age,
            self._clock,
            self.resident,
            self.parent,
            self.children,
            self.uses,
            self.cost,
            self.worth,
            self.stamp,
            self.pinned_now,
            self._heap,
            self.place,
            self._leaves,
            out,
        )
        self._clock += len(blocks)
        self._count += taken - gone
        return out[:gone], taken
