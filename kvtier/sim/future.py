"""What a whole trace tells beforehand: when blocks are used next, and what LRU reaches at every size."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtier.policy.baselines.clairvoyant import Future
from kvtier.policy.baselines.interfaces import IntArray
from kvtier.sim.chains import NONE
from kvtier.sim.compiled import compiled
from kvtier.sim.trace import Trace

LongArray = npt.NDArray[np.int64]


def future_of(trace: Trace) -> Future:
    """When each block of each request is used next."""
    first = np.zeros(len(trace) + 1, np.int64)
    nothing = np.empty(0, np.int32)
    columns = (trace.leaf, trace.blocks, trace.parent)
    _next_uses(*columns, first, nothing, nothing)
    np.cumsum(first, out=first)
    end = np.empty(first[-1], np.int32)
    row = np.empty(first[-1], np.int32)
    _next_uses(*columns, first, end, row)
    return Future(first, end, row)


def lru_hits(trace: Trace) -> LongArray:
    """Hit blocks of LRU by capacity: int64, index 0 to unique_blocks; one pass for all sizes.

    Stack distances after Mattson et al., "Evaluation techniques for storage hierarchies", IBM Systems
    Journal 1970.  Blocks last used by the same request stand together in LRU's order, shallow ones newest,
    so distances are found for runs: how many blocks later requests used, plus the place within the run.
    """
    change = np.zeros(trace.unique_blocks + 2, np.int64)
    _stack_distances(trace.leaf, trace.blocks, trace.parent, change)
    by_distance = np.cumsum(change[:-1])
    hits = np.zeros(trace.unique_blocks + 1, np.int64)
    np.cumsum(by_distance[: trace.unique_blocks], out=hits[1:])
    return hits


@compiled
def _next_uses(
    leaf: IntArray, blocks: IntArray, parent: IntArray, first: LongArray, end: IntArray, row: IntArray
) -> None:
    """Counts the runs of each row into first[row + 1]; given room in `end`, writes them instead."""
    coming = np.full(len(parent), NONE, np.int32)
    for now in range(len(leaf) - 1, -1, -1):
        runs = 0
        coming_below = NONE
        block = leaf[now]
        for depth in range(blocks[now] - 1, -1, -1):
            new_run = depth == blocks[now] - 1 or coming[block] != coming_below
            coming_below = coming[block]
            if new_run:
                runs += 1
                if len(end):
                    end[first[now + 1] - runs] = depth + 1
                    row[first[now + 1] - runs] = coming_below
            coming[block] = now
            block = parent[block]
        if not len(end):
            first[now + 1] = runs


@compiled
def _stack_distances(leaf: IntArray, blocks: IntArray, parent: IntArray, change: LongArray) -> None:
    """Adds one at each distance that is a hit's, as differences: cumsum(change)[d] hits have distance d."""
    last = np.full(len(parent), NONE, np.int32)
    # A Fenwick tree over rows: how many blocks each row was the last to use.
    tree = np.zeros(len(leaf) + 1, np.int64)
    known = 0
    path = np.empty(blocks.max(), np.int32)
    for now in range(len(leaf)):
        block = leaf[now]
        for depth in range(blocks[now] - 1, -1, -1):
            path[depth] = block
            block = parent[block]
        depth = 0
        # Distances are those at arrival; the tree changes after.
        while depth < blocks[now] and last[path[depth]] != NONE:
            group = last[path[depth]]
            begin = depth
            while depth < blocks[now] and last[path[depth]] == group:
                depth += 1
            newer = known - _up_to(tree, group)
            change[newer] += 1
            change[newer + depth - begin] -= 1
        seen = depth
        depth = 0
        while depth < seen:
            group = last[path[depth]]
            begin = depth
            while depth < seen and last[path[depth]] == group:
                depth += 1
            _add(tree, group, begin - depth)
        for depth in range(blocks[now]):
            last[path[depth]] = now
        _add(tree, now, blocks[now])
        known += blocks[now] - seen


@compiled
def _up_to(tree: LongArray, index: int) -> int:
    total = 0
    index += 1
    while index > 0:
        total += tree[index]
        index -= index & -index
    return total


@compiled
def _add(tree: LongArray, index: int, value: int) -> None:
    index += 1
    while index < len(tree):
        tree[index] += value
        index += index & -index
