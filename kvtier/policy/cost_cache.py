"""Keeps what is worth most for its room: the chance of a return against how long it keeps the room taken."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from kvtier.policy.baselines.flat import EMPTY, grown
from kvtier.policy.baselines.interfaces import Arrival, Jit, Outcome, Served, ServedTwo
from kvtier.policy.cost_cache_tier import Paths, Shadow, Tier, growth_of
from kvtier.policy.cost_cache_waits import Waits

# A drive wears: the slow tier may write so many blocks for each block that was never seen before.
_WRITES_PER_BLOCK: Final = 1.58


class CostCache:
    """Evicts from the end of the chain with the least worth; the request just served is a candidate too.

    A shadow of LRU that holds no data runs along. Where worth has fallen behind it, pieces go in LRU's order.
    by_cost: a block saves in proportion to 1 + its position in tokens / 30000, else each one the same.
    """

    def __init__(self, capacity: int, block_tokens: int, by_cost: bool, jit: Jit) -> None:
        growth = growth_of(block_tokens, by_cost)
        self.waits = Waits(jit)
        self._paths = Paths(jit)
        self._tier = Tier(capacity, growth, jit)
        self._shadow = Shadow(capacity, growth, jit)

    def serve(self, arrival: Arrival) -> Served:
        """See BlockPolicy."""
        path, paths, tier = arrival.path, self._paths, self._tier
        paths.meet(path)
        self.waits.arrive(arrival, *paths.owners(path))
        if not len(path):
            return Served(0, EMPTY, EMPTY)
        pieces = self.waits.pieces
        tier.meet(paths, pieces)
        hit = tier.front(path)
        self._shadow.serve(arrival, hit)
        tier.take(path, arrival.row, paths)
        gone = tier.cut(tier.count - tier.capacity, arrival.t_s, self._shadow.leads, paths, pieces)
        fresh = np.isin(gone, path[hit:])
        return Served(hit, gone[~fresh], gone[fresh])

    def finished(self, row: int, outcome: Outcome) -> None:
        """See BlockPolicy."""
        self.waits.finished(row, outcome)


class CostTwoTiers:
    """The same worth orders a fast and a slow tier.

    What the fast tier pushes out is written to the slow one, unless a copy still lies there or it is worth so
    little that the slow tier would let go of it at once. A block that comes back keeps its slow copy.
    A write costs the more of what one use saves, the fewer of them are left, nothing where as many are left
    as the slow tier has room. As long as it is nothing, a shadow of LRU runs along as in CostCache.
    """

    def __init__(self, fast: int, slow: int, block_tokens: int, by_cost: bool, jit: Jit) -> None:
        growth = growth_of(block_tokens, by_cost)
        self.waits = Waits(jit)
        self._paths = Paths(jit)
        self._fast = Tier(fast, growth, jit)
        # What lies in either tier; the slow tier's bound is held by counting copies.
        self._either = Tier(fast + slow, growth, jit)
        self._shadow = Shadow(fast + slow, growth, jit)
        self._slow = slow
        self._in_slow: npt.NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._slow_count = 0
        self._unpaid: npt.NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._writes_left = 0.0

    def serve(self, arrival: Arrival) -> ServedTwo:
        """See TwoTierPolicy."""
        path, paths = arrival.path, self._paths
        paths.meet(path)
        rows, ends = paths.owners(path)
        self.waits.arrive(arrival, rows, ends)
        if not len(path):
            return ServedTwo(0, 0)
        self._writes_left += _WRITES_PER_BLOCK * (len(path) - (int(ends[-1]) if len(ends) else 0))
        for tier in (self._fast, self._either):
            tier.meet(paths, self.waits.pieces)
        if len(self._in_slow) < len(paths.owner):
            self._in_slow = grown(self._in_slow, len(paths.owner), 0)
            self._unpaid = grown(self._unpaid, len(paths.owner), 0)
        hit = self._either.front(path)
        self._shadow.serve(arrival, hit)
        for tier in (self._fast, self._either):
            tier.take(path, arrival.row, paths)
        written = self._settle(arrival.t_s)
        # What lies in both tiers LRU would have in both, too: it counts once.
        self._shadow.trim(self._either.count)
        return ServedTwo(hit, written)

    def finished(self, row: int, outcome: Outcome) -> None:
        """See TwoTierPolicy."""
        self.waits.finished(row, outcome)

    def _settle(self, now_s: float) -> int:
        """Bring both tiers within their bounds; returns how many blocks are written."""
        pieces = self.waits.pieces
        write = min(max(1.0 - self._writes_left / self._slow, 0.0), 1.0)
        args = (now_s, self._shadow.leads and not write, self._paths, pieces)
        down = self._fast.cut(self._fast.count - self._fast.capacity, *args)
        fresh = down[~self._in_slow[down]]
        self._unpaid[fresh] = True
        over = self._slow_count + len(fresh) - self._slow
        gone = self._either.cut(over, *args, self._fast.resident, self._unpaid, write)
        self._unpaid[gone] = False
        kept = fresh[self._unpaid[fresh]]
        too_many = max(len(kept) - int(max(self._writes_left, 0.0)), 0)
        shed = self._either.shed(kept, too_many, self._paths, pieces)
        self._unpaid[shed] = False
        written = kept[self._unpaid[kept]]
        self._unpaid[written] = False
        self._slow_count -= int(self._in_slow[gone].sum())
        self._in_slow[gone] = False
        self._in_slow[written] = True
        self._slow_count += len(written)
        self._writes_left -= len(written)
        if self._slow_count > self._slow:
            self._drop_copies(self._slow_count - self._slow)
        return len(written)

    def _drop_copies(self, count: int) -> None:
        """Nothing is left that only the slow tier has: copies go, those of the newest blocks first."""
        copies = np.flatnonzero(self._in_slow)[-count:]
        self._in_slow[copies] = False
        self._slow_count -= count
