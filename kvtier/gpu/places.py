"""Which engine copies a pool: found by where its memory is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvtier.errors import GeometryError
from kvtier.gpu.cpu_engine import CpuCopyEngine
from kvtier.gpu.engine import CopyEngine, Place, Reached, SlotMemory, StreamEvent
from kvtier.gpu.pool import Pool

CPU = "cpu"
MakeEngine = Callable[[SlotMemory], CopyEngine]


class CpuPlace(Place):
    """Host memory: what was written before a call is there, so every event is one that was reached.

    make: makes the engine; by default the CPU's.
    """

    location = CPU
    engine = "cpu"

    def __init__(self, make: MakeEngine = CpuCopyEngine) -> None:
        self._make = make

    def __call__(self, slots: SlotMemory) -> CopyEngine:
        """See Place."""
        return self._make(slots)

    @property
    def device_bytes(self) -> int:
        """See Place."""
        return 0

    def stream(self, stream: Any) -> int:
        """See Place: None, and whatever is no GPU's stream, such as torch.cpu's."""
        if isinstance(stream, int) or hasattr(stream, "cuda_stream") or hasattr(stream, "ptr"):
            raise GeometryError(
                "a pool in host memory knows no stream of a GPU", fix="wait for the stream, and pass none"
            )
        return 0

    def mark(self, stream: Any = None) -> StreamEvent:
        """See Place."""
        self.stream(stream)
        return Reached()

    def event(self, event: Any) -> StreamEvent:
        """See Place."""
        if isinstance(event, StreamEvent) and event.done():
            return event
        raise GeometryError(
            "a pool in host memory waits for no event of a GPU", fix="pass what worker.mark() gives"
        )


def location_of(pool: object) -> str:
    """Where the pool's memory is. A cache of its own for each conversation counts as host memory."""
    views = [view for group in pool.views for view in group] if isinstance(pool, Pool) else []
    return views[0].location if views else CPU


def place_of(location: str) -> Place:
    """The place by its name. Raises TierUnavailable, with the fix, where a GPU or cupy is missing."""
    if location == CPU:
        return CpuPlace()
    kind, _, number = location.partition(":")
    if kind != "cuda" or not number.isdigit():
        raise GeometryError(f"there is no copy engine for memory on {location}")
    from kvtier.gpu.cuda.make import cuda_engine

    return cuda_engine(int(number))


def choose(pool: object, make: MakeEngine | None) -> Place:
    """The place for a pool, or the one that the caller made. Raises GeometryError, TierUnavailable."""
    if isinstance(make, Place):
        return make
    location = location_of(pool)
    if make is None:
        return place_of(location)
    if location != CPU:
        raise GeometryError(
            f"an engine of one's own cannot order its copies with the work on {location}",
            fix="leave make_engine out, or pass kvtier.gpu.cuda.make.cuda_engine(...)",
        )
    return CpuPlace(make)
