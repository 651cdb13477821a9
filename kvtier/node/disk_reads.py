"""Reads from disk into host memory, and slots that a lost disk service may still be touching."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from kvtier.node import wire
from kvtier.node.state import NodeState
from kvtier.objects import ObjectMeta
from kvtier.tier import Slot
from kvtier.tier_messages import DiskRead, DiskReadDone

# A write or read that the disk service has not answered by then no longer has a right to its slots.
DISK_LEASE_S = 60.0
# Why a read failed, where the disk has the object no longer: it removes what it finds to be corrupt.
GONE = ("corrupt", "missing")

# Who waits for a read: told the reason for each object that failed, by its place in the read.
ReadDone: TypeAlias = Callable[[dict[int, str], int, float], None]


class Orphans:
    """Disk jobs that nobody waits for any more, by the connection that they were sent over.

    Their slots stay held until the service's word, or the end of its process.
    """

    def __init__(self, state: NodeState) -> None:
        self._state = state
        self._jobs: dict[str, set[str]] = {}

    def add(self, peer: str, jobs: Iterable[str]) -> None:
        """Jobs whose answer will find nobody."""
        self._jobs.setdefault(peer, set()).update(jobs)

    def answered(self, peer: str, job: str) -> None:
        """The service says that it has ended a job."""
        jobs = self._jobs.get(peer, set())
        if job in jobs:
            jobs.discard(job)
            self._state.host.holder_ended(job)

    def ended(self, peer: str) -> None:
        """Nothing that was done for this connection touches a slot any more."""
        for job in sorted(self._jobs.pop(peer, ())):
            self._state.host.holder_ended(job)

    def connected_again(self, peer: str, pid: int) -> None:
        """A service connects again only after everything that it did for a former connection has ended."""
        for former in [p for p in self._jobs if p != peer and self._state.pids.get(p) == pid]:
            self.ended(former)


@dataclass(slots=True)
class _Read:
    slots: list[Slot]
    done: ReadDone


class DiskReads:
    """Reads that the disk service has not answered."""

    def __init__(self, state: NodeState, orphans: Orphans) -> None:
        self._state = state
        self._orphans = orphans
        self._reads: dict[str, _Read] = {}

    def running(self) -> bool:
        """Whether a read is under way."""
        return bool(self._reads)

    def start(self, job: str, pairs: Sequence[tuple[ObjectMeta, Slot]], done: ReadDone) -> None:
        """Read objects into host slots that were reserved by `job`.

        The slots of what failed are given back before `done` is told; the others it has to commit.
        """
        state = self._state
        for _, slot in pairs:
            state.host.lease(slot, job, state.now_s + DISK_LEASE_S)
        self._reads[job] = _Read([slot for _, slot in pairs], done)
        state.send(
            state.disk.peer,
            DiskRead(
                job=job,
                batch=0,
                object_keys=[wire.key_of(meta.object_id) for meta, _ in pairs],
                slots=[wire.item(meta, slot) for meta, slot in pairs],
            ),
        )

    def on_read(self, peer: str, message: DiskReadDone) -> None:
        """The answer to a read."""
        read = self._reads.pop(message.job, None)
        if read is None:
            self._orphans.answered(peer, message.job)
            return
        failed = dict(message.failed)
        for index in sorted(failed):
            self._state.host.abort(read.slots[index], quiet=True)
        read.done(failed, message.bytes, message.seconds)

    def expired(self, job: str) -> None:
        """A read's right to its slots ended, and it is not answered: it counts as failed."""
        read = self._reads.pop(job, None)
        if read is not None:
            self._orphans.add(self._state.disk.peer, [job])
            self._fail(read)

    def lost(self, peer: str) -> None:
        """The disk service went away: its last reads may still be running."""
        reads, self._reads = self._reads, {}
        self._orphans.add(peer, reads)
        for read in reads.values():
            self._fail(read)

    def _fail(self, read: _Read) -> None:
        for slot in read.slots:
            self._state.host.abort(slot, quiet=False)
        read.done(dict.fromkeys(range(len(read.slots)), "disk_error"), 0, 0.0)
