"""Reads into host memory that a service was asked for, and slots that a lost one may still be touching."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from kvtier.messages.cluster import PeerReadDone
from kvtier.messages.tiers import DiskReadDone
from kvtier.node.copies import Pair
from kvtier.node.state import NodeState
from kvtier.tier import Slot

# Who waits for a read: told the reason for each object that failed, by its place in the read.
ReadDone: TypeAlias = Callable[[dict[int, str], int, float], None]


class Orphans:
    """Jobs that nobody waits for any more, by the connection that they were sent over.

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


class Reads:
    """Reads that have not been answered. late: why those failed that are given up."""

    def __init__(self, state: NodeState, orphans: Orphans, late: str) -> None:
        self._state = state
        self._orphans = orphans
        self._late = late
        self._reads: dict[str, _Read] = {}

    def running(self) -> bool:
        """Whether a read is under way."""
        return bool(self._reads)

    def _begin(self, job: str, pairs: Sequence[Pair], until_s: float, done: ReadDone) -> None:
        """Wait for a read into host slots that were reserved by `job`, and are leased to it from now on.

        The slots of what failed are given back before `done` is told; the others it has to commit.
        """
        for _, slot in pairs:
            self._state.host.lease(slot, job, until_s)
        self._reads[job] = _Read([slot for _, slot in pairs], done)

    def _answered(self, peer: str, message: DiskReadDone | PeerReadDone) -> None:
        """Nothing of the read touches a slot any more, but for those that are named as busy."""
        busy = message.busy if isinstance(message, PeerReadDone) else ()
        read = self._reads.pop(message.job, None)
        if read is None:
            if not busy:
                self._orphans.answered(peer, message.job)
            return
        if busy:
            self._orphans.add(peer, [message.job])
        failed = dict(message.failed)
        for index in sorted(failed):
            self._state.host.abort(read.slots[index], quiet=index not in busy)
        read.done(failed, message.bytes, message.seconds)

    def _give_up(self, peer: str, jobs: Iterable[str]) -> None:
        """These are not waited for any longer, and count as failed; `peer` may be touching their slots."""
        reads = {job: self._reads.pop(job) for job in list(jobs) if job in self._reads}
        self._orphans.add(peer, reads)
        for read in reads.values():
            for slot in read.slots:
                self._state.host.abort(slot, quiet=False)
            read.done(dict.fromkeys(range(len(read.slots)), self._late), 0, 0.0)
