"""The copy engine for pools in GPU memory: two lanes that work at once, one for each direction.

Not run on a GPU yet: tested against a fake device that models streams.

Four threads.  For each direction one queues work on the device (it waits only when enough is queued), and
one waits for the oldest batch's last event and answers.  The waiting is cudaEventSynchronize on an event that
blocks: the thread sleeps in the driver without the GIL.  Callbacks on streams are not used: CUDA runs them on
a thread of its own, which would have to take the GIL, and the stream stands still until it has it.
"""

from __future__ import annotations

import heapq
import queue
import threading
from collections.abc import Sequence
from contextlib import suppress

from kvtier.errors import GeometryError, TierUnavailable
from kvtier.gpu.cuda.device import Device
from kvtier.gpu.cuda.lane import COPY_ERRORS, Lane, Run, Settings, result_of
from kvtier.gpu.cuda.memory import BlobPool, PinnedArena
from kvtier.gpu.cuda.ways import WayTable
from kvtier.gpu.engine import (
    CANCELLED,
    CLOSE_S,
    ERROR,
    CopyBatch,
    CopyEngine,
    Direction,
    Done,
    SlotMemory,
    check_batch,
    start_all,
)
from kvtier.gpu.tensors import Bytes
from kvtier.waiting import join_all

DIRECTIONS: tuple[Direction, ...] = ("gather", "scatter")
DEFAULT_SETTINGS = Settings()


