"""Tail-optimised LRU: what is beyond a prompt's latency target anyway goes first.

Source: Zhang, Li, Moallemi and Peng, "Tail-Optimized Caching for LLM Inference", NeurIPS 2025. A next turn
of L known and Q new tokens that may compute T tokens in time needs L + Q - T tokens in the cache; what a
conversation has cached behind that is spare. Spare blocks go first, then the others, each in LRU's order. Q
is the mean of the new tokens of all requests so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from kvtier.policy.baselines.flat import NONE, Columns, FlatCache, list_kernels, no_ends
from kvtier.policy.baselines.interfaces import Arrival, IntArray, Jit, Served

_SPARE: Final = 0
_FIRM: Final = 1


@cache
def _access_kernel(jit: Jit) -> Callable[..., Any]:
    push, unlink = list_kernels(jit)

    @jit
    def access(
        path: IntArray,
        firm_blocks: int,
        resident: npt.NDArray[np.bool_],
        parent: IntArray,
        which: IntArray,
        firm_children: IntArray,
        pinned: npt.NDArray[np.bool_],
        newer: IntArray,
        older: IntArray,
        ends: IntArray,
        free: int,
        out: IntArray,
    ) -> tuple[int, int]:
        taken = 0
        for i in range(len(path) - 1, -1, -1):
            block = path[i]
            was_firm = 0
            if resident[block]:
                unlink(newer, older, ends, which[block], block)
                was_firm = which[block]
            else:
                resident[block] = True
                taken += 1
            # On a spare block nothing firm stands, so that it is a leaf when it comes up.
            firm = _FIRM if i < firm_blocks or firm_children[block] > 0 else _SPARE
            which[block] = firm
            push(newer, older, ends, firm, block)
            if i > 0:
                firm_children[path[i - 1]] += firm - was_firm
            pinned[block] = True
        gone = 0
        while taken - gone > free:
            block = ends[_SPARE, 1]
            if block == NONE or pinned[block]:
                block = ends[_FIRM, 1]
            unlink(newer, older, ends, which[block], block)
            resident[block] = False
            if parent[block] != NONE:
                firm_children[parent[block]] -= which[block]
            out[gone] = block
            gone += 1
        for block in path:
            pinned[block] = False
        return gone, taken

    return access


class TlruCache(FlatCache):
    """threshold_tokens: how much of a prompt may be computed within the latency target."""

    COLUMNS: ClassVar[Columns] = {
        "newer": (np.int32, NONE),
        "older": (np.int32, NONE),
        "which": (np.int32, _SPARE),
        "firm_children": (np.int32, 0),
        "pinned": (np.bool_, 0),
    }
    newer: IntArray
    older: IntArray
    which: IntArray
    firm_children: IntArray
    pinned: npt.NDArray[np.bool_]

    def __init__(self, capacity: int, block_tokens: int, threshold_tokens: float, jit: Jit) -> None:
        super().__init__(capacity, jit)
        self._block_tokens = block_tokens
        self._threshold_tokens = threshold_tokens
        self._ends = no_ends(2)
        self._count = self._known = 0
        self._requests = self._new_tokens = 0
        self._access = _access_kernel(jit)

    def serve(self, arrival: Arrival) -> Served:
        """See BlockPolicy."""
        path = arrival.path
        known = int((path < self._known).sum()) * self._block_tokens
        self._requests += 1
        self._new_tokens += max(arrival.tokens_in - known, 0)
        if len(path):
            self._known = max(self._known, int(path.max()) + 1)
        return super().serve(arrival)

    def access(self, blocks: IntArray, pinned: IntArray) -> tuple[IntArray, int]:
        """See FlatCache. Both are the front of the path that is served."""
        out = np.empty(len(blocks), np.int32)
        gone, taken = self._access(
            blocks,
            self._firm_blocks(len(blocks)),
            self.resident,
            self.parent,
            self.which,
            self.firm_children,
            self.pinned,
            self.newer,
            self.older,
            self._ends,
            self.capacity - self._count,
            out,
        )
        self._count += taken - gone
        return out[:gone], taken

    def _firm_blocks(self, blocks: int) -> int:
        """How many of a path's blocks its next turn needs."""
        coming = self._new_tokens / max(self._requests, 1)
        needed = blocks * self._block_tokens + coming - self._threshold_tokens
        return max(min(math.ceil(needed / self._block_tokens), blocks), 0)
