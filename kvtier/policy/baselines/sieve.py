"""SIEVE: one queue and a hand that spares what was used since it last came by.

Source: Zhang et al., "SIEVE is simpler than LRU: an efficient turn-key eviction algorithm for web caches",
NSDI 2024, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kvtier.policy.baselines.flat import NONE, Columns, FlatCache, list_kernels, no_ends
from kvtier.policy.baselines.interfaces import IntArray, Jit


@cache
def _evict_kernel(jit: Jit) -> Callable[..., Any]:
    _, unlink = list_kernels(jit)

    @jit
    def evict(
        hand: int,
        count: int,
        pins: IntArray,
        pin: int,
        visited: npt.NDArray[np.bool_],
        newer: IntArray,
        older: IntArray,
        ends: IntArray,
    ) -> tuple[int, int]:
        """The block to go and where the hand stands after; NONE where all are pinned."""
        for _ in range(2 * count):
            if hand == NONE:
                hand = ends[0, 1]
            block = hand
            hand = newer[block]
            if pins[block] == pin:
                continue
            if not visited[block]:
                unlink(newer, older, ends, 0, block)
                return block, hand
            visited[block] = False
        return NONE, hand

    return evict


@cache
def _access_kernel(jit: Jit) -> Callable[..., Any]:
    push, _ = list_kernels(jit)
    evict = _evict_kernel(jit)

    @jit
    def access(
        blocks: IntArray,
        capacity: int,
        count: int,
        hand: int,
        pins: IntArray,
        pin: int,
        resident: npt.NDArray[np.bool_],
        visited: npt.NDArray[np.bool_],
        newer: IntArray,
        older: IntArray,
        ends: IntArray,
        out: IntArray,
    ) -> tuple[int, int, int]:
        gone = taken = 0
        for i in range(len(blocks) - 1, -1, -1):
            block = blocks[i]
            if resident[block]:
                visited[block] = True
                continue
            if count + taken - gone >= capacity:
                victim, hand = evict(hand, count + taken - gone, pins, pin, visited, newer, older, ends)
                if victim == NONE:
                    continue
                resident[victim] = False
                out[gone] = victim
                gone += 1
            visited[block] = False
            push(newer, older, ends, 0, block)
            resident[block] = True
            taken += 1
        return gone, taken, hand

    return access


class SieveCache(FlatCache):
    """SIEVE over single blocks; evicts any block that is not pinned. The hand passes over pinned blocks."""

    COLUMNS: ClassVar[Columns] = {
        "newer": (np.int32, NONE),
        "older": (np.int32, NONE),
        "visited": (np.bool_, 0),
        "pins": (np.int32, 0),
    }
    newer: IntArray
    older: IntArray
    visited: npt.NDArray[np.bool_]
    pins: IntArray

    def __init__(self, capacity: int, jit: Jit) -> None:
        super().__init__(capacity, jit)
        self._ends = no_ends(1)
        self._count = 0
        self._hand = NONE
        self._pin = 0
        self._access = _access_kernel(jit)

    def access(self, blocks: IntArray, pinned: IntArray) -> tuple[IntArray, int]:
        """See FlatCache."""
        out = np.empty(len(blocks), np.int32)
        self._pin += 1
        self.pins[pinned] = self._pin
        gone, taken, self._hand = self._access(
            blocks,
            self.capacity,
            self._count,
            self._hand,
            self.pins,
            self._pin,
            self.resident,
            self.visited,
            self.newer,
            self.older,
            self._ends,
            out,
        )
        self._count += taken - gone
        return out[:gone], taken
