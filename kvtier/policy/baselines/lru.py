"""Least recently used, and the same with a fixed time to live."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kvtier.policy.baselines.flat import EMPTY, NONE, Columns, FlatCache, list_kernels, no_ends
from kvtier.policy.baselines.interfaces import Arrival, IntArray, Jit, Served


@cache
def _access_kernel(jit: Jit) -> Callable[..., Any]:
    push, unlink = list_kernels(jit)

    @jit
    def access(
        blocks: IntArray,
        resident: npt.NDArray[np.bool_],
        newer: IntArray,
        older: IntArray,
        ends: IntArray,
        free: int,
        out: IntArray,
    ) -> tuple[int, int]:
        taken = 0
        for i in range(len(blocks) - 1, -1, -1):
            block = blocks[i]
            if resident[block]:
                unlink(newer, older, ends, 0, block)
            else:
                resident[block] = True
                taken += 1
            push(newer, older, ends, 0, block)
        gone = 0
        while taken - gone > free:
            block = ends[0, 1]
            unlink(newer, older, ends, 0, block)
            resident[block] = False
            out[gone] = block
            gone += 1
        return gone, taken

    return access


class LruCache(FlatCache):
    """Evicts what was used longest ago.

    A use of a block is a use of all its ancestors, a moment later: the oldest is always a leaf, and the
    blocks of the request at hand, at most as many as the capacity, are always the newest.
    """

    COLUMNS: ClassVar[Columns] = {"newer": (np.int32, NONE), "older": (np.int32, NONE)}
    newer: IntArray
    older: IntArray

    def __init__(self, capacity: int, jit: Jit) -> None:
        super().__init__(capacity, jit)
        self._ends = no_ends(1)
        self._count = 0
        self._access = _access_kernel(jit)

    def access(self, blocks: IntArray, pinned: IntArray) -> tuple[IntArray, int]:
        """See FlatCache."""
        out = np.empty(len(blocks), np.int32)
        free = self.capacity - self._count
        gone, taken = self._access(blocks, self.resident, self.newer, self.older, self._ends, free, out)
        self._count += taken - gone
        return out[:gone], taken

    def trim(self, count: int) -> None:
        """Evict until no more blocks are left than that."""
        over = self._count - count
        if over > 0:
            lists, out = (self.newer, self.older, self._ends), np.empty(over, np.int32)
            self._access(EMPTY, self.resident, *lists, -over, out)
            self._count = count


@cache
def _expire_kernel(jit: Jit) -> Callable[..., Any]:
    _, unlink = list_kernels(jit)

    @jit
    def expire(
        before_s: float,
        used_s: npt.NDArray[np.float64],
        resident: npt.NDArray[np.bool_],
        newer: IntArray,
        older: IntArray,
        ends: IntArray,
        out: IntArray,
    ) -> int:
        gone = 0
        while ends[0, 1] != NONE and used_s[ends[0, 1]] < before_s:
            block = ends[0, 1]
            unlink(newer, older, ends, 0, block)
            resident[block] = False
            out[gone] = block
            gone += 1
        return gone

    return expire


class TtlCache(LruCache):
    """LRU that also drops what was not used for ttl_s; what is dropped before a request is no hit of it."""

    COLUMNS: ClassVar[Columns] = {**LruCache.COLUMNS, "used_s": (np.float64, 0)}
    used_s: npt.NDArray[np.float64]

    def __init__(self, capacity: int, ttl_s: float, jit: Jit) -> None:
        super().__init__(capacity, jit)
        self._ttl_s = ttl_s
        self._expire = _expire_kernel(jit)

    def serve(self, arrival: Arrival) -> Served:
        """See BlockPolicy."""
        out = np.empty(self._count, np.int32)
        before_s = arrival.t_s - self._ttl_s
        gone = self._expire(before_s, self.used_s, self.resident, self.newer, self.older, self._ends, out)
        self._count -= gone
        served = super().serve(arrival)
        self.used_s[arrival.path] = arrival.t_s
        # A block that expired and came in again with this very request was never away between requests.
        expired = out[:gone]
        away = np.concatenate((expired[~self.resident[expired]], served.evicted))
        back = expired[np.isin(expired, served.bypassed)]
        if len(back):
            served = Served(served.hit, served.evicted, served.bypassed[~np.isin(served.bypassed, back)])
        return Served(served.hit, away, served.bypassed)
