"""A binary heap of blocks in flat arrays, from which any block can be taken out."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvtier.policy.baselines.flat import NONE
from kvtier.policy.baselines.interfaces import IntArray, Jit

FloatArray = npt.NDArray[np.float64]


class HeapKernels(NamedTuple):
    """put adds a block that is not in the heap, drop takes one out; both return the new size.

    heap[:size]: blocks, the one of the least (worth, stamp) first; place[block]: where it stands, or NONE.
    A block's worth and stamp do not change while it is in the heap.
    """

    put: Callable[..., Any]
    drop: Callable[..., Any]


@cache
def heap_kernels(jit: Jit) -> HeapKernels:
    """Compiled heap operations."""

    @jit
    def less(worth: FloatArray, stamp: npt.NDArray[np.int64], a: int, b: int) -> bool:
        return bool(worth[a] < worth[b] or (worth[a] == worth[b] and stamp[a] < stamp[b]))

    @jit
    def rise(
        heap: IntArray, place: IntArray, worth: FloatArray, stamp: npt.NDArray[np.int64], at: int, block: int
    ) -> None:
        while at > 0:
            up = (at - 1) // 2
            if not less(worth, stamp, block, heap[up]):
                break
            heap[at] = heap[up]
            place[heap[at]] = at
            at = up
        heap[at] = block
        place[block] = at

    @jit
    def put(
        heap: IntArray,
        place: IntArray,
        size: int,
        worth: FloatArray,
        stamp: npt.NDArray[np.int64],
        block: int,
    ) -> int:
        rise(heap, place, worth, stamp, size, block)
        return size + 1

    @jit
    def drop(
        heap: IntArray,
        place: IntArray,
        size: int,
        worth: FloatArray,
        stamp: npt.NDArray[np.int64],
        block: int,
    ) -> int:
        at = place[block]
        place[block] = NONE
        size -= 1
        last = heap[size]
        if last == block:
            return size
        while True:
            low = 2 * at + 1
            if low >= size:
                break
            if low + 1 < size and less(worth, stamp, heap[low + 1], heap[low]):
                low += 1
            heap[at] = heap[low]
            place[heap[at]] = at
            at = low
        rise(heap, place, worth, stamp, at, last)
        return size

    return HeapKernels(put, drop)
