"""Blocks numbered in order of first appearance, in runs that came together."""

from __future__ import annotations

from array import array
from bisect import bisect_right

NONE = -1


class Chains:
    """The forest of all blocks so far.

    Blocks that one request brought have numbers in a row and stand on each other, so only such runs are
    kept: the first number, its depth, and the block that it stands on.
    """

    def __init__(self) -> None:
        self._first = array("i")
        self._depth = array("i")
        self._parent = array("i")
        self.blocks = 0

    def extend(self, parent: int, depth: int, count: int) -> int:
        """Add `count` > 0 new blocks on `parent` (NONE for a root); depth: of the first. Returns the last."""
        self._first.append(self.blocks)
        self._depth.append(depth)
        self._parent.append(parent)
        self.blocks += count
        return self.blocks - 1

    def ancestor(self, block: int, depth: int) -> int:
        """The block at `depth` (from 0) on the path that ends with `block`; NONE for depth -1."""
        if depth < 0:
            return NONE
        run = bisect_right(self._first, block) - 1
        while self._depth[run] > depth:
            block = self._parent[run]
            run = bisect_right(self._first, block) - 1
        return self._first[run] + depth - self._depth[run]

    def runs(self) -> tuple[array[int], array[int]]:
        """The first block of each run and what it stands on."""
        return self._first, self._parent
