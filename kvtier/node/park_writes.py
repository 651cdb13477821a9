"""The second half of a park: what lies in host memory is made durable, and which level it has reached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from kvtier.node import naming
from kvtier.node.blocks import Stored
from kvtier.node.conversations import Conversation
from kvtier.node.disk_requests import Written
from kvtier.node.disk_side import DiskSide
from kvtier.node.park_job import ParkJob
from kvtier.node.state import NodeState
from kvtier.objects import ObjectMeta
from kvtier.receipts import Level, Reason


class ParkWrites:
    """Writes the objects of parks, then the record that names them."""

    def __init__(self, state: NodeState, disk: DiskSide) -> None:
        self._state = state
        self._disk = disk

    def streams(self, job: ParkJob) -> bool:
        """Whether the conversation is too large to be held in host memory as a whole."""
        fits_on_disk = self._disk.usable() and job.disk_nbytes <= self._state.disk.capacity_bytes
        return fits_on_disk and job.nbytes > sum(self._state.arena_bytes) // 2

    def begin(self, job: ParkJob, gathered: Sequence[Stored]) -> None:
        """Write what was gathered just now, where the disk is asked for, while the rest is gathered."""
        todo = [stored for stored in gathered if not stored.durable]
        if todo and job.message.level == "disk" and self._disk.usable() and job.lowered is None:
            self._write(job, todo, None)

    def reached(self, job: ParkJob) -> Level | None:
        """The level of a job that has been gathered, once it will get no further; until then it goes on."""
        if job.message.level == "disk" and job.lowered is None and not self._all_there(job):
            job.lowered = ("incomplete", "something of it was lost again before all was on disk")
        if job.message.level != "disk" or job.lowered is not None:
            return self._lower(job)
        todo = [stored for stored in job.held.values() if not stored.durable]
        if job.writes_running or any(stored.writing for stored in todo):
            return None
        if job.recorded and not todo:
            return "disk"
        record = None if todo else job.conversation
        if record is not None and job.head is not None:
            record.keep_end(job.head)
        self._write(job, todo, record)
        return self._lower(job) if job.lowered is not None else None

    def _lower(self, job: ParkJob) -> Level:
        return "host" if self._all_there(job) else "none"

    def _all_there(self, job: ParkJob) -> bool:
        """Whether everything that was gathered can still be restored."""
        return all(self.is_there(job, meta) for meta in job.metas)

    def is_there(self, job: ParkJob, meta: ObjectMeta) -> bool:
        """Whether the job holds the object, and some tier has it, complete enough."""
        stored = job.held.get(meta.object_id)
        if stored is None or not self._state.is_stored(stored):
            return False
        return stored.meta.first_valid <= meta.first_valid and self._state.source_of(stored) is not None

    def _write(self, job: ParkJob, objects: list[Stored], record: Conversation | None) -> None:
        job.writes_running += 1

        def done(result: Written) -> None:
            job.writes_running -= 1
            if not result.ok:
                job.lowered = (cast(Reason, result.reason), result.detail)
                job.retry_after_s = result.retry_after_s
            elif record is not None and job.head is not None:
                job.recorded = True
                record.reached_disk(job.head, job.replaces)
            elif self.streams(job):
                for stored in objects:
                    slot = self._state.host.find(stored.meta.object_id)
                    if slot is not None:
                        self._state.host.release(slot, job.id)

        records = [record] if record is not None else []
        self._disk.write(objects, records, "park", done, job.message.codec)

    def drop_extended_tails(self, job: ParkJob) -> None:
        """A tail goes once the block that contains it is as durable."""
        state = self._state
        chain = state.tree.chain(job.metas[-1].object_id.block_key)
        by_parent = {block.parent: block for block in chain if not block.is_tail}
        for tail in naming.extended_tails(state, job.root, job.query, job.private, chain):
            if not naming.droppable(state, tail, by_parent[tail.parent]):
                continue
            parts = list(tail.parts.values())
            for stored in parts:
                if state.in_host(stored.meta.object_id):
                    state.host.remove(stored.meta.object_id)
            self._disk.remove(parts)
            for stored in parts:
                state.forget_object(stored.meta.object_id)
