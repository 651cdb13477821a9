"""Reads from disk ahead of a return: what somebody who is expected soon would otherwise wait for.

Whom to expect, and what may go for it, is the policy's to say. One conversation at a time is read, from its
front on, in small batches, and only while nobody waits for the disk. Nothing is written to make room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from kvtier.errors import GeometryError, ObjectExists
from kvtier.node.blocks import Stored
from kvtier.node.coverage import longest
from kvtier.node.disk_reads import REMOVED, Read
from kvtier.node.disk_side import DiskSide
from kvtier.node.room import Room
from kvtier.node.state import NodeState
from kvtier.policy.interfaces import Expected

# Who is asked for comes first: a read of this size delays nobody for long.
_BATCH_BYTES = 32 << 20
# Conversations that one tick looks at.
_LOOKS = 8


@dataclass(slots=True)
class _Job:
    ahead: Expected
    todo: deque[Stored]
    reading: bool = False


class Prefetch:
    """See the module's text."""

    def __init__(self, state: NodeState, disk: DiskSide, room: Room) -> None:
        self._state = state
        self._disk = disk
        self._room = room
        self._job: _Job | None = None

    def tick(self) -> None:
        """See who is expected."""
        state = self._state
        ahead_s = state.settings.prefetch_s
        if self._job is not None or not ahead_s or state.draining or not self._disk.usable():
            return
        for _ in range(_LOOKS):
            ahead = state.policies.prefetch.due(state.now_s, ahead_s)
            if ahead is None:
                return
            todo = deque(self._lacking(ahead))
            if todo:
                self._job = _Job(ahead, todo)
                return

    def advance(self) -> None:
        """Read on, where nobody else reads."""
        job = self._job
        if job is None or job.reading or self._disk.reads.running():
            return
        read_id = self._state.next_id("r")
        goes_on = self._disk.usable() and not self._state.draining
        reads = self._next_batch(job, read_id) if goes_on else []
        if not reads:
            self._job = None
            return
        job.reading = True

        def ended(objects: list[tuple[Stored, str]], seconds: float) -> None:
            job.reading = False
            for stored, why in objects:
                if not why:
                    self._state.prefetched[stored.meta.object_id] = stored.meta.nbytes
                    self._state.counters.prefetched_bytes += stored.meta.nbytes
                elif why != REMOVED:
                    job.todo.clear()

        self._disk.reads.start(read_id, reads, ended)

    def _lacking(self, ahead: Expected) -> Iterator[Stored]:
        """What a restore of the newest branch would read from disk, for all ranks that are served here."""
        state = self._state
        known = state.conversations.get(ahead.name)
        if known is None or not known.heads:
            return
        head = known.heads[-1]
        chain = state.tree.chain(head.key)
        if not chain:
            return
        root = chain[-1].root
        served = {
            (worker.shard, worker.geometry): None
            for worker in state.workers.values()
            if worker.connected
            and worker.fingerprint == head.fingerprint
            and worker.geometry.block_tokens == root.block_tokens
        }
        for shard, geometry in served:
            try:
                as_stored = geometry.at(root.fidelity)
            except GeometryError:
                # They cannot take what is stored like this.
                continue
            for piece in longest(chain, as_stored, shard, state.source_of, head.tokens):
                if piece.source == "disk":
                    yield piece.stored

    def _next_batch(self, job: _Job, read_id: str) -> list[Read]:
        """Slots for what comes next; the job ends where there is no room that is worth less."""
        state, prefetch = self._state, self._state.policies.prefetch
        reads: list[Read] = []
        nbytes = 0
        while job.todo and nbytes < _BATCH_BYTES:
            stored = job.todo.popleft()
            meta = stored.on_disk
            if meta is None or stored.slot is not None or not state.is_stored(stored):
                continue
            try:
                slot = self._room.spare(meta, read_id, lambda key: prefetch.displaces(job.ahead, key))
            except ObjectExists:
                # Somebody else is reading it.
                continue
            if slot is None:
                job.todo.clear()
                break
            reads.append((stored, meta, slot))
            nbytes += meta.nbytes
        return reads
