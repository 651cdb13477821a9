"""Restoring: disk -> host memory -> pool."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable

from kvtier.errors import ObjectExists
from kvtier.messages.calls import Restore, RestoreDone, RestoreStarted
from kvtier.messages.tiers import Copied
from kvtier.node.blocks import Stored
from kvtier.node.copies import Copies, Pair
from kvtier.node.counters import count
from kvtier.node.coverage import Piece
from kvtier.node.disk_reads import REMOVED, Read
from kvtier.node.disk_side import DiskSide
from kvtier.node.held_plan import HeldPlan
from kvtier.node.limits import check_seconds
from kvtier.node.plans import Plans
from kvtier.node.pulls import Pulls
from kvtier.node.restore_acts import RestoreActs
from kvtier.node.restore_ends import RestoreEnds
from kvtier.node.restore_job import RestoreJob
from kvtier.node.room import Room
from kvtier.node.state import NodeState, Worker
from kvtier.objects import ObjectId, ObjectMeta
from kvtier.receipts import Reason, RestoreReceipt
from kvtier.tier import Slot

# Reasons that a copy engine gives.
_CORRUPT, _STALE = "corrupt", "stale"

# Objects of one batch of a restore by layer: their description stays well below what a frame may hold.
_BY_LAYER_OBJECTS = 4096

# A read from another node is not asked for with less time than this.
_LEAST_S = 0.01


class Restores:
    """Starts restores, and moves them on whenever something ended."""

    def __init__(
        self,
        state: NodeState,
        copies: Copies,
        disk: DiskSide,
        room: Room,
        plans: Plans,
        pulls: Pulls,
    ) -> None:
        self._state = state
        self._copies = copies
        self._disk = disk
        self._room = room
        self._plans = plans
        self._pulls = pulls
        self._acts = RestoreActs(plans, RestoreEnds(state))
        self._jobs: dict[str, RestoreJob] = {}

    def start(self, peer: str, message: Restore, worker: Worker) -> None:
        """Answer a Restore. Raises ProtocolError, and the plan stays."""
        state = self._state
        check_seconds("deadline_s", message.deadline_s)
        held = self._plans.take(message.plan_id, worker)
        if held is None:
            count(state.counters.misses, "lease_expired")
            detail = "the plan is not held any more"
            receipt = RestoreReceipt("", "", 0, 0, reason="lease_expired", detail=detail)
            state.send(peer, RestoreStarted(id=message.id, job="", receipt=receipt))
            return
        job = RestoreJob(
            state.next_id("s"),
            worker,
            message.request,
            message.pages,
            held=held,
            deadline_s=state.now_s + message.deadline_s,
            started_s=state.now_s,
            by_layer=message.by_layer,
            events=message.events,
            layers=message.layers,
        )
        self._jobs[job.id] = job
        self._acts.began(job)
        self._copies.add(job)
        state.send(peer, RestoreStarted(id=message.id, job=job.id))
        self._expect(job, held)
        for piece in held.pieces:
            self._queue(job, piece)
        self._plans.leased(held)

    @staticmethod
    def _expect(job: RestoreJob, held: HeldPlan) -> None:
        """Note what is to come from where, as it was planned."""
        segments = held.chosen.segments
        ends = [segment.end for segment in segments]
        for piece in held.pieces:
            source = segments[bisect_right(ends, piece.stored.meta.start)].source
            job.sources[piece.stored.meta.object_id] = source
            job.left[source] = job.left.get(source, 0) + 1
        job.to_come_bytes = sum(piece.stored.meta.nbytes for piece in held.pieces)

    def _queue(self, job: RestoreJob, piece: Piece) -> None:
        """Copy it from host memory when it is there, else read it."""
        if job.over or job.reason:
            return
        state = self._state
        slot = state.host.find(piece.stored.meta.object_id)
        if slot is None:
            (job.to_pull if piece.source == "peer" else job.to_read).append(piece)
            return
        # What was to come from another node may have been parked here meanwhile, with bytes of its own.
        stored = state.tree.stored(piece.stored.meta.object_id) or piece.stored
        if stored.meta.first_valid > piece.stored.meta.first_valid:
            self._stop(job, "incomplete", "a block has fewer rows here than it had elsewhere")
            return
        until_s = job.deadline_s + state.settings.quiet_grace_s + state.settings.copy_lease_s
        state.host.lease(slot, job.id, until_s)
        state.counters.prefetch_used_bytes += state.prefetched.pop(stored.meta.object_id, 0)
        job.to_copy.append((stored.meta, slot))

    # --- moving on --------------------------------------------------------------------------------------

    def advance_all(self) -> None:
        """Something ended, somewhere."""
        for job in list(self._jobs.values()):
            self._advance(job)

    def tick(self) -> None:
        """Cut off what is late."""
        for job in [job for job in self._jobs.values() if self._state.now_s >= self._acts.deadline_s(job)]:
            if job.over:
                continue
            grace_s = self._state.settings.quiet_grace_s
            after_grace = self._state.now_s >= self._acts.deadline_s(job) + grace_s
            self._acts.late(job)
            self._stop_if_lost(job)
            self._stop(job, "deadline", "the rest would have come too late")
            if after_grace:
                self._finish(job)

    def _advance(self, job: RestoreJob) -> None:
        if job.over:
            return
        if not self._state.gpu_peer:
            self._stop(job, "copy_failed", "the GPU service is not there")
        self._stop_if_lost(job)
        if not job.reason:
            self._read(job)
            self._copy(job)
        if not (job.running or job.reading or job.to_copy or job.to_read or job.to_pull):
            self._finish(job)

    def _read(self, job: RestoreJob) -> None:
        stuck = self._begin_reads(job, job.to_read, "r", self._on_disk, self._start_read)
        stuck = stuck or self._begin_reads(job, job.to_pull, "x", _as_planned, self._start_pull)
        idle = not (job.running or job.reading or job.to_copy)
        reads_run = self._disk.reads.running() or self._pulls.reads.running()
        others_run = self._copies.running(besides=job) or reads_run
        if idle and stuck == "full" and not others_run:
            self._stop(job, "backpressure", "no host memory to read into")

    def _begin_reads(
        self,
        job: RestoreJob,
        todo: deque[Piece],
        prefix: str,
        copy_of: Callable[[Stored], ObjectMeta | None],
        start: Callable[[RestoreJob, str, list[Read]], None],
    ) -> str:
        """Ask for as many reads as the job may have under way; answers what stopped it before."""
        stuck = ""
        while todo and not stuck and job.reading < self._state.settings.batches_in_flight:
            read_id = self._state.next_id(prefix)
            pairs, stuck = self._next_read(job, todo, read_id, copy_of)
            if pairs:
                job.reading += 1
                start(job, read_id, pairs)
        return stuck

    def _on_disk(self, stored: Stored) -> ObjectMeta | None:
        return stored.on_disk if self._state.disk.ready else None

    def _next_read(
        self,
        job: RestoreJob,
        todo: deque[Piece],
        read_id: str,
        copy_of: Callable[[Stored], ObjectMeta | None],
    ) -> tuple[list[Read], str]:
        """Slots for the next objects, and what stopped it from taking more. copy_of: what is to be read."""
        state = self._state
        reads: list[Read] = []
        nbytes = 0
        while todo and (not reads or nbytes < state.settings.batch_bytes):
            stored = todo[0].stored
            if state.in_host(stored.meta.object_id):
                self._queue(job, todo.popleft())
                continue
            meta = copy_of(stored)
            if meta is None:
                self._stop(job, "disk_error", "a block is not on disk any more")
                break
            try:
                slot = self._room.reserve(meta, read_id)
            except ObjectExists:
                return reads, "filling"
            if not isinstance(slot, Slot):
                return reads, slot
            reads.append((stored, meta, slot))
            nbytes += meta.nbytes
            todo.popleft()
        return reads, ""

    def _start_read(self, job: RestoreJob, read_id: str, reads: list[Read]) -> None:
        def ended(objects: list[tuple[Stored, str]], seconds: float) -> None:
            job.reading -= 1
            job.read_s += seconds
            for stored, why in objects:
                if not why:
                    self._queue(job, Piece(stored, "host"))
                elif why == REMOVED:
                    self._stop(job, "incomplete", "a block was removed while it was read")
                else:
                    self._stop(
                        job, "corrupt" if why == "corrupt" else "disk_error", f"a block on disk: {why}"
                    )

        self._disk.reads.start(read_id, reads, ended)

    def _start_pull(self, job: RestoreJob, read_id: str, reads: list[Read]) -> None:
        def ended(arrived: list[Stored], reason: Reason, detail: str) -> None:
            job.reading -= 1
            for stored in arrived:
                self._queue(job, Piece(stored, "host"))
            if reason:
                self._stop(job, reason, detail)

        timeout_s = max(job.deadline_s - self._state.now_s, _LEAST_S)
        pairs = [(meta, slot) for _, meta, slot in reads]
        self._pulls.start(job.held, read_id, pairs, timeout_s, ended)

    def _copy(self, job: RestoreJob) -> None:
        settings = self._state.settings
        while job.to_copy and len(job.running) < settings.batches_in_flight:
            batch = [job.to_copy.popleft()]
            nbytes = batch[0][0].nbytes
            while job.to_copy and (
                nbytes + job.to_copy[0][0].nbytes <= settings.batch_bytes
                or (job.by_layer and len(batch) < _BY_LAYER_OBJECTS)
            ):
                batch.append(job.to_copy.popleft())
                nbytes += batch[-1][0].nbytes
            job.to_come_bytes = max(job.to_come_bytes - nbytes, 0)
            last = not (job.to_copy or job.to_read or job.to_pull or job.reading)
            self._copies.start(job, "scatter", batch, last)

    # --- copies end -------------------------------------------------------------------------------------

    def copied(self, job: RestoreJob, pairs: list[Pair], message: Copied) -> None:
        """A batch of the job ended."""
        if job.over:
            self._copies.settle(job)
            return
        job.copy_s += message.seconds
        failed = dict(message.failed)
        for index, (meta, slot) in enumerate(pairs):
            if message.ok or (failed and index not in failed):
                job.copied.add(meta.object_id)
                job.copied_bytes += meta.nbytes
                self._arrived(job, meta.object_id)
                # Its room may go to what is still to be read.
                self._state.host.release(slot, job.id)
            else:
                self._copy_failed(job, meta.object_id, slot, failed.get(index, "the copy failed"))

    def _arrived(self, job: RestoreJob, object_id: ObjectId) -> None:
        source = job.sources.pop(object_id, "")
        if source:
            job.left[source] -= 1
            if not job.left[source]:
                job.arrived_s[source] = self._state.now_s

    def _copy_failed(self, job: RestoreJob, object_id: ObjectId, slot: Slot, why: str) -> None:
        """Wrong bytes in host memory: gone from there; another copy is tried when there is one."""
        state = self._state
        if why not in (_CORRUPT, _STALE):
            self._stop(job, "copy_failed", why)
            return
        count(state.counters.errors, why)
        stored, block = state.tree.stored(object_id), state.tree.get(object_id.block_key)
        if why == _CORRUPT and stored and block and state.host.find(object_id) == slot:
            state.host.quarantine(slot)
            if object_id in job.tried_again:
                # As read from disk it was wrong, too.
                self._disk.remove([stored])
            state.left_host(block, stored)
        state.host.release(slot, job.id)
        can_try = stored is not None and state.is_stored(stored) and object_id not in job.tried_again
        if stored is not None and can_try and not job.reason:
            job.tried_again.add(object_id)
            job.to_read.append(Piece(stored, "disk"))
        else:
            self._stop(
                job, "corrupt" if why == _CORRUPT else "copy_failed", "a block in host memory was wrong"
            )

    # --- ends -------------------------------------------------------------------------------------------

    def abandon(self, job: RestoreJob, reason: Reason, detail: str) -> None:
        """Answer now, although copies may still run."""
        if not job.over:
            self._stop(job, reason, detail)
            self._acts.lose(job, f"the rank with {job.worker.shard} fell out: {detail}")
            self._finish(job)

    def _stop_if_lost(self, job: RestoreJob) -> None:
        lost = self._acts.lost(job)
        if lost:
            self._stop(job, "shard_missing", lost)

    def _stop(self, job: RestoreJob, reason: Reason, detail: str) -> None:
        """Begin nothing more; what is in place counts."""
        job.to_read.clear()
        job.to_pull.clear()
        job.to_copy.clear()
        job.to_come_bytes = 0
        if not job.reason:
            job.reason, job.detail = reason, detail
            self._copies.cancel(job)

    def _finish(self, job: RestoreJob) -> None:
        """Nothing more of it is to come: answer, with the other ranks of its plan."""
        job.ended = True
        for one, receipt in self._acts.receipts(job):
            self._end(one, receipt)

    def _end(self, job: RestoreJob, receipt: RestoreReceipt) -> None:
        state = self._state
        state.send(job.worker.name, RestoreDone(request=job.request, receipt=receipt))
        self._plans.release(job.held)
        job.over = True
        self._jobs.pop(job.id, None)
        self._copies.settle(job)


def _as_planned(stored: Stored) -> ObjectMeta:
    """What another node has of an object: its entry is no part of this node's tree."""
    return stored.meta
