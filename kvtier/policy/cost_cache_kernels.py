"""Loops over blocks of the cost policy: who used a block last, and which ends of chains go.

Blocks whose last use was the same request stand on its path without a gap, so what is kept falls into one
piece for each request, and is cut from the end of pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvtier.policy.baselines.flat import NONE
from kvtier.policy.baselines.interfaces import IntArray, Jit
from kvtier.policy.survival import CurveArray, FloatArray, survival_kernels

BoolArray = npt.NDArray[np.bool_]
# What was used and waits for nobody goes first, the oldest first: its worth is below that of any wait.
_NOBODY_WAITS: Final = 1e-12


class Blocks(NamedTuple):
    """By block. owner: the row that used it last; children: resident blocks on it.

    held: must stay.  unpaid: keeping it takes a write first.
    """

    resident: BoolArray
    parent: IntArray
    owner: IntArray
    children: IntArray
    held: BoolArray
    unpaid: BoolArray


class Pieces(NamedTuple):
    """By row: what it was the last to use, [start, end) of its path, resident up to the block `tail`.

    waiting: a return to it is expected; clock_s: when that wait started, and used_s when it was used.
    """

    start: IntArray
    end: IntArray
    tail: IntArray
    waiting: BoolArray
    clock_s: FloatArray
    used_s: FloatArray
    survival: CurveArray
    rates: CurveArray


class CostKernels(NamedTuple):
    """owners: the runs of one last user along the known front of a path; take: use a path, and count what
    was not resident; cut: evict;
    shed: evict named blocks."""

    owners: Callable[..., int]
    take: Callable[..., int]
    cut: Callable[..., tuple[int, int]]
    shed: Callable[..., int]


@cache
def cost_kernels(jit: Jit) -> CostKernels:
    """Compiled loops."""
    kernels = survival_kernels(jit)
    rate, rate_after = kernels.rate, kernels.rate_after

    @jit
    def owners(path: IntArray, owner: IntArray, rows: IntArray, ends: IntArray) -> int:
        runs = 0
        depth = 0
        while depth < len(path) and owner[path[depth]] != NONE:
            row = owner[path[depth]]
            while depth < len(path) and owner[path[depth]] == row:
                depth += 1
            rows[runs] = row
            ends[runs] = depth
            runs += 1
        return runs

    @jit
    def take(path: IntArray, row: int, blocks: Blocks) -> int:
        taken = 0
        above = NONE
        for block in path:
            blocks.owner[block] = row
            if not blocks.resident[block]:
                blocks.resident[block] = True
                taken += 1
                if above != NONE:
                    blocks.children[above] += 1
            above = block
        return taken

    @jit
    def worth(row: int, now_s: float, pieces: Pieces, growth: float, by_age: bool, write: float) -> float:
        value = 1.0 / (1.0 + now_s - pieces.used_s[row])
        if by_age:
            return float(value)
        value *= _NOBODY_WAITS
        if pieces.waiting[row]:
            age_s = now_s - pieces.clock_s[row]
            if write > 0.0:
                value += rate_after(pieces.survival[row], age_s, write)
            else:
                value += rate(pieces.survival[row], pieces.rates[row], age_s)
        return float(value * (1.0 + growth * 0.5 * (pieces.start[row] + pieces.end[row])))

    @jit
    def put(heap: FloatArray, rows: IntArray, size: int, value: float, row: int) -> int:
        at = size
        while at > 0 and heap[(at - 1) // 2] > value:
            heap[at] = heap[(at - 1) // 2]
            rows[at] = rows[(at - 1) // 2]
            at = (at - 1) // 2
        heap[at] = value
        rows[at] = row
        return size + 1

    @jit
    def pop(heap: FloatArray, rows: IntArray, size: int) -> int:
        size -= 1
        value, row = heap[size], rows[size]
        at = 0
        while 2 * at + 1 < size:
            low = 2 * at + 1
            if low + 1 < size and heap[low + 1] < heap[low]:
                low += 1
            if heap[low] >= value:
                break
            heap[at] = heap[low]
            rows[at] = rows[low]
            at = low
        heap[at] = value
        rows[at] = row
        return size

    @jit
    def free(block: int, blocks: Blocks) -> bool:
        return bool(blocks.resident[block] and blocks.children[block] == 0 and not blocks.held[block])

    @jit
    def cut(
        over: int,
        now_s: float,
        growth: float,
        by_age: bool,
        write: float,
        kept: IntArray,
        count: int,
        blocks: Blocks,
        pieces: Pieces,
        out: IntArray,
    ) -> tuple[int, int]:
        """Evicts `over` blocks into out; returns how many went, and how many of the rows in `kept` stay.

        growth: how much more a block saves than the one before it.  by_age: forget worth, and be LRU.
        write: what a write costs, as a part of what one use saves.
        """
        heap = np.empty(count, np.float64)
        rows = np.empty(count, np.int32)
        size = stay = 0
        for i in range(count):
            row = kept[i]
            tail = pieces.tail[row]
            if blocks.owner[tail] != row or not blocks.resident[tail]:
                continue
            kept[stay] = row
            stay += 1
            if free(tail, blocks):
                cost = write if blocks.unpaid[tail] else 0.0
                size = put(heap, rows, size, worth(row, now_s, pieces, growth, by_age, cost), row)
        gone = 0
        while gone < over and size > 0:
            row = rows[0]
            size = pop(heap, rows, size)
            block = pieces.tail[row]
            unpaid = blocks.unpaid[block]
            while gone < over and blocks.owner[block] == row and free(block, blocks):
                if blocks.unpaid[block] != unpaid:
                    break
                blocks.resident[block] = False
                pieces.end[row] -= 1
                out[gone] = block
                gone += 1
                block = blocks.parent[block]
                if block == NONE:
                    break
                blocks.children[block] -= 1
                if blocks.owner[block] == row:
                    pieces.tail[row] = block
            if block != NONE and free(block, blocks):
                below = blocks.owner[block]
                if pieces.tail[below] == block:
                    cost = write if blocks.unpaid[block] else 0.0
                    size = put(heap, rows, size, worth(below, now_s, pieces, growth, by_age, cost), below)
        return gone, stay

    @jit
    def shed(named: IntArray, count: int, blocks: Blocks, pieces: Pieces, out: IntArray) -> int:
        """Evicts the first `count` of the named blocks that are leaves by then."""
        gone = 0
        for block in named:
            if gone == count:
                break
            if not free(block, blocks):
                continue
            blocks.resident[block] = False
            out[gone] = block
            gone += 1
            row = blocks.owner[block]
            pieces.end[row] -= 1
            above = blocks.parent[block]
            if above != NONE:
                blocks.children[above] -= 1
                if blocks.owner[above] == row:
                    pieces.tail[row] = above
        return gone

    return CostKernels(owners, take, cut, shed)
