"""S3-FIFO: a small queue that filters one-hit blocks, a main queue with counters, and a ghost queue.

Source: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, algorithm 1; here with a
small queue of a tenth, a ghost queue of 0.9 of the capacity, counters up to 3 and promotion at 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kvtier.policy.baselines.flat import NONE, Columns, FlatCache, list_kernels, no_ends
from kvtier.policy.baselines.interfaces import IntArray, Jit

_SMALL, _MAIN, _GHOST = 0, 1, 2
_MOST_COUNTED = 3


@cache
def _evict_kernel(jit: Jit) -> Callable[..., Any]:
    push, unlink = list_kernels(jit)

    @jit
    def evict(
        small_limit: int,
        pins: IntArray,
        pin: int,
        where: npt.NDArray[np.int8],
        uses: npt.NDArray[np.int8],
        newer: IntArray,
        older: IntArray,
        ends: IntArray,
        sizes: IntArray,
    ) -> int:
        """Take one unpinned block out; NONE where all are pinned."""
        left = (_MOST_COUNTED + 1) * (sizes[_SMALL] + sizes[_MAIN])
        small_is_pinned = False
        while left > 0:
            left -= 1
            if (sizes[_SMALL] >= small_limit or sizes[_MAIN] == 0) and not small_is_pinned:
                block = ends[_SMALL, 1]
                if block == NONE:
                    break
                if uses[block] == 0 and pins[block] == pin:
                    # What came in with this request is at the end, so it is all that is left.
                    small_is_pinned = True
                    continue
                unlink(newer, older, ends, _SMALL, block)
                sizes[_SMALL] -= 1
                if uses[block] == 0:
                    where[block] = _GHOST + 1
                    push(newer, older, ends, _GHOST, block)
                    sizes[_GHOST] += 1
                    return int(block)
                where[block] = _MAIN + 1
                uses[block] = 0
            else:
                block = ends[_MAIN, 1]
                if block == NONE:
                    break
                unlink(newer, older, ends, _MAIN, block)
                sizes[_MAIN] -= 1
                if uses[block] == 0 and pins[block] != pin:
                    where[block] = 0
                    return int(block)
                uses[block] = max(uses[block] - 1, 0)
            push(newer, older, ends, _MAIN, block)
            sizes[_MAIN] += 1
        block = ends[_SMALL, 1]
        while block != NONE and pins[block] == pin:
            block = newer[block]
        if block != NONE:
            unlink(newer, older, ends, _SMALL, block)
            sizes[_SMALL] -= 1
            where[block] = 0
        return int(block)

    return evict


@cache
def _access_kernel(jit: Jit) -> Callable[..., Any]:
    push, unlink = list_kernels(jit)
    evict = _evict_kernel(jit)

    @jit
    def access(
        blocks: IntArray,
        capacity: int,
        small_limit: int,
        ghost_limit: int,
        pins: IntArray,
        pin: int,
        resident: npt.NDArray[np.bool_],
        where: npt.NDArray[np.int8],
        uses: npt.NDArray[np.int8],
        newer: IntArray,
        older: IntArray,
        ends: IntArray,
        sizes: IntArray,
        out: IntArray,
    ) -> tuple[int, int]:
        gone = taken = 0
        for i in range(len(blocks) - 1, -1, -1):
            if resident[blocks[i]]:
                uses[blocks[i]] = min(uses[blocks[i]] + 1, _MOST_COUNTED)
        for i in range(len(blocks) - 1, -1, -1):
            block = blocks[i]
            if resident[block]:
                continue
            if sizes[_SMALL] + sizes[_MAIN] >= capacity:
                victim = evict(small_limit, pins, pin, where, uses, newer, older, ends, sizes)
                if victim == NONE:
                    continue
                resident[victim] = False
                out[gone] = victim
                gone += 1
            to = _SMALL
            if where[block] == _GHOST + 1:
                unlink(newer, older, ends, _GHOST, block)
                sizes[_GHOST] -= 1
                to = _MAIN
            while sizes[_GHOST] > ghost_limit:
                forgotten = ends[_GHOST, 1]
                unlink(newer, older, ends, _GHOST, forgotten)
                sizes[_GHOST] -= 1
                where[forgotten] = 0
            uses[block] = 0
            where[block] = to + 1
            push(newer, older, ends, to, block)
            sizes[to] += 1
            resident[block] = True
            taken += 1
        return gone, taken

    return access


class S3FifoCache(FlatCache):
    """S3-FIFO over single blocks; evicts any block that is not pinned.

    Blocks of the request that are resident are counted first, then the others come in, deeper ones first.
    A pinned block at the end of the main queue goes back to its start.
    """

    COLUMNS: ClassVar[Columns] = {
        "newer": (np.int32, NONE),
        "older": (np.int32, NONE),
        "where": (np.int8, 0),
        "uses": (np.int8, 0),
        "pins": (np.int32, 0),
    }
    newer: IntArray
    older: IntArray
    where: npt.NDArray[np.int8]
    uses: npt.NDArray[np.int8]
    pins: IntArray

    def __init__(self, capacity: int, jit: Jit) -> None:
        super().__init__(capacity, jit)
        self._ends = no_ends(3)
        self._sizes = np.zeros(3, np.int32)
        self._small = max(capacity // 10, 1)
        self._ghost = capacity * 9 // 10
        self._pin = 0
        self._access = _access_kernel(jit)

    def access(self, blocks: IntArray, pinned: IntArray) -> tuple[IntArray, int]:
        """See FlatCache."""
        out = np.empty(len(blocks), np.int32)
        self._pin += 1
        self.pins[pinned] = self._pin
        gone, taken = self._access(
            blocks,
            self.capacity,
            self._small,
            self._ghost,
            self.pins,
            self._pin,
            self.resident,
            self.where,
            self.uses,
            self.newer,
            self.older,
            self._ends,
            self._sizes,
            out,
        )
        return out[:gone], taken
