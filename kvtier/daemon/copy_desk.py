"""The GPU service's books: which copies are queued where, and who carries them out. No I/O.

Every Copy that the node sent is answered by exactly one Copied, except for batches that a worker had when
its connection closed: about those only the worker itself, or the end of its process, can say anything.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvtier.errors import GeometryError
from kvtier.gpu.engine import ERROR, CopyItem
from kvtier.gpu.schedule import (
    Batch,
    Bounds,
    CancelOnWorker,
    CopySchedule,
    Instruction,
    Job,
    JobEnded,
    Refused,
    SendBatch,
)
from kvtier.messages.tiers import CancelCopies, Copied, Copy, WireItem

_PAGE_ID = np.dtype("<u4")


class CopyDesk:
    """Takes the node's Copy messages, hands them out in the schedule's order.

    carry_out: a batch to be copied now, by the worker or here.  cancel: what runs of a job shall end early.
    answer: to the node.
    """

    def __init__(
        self,
        carry_out: Callable[[Copy], None],
        cancel: Callable[[str, CancelCopies], None],
        answer: Callable[[Copied], None],
        bounds: Bounds,
    ) -> None:
        self._carry_out = carry_out
        self._cancel = cancel
        self._answer = answer
        self._schedule = CopySchedule(bounds)
        self._asked: dict[tuple[str, int], Copy] = {}
        self._sent: dict[tuple[str, int], Copy] = {}
        self._begun: set[str] = set()
        self._last: set[str] = set()
        self._cancelled: set[str] = set()
        self._early: dict[str, list[Copy]] = {}
        self._here: set[str] = set()

    def joined(self, worker: str, now_s: float) -> None:
        """The worker can copy from now on; what came before it did is begun."""
        if worker in self._here:
            self.gone(worker, now_s)
        self._here.add(worker)
        self._schedule.worker_joined(worker)
        for copy in self._early.pop(worker, []):
            self.asked(copy, now_s)

    def gone(self, worker: str, now_s: float) -> None:
        """The worker's connection closed, or the node gave it up."""
        self._here.discard(worker)
        for copy in self._early.pop(worker, []):
            self._answer(_not_copied(copy, "cancelled"))
        self._follow(self._schedule.worker_gone(worker), now_s)

    def asked(self, copy: Copy, now_s: float) -> None:
        """The node wants a batch copied."""
        if copy.worker not in self._here:
            self._early.setdefault(copy.worker, []).append(copy)
            return
        if copy.job in self._cancelled:
            self._answer(_not_copied(copy, "cancelled"))
            return
        self._asked[copy.job, copy.batch] = copy
        if copy.job not in self._begun:
            why_not = self._begin(copy)
            if why_not:
                del self._asked[copy.job, copy.batch]
                self._answer(_not_copied(copy, why_not))
                return
        items = tuple(copy_item(item) for item in copy.items)
        self._schedule.add(copy.job, Batch(copy.batch, items))
        if copy.last:
            self._last.add(copy.job)
        self._follow(self._schedule.start(now_s), now_s)

    def _begin(self, copy: Copy) -> str:
        """Put the batch's job on the schedule, or say why that cannot be."""
        try:
            pages = _pages(copy)
        except GeometryError as error:
            return f"{ERROR}{error}"
        refused = self._schedule.begin(Job(copy.job, copy.worker, copy.direction, pages))
        if refused:
            return _why(refused[0])
        self._begun.add(copy.job)
        return ""

    def copied(self, message: Copied, now_s: float, worker: str = "") -> bool:
        """A batch ended; answers whether it was waited for. worker: who says so; '' for this service."""
        sent = self._sent.get((message.job, message.batch))
        if sent is None or worker not in ("", sent.worker):
            return False
        del self._sent[message.job, message.batch]
        self._answer(message)
        self._follow(self._schedule.done(message.job, message.batch), now_s)
        # Not before its batches ended: one that failed may be followed by another attempt from the disk.
        if message.job in self._last and not self._open(message.job):
            self._follow(self._schedule.seal(message.job), now_s)
        self._follow(self._schedule.start(now_s), now_s)
        return True

    def cancelled(self, job: str, now_s: float) -> None:
        """The node wants no more of this job."""
        for worker, early in self._early.items():
            self._early[worker] = [copy for copy in early if copy.job != job]
            for copy in early:
                if copy.job == job:
                    self._answer(_not_copied(copy, "cancelled"))
        if job in self._begun:
            self._cancelled.add(job)
        self._follow(self._schedule.cancel(job), now_s)
        self._follow(self._schedule.start(now_s), now_s)

    def _follow(self, instructions: list[Instruction], now_s: float) -> None:
        for instruction in instructions:
            if isinstance(instruction, SendBatch):
                name = (instruction.job, instruction.batch.number)
                self._sent[name] = self._asked.pop(name)
                self._carry_out(self._sent[name])
            elif isinstance(instruction, CancelOnWorker):
                self._cancel(instruction.worker, CancelCopies(job=instruction.job))
            elif isinstance(instruction, JobEnded):
                self._ended(instruction)

    def _ended(self, ended: JobEnded) -> None:
        for jobs in (self._begun, self._last, self._cancelled):
            jobs.discard(ended.job)
        for number in ended.unsent:
            self._answer(_not_copied(self._asked.pop((ended.job, number)), "cancelled"))
        for number in ended.unanswered:
            self._sent.pop((ended.job, number), None)

    def _open(self, job: str) -> bool:
        """Whether a batch of the job is queued or under way."""
        return any(name[0] == job for books in (self._asked, self._sent) for name in books)


def copy_item(item: WireItem) -> CopyItem:
    """An item as the engine takes it."""
    return CopyItem(
        item.group,
        item.start,
        item.tokens,
        item.first_valid,
        item.slot_id,
        item.generation,
        (item.arena, item.offset),
        item.nbytes,
        item.checksum,
    )


def page_tables(copy: Copy) -> list[list[int]]:
    """The page ids of a Copy in 'shared' mode, one list for each layer group. Raises GeometryError."""
    if any(len(packed) % _PAGE_ID.itemsize for packed in copy.pages):
        raise GeometryError("the page ids are cut off in the middle of one")
    return [np.frombuffer(packed, _PAGE_ID).tolist() if packed else [] for packed in copy.pages]


def _pages(copy: Copy) -> frozenset[tuple[int, int]]:
    return frozenset((group, page) for group, table in enumerate(page_tables(copy)) for page in table)


def _why(refused: Instruction) -> str:
    taken = refused.pages if isinstance(refused, Refused) else frozenset()
    return f"{ERROR}pages {sorted(page for _, page in taken)[:8]} are in use by another copy"


def _not_copied(copy: Copy, reason: str) -> Copied:
    failed = [(index, reason) for index in range(len(copy.items))]
    return Copied(job=copy.job, batch=copy.batch, ok=False, checksums=[], failed=failed)
