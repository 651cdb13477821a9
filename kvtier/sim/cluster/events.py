"""What happens when: a heap of calls.

A process library such as simpy wraps each step in a generator, an event and a list of callbacks; the
cluster's steps are few and know their own end times, so a heap of (time, number, call) does the same at a
fraction of the cost (benchmarks/simulate.py says how much).  The number makes the order of equal times that
in which they were asked for.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Events:
    """Virtual time. now_s never goes back."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.done = 0
        self._heap: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._asked = 0

    def at(self, t_s: float, call: Callable[[Any], None], argument: Any) -> None:
        """Call it with the argument at t_s, or now where that is past."""
        self._asked += 1
        heapq.heappush(self._heap, (max(t_s, self.now_s), self._asked, call, argument))

    def run_until(self, t_s: float) -> None:
        """Everything up to t_s, which then is now; what was asked for at t_s itself is done."""
        heap = self._heap
        while heap and heap[0][0] <= t_s:
            self.now_s, _, call, argument = heapq.heappop(heap)
            self.done += 1
            call(argument)
        self.now_s = max(self.now_s, t_s)

    def run_out(self) -> None:
        """Everything that is left."""
        while self._heap:
            self.run_until(self._heap[0][0])
