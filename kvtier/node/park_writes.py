"""The second half of a park: what lies in host memory is made durable, and which level it has reached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, cast

from kvtier.node import naming
from kvtier.node.blocks import Stored
from kvtier.node.conversations import Conversation, Head
from kvtier.node.disk_requests import Written
from kvtier.node.disk_side import DiskSide
from kvtier.node.park_job import ParkAct, ParkJob
from kvtier.node.replicas import Copied, Replicas, keep_of
from kvtier.node.state import NodeState
from kvtier.objects import ObjectMeta
from kvtier.receipts import Level, Reason, copies_level

# Of a park's time, what is kept for writing to disk what no other node took.
_LEFT_FOR_DISK_S = 5.0
_INCOMPLETE: Final[tuple[Reason, str]] = (
    "incomplete",
    "something of it was lost again before all was as safe as asked",
)


class ParkWrites:
    """Writes the objects of parks, then the record that names them."""

    def __init__(self, state: NodeState, disk: DiskSide, replicas: Replicas) -> None:
        self._state = state
        self._disk = disk
        self._replicas = replicas

    def streams(self, job: ParkJob) -> bool:
        """Whether the conversation is too large to be held in host memory as a whole."""
        on_disk, nbytes = job.disk_nbytes * job.slices, job.nbytes * job.slices
        fits_on_disk = self._disk.usable() and on_disk <= self._state.disk.capacity_bytes
        return fits_on_disk and nbytes > sum(self._state.arena_bytes) // 2

    def begin(self, job: ParkJob, gathered: Sequence[Stored]) -> None:
        """Write what was gathered just now, where the disk is asked for, while the rest is gathered."""
        todo = [stored for stored in gathered if not stored.durable]
        if todo and job.message.level == "disk" and self._disk.usable() and job.lowered is None:
            self._write(job, todo, None)

    def reached(self, job: ParkJob) -> Level | None:
        """The level of a job that has been gathered, once it will get no further; until then it goes on."""
        if job.message.level != "host" and job.lowered is None and not self._all_there(job):
            job.lowered = _INCOMPLETE
        for one in job.act.jobs if job.act is not None else ():
            job.lowered = job.lowered or one.lowered
        if job.message.level == "host" or job.lowered is not None:
            return self._lower(job)
        if job.others and job.copies is None:
            self._copy(job)
        if job.others and job.copies is None:
            return None
        if job.copies:
            return copies_level(1 + len(job.copies))
        # Also of a park that asked for copies and got none.
        todo = [stored for stored in job.held.values() if not stored.durable]
        if job.writes_running or any(stored.writing for stored in todo):
            return None
        job.durable = not todo
        recorded = job.recorded if job.act is None else job.act.recorded
        if recorded and not todo:
            return "disk"
        if not todo and not self._may_record(job):
            return None
        record = None if todo else job.conversation
        if record is not None and job.head is not None:
            record.keep_end(job.head)
        self._write(job, todo, record)
        return self._lower(job) if job.lowered is not None else None

    def _may_record(self, job: ParkJob) -> bool:
        """Whether what its other ranks park is on disk too: only then the record may say so, and once.

        What nobody holds but their act is written by this job: also the parts of those who asked for host
        memory only, once they have left.
        """
        act = job.act
        if act is None:
            return True
        fellows = [one for one in act.jobs if one.ready]
        others = [stored for stored in act.others if not stored.durable]
        if act.recording or not all(one.durable for one in fellows):
            return False
        if others and not any(stored.writing for stored in others):
            self._write(job, others, None)
        act.recording = not others
        return not others

    def over(self, job: ParkJob) -> None:
        """Nobody waits for anything of it any more."""
        self._replicas.end(job.wish)

    def _copy(self, job: ParkJob) -> None:
        """Have other nodes keep it, once; with the parts of its other ranks, so that one node has all."""
        there = [one for one in job.act.jobs if one.ready] if job.act is not None else [job]
        fellows = [one for one in there if one.others]
        for one in fellows:
            if one.copies is not None:
                job.copies, job.short = one.copies, one.short
        if job.copies is not None or any(one.wish for one in fellows) or job.head is None:
            return
        chain = self._state.tree.chain(job.head.key)
        own = {block.key for block in chain}
        whole = {meta.object_id: one.held[meta.object_id] for one in there for meta in one.metas}
        whole |= {stored.meta.object_id: stored for stored in (job.act.others if job.act is not None else ())}
        objects = sorted(whole.values(), key=lambda stored: stored.meta.start)
        keep = keep_of(self._state, job.name, job.head, objects, job.replaces - own)

        def copied(result: Copied) -> None:
            job.copies = result.copies
            if len(result.copies) < job.others:
                job.short = ("deadline" if result.late else "no_peer", result.why)
            for block in chain:
                block.kept = True

        limit_s = job.message.timeout_s
        until_s = job.started_s + limit_s - min(_LEFT_FOR_DISK_S, limit_s / 4)
        job.wish = self._replicas.start(keep, job.others, until_s, copied)

    def _lower(self, job: ParkJob) -> Level:
        return "host" if self._all_there(job) else "none"

    def _all_there(self, job: ParkJob) -> bool:
        """Whether everything that was gathered can still be restored."""
        state, others = self._state, job.act.others if job.act is not None else ()
        there = all(state.is_stored(stored) and state.source_of(stored) is not None for stored in others)
        return there and all(self.is_there(job, meta) for meta in job.metas)

    def all_there(self, act: ParkAct) -> bool:
        """Whether everything that its ranks have gathered can still be restored."""
        return all(self._all_there(one) for one in act.jobs if one.ready)

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
                if job.act is not None:
                    job.act.recording = False
            elif record is not None and job.head is not None:
                if not self._is_on_disk(job, job.head):
                    # What has left since, or was found to be corrupt, is no end of the conversation: the
                    # ends that it goes on from stay.
                    job.lowered = job.lowered or _INCOMPLETE
                    if job.act is not None:
                        job.act.recording = False
                    return
                job.recorded = True
                if job.act is not None:
                    job.act.recorded = True
                record.reached_disk(job.head, job.replaces)
            elif self.streams(job):
                for stored in objects:
                    slot = self._state.host.find(stored.meta.object_id)
                    if slot is not None:
                        self._state.host.release(slot, job.id)

        records = [record] if record is not None else []
        self._disk.write(objects, records, "park", done, job.message.codec)

    def _is_on_disk(self, job: ParkJob, head: Head) -> bool:
        """Whether the disk has everything up to this end; while the job goes on, that is what it holds."""
        if job.over:
            tree = self._state.tree
            own = [tree.stored(meta.object_id) for meta in job.metas]
            whole = [*own, *(stored for block in tree.chain(head.key) for stored in block.parts.values())]
            return all(stored is not None and stored.on_disk is not None for stored in whole)
        return all(stored.durable for stored in job.held.values())

    def drop_extended_tails(self, job: ParkJob) -> None:
        """A tail goes once the block that contains it is as durable."""
        state = self._state
        chain = state.tree.chain(job.metas[-1].object_id.block_key)
        tails = naming.extended_tails(state, job.root, job.query, job.private, chain)
        naming.drop_tails(state, self._disk, chain, tails)
