"""The copy engine for pools in host memory: threads that share each batch's units among them.

Each direction has threads of its own, and those that gather step back: where processors are short, a park
takes longer and a restore, which a user waits for, hardly does.
"""

from __future__ import annotations

import heapq
import os
import threading
import time
from dataclasses import dataclass, field

from kvtier.background import step_back
from kvtier.checksum import combine
from kvtier.errors import GeometryError, KvtierError, TierUnavailable
from kvtier.geometry import EXACT
from kvtier.gpu.cpu_copy import BlockCopy
from kvtier.gpu.engine import (
    CANCELLED,
    CLOSE_S,
    CORRUPT,
    ERROR,
    NO_LOSS,
    STALE,
    CopyBatch,
    CopyEngine,
    CopyItem,
    CopyResult,
    Direction,
    Done,
    SlotMemory,
    check_batch,
    start_all,
)
from kvtier.gpu.lossy_copy import LossyCopy
from kvtier.gpu.plan import Cut, Unit
from kvtier.gpu.quantise import Loss
from kvtier.gpu.tensors import Bytes
from kvtier.waiting import join_all

MAX_THREADS = 4
_DIRECTIONS: tuple[Direction, ...] = ("scatter", "gather")
# Hashed steps are copied and hashed before they leave a core's cache of 1 to 2 MiB; without hashing, longer
# steps cost less Python and fewer hand-overs of the GIL.
HASHED = Cut(chunk_bytes=512 << 10, merge_bytes=1 << 20, unit_bytes=4 << 20)
PLAIN = Cut(chunk_bytes=4 << 20, merge_bytes=4 << 20, unit_bytes=4 << 20)
_COPY_ERRORS = (KvtierError, OSError, ValueError, IndexError, BufferError, MemoryError)


@dataclass(slots=True, eq=False)
class _Copy:
    """One item of a running batch."""

    index: int
    item: CopyItem
    block: BlockCopy | LossyCopy | None
    units_left: int
    sums: list[int] = field(default_factory=list)
    waiting: dict[int, int] = field(default_factory=dict)
    failure: str = ""


@dataclass(slots=True, eq=False)
class _Run:
    """A batch from submit to its answer."""

    batch: CopyBatch
    on_done: Done
    copies: list[_Copy]
    tasks: list[tuple[_Copy, Unit]]
    next_task: int = 0
    running: int = 0
    cancelled: bool = False
    began_s: float = 0.0

    @property
    def all_taken(self) -> bool:
        return self.cancelled or self.next_task == len(self.tasks)


