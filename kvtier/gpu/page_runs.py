"""Free pages of a parking area, given out as runs of neighbours."""

from __future__ import annotations

from bisect import bisect_left


class PageRuns:
    """Pages 0 .. pages-1, all free at first. Pure; not thread-safe."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.used = 0
        self._starts = [0] if pages else []
        self._counts = [pages] if pages else []

    def take(self, count: int) -> int | None:
        """First page of the smallest free run that has `count` pages, or None."""
        fitting = [(have, i) for i, have in enumerate(self._counts) if have >= count]
        if count < 1 or not fitting:
            return None
        _, i = min(fitting)
        first = self._starts[i]
        if self._counts[i] == count:
            del self._starts[i], self._counts[i]
        else:
            self._starts[i] += count
            self._counts[i] -= count
        self.used += count
        return first

    def give(self, first: int, count: int) -> None:
        """Free a run that `take` answered. Raises ValueError when some of it is free already."""
        i = bisect_left(self._starts, first)
        after = i < len(self._starts) and self._starts[i] < first + count
        before = i > 0 and self._starts[i - 1] + self._counts[i - 1] > first
        if after or before or first < 0 or first + count > self.pages:
            raise ValueError(f"pages {first} to {first + count} are not all in use")
        self._starts.insert(i, first)
        self._counts.insert(i, count)
        self.used -= count
        for left in (i, i - 1):
            if 0 <= left < len(self._starts) - 1:
                self._join(left)

    def _join(self, left: int) -> None:
        if self._starts[left] + self._counts[left] == self._starts[left + 1]:
            self._counts[left] += self._counts.pop(left + 1)
            del self._starts[left + 1]
