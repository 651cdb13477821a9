"""Three ways to move scattered pages, and the table that says which one serves for which pieces.

Not run on a GPU yet: the shipped table rests on what others have published, and fit_table() replaces it by
what this machine measures.

batch    many copies by the copy engines in one call (cudaMemcpyBatchAsync); no kernel, no staging
staged   a kernel collects pages in device staging, one large copy goes over the link; and back
direct   a kernel reads or writes the registered host memory itself; no staging, but it lives as long as the
         transfer, and holds its part of the GPU meanwhile
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

from kvtier.gpu.engine import Direction

Way: TypeAlias = Literal["batch", "staged", "direct"]
WAYS: tuple[Way, ...] = ("batch", "staged", "direct")
FITTED_PIECES = tuple(4096 << i for i in range(0, 12, 2))
# A way with fewer demands on the GPU is preferred while it is within this of the quickest.
ENOUGH = 0.97
_DEMANDS: dict[Way, int] = {"batch": 0, "staged": 1, "direct": 2}


@dataclass(frozen=True, slots=True)
class WayTable:
    """For each direction (pieces up to this many bytes, way), ascending; the last way holds from there on."""

    gather: tuple[tuple[int, Way], ...]
    scatter: tuple[tuple[int, Way], ...]

    def way(self, direction: Direction, piece_bytes: int) -> Way:
        """How to move pieces of this size."""
        rows = self.gather if direction == "gather" else self.scatter
        return next((way for upto, way in rows if piece_bytes <= upto), rows[-1][1])


# The driver handles a descriptor for each copy of a batch, which costs as much as moving some tens of
# kilobytes; a kernel does not, so small pieces go through staging.
DEFAULT_TABLE = WayTable(
    gather=((256 << 10, "staged"), (1 << 62, "batch")), scatter=((256 << 10, "staged"), (1 << 62, "batch"))
)


def always(way: Way) -> WayTable:
    """A table that knows one way."""
    return WayTable(((1 << 62, way),), ((1 << 62, way),))


def fit_table(
    measure: Callable[[Direction, Way, int], float],
    *,
    pieces: Iterable[int] = FITTED_PIECES,
    ways: Iterable[Way] = WAYS,
) -> WayTable:
    """A table from measurements.

    measure(direction, way, piece_bytes): bytes a second.  A size between two that were measured goes by the
    smaller one's way up to the middle (of their logarithms: a factor of 2 when sizes grow by 4).
    """
    sizes, tried = sorted(pieces), tuple(ways)

    def rows(direction: Direction) -> tuple[tuple[int, Way], ...]:
        chosen = [_best({way: measure(direction, way, size) for way in tried}) for size in sizes]
        limits = [int((a * b) ** 0.5) for a, b in pairwise(sizes)] + [1 << 62]
        return tuple(
            (limit, way)
            for i, (limit, way) in enumerate(zip(limits, chosen, strict=True))
            if i + 1 == len(chosen) or chosen[i + 1] != way
        )

    return WayTable(rows("gather"), rows("scatter"))


def _best(rates: dict[Way, float]) -> Way:
    top = max(rates.values())
    return min((way for way, rate in rates.items() if rate >= ENOUGH * top), key=lambda way: _DEMANDS[way])
