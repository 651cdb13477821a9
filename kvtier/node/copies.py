"""Copies between pools and slots: what was asked of the GPU service and has not ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvtier.messages.tiers import CancelCopies, Copied, Copy, Direction
from kvtier.node import wire
from kvtier.node.state import NodeState, Worker
from kvtier.objects import ObjectMeta
from kvtier.tier import Slot

Pair = tuple[ObjectMeta, Slot]


@dataclass(slots=True)
class CopyJob:
    """What parks and restores have in common.

    running: batches whose end is not known, with their slots.  over: its receipt is out; the job is only
    kept until all its batches have ended.  executor: the peer whose process runs the copies.
    to_come_bytes: of a restore, what no batch copies yet.  events: of the worker's, see messages.Park.
    layers: see messages.Restore.
    """

    id: str
    worker: Worker
    request: int
    pages: list[bytes]
    running: dict[int, list[Pair]] = field(default_factory=dict)
    next_batch: int = 0
    executor: str = ""
    over: bool = False
    cancelled: bool = False
    to_come_bytes: int = 0
    events: list[int] = field(default_factory=list)
    layers: bool = False

    @property
    def running_bytes(self) -> int:
        """Bytes of the batches whose end is not known."""
        return sum(meta.nbytes for pairs in self.running.values() for meta, _ in pairs)


class Copies:
    """Sends batches, and knows which job a finished one belongs to."""

    def __init__(self, state: NodeState) -> None:
        self._state = state
        self._jobs: dict[str, CopyJob] = {}

    def add(self, job: CopyJob) -> None:
        """Know the job from now on."""
        self._jobs[job.id] = job
        job.worker.jobs.add(job.id)

    def get(self, job_id: str) -> CopyJob | None:
        """A job that has batches running or is not over."""
        return self._jobs.get(job_id)

    def all(self) -> list[CopyJob]:
        """Every job, in order of their beginning."""
        return list(self._jobs.values())

    def running(self, besides: CopyJob | None = None) -> bool:
        """Whether any other job has a batch running: its end may make room."""
        return any(job.running for job in self._jobs.values() if job is not besides)

    def start(self, job: CopyJob, direction: Direction, pairs: Sequence[Pair], last: bool) -> None:
        """Ask for one batch. Its slots are leased to the job already."""
        batch = job.next_batch
        job.next_batch += 1
        job.running[batch] = list(pairs)
        job.executor = job.worker.peer if job.worker.mode == "worker" else self._state.gpu_peer
        over, job.worker.restored = job.worker.restored, []
        self._state.send(
            self._state.gpu_peer,
            Copy(
                job=job.id,
                batch=batch,
                worker=job.worker.name,
                request=job.request,
                direction=direction,
                items=[wire.item(meta, slot) for meta, slot in pairs],
                verify=self._state.settings.verify,
                pages=job.pages,
                last=last,
                fidelity=pairs[0][0].root.fidelity,
                events=job.events,
                layers=job.layers,
                over=over,
            ),
        )

    def ended(self, message: Copied) -> tuple[CopyJob, list[Pair]] | None:
        """The job and slots of a batch that ended; None when nobody waits for it."""
        job = self._jobs.get(message.job)
        pairs = job.running.pop(message.batch, None) if job is not None else None
        return (job, pairs) if job is not None and pairs is not None else None

    def cancel(self, job: CopyJob) -> None:
        """Batches that have not begun shall not; each is still answered."""
        if job.running and not job.cancelled and self._state.gpu_peer:
            self._state.send(self._state.gpu_peer, CancelCopies(job=job.id))
        job.cancelled = True

    def settle(self, job: CopyJob) -> bool:
        """Forget a job that is over and quiet; answers whether it was."""
        if not job.over or job.running:
            return False
        self._state.host.holder_ended(job.id)
        self._jobs.pop(job.id, None)
        job.worker.jobs.discard(job.id)
        # One that nothing was copied for is not known there, and would be told of for nothing.
        if job.layers and job.next_batch:
            job.worker.restored.append(job.id)
        return True

    def proven_quiet(self, job: CopyJob) -> None:
        """No copy of a job that was given up runs or will: once it is over, its slots are free of it."""
        if job.over or job.cancelled:
            job.running.clear()
            self.settle(job)
