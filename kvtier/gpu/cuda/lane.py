"""One direction's streams: queues a batch's work on the device, and says how it ended. Not run on a GPU yet.

A batch on the streams:

    kernels   [descriptors up] [after] [checksums*] [gather 1] [gather 2] ...           gather
    copies                     [after]                [copy 1]   [copy 2] ... [done]
    copies                     [after] [copy 1] [copy 2] ...                            scatter
    kernels   [descriptors up] [after]   [scatter 1] [scatter 2] ... [checksums] [done]

Checksums are of the pool's pages, read by a kernel: on gather before the bytes leave the GPU (* after the
last layer where layers are still being computed), on scatter after they are in their pages.  So what goes
wrong on the way, in staging, on the link or in host memory, is seen, whichever way the bytes moved.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from kvtier.checksum import combine
from kvtier.errors import KvtierError, TierUnavailable
from kvtier.geometry import EXACT, SCALE_BYTES
from kvtier.gpu.cuda.device import Device, Event, Stream
from kvtier.gpu.cuda.events import EventPool, mark
from kvtier.gpu.cuda.memory import Blob, BlobPool, PinnedArena, StagingRing
from kvtier.gpu.cuda.movers import MOVERS, CodedMover, Track, segments_address
from kvtier.gpu.cuda.shapes import ShapeCache
from kvtier.gpu.cuda.ways import DEFAULT_TABLE, WayTable
from kvtier.gpu.cuda.work import LOSS, Descriptors, Live, Load, Step, cut, describe_batch, form_of
from kvtier.gpu.engine import (
    CANCELLED,
    CORRUPT,
    ERROR,
    NO_LOSS,
    STALE,
    CopyBatch,
    CopyItem,
    CopyResult,
    Direction,
    Done,
    SlotMemory,
)
from kvtier.gpu.quantise import Loss
from kvtier.gpu.tensors import Bytes

COPY_ERRORS = (KvtierError, OSError, ValueError, IndexError, BufferError, MemoryError)


@dataclass(frozen=True, slots=True)
class Settings:
    """table: which way for which pieces.  staging: slots and their bytes, for each direction.

    ahead_bytes: how much is queued on the device at once, in each direction.  The more, the longer the device
    goes on while Python is busy elsewhere, and the later a cancelled batch ends: 256 MiB are about 5 ms.
    """

    table: WayTable = DEFAULT_TABLE
    staging_slots: int = 8
    staging_slot_bytes: int = 8 << 20
    ahead_bytes: int = 256 << 20


@dataclass(slots=True)
class Ended:
    """Whether a batch is over; apart from it, so that what only asks this does not keep its memory."""

    yes: bool = False


@dataclass(slots=True, eq=False)
class Run:
    """A batch from submit to its answer. views: memory of each slot. failures: why an item failed, or ''."""

    batch: CopyBatch
    on_done: Done
    views: list[Bytes | None]
    failures: list[str]
    cancelled: bool = False
    began_s: float = 0.0
    ended: Ended = field(default_factory=Ended)
    live: list[Live] = field(default_factory=list)
    bytes_left: list[int] = field(default_factory=list)
    used: list[Event] = field(default_factory=list)
    blob: Blob | None = None
    results: int = 0
    done: Event | None = None
    coded: CodedMover | None = None
    loss: Loss = NO_LOSS


class Lane:
    """issue() and close() from one thread, conclude() from another; both of the engine's.

    table: which way for which pieces, from the next batch on.
    """

    def __init__(
        self,
        device: Device,
        direction: Direction,
        slots: SlotMemory,
        arena: PinnedArena,
        blobs: BlobPool,
        settings: Settings,
    ) -> None:
        self._device, self._slots, self._arena, self._blobs = device, slots, arena, blobs
        self._settings = settings
        self.table = settings.table
        self._shapes = ShapeCache()
        self._events = EventPool(device)
        self._ring = StagingRing(device, settings.staging_slots, settings.staging_slot_bytes)
        streams: list[Stream] = []
        try:
            streams += [device.stream()]
            streams += [device.stream()]
        except TierUnavailable:
            self._free(streams)
            raise
        self._track = Track(device, direction, streams[0], streams[1], self._ring, self._events)
        self._ahead: deque[tuple[Ended, Event, int]] = deque()
        self._ahead_bytes = 0

    @property
    def streams(self) -> tuple[Stream, Stream]:
        """(copies, kernels)."""
        return self._track.copies, self._track.kernels

    @property
    def device_bytes(self) -> int:
        """Device memory of the staging ring."""
        return self._ring.nbytes

    # -- queueing

    def issue(self, run: Run) -> None:
        """Queue the batch. Whatever happens, conclude() is to be called next; a failure is in the run."""
        run.began_s = time.perf_counter()
        try:
            self._select(run)
            if run.live:
                self._queue(run)
                self._finish(run)
        except COPY_ERRORS as error:
            run.failures = [failure or f"{ERROR}{error}" for failure in run.failures]
            # Part of it may be queued without the events that others would wait for.
            with suppress(KvtierError):
                self._drain()

    def _select(self, run: Run) -> None:
        """Which items are going to be copied, where, and from where."""
        binding = run.batch.binding
        for index, item in enumerate(run.batch.items):
            view = run.views[index]
            if run.failures[index] or view is None:
                continue
            run.failures[index] = self.changed(item)
            if run.failures[index]:
                continue
            rows = (item.group, item.start, item.tokens, item.first_valid)
            shape = self._shapes.shape(binding, *rows)
            ids, host = binding.page_ids(*rows), int(view.ctypes.data)
            scale_bytes = self._scale_bytes(run.batch, shape.nbytes)
            run.live.append(Live(index, item.group, shape, ids, host, item.nbytes, scale_bytes))
        run.bytes_left = [live.stored for live in run.live]

    @staticmethod
    def _scale_bytes(batch: CopyBatch, exact_bytes: int) -> int:
        values = batch.binding.layout.values
        if values is None or batch.fidelity == EXACT or batch.direction == "gather":
            return 0
        return SCALE_BYTES * (exact_bytes // (values.itemsize * values.vector))

    def _queue(self, run: Run) -> None:
        batch, track, device = run.batch, self._track, self._device
        steps = cut(batch, run.live, self.table, self._ring.slot_bytes)
        work = describe_batch(run.live, steps, [device.device_address(live.host) for live in run.live])
        run.blob, run.results = self._blobs.take(work.nbytes), work.results
        run.coded = _coded_mover(run, work)
        work.write(run.blob.host, run.blob.address)
        device.copy(run.blob.address, int(run.blob.host.ctypes.data), work.described, track.kernels)
        if batch.after is not None:
            batch.after.wait(track.copies)
            batch.after.wait(track.kernels)
        early = batch.verify and batch.direction == "gather" and not batch.after_layers
        if run.coded is not None:
            self._step(run, steps[0], work)
            self._fetch(run, len(run.live) * (8 + LOSS.itemsize))
            return
        if early:
            self._checksums(run, work)
        for step in steps:
            self._step(run, step, work)
        if batch.verify and not early:
            if batch.direction == "scatter":
                track.join(run.used)
            self._checksums(run, work)

    def _step(self, run: Run, step: Step, work: Descriptors) -> None:
        batch, track = run.batch, self._track
        for layer in step.layers if batch.after_layers else ():
            batch.after_layers[layer].wait(track.copies)
            batch.after_layers[layer].wait(track.kernels)
        for load in step.loads:
            if run.cancelled:
                return
            self._load(run, load, work)
        if step.layers and batch.on_layer is not None:
            track.join(run.used)
            event = mark(self._device, track.last)
            for layer in step.layers:
                batch.on_layer(layer, event)

    def _load(self, run: Run, load: Load, work: Descriptors) -> None:
        self._hold_back(load.nbytes)
        assert run.blob is not None
        segments = segments_address(run.blob.address, work.moves, load)
        mover = run.coded or MOVERS[load.way]
        event = mover.move(self._track, load, run.live, segments, run.used)
        for part in load.parts:
            run.bytes_left[part.live] -= part.hi - part.lo
        self._ahead.append((run.ended, event, load.nbytes))
        self._ahead_bytes += load.nbytes

    def _hold_back(self, nbytes: int) -> None:
        """Wait until no more than `ahead_bytes` would be queued."""
        while self._ahead and self._ahead_bytes + nbytes > self._settings.ahead_bytes:
            ended, event, queued = self._ahead.popleft()
            # The events of a batch that has ended may be in use again, for something later.
            if not ended.yes:
                self._device.synchronize(event)
            self._ahead_bytes -= queued

    def _checksums(self, run: Run, work: Descriptors) -> None:
        assert run.blob is not None
        device, kernels, base = self._device, self._track.kernels, run.blob.address
        results = base + work.results
        device.launch("checksum", base + work.checks, len(run.live), work.check_tiles, results, kernels)
        self._fetch(run, 8 * len(run.live))

    def _fetch(self, run: Run, nbytes: int) -> None:
        """Bring what the kernels found out to the host."""
        assert run.blob is not None
        host, there = int(run.blob.host.ctypes.data) + run.results, run.blob.address + run.results
        self._device.copy(host, there, nbytes, self._track.kernels)

    def _finish(self, run: Run) -> None:
        """One event after all that the batch queued, on either stream."""
        self._track.join(run.used)
        done = self._events.take()
        run.used.append(done)
        self._device.record(done, self._track.last)
        # Only now: CUDA takes an event that was never recorded for one that is done.
        run.done = done

    # -- ending

    def conclude(self, run: Run) -> CopyResult:
        """Wait for the batch's copies, and say how each item ended."""
        lost = self._await(run)
        sums: list[int | None] = [None] * len(run.batch.items)
        for number, live in enumerate(run.live):
            failure = run.failures[live.index] or (CANCELLED if run.bytes_left[number] else "") or lost
            failure = failure or self.changed(run.batch.items[live.index])
            if not failure and run.coded is not None and run.batch.direction == "gather":
                failure = self._lost(run, number)
            if not failure and run.batch.verify:
                failure, sums[live.index] = self._judge(run, number)
            run.failures[live.index] = failure
        self._recycle(run, lost)
        return result_of(run, tuple(sums), time.perf_counter() - run.began_s)

    def changed(self, item: CopyItem) -> str:
        """Why the slot is not the item's, or ''."""
        try:
            return "" if self._slots.generation(item.slot_id) == item.generation else STALE
        except COPY_ERRORS as error:
            return f"{ERROR}{error}"

    def _await(self, run: Run) -> str:
        try:
            if run.done is not None:
                self._device.synchronize(run.done)
            elif run.blob is not None:
                self._drain()
        except KvtierError as error:
            return f"{ERROR}{error}"
        return ""

    def _drain(self) -> None:
        """Wait for both streams, where no event could be had."""
        for stream in self.streams:
            mark(self._device, stream).synchronize()

    def _judge(self, run: Run, number: int) -> tuple[str, int | None]:
        assert run.blob is not None
        live = run.live[number]
        words = run.blob.host[run.results : run.results + 8 * len(run.live)].view(np.uint64)
        found = combine([int(words[number])], live.stored)
        if run.batch.direction == "gather":
            return "", found
        return ("", None) if found == run.batch.items[live.index].checksum else (CORRUPT, None)

    def _lost(self, run: Run, number: int) -> str:
        """Book what the codec lost of an item, or say why it does not take it."""
        assert run.blob is not None
        at = run.results + 8 * len(run.live)
        found = run.blob.host[at : at + LOSS.itemsize * len(run.live)].view(LOSS)[number]
        if found["not_finite"]:
            return f"{ERROR}the KV holds values that are not finite (park it with fidelity 'exact')"
        run.loss += Loss(float(found["error_squares"]), float(found["value_squares"]))
        return ""

    def _recycle(self, run: Run, lost: str) -> None:
        run.ended.yes = True
        # On a device that is lost nothing is known of the copies: its events and blobs are used no more.
        if lost:
            return
        self._events.give(run.used)
        if run.blob is not None:
            self._blobs.give(run.blob)

    def close(self) -> None:
        """Free everything. No batch may be open."""
        self._free(self.streams)

    def _free(self, streams: Sequence[Stream]) -> None:
        for stream in streams:
            self._device.destroy_stream(stream)
        self._ring.close()
        self._events.close()


def result_of(run: Run, sums: Sequence[int | None], seconds: float) -> CopyResult:
    """The answer, by what is in `failures`."""
    failed = tuple((i, failure) for i, failure in enumerate(run.failures) if failure)
    moved = sum(
        item.nbytes for item, failure in zip(run.batch.items, run.failures, strict=True) if not failure
    )
    batch = run.batch
    return CopyResult(batch.job, batch.batch, not failed, tuple(sums), failed, moved, seconds, run.loss)


def _coded_mover(run: Run, work: Descriptors) -> CodedMover | None:
    """What moves a batch under a lossy codec; None for an exact one."""
    batch, values = run.batch, run.batch.binding.layout.values
    if batch.fidelity == EXACT or values is None or run.blob is None:
        return None
    base = run.blob.address
    return CodedMover(
        form_of(values, batch.fidelity),
        batch.verify,
        base + work.results,
        base + work.losses,
        [base + at for at in work.scales],
    )
