"""What the baselines share: flat arrays by block number, linked lists in them, and the way of a request."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from kvtier.policy.baselines.interfaces import Arrival, IntArray, Jit, Outcome, Served

NONE = -1
# Further arrays by block: name -> (dtype, what a new block has).
Columns = dict[str, tuple[type[np.generic], int]]
EMPTY: IntArray = np.empty(0, np.int32)


class ListKernels(NamedTuple):
    """Operations on linked lists of blocks; list `which` has its newest and oldest in ends[which]."""

    push: Callable[..., Any]
    unlink: Callable[..., Any]


@cache
def list_kernels(jit: Jit) -> ListKernels:
    """Compiled list operations."""

    @jit
    def push(newer: IntArray, older: IntArray, ends: IntArray, which: int, block: int) -> None:
        head = ends[which, 0]
        newer[block] = NONE
        older[block] = head
        if head == NONE:
            ends[which, 1] = block
        else:
            newer[head] = block
        ends[which, 0] = block

    @jit
    def unlink(newer: IntArray, older: IntArray, ends: IntArray, which: int, block: int) -> None:
        above = newer[block]
        below = older[block]
        if above == NONE:
            ends[which, 0] = below
        else:
            older[above] = below
        if below == NONE:
            ends[which, 1] = above
        else:
            newer[below] = above

    return ListKernels(push, unlink)


def no_ends(lists: int) -> IntArray:
    """Ends of so many empty lists."""
    return np.full((lists, 2), NONE, np.int32)


@cache
def front_kernel(jit: Jit) -> Callable[..., int]:
    """Compiled: how many blocks of a path are resident, from the root without a gap."""

    @jit
    def front(resident: npt.NDArray[np.bool_], path: IntArray) -> int:
        hit = 0
        for block in path:
            if not resident[block]:
                break
            hit += 1
        return hit

    return front


class BlockTable:
    """Which blocks are resident, and their parents, in arrays that grow with the numbers seen."""

    COLUMNS: ClassVar[Columns] = {}

    def __init__(self, jit: Jit) -> None:
        self.resident = np.zeros(0, np.bool_)
        self.parent: IntArray = np.zeros(0, np.int32)
        self._front = front_kernel(jit)
        for name, (dtype, _) in self.COLUMNS.items():
            setattr(self, name, np.zeros(0, dtype))

    def finished(self, row: int, outcome: Outcome) -> None:
        """See BlockPolicy. Nothing is learned from it."""

    def front(self, path: IntArray) -> int:
        """How many blocks of the path are resident, from the root without a gap."""
        return int(self._front(self.resident, path))

    def meet(self, path: IntArray) -> None:
        """Make room in the arrays for the blocks of a path, and note their parents."""
        if not len(path):
            return
        self._grow(int(path.max()) + 1)
        self.parent[path[0]] = NONE
        self.parent[path[1:]] = path[:-1]

    def _grow(self, blocks: int) -> None:
        have = len(self.resident)
        if blocks <= have:
            return
        blocks = max(blocks, 2 * have, 1024)
        self.resident = grown(self.resident, blocks, 0)
        self.parent = grown(self.parent, blocks, NONE)
        for name, (_, fill) in self.COLUMNS.items():
            setattr(self, name, grown(getattr(self, name), blocks, fill))


class FlatCache(BlockTable, ABC):
    """A cache of at most `capacity` blocks; all blocks are of one size.

    A path longer than the capacity is cut: its front is what could ever be a hit.
    """

    def __init__(self, capacity: int, jit: Jit) -> None:
        super().__init__(jit)
        self.capacity = capacity

    def serve(self, arrival: Arrival) -> Served:
        """See BlockPolicy."""
        self.meet(arrival.path)
        hit = self.front(arrival.path)
        path = arrival.path[: self.capacity]
        rest = arrival.path[self.capacity :]
        bypassed = rest[~self.resident[rest]]
        evicted, _ = self.access(path, path)
        return Served(hit, evicted, bypassed)

    @abstractmethod
    def access(self, blocks: IntArray, pinned: IntArray) -> tuple[IntArray, int]:
        """Use or take in `blocks`, from the last to the first; never evict `pinned`.

        blocks, pinned: known to `meet`.  Returns what was evicted, in order, and how many were taken in.
        """


def grown(array: npt.NDArray[Any], length: int, fill: int) -> npt.NDArray[Any]:
    """The array, extended to `length` with `fill`."""
    longer = np.full(length, fill, array.dtype)
    longer[: len(array)] = array
    return longer
