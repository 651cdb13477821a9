"""When which batch of copies runs, for all workers of a GPU: the schedule that the GPU actor holds.

Pure: no I/O, no clock; time is an argument, and what there is to do comes back as instructions that a shell
carries out.  A job is one park (gather) or restore (scatter) of one worker; its batches may be added while
it runs.  Life of a job:

    begin(job)         its pages are claimed, or it is refused: a page it would write is in use, or it would
                       read one that is being written
    add(job, batch)    queued; a batch goes out when it is first by (restore before park, deadline, age) and
                       its worker has room under both bounds
    done(job, number)  a worker answered; answers about what is not in flight are ignored
    seal(job)          no batch will be added
    -> JobEnded        sealed, or withdrawn, and no batch in flight: only then are its pages free again
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from kvtier.gpu.engine import CopyItem, Direction
from kvtier.gpu.ledger import Page, PageLedger

Outcome: TypeAlias = Literal["done", "cancelled", "late", "worker_gone"]
_NO_DEADLINE = float("inf")


@dataclass(frozen=True, slots=True)
class Job:
    """pages: (space, page id) of everything it reads or writes; empty where the worker keeps that ledger."""

    job: str
    worker: str
    direction: Direction
    pages: frozenset[Page] = frozenset()
    deadline_s: float = _NO_DEADLINE


@dataclass(frozen=True, slots=True)
class Batch:
    """Objects that travel together. number: the caller's, unique in its job."""

    number: int
    items: tuple[CopyItem, ...]

    @property
    def nbytes(self) -> int:
        """Bytes to copy."""
        return sum(item.nbytes for item in self.items)


@dataclass(frozen=True, slots=True)
class Refused:
    """The job was not taken. pages: those in the way; empty when the worker is unknown."""

    job: str
    pages: frozenset[Page]


@dataclass(frozen=True, slots=True)
class SendBatch:
    """Have the worker's engine copy this; answer with done()."""

    worker: str
    job: str
    direction: Direction
    batch: Batch


@dataclass(frozen=True, slots=True)
class CancelOnWorker:
    """Have the worker's engine cancel the job; batches in flight still answer."""

    worker: str
    job: str


@dataclass(frozen=True, slots=True)
class JobEnded:
    """No copy of the job is queued or running. copied: batches answered, in order of their answers.

    unsent: batches that never went out.  unanswered: batches in flight when the worker was lost.
    """

    job: str
    outcome: Outcome
    copied: tuple[int, ...]
    unsent: tuple[int, ...]
    unanswered: tuple[int, ...] = ()


Instruction: TypeAlias = Refused | SendBatch | CancelOnWorker | JobEnded


@dataclass(frozen=True, slots=True)
class Bounds:
    """For each worker. A batch above max_bytes still goes out when nothing else is in flight."""

    max_batches: int = 4
    max_bytes: int = 256 << 20


@dataclass(slots=True)
class _Running:
    job: Job
    order: int
    queued: list[Batch] = field(default_factory=list)
    in_flight: dict[int, Batch] = field(default_factory=dict)
    copied: list[int] = field(default_factory=list)
    unsent: list[int] = field(default_factory=list)
    sealed: bool = False
    outcome: Outcome = "done"

    @property
    def rank(self) -> tuple[bool, float, int]:
        return self.job.direction == "gather", self.job.deadline_s, self.order

    @property
    def over(self) -> bool:
        return not self.in_flight and not self.queued and (self.sealed or self.outcome != "done")


@dataclass(slots=True)
class _Worker:
    ledger: PageLedger = field(default_factory=PageLedger)
    batches: int = 0
    nbytes: int = 0


