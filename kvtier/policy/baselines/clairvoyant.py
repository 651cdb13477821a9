"""The offline optimum: keeps what is needed soonest, and knows what that is.

Belady's rule with bypass: after each request, of the blocks at hand those with the nearest next use stay
(Belady, "A study of replacement algorithms for a virtual-storage computer", 1966). A block is needed
whenever one of its descendants is, so the sets it keeps are closed under prefixes by themselves, and with
blocks of equal weight no policy can have more hits: it is the largest set of intervals between uses of
which no more than the capacity overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kvtier.policy.baselines.flat import NONE, BlockTable, Columns
from kvtier.policy.baselines.heap import heap_kernels
from kvtier.policy.baselines.interfaces import Arrival, IntArray, Jit, Served


@dataclass(frozen=True, slots=True)
class Future:
    """When each block of each request is used next.

    The path of row r falls into runs [first[r], first[r + 1]), shallow ones first; run k ends at depth
    end[k] (exclusive), and its blocks are next used by row `row[k]`, NONE for never.
    """

    first: npt.NDArray[np.int64]
    end: IntArray
    row: IntArray


@cache
def _serve_kernel(jit: Jit) -> Callable[..., Any]:
    put, drop = heap_kernels(jit)

    @jit
    def serve(
        path: IntArray,
        hit: int,
        capacity: int,
        count: int,
        now: int,
        ends: IntArray,
        rows: IntArray,
        resident: npt.NDArray[np.bool_],
        parent: IntArray,
        next_row: IntArray,
        top: IntArray,
        heap: IntArray,
        place: IntArray,
        size: int,
        late: npt.NDArray[np.float64],
        ties: npt.NDArray[np.int64],
        evicted: IntArray,
        bypassed: IntArray,
    ) -> tuple[int, int, int]:
        gone = passed = 0
        # The resident front was kept for this very request, and all that was kept for it is here.
        if place[now] != NONE:
            size = drop(heap, place, size, late, ties, now)
        top[now] = NONE
        count += len(path) - hit
        begin = 0
        for k in range(len(ends)):
            row = rows[k]
            for depth in range(begin, ends[k]):
                next_row[path[depth]] = row
            if row == NONE:
                for depth in range(ends[k] - 1, begin - 1, -1):
                    if depth < hit:
                        evicted[gone] = path[depth]
                        gone += 1
                        resident[path[depth]] = False
                    else:
                        bypassed[passed] = path[depth]
                        passed += 1
            else:
                for depth in range(max(begin, hit), ends[k]):
                    resident[path[depth]] = True
                if top[row] == NONE:
                    top[row] = path[ends[k] - 1]
                    size = put(heap, place, size, late, ties, row)
            begin = ends[k]
        while count - gone - passed > capacity:
            row = heap[0]
            block = top[row]
            resident[block] = False
            evicted[gone] = block
            gone += 1
            up = parent[block]
            if up != NONE and resident[up] and next_row[up] == row:
                top[row] = up
            else:
                top[row] = NONE
                size = drop(heap, place, size, late, ties, row)
        return gone, passed, size

    return serve


class ClairvoyantCache(BlockTable):
    """Of the resident and the served blocks, keeps those that are used soonest; of equal ones the shallow.

    Blocks that are next used by the same row stand on one path without a gap, so a tier is a heap of rows,
    and each row needs no more than its deepest block.
    """

    COLUMNS: ClassVar[Columns] = {"next_row": (np.int32, NONE)}
    next_row: IntArray

    def __init__(self, capacity: int, future: Future, jit: Jit) -> None:
        super().__init__(jit)
        self._capacity = capacity
        self._future = future
        requests = len(future.first) - 1
        self._top = np.full(requests, NONE, np.int32)
        self._heap = np.zeros(requests, np.int32)
        self._place = np.full(requests, NONE, np.int32)
        self._late = -np.arange(requests, dtype=np.float64)
        self._ties = np.zeros(requests, np.int64)
        self._rows = 0
        self._count = 0
        self._serve = _serve_kernel(jit)

    def serve(self, arrival: Arrival) -> Served:
        """See BlockPolicy. arrival.row: as in the future that was given."""
        path = arrival.path
        self.meet(path)
        hit = self.front(path)
        runs = slice(self._future.first[arrival.row], self._future.first[arrival.row + 1])
        evicted = np.empty(self._count + len(path), np.int32)
        bypassed = np.empty(len(path), np.int32)
        gone, passed, self._rows = self._serve(
            path,
            hit,
            self._capacity,
            self._count,
            arrival.row,
            self._future.end[runs],
            self._future.row[runs],
            self.resident,
            self.parent,
            self.next_row,
            self._top,
            self._heap,
            self._place,
            self._rows,
            self._late,
            self._ties,
            evicted,
            bypassed,
        )
        self._count += len(path) - hit - gone - passed
        return self._split(path[hit:], evicted[:gone], bypassed[:passed], hit)

    def _split(self, fresh: IntArray, evicted: IntArray, bypassed: IntArray, hit: int) -> Served:
        """What went out again without having been resident counts as bypassed."""
        if len(fresh) and len(evicted):
            passed = np.isin(evicted, fresh)
            bypassed = np.concatenate((bypassed, evicted[passed]))
            evicted = evicted[~passed]
        return Served(hit, evicted, bypassed.copy())
