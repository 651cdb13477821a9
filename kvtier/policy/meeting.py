"""Where computing from the front and loading from the back meet, decided block by block while both go on.

A plan's meeting point is what is expected; how fast both are this time shows while they work.  Each asks
for its next block when it is free.  It gets one unless the other would be done with all that is left before
this block were ready: a slow side's last block must not hold up the whole.  So with right expectations the
whole never takes longer than the better side alone would have, and at break-even about half as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


class _Side:
    """What one side is expected to need, corrected by what it needed so far."""

    def __init__(self, block_s: Sequence[float]) -> None:
        self.block_s = block_s
        self._before = [0.0, *accumulate(block_s)]
        self.closed = False
        self.busy_until_s = 0.0
        self._taken: dict[int, float] = {}
        # One block's worth of belief in what was expected.
        self._expected_s = self._needed_s = block_s[0] if block_s else 0.0

    @property
    def _pace(self) -> float:
        return self._needed_s / self._expected_s if self._expected_s else 1.0

    def alone_until_s(self, now_s: float, first: int, end: int) -> float:
        """When it would be done with the blocks [first, end), after what it works on."""
        left_s = (self._before[end] - self._before[first]) * self._pace
        return max(now_s, self.busy_until_s) + left_s

    def one_until_s(self, now_s: float, block: int) -> float:
        """When it would be done with one block, begun now."""
        return now_s + self.block_s[block] * self._pace

    def take(self, now_s: float, block: int) -> int:
        """Begin a block."""
        self.busy_until_s = self.one_until_s(now_s, block)
        self._taken[block] = now_s
        return block

    def ended(self, now_s: float, block: int) -> None:
        """A block that was begun is done."""
        self._needed_s += max(now_s - self._taken.pop(block), 0.0)
        self._expected_s += self.block_s[block]
        self.busy_until_s = now_s


class Meeting:
    """Hands out the blocks [0, n) of what is stored: from the front to compute, from the back to load.

    compute_s: expected seconds to compute each block after those before it.  load_s: to load each block.  Not
    safe for use by several threads at once: the caller holds a lock.  Times are of any one clock.
    """

    def __init__(self, compute_s: Sequence[float], load_s: Sequence[float]) -> None:
        if len(compute_s) != len(load_s) or not all(s >= 0 for s in (*compute_s, *load_s)):
            raise ValueError("each block needs its seconds to compute and to load, not negative")
        self._compute, self._load = _Side(compute_s), _Side(load_s)
        self._front, self._back = 0, len(compute_s)

    @property
    def computed(self) -> int:
        """Blocks from the front that are computed, or being computed."""
        return self._front

    def next_to_compute(self, now_s: float) -> int | None:
        """The block to compute now; None when what is left is left to loading, for good."""
        if self._done(self._compute, self._load, now_s, self._front):
            return None
        self._front += 1
        return self._compute.take(now_s, self._front - 1)

    def next_to_load(self, now_s: float) -> int | None:
        """The block to load now; None when what is left is left to computing, for good."""
        if self._done(self._load, self._compute, now_s, self._back - 1):
            return None
        self._back -= 1
        return self._load.take(now_s, self._back)

    def block_computed(self, now_s: float, block: int) -> None:
        """A block that was given out is computed."""
        self._compute.ended(now_s, block)

    def block_loaded(self, now_s: float, block: int) -> None:
        """A block that was given out is loaded."""
        self._load.ended(now_s, block)

    def _done(self, side: _Side, other: _Side, now_s: float, block: int) -> bool:
        """Whether a side takes no more blocks. One of the two always goes on while any are left."""
        if self._front >= self._back or side.closed:
            return True
        if not other.closed:
            alone_s = other.alone_until_s(now_s, self._front, self._back)
            side.closed = side.one_until_s(now_s, block) > alone_s
        return side.closed