class CpuCopyEngine(CopyEngine):
    """slots: where the slots are. threads: how many copy at once each way, min(4, cores) when 0."""

    def __init__(self, slots: SlotMemory, *, threads: int = 0) -> None:
        self._slots = slots
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._wake: dict[Direction, threading.Condition] = {
            d: threading.Condition(self._lock) for d in _DIRECTIONS
        }
        self._queues: dict[Direction, list[tuple[int, int, _Run]]] = {d: [] for d in _DIRECTIONS}
        self._open: dict[_Run, None] = {}
        self._submitted = 0
        self._closed = False
        count = threads or min(MAX_THREADS, os.cpu_count() or 1)
        self._threads = [
            threading.Thread(
                target=self._work, args=(direction,), name=f"kvtier-{direction}-{i}", daemon=True
            )
            for direction in _DIRECTIONS
            for i in range(count)
        ]
        try:
            start_all(self._threads)
        except TierUnavailable:
            self.close()
            raise

    def submit(self, batch: CopyBatch, on_done: Done) -> None:
        """See CopyEngine."""
        check_batch(batch)
        if not all(event.done() for event in (batch.after, *batch.after_layers) if event is not None):
            raise GeometryError("copies on the CPU wait for no stream", fix="use the engine of that device")
        run = self._prepare(batch, on_done)
        with self._lock:
            if self._closed:
                raise TierUnavailable("the copy engine is closed")
            self._open[run] = None
            self._submitted += 1
            if run.tasks:
                place = (batch.priority, self._submitted, run)
                heapq.heappush(self._queues[batch.direction], place)
                self._wake[batch.direction].notify(len(run.tasks))
                return
        self._answer(run)

    def cancel(self, job: str) -> None:
        """See CopyEngine."""
        with self._lock:
            unstarted = self._withdraw([run for run in self._open if run.batch.job == job])
        for run in unstarted:
            self._answer(run)

    def wait_idle(self, timeout_s: float) -> bool:
        """See CopyEngine."""
        with self._lock:
            return self._idle.wait_for(lambda: not self._open, timeout_s)

    def busy_jobs(self) -> frozenset[str]:
        """See CopyEngine."""
        with self._lock:
            return frozenset(run.batch.job for run in self._open)

    def close(self, timeout_s: float = CLOSE_S) -> bool:
        """See CopyEngine."""
        with self._lock:
            self._closed = True
            unstarted = self._withdraw(list(self._open))
            for waiting in self._wake.values():
                waiting.notify_all()
        for run in unstarted:
            self._answer(run)
        return join_all(self._threads, timeout_s)

    def _withdraw(self, runs: list[_Run]) -> list[_Run]:
        """Take no more units from these; answers those that nobody works on. Holds the lock."""
        unstarted = [run for run in runs if not run.all_taken and not run.running]
        for run in runs:
            run.cancelled = True
        for queue in self._queues.values():
            queue[:] = [entry for entry in queue if not entry[2].cancelled]
            heapq.heapify(queue)
        self._let_gather()
        return unstarted

    def _may_take(self, direction: Direction) -> bool:
        """Whether there is a unit to copy; none is gathered while one waits to be scattered."""
        return bool(self._queues[direction]) and (direction == "scatter" or not self._queues["scatter"])

    def _let_gather(self) -> None:
        """Wake those who waited for the scatters' end, if that was it. Holds the lock."""
        if self._may_take("gather"):
            self._wake["gather"].notify_all()

    def _prepare(self, batch: CopyBatch, on_done: Done) -> _Run:
        copies = [self._copy(batch, index, item) for index, item in enumerate(batch.items)]
        tasks = [(copy, unit) for copy in copies if copy.block for unit in copy.block.plan.units]
        return _Run(batch, on_done, copies, tasks)

    def _copy(self, batch: CopyBatch, index: int, item: CopyItem) -> _Copy:
        try:
            slot = self._slots.view(item.address, item.nbytes)
        except _COPY_ERRORS as error:
            return _Copy(index, item, None, 0, failure=f"{ERROR}{error}")
        if slot.ndim != 1 or slot.nbytes != item.nbytes:
            return _Copy(index, item, None, 0, failure=f"{ERROR}the slot's memory is {slot.nbytes} bytes")
        block = _block(batch, item, slot)
        return _Copy(index, item, block, len(block.plan.units), waiting=dict(block.plan.sharers))

    def _work(self, direction: Direction) -> None:
        if direction == "gather":
            step_back()
        # A thread that waits must not keep the last batch's memory mapped, so a unit is a call by itself.
        while self._do_next(direction):
            pass

    def _do_next(self, direction: Direction) -> bool:
        """Wait for a unit and copy it; False once closed."""
        queue = self._queues[direction]
        with self._lock:
            self._wake[direction].wait_for(lambda: self._may_take(direction) or self._closed)
            if not queue:
                return False
            run = queue[0][2]
            copy, unit = run.tasks[run.next_task]
            run.next_task += 1
            run.running += 1
            if run.next_task == 1:
                run.began_s = time.perf_counter()
            if run.all_taken:
                heapq.heappop(queue)
                self._let_gather()
        failure, total = self._do(run, copy, unit)
        pieces = self._finish_unit(copy, unit, failure, total, run)
        self._finish_pieces(copy, pieces)
        with self._lock:
            run.running -= 1
            over = run.all_taken and not run.running
        if over:
            self._answer(run)
        return True

    def _do(self, run: _Run, copy: _Copy, unit: Unit) -> tuple[str, int]:
        """Copy one unit; answers (reason of failure or '', sum of its hashes). Holds no lock."""
        block, item = copy.block, copy.item
        if copy.failure or block is None:
            return copy.failure, 0
        try:
            if self._slots.generation(item.slot_id) != item.generation:
                return STALE, 0
            move = block.gather if run.batch.direction == "gather" else block.scatter
            return "", move(unit, run.batch.verify)
        except _COPY_ERRORS as error:
            return f"{ERROR}{error}", 0

    def _finish_unit(self, copy: _Copy, unit: Unit, failure: str, total: int, run: _Run) -> list[int]:
        """Book a unit; answers the pieces that are complete now and were shared with other units."""
        with self._lock:
            copy.units_left -= 1
            copy.failure = copy.failure or failure
            copy.sums.append(total)
            if not run.batch.verify or run.batch.direction == "scatter" or copy.failure:
                return []
            for piece in unit.shared:
                copy.waiting[piece] -= 1
            return [piece for piece in unit.shared if not copy.waiting[piece]]

    def _finish_pieces(self, copy: _Copy, pieces: list[int]) -> None:
        if pieces and copy.block is not None:
            copy.sums += [copy.block.hash_piece(piece) for piece in pieces]

    def _answer(self, run: _Run) -> None:
        ended_s = time.perf_counter()
        checksums = [self._conclude(run, copy) for copy in run.copies]
        failed = tuple((copy.index, copy.failure) for copy in run.copies if copy.failure)
        result = CopyResult(
            run.batch.job,
            run.batch.batch,
            not failed,
            tuple(checksums),
            failed,
            sum(copy.item.nbytes for copy in run.copies if not copy.failure),
            ended_s - run.began_s if run.next_task else 0.0,
            sum((_loss(copy) for copy in run.copies), NO_LOSS),
        )
        try:
            run.on_done(result)
        finally:
            with self._lock:
                del self._open[run]
                self._idle.notify_all()

    def _conclude(self, run: _Run, copy: _Copy) -> int | None:
        """Settle how an item ended; answers its checksum where one was asked for and is right."""
        item = copy.item
        if not copy.failure and copy.units_left:
            copy.failure = CANCELLED
        if not copy.failure:
            copy.failure = self._changed(item)
        if copy.failure or not run.batch.verify:
            return None
        found = combine(copy.sums, item.nbytes)
        if run.batch.direction == "scatter" and found != item.checksum:
            copy.failure = CORRUPT
            return None
        return found if run.batch.direction == "gather" else None

    def _changed(self, item: CopyItem) -> str:
        try:
            return "" if self._slots.generation(item.slot_id) == item.generation else STALE
        except _COPY_ERRORS as error:
            return f"{ERROR}{error}"


def _block(batch: CopyBatch, item: CopyItem, slot: Bytes) -> BlockCopy | LossyCopy:
    rows = (item.start, item.tokens, item.first_valid)
    values = batch.binding.layout.values
    if batch.fidelity == EXACT or values is None:
        return BlockCopy(batch.binding, item.group, rows, slot, HASHED if batch.verify else PLAIN)
    return LossyCopy(batch.binding, item.group, rows, slot, PLAIN, batch.fidelity, values)


def _loss(copy: _Copy) -> Loss:
    return copy.block.loss if isinstance(copy.block, LossyCopy) and not copy.failure else NO_LOSS
