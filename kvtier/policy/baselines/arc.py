"""ARC: recency and frequency in a balance that its ghosts adjust.

Source: Megiddo and Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003, figure 4.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kvtier.policy.baselines.flat import NONE, Columns, FlatCache, list_kernels, no_ends
from kvtier.policy.baselines.interfaces import IntArray, Jit

# Lists: seen once, seen more often, and the ghosts of both. A block's `where` is the list plus one.
_T1, _T2, _B1, _B2 = 0, 1, 2, 3


@cache
def _move_kernel(jit: Jit) -> Callable[..., Any]:
    push, unlink = list_kernels(jit)

    @jit
    def move(
        block: int,
        to: int,
        where: npt.NDArray[np.int8],
        newer: IntArray,
        older: IntArray,
        ends: IntArray,
        sizes: IntArray,
    ) -> None:
        origin = where[block] - 1
        if origin != NONE:
            unlink(newer, older, ends, origin, block)
            sizes[origin] -= 1
        where[block] = to + 1
        if to != NONE:
            push(newer, older, ends, to, block)
            sizes[to] += 1

    return move


@cache
def _replace_kernel(jit: Jit) -> Callable[..., Any]:
    move = _move_kernel(jit)

    @jit
    def replace(
        in_b2: bool,
        ghost: bool,
        target: float,
        pins: IntArray,
        pin: int,
        where: npt.NDArray[np.int8],
        newer: IntArray,
        older: IntArray,
        ends: IntArray,
        sizes: IntArray,
    ) -> int:
        """Evict the oldest unpinned block of one list, or else of the other; NONE where all are pinned."""
        once = sizes[_T1] >= 1 and (sizes[_T1] > target or (in_b2 and sizes[_T1] == int(target)))
        for which in (_T1, _T2) if once else (_T2, _T1):
            block = ends[which, 1]
            # The blocks of the request at hand are the newest ones of each list.
            if block != NONE and pins[block] != pin:
                move(block, which + _B1 if ghost else NONE, where, newer, older, ends, sizes)
                return int(block)
        return NONE

    return replace


@cache
def _access_kernel(jit: Jit) -> Callable[..., Any]:
    move = _move_kernel(jit)
    replace = _replace_kernel(jit)

    @jit
    def access(
        blocks: IntArray,
        capacity: int,
        target: float,
        pins: IntArray,
        pin: int,
        resident: npt.NDArray[np.bool_],
        where: npt.NDArray[np.int8],
        newer: IntArray,
        older: IntArray,
        ends: IntArray,
        sizes: IntArray,
        out: IntArray,
    ) -> tuple[int, int, float]:
        gone = taken = 0
        for i in range(len(blocks) - 1, -1, -1):
            if resident[blocks[i]]:
                move(blocks[i], _T2, where, newer, older, ends, sizes)
        for i in range(len(blocks) - 1, -1, -1):
            block = blocks[i]
            if resident[block]:
                # Once more, so that a request's blocks stand in the order of their depth.
                if where[block] - 1 == _T2:
                    move(block, _T2, where, newer, older, ends, sizes)
                continue
            at = where[block] - 1
            ghost = True
            if at == _B1:
                target = min(float(capacity), target + max(sizes[_B2] / sizes[_B1], 1.0))
            elif at == _B2:
                target = max(0.0, target - max(sizes[_B1] / sizes[_B2], 1.0))
            elif sizes[_T1] + sizes[_B1] >= capacity:
                if sizes[_T1] < capacity:
                    move(ends[_B1, 1], NONE, where, newer, older, ends, sizes)
                else:
                    ghost = False
            elif sizes[_T1] + sizes[_T2] + sizes[_B1] + sizes[_B2] >= 2 * capacity:
                move(ends[_B2, 1], NONE, where, newer, older, ends, sizes)
            if sizes[_T1] + sizes[_T2] >= capacity:
                victim = replace(at == _B2, ghost, target, pins, pin, where, newer, older, ends, sizes)
                if victim == NONE:
                    continue
                resident[victim] = False
                out[gone] = victim
                gone += 1
            move(block, _T1 if at == NONE else _T2, where, newer, older, ends, sizes)
            resident[block] = True
            taken += 1
        return gone, taken, target

    return access


class ArcCache(FlatCache):
    """ARC over single blocks; evicts any block that is not pinned.

    Blocks of the request that are resident are used first, then the others come in, deeper ones first.
    Where the list that ARC would shorten holds pinned blocks alone, the other list gives.
    """

    COLUMNS: ClassVar[Columns] = {
        "newer": (np.int32, NONE),
        "older": (np.int32, NONE),
        "where": (np.int8, 0),
        "pins": (np.int32, 0),
    }
    newer: IntArray
    older: IntArray
    where: npt.NDArray[np.int8]
    pins: IntArray

    def __init__(self, capacity: int, jit: Jit) -> None:
        super().__init__(capacity, jit)
        self._ends = no_ends(4)
        self._sizes = np.zeros(4, np.int32)
        self._target = 0.0
        self._pin = 0
        self._access = _access_kernel(jit)

    def access(self, blocks: IntArray, pinned: IntArray) -> tuple[IntArray, int]:
        """See FlatCache."""
        out = np.empty(len(blocks), np.int32)
        self._pin += 1
        self.pins[pinned] = self._pin
        gone, taken, self._target = self._access(
            blocks,
            self.capacity,
            self._target,
            self.pins,
            self._pin,
            self.resident,
            self.where,
            self.newer,
            self.older,
            self._ends,
            self._sizes,
            out,
        )
        return out[:gone], taken
