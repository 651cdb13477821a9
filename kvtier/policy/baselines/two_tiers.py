"""A fast tier over a slow one, both ordered by the same baseline."""

from __future__ import annotations

import numpy as np

from kvtier.policy.baselines.flat import FlatCache
from kvtier.policy.baselines.interfaces import Arrival, Outcome, ServedTwo


class TwoTiers:
    """What the fast tier pushes out is written to the slow tier, unless it still lies there.

    A block that comes back from the slow tier keeps its copy there, so that it need not be written again.
    The slow tier sees a block used when it is read from it and when the fast tier lets go of it. What a
    path has beyond the capacity of the fast tier goes straight to the slow one.
    """

    def __init__(self, fast: FlatCache, slow: FlatCache) -> None:
        self._fast = fast
        self._slow = slow

    def serve(self, arrival: Arrival) -> ServedTwo:
        """See TwoTierPolicy."""
        path = arrival.path
        self._fast.meet(path)
        self._slow.meet(path)
        in_fast = self._fast.resident[path]
        held = in_fast | self._slow.resident[path]
        hit = len(path) if held.all() else int(held.argmin())
        kept = path[: self._fast.capacity]
        read = kept[:hit][~in_fast[: len(kept)][:hit]]
        direct = path[self._fast.capacity : self._slow.capacity]
        evicted, _ = self._fast.access(kept, kept)
        # The last goes in first: leaves before what they stand on, and what is used now after what is old.
        _, written = self._slow.access(np.concatenate((read, direct, evicted[::-1])), path)
        return ServedTwo(hit, written)

    def finished(self, row: int, outcome: Outcome) -> None:
        """See TwoTierPolicy. Nothing is learned from it."""
