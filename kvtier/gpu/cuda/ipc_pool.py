"""A worker's side of the second mode: its pool on a GPU, offered to the GPU service. Not run on a GPU yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvtier.errors import GeometryError, TierUnavailable
from kvtier.geometry import CUDA_IPC
from kvtier.gpu.cuda.ipc import PeerEvents, Prober, export_pool
from kvtier.gpu.cuda.make import CudaPlace
from kvtier.gpu.engine import StreamEvent
from kvtier.gpu.pool import Pool
from kvtier.gpu.shared_pool import Answer, Challenge, MappablePool


class IpcPool(MappablePool):
    """Goes to `attach(...)` instead of the pool, where the daemon shall copy by itself.

    place: of the pool's GPU, from `cuda_engine(...)`.  scratch: pages that hold nothing, ever: the probe
    writes there, at each attach.  Raises GeometryError for a pool that is elsewhere, or no scratch pages.
    """

    place: CudaPlace

    def __init__(self, pool: Pool, place: CudaPlace, scratch: Sequence[int]) -> None:
        if not scratch:
            raise GeometryError("a probe needs at least one scratch page", fix="keep a page out of use")
        if {view.location for views in pool.views for view in views} != {place.location}:
            raise GeometryError(f"the pool is not on {place.location}")
        pool.bind(scratch)
        self.pool, self.place, self._gpu = pool, place, place.gpu
        self._scratch = tuple(scratch)
        self._prober = Prober(self._gpu, pool)
        self._ring = place.rings.take(self._gpu)
        self._closed = False

    def export(self) -> dict[str, Any]:
        """See MappablePool."""
        return {"kind": CUDA_IPC, "events": self._ring.handles(), **export_pool(self._gpu, self.pool)}

    def challenge(self) -> Challenge:
        """See MappablePool."""
        return self._prober.challenge(self._scratch)

    def judge(self, answer: Answer) -> bool:
        """See MappablePool."""
        return self._prober.judge(answer)

    def relay(self, event: StreamEvent) -> int:
        """See MappablePool."""
        if self._closed:
            raise TierUnavailable("the pool is closed")
        return self._ring.relay(event)

    def listen(self, handles: Sequence[bytes]) -> Callable[[int], StreamEvent]:
        """See MappablePool."""
        return PeerEvents(self._gpu, handles).event

    def close(self) -> None:
        """Give the events to the place's next pool, once no worker is attached with it; again is no error.

        They are not destroyed: the service may have a copy to queue that waits for one.  See EventRings.
        """
        closed, self._closed = self._closed, True
        if not closed:
            self.place.rings.give(self._ring)