class CudaCopyEngine(CopyEngine):
    """slots: where the slots are. arena: the mappings that they lie in, registered here, once; or what
    several engines of one process share, since memory is registered once for all of them.

    The engine owns its registration, staging and streams, not the device.  Raises TierUnavailable when the
    device has no room, or refuses to lock the arena.
    """

    def __init__(
        self,
        device: Device,
        slots: SlotMemory,
        arena: Sequence[Bytes] | PinnedArena,
        *,
        settings: Settings = DEFAULT_SETTINGS,
    ) -> None:
        self._device, self._slots = device, slots
        shared = isinstance(arena, PinnedArena)
        self._arena = arena if isinstance(arena, PinnedArena) else PinnedArena(device, arena)
        self._unpin = [] if shared else [self._arena.close]
        self._blobs = BlobPool(device)
        self._wake = threading.Condition()
        self._queues: dict[Direction, list[tuple[int, int, Run]]] = {d: [] for d in DIRECTIONS}
        self._issued: dict[Direction, queue.SimpleQueue[Run | None]] = {
            d: queue.SimpleQueue() for d in DIRECTIONS
        }
        self._open: dict[Run, None] = {}
        self._submitted = 0
        self._closed = False
        self._freed = False
        self._lanes: dict[Direction, Lane] = {}
        try:
            for direction in DIRECTIONS:
                self._lanes[direction] = Lane(device, direction, slots, self._arena, self._blobs, settings)
        except TierUnavailable:
            self._free()
            raise
        self._threads = [
            threading.Thread(target=work, args=(direction,), name=f"kvtier-{name}-{direction}", daemon=True)
            for direction in DIRECTIONS
            for name, work in (("issue", self._issue_all), ("answer", self._answer_all))
        ]
        try:
            start_all(self._threads)
        except TierUnavailable:
            self.close()
            raise

    @property
    def device_bytes(self) -> int:
        """GPU memory that the engine takes, without the process's CUDA context."""
        return self._blobs.nbytes + sum(lane.device_bytes for lane in self._lanes.values())

    def use(self, table: WayTable) -> None:
        """Choose ways by another table, from the next batch on."""
        for lane in self._lanes.values():
            lane.table = table

    def submit(self, batch: CopyBatch, on_done: Done) -> None:
        """See CopyEngine."""
        check_batch(batch)
        layers = sum(len(group.layers) for group in batch.binding.layout.groups)
        where = {view.location for views in batch.binding.views for view in views}
        if where != {self._device.location}:
            raise GeometryError(f"the pool is on {sorted(where)}, the engine on {self._device.location}")
        if batch.after_layers and len(batch.after_layers) != layers:
            raise GeometryError(f"{len(batch.after_layers)} events for {layers} layers")
        run = Run(batch, on_done, [], [])
        for item in batch.items:
            view, failure = self._view(item.address, item.nbytes)
            run.views.append(view)
            run.failures.append(failure)
        with self._wake:
            if self._closed:
                raise TierUnavailable("the copy engine is closed")
            self._open[run] = None
            self._submitted += 1
            if not all(run.failures):
                heapq.heappush(self._queues[batch.direction], (batch.priority, self._submitted, run))
                self._wake.notify_all()
                return
        self._answer_unstarted(run)

    def cancel(self, job: str) -> None:
        """See CopyEngine. What is queued on the device already still runs: some milliseconds' work."""
        with self._wake:
            unstarted = self._withdraw([run for run in self._open if run.batch.job == job])
        for run in unstarted:
            self._answer_unstarted(run)

    def wait_idle(self, timeout_s: float) -> bool:
        """See CopyEngine."""
        with self._wake:
            return self._wake.wait_for(lambda: not self._open, timeout_s)

    def busy_jobs(self) -> frozenset[str]:
        """See CopyEngine."""
        with self._wake:
            return frozenset(run.batch.job for run in self._open)

    def close(self, timeout_s: float = CLOSE_S) -> bool:
        """See CopyEngine. Freeing device memory waits for the device, so it is left to who closes it then."""
        with self._wake:
            self._closed = True
            unstarted = self._withdraw(list(self._open))
            self._wake.notify_all()
        for run in unstarted:
            self._answer_unstarted(run)
        if not join_all(self._threads, timeout_s):
            return False
        with self._wake:
            again, self._freed = self._freed, True
        if not again:
            self._free()
        return True

    def _free(self) -> None:
        # A device that is lost takes nothing back; the end of the process does.
        lanes = [lane.close for lane in self._lanes.values()]
        for close in (*lanes, self._blobs.close, *self._unpin):
            with suppress(TierUnavailable):
                close()

    def _view(self, address: tuple[int, int], nbytes: int) -> tuple[Bytes | None, str]:
        try:
            slot = self._slots.view(address, nbytes)
            if slot.ndim != 1 or slot.nbytes != nbytes:
                return None, f"{ERROR}the slot's memory is {slot.nbytes} bytes"
            self._arena.address(slot)
        except COPY_ERRORS as error:
            return None, f"{ERROR}{error}"
        return slot, ""

    def _withdraw(self, runs: list[Run]) -> list[Run]:
        """Issue no more of these; answers those that nothing was issued of. Holds the lock."""
        for run in runs:
            run.cancelled = True
        unstarted = [entry[2] for rows in self._queues.values() for entry in rows if entry[2].cancelled]
        for direction, rows in self._queues.items():
            self._queues[direction] = [entry for entry in rows if not entry[2].cancelled]
            heapq.heapify(self._queues[direction])
        return unstarted

    # -- the threads

    def _issue_all(self, direction: Direction) -> None:
        self._device.enter()
        # A thread that waits must not keep the last batch's memory alive, so a batch is a call by itself.
        while self._issue_next(direction):
            pass
        self._issued[direction].put(None)

    def _issue_next(self, direction: Direction) -> bool:
        with self._wake:
            self._wake.wait_for(lambda: self._queues[direction] or self._closed)
            if not self._queues[direction]:
                return False
            run = heapq.heappop(self._queues[direction])[2]
        self._lanes[direction].issue(run)
        self._issued[direction].put(run)
        return True

    def _answer_all(self, direction: Direction) -> None:
        self._device.enter()
        while self._answer_next(direction):
            pass

    def _answer_next(self, direction: Direction) -> bool:
        run = self._issued[direction].get()
        if run is None:
            return False
        result = self._lanes[direction].conclude(run)
        try:
            run.on_done(result)
        finally:
            self._forget(run)
        return True

    def _answer_unstarted(self, run: Run) -> None:
        """Answer a batch of which nothing was copied, from the caller's thread."""
        run.failures = [failure or CANCELLED for failure in run.failures]
        try:
            run.on_done(result_of(run, [None] * len(run.failures), 0.0))
        finally:
            self._forget(run)

    def _forget(self, run: Run) -> None:
        with self._wake:
            del self._open[run]
            self._wake.notify_all()
