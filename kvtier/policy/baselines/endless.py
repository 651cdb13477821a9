"""The two ends of the scale: nothing is kept, and everything is."""

from __future__ import annotations

import numpy as np

from kvtier.policy.baselines.flat import EMPTY, front_kernel, grown
from kvtier.policy.baselines.interfaces import Arrival, Jit, Outcome, Served


class NeverCache:
    """Keeps nothing."""

    def serve(self, arrival: Arrival) -> Served:
        """See BlockPolicy."""
        return Served(0, EMPTY, arrival.path)

    def finished(self, row: int, outcome: Outcome) -> None:
        """See BlockPolicy. Nothing is learned from it."""


class UnboundedCache:
    """Keeps everything: what a cache of any size could reach at most."""

    def __init__(self, jit: Jit) -> None:
        self._resident = np.zeros(0, np.bool_)
        self._front = front_kernel(jit)

    def serve(self, arrival: Arrival) -> Served:
        """See BlockPolicy."""
        if not len(arrival.path):
            return Served(0, EMPTY, EMPTY)
        blocks = int(arrival.path.max()) + 1
        if blocks > len(self._resident):
            self._resident = grown(self._resident, max(blocks, 2 * len(self._resident)), 0)
        hit = int(self._front(self._resident, arrival.path))
        self._resident[arrival.path] = True
        return Served(hit, EMPTY, EMPTY)

    def finished(self, row: int, outcome: Outcome) -> None:
        """See BlockPolicy. Nothing is learned from it."""