class CopySchedule:
    """See the module's text. Not thread-safe."""

    def __init__(self, bounds: Bounds | None = None) -> None:
        self._bounds = bounds or Bounds()
        self._workers: dict[str, _Worker] = {}
        self._jobs: dict[str, _Running] = {}
        self._begun = 0

    def worker_joined(self, worker: str) -> None:
        """A worker attached. Raises ValueError for one that is here already."""
        if worker in self._workers:
            raise ValueError(f"worker {worker} is here already")
        self._workers[worker] = _Worker()

    def worker_gone(self, worker: str) -> list[Instruction]:
        """The worker's process is gone, proven: none of its copies runs. Unknown workers are no error."""
        ended: list[Instruction] = []
        for running in [r for r in self._jobs.values() if r.job.worker == worker]:
            running.outcome = "worker_gone"
            running.unsent += [batch.number for batch in running.queued]
            ended.append(self._end(running, tuple(running.in_flight)))
        self._workers.pop(worker, None)
        return ended

    def begin(self, job: Job) -> list[Instruction]:
        """Take the job and claim its pages, or answer Refused. Raises ValueError for a job twice."""
        if job.job in self._jobs:
            raise ValueError(f"job {job.job} has begun already")
        worker = self._workers.get(job.worker)
        if worker is None:
            return [Refused(job.job, frozenset())]
        taken = worker.ledger.claim(job.job, job.pages, writes=job.direction == "scatter")
        if taken:
            return [Refused(job.job, taken)]
        self._begun += 1
        self._jobs[job.job] = _Running(job, self._begun)
        return []

    def add(self, job: str, batch: Batch) -> None:
        """Queue a batch. Raises ValueError for a job that is not open, or a number twice."""
        running = self._jobs.get(job)
        if running is None or running.sealed or running.outcome != "done":
            raise ValueError(f"job {job} takes no batches")
        known = {*running.in_flight, *running.copied, *(b.number for b in running.queued)}
        if batch.number in known:
            raise ValueError(f"batch {batch.number} of job {job} is known already")
        running.queued.append(batch)

    def seal(self, job: str) -> list[Instruction]:
        """No more batches will come. Unknown jobs are no error: they ended."""
        running = self._jobs.get(job)
        if running is None:
            return []
        running.sealed = True
        return self._end_if_over(running)

    def start(self, now_s: float) -> list[Instruction]:
        """Withdraw what is past its deadline, then send what has room."""
        late = [r for r in self._jobs.values() if r.job.deadline_s <= now_s and r.outcome == "done"]
        out = [instruction for running in late for instruction in self._withdraw(running, "late")]
        full: set[str] = set()
        for running in sorted(self._jobs.values(), key=lambda r: r.rank):
            # What does not fit blocks those behind it: small parks must not keep a large restore out.
            if running.job.worker not in full:
                out += self._send(running)
                full |= {running.job.worker} if running.queued else set()
        return out

    def done(self, job: str, number: int) -> list[Instruction]:
        """A worker answered a batch. Answers about batches not in flight are ignored."""
        running = self._jobs.get(job)
        batch = running.in_flight.pop(number, None) if running else None
        if running is None or batch is None:
            return []
        worker = self._workers[running.job.worker]
        worker.batches -= 1
        worker.nbytes -= batch.nbytes
        running.copied.append(number)
        return self._end_if_over(running)

    def cancel(self, job: str) -> list[Instruction]:
        """Send no more of this job; it ends when its batches in flight were answered."""
        running = self._jobs.get(job)
        if running is None or running.outcome != "done":
            return []
        return self._withdraw(running, "cancelled")

    def busy(self, worker: str, pages: Iterable[Page]) -> frozenset[Page]:
        """Those of the worker's pages that a job names: what cannot be proven quiet."""
        found = self._workers.get(worker)
        return found.ledger.busy(pages) if found else frozenset()

    def in_flight(self, worker: str) -> tuple[int, int]:
        """(batches, bytes) that the worker has been sent and has not answered."""
        found = self._workers.get(worker)
        return (found.batches, found.nbytes) if found else (0, 0)

    def _send(self, running: _Running) -> Iterator[Instruction]:
        job, worker = running.job, self._workers[running.job.worker]
        while running.queued and self._fits(worker, running.queued[0]):
            batch = running.queued.pop(0)
            running.in_flight[batch.number] = batch
            worker.batches += 1
            worker.nbytes += batch.nbytes
            yield SendBatch(job.worker, job.job, job.direction, batch)

    def _fits(self, worker: _Worker, batch: Batch) -> bool:
        if worker.batches == 0:
            return True
        bounds = self._bounds
        return worker.batches < bounds.max_batches and worker.nbytes + batch.nbytes <= bounds.max_bytes

    def _withdraw(self, running: _Running, outcome: Outcome) -> list[Instruction]:
        running.outcome = outcome
        running.unsent += [batch.number for batch in running.queued]
        running.queued.clear()
        told: list[Instruction] = []
        if running.in_flight:
            told.append(CancelOnWorker(running.job.worker, running.job.job))
        return told + self._end_if_over(running)

    def _end_if_over(self, running: _Running) -> list[Instruction]:
        return [self._end(running, ())] if running.over else []

    def _end(self, running: _Running, unanswered: tuple[int, ...]) -> JobEnded:
        job = running.job
        del self._jobs[job.job]
        self._workers[job.worker].ledger.release(job.job)
        return JobEnded(job.job, running.outcome, tuple(running.copied), tuple(running.unsent), unanswered)


def cut_batches(items: Iterable[CopyItem], max_bytes: int) -> Iterator[tuple[CopyItem, ...]]:
    """Cut items, in order, into batches of at most max_bytes; an object above that is one by itself."""
    batch: list[CopyItem] = []
    nbytes = 0
    for item in items:
        if batch and nbytes + item.nbytes > max_bytes:
            yield tuple(batch)
            batch, nbytes = [], 0
        batch.append(item)
        nbytes += item.nbytes
    if batch:
        yield tuple(batch)
