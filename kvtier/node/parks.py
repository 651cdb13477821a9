"""Parking: pool -> host memory -> disk."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from kvtier.errors import StaleSlot
from kvtier.messages.calls import Park, ParkDone, ParkStarted, Released
from kvtier.messages.tiers import Copied
from kvtier.node import held_cost, limits, naming, usage
from kvtier.node.blocks import ConversationId, Stored
from kvtier.node.conversations import Head
from kvtier.node.copies import Copies, Pair
from kvtier.node.counters import count
from kvtier.node.disk_side import DiskSide
from kvtier.node.holding import Holding
from kvtier.node.park_acts import ParkActs
from kvtier.node.park_job import ParkJob
from kvtier.node.park_request import new_job
from kvtier.node.park_writes import ParkWrites
from kvtier.node.replicas import Replicas
from kvtier.node.room import Room
from kvtier.node.state import NodeState, Worker
from kvtier.receipts import Level, Reason

# Least and most that a refused caller is told to wait.
_RETRY_LEAST_S, _RETRY_MOST_S = 0.05, 5.0
# How often a park that is too large to be held gathers again what others took meanwhile.
_ROUNDS_MOST = 2


class Parks:
    """Starts parks, and moves them on whenever something ended."""

    def __init__(
        self, state: NodeState, copies: Copies, disk: DiskSide, room: Room, replicas: Replicas
    ) -> None:
        self._state = state
        self._copies = copies
        self._disk = disk
        self._room = room
        self._holding = Holding(state, room)
        self._writes = ParkWrites(state, disk, replicas)
        self._acts = ParkActs(state)
        self._jobs: dict[str, ParkJob] = {}

    def waiting(self) -> int:
        """Parks that wait for room."""
        return sum(job.waiting_since_s is not None for job in self._jobs.values())

    def copying(self, name: ConversationId) -> bool:
        """Whether a park of the conversation still copies."""
        return any(job.name == name and not job.gathered for job in self._jobs.values())

    def forget(self, name: ConversationId) -> None:
        """End all parks of a conversation that is to be erased."""
        for job in [job for job in self._jobs.values() if job.name == name]:
            self.abandon(job, "forgotten", "the conversation was forgotten")

    # --- beginning --------------------------------------------------------------------------------------

    def start(self, peer: str, message: Park, worker: Worker) -> None:
        """Answer a Park. Raises the caller's mistakes as KvtierError, before anything changed."""
        pending = self._acts.privates((message.tenant, message.conversation))
        job = new_job(self._state, message, worker, pending)
        self._jobs[job.id] = job
        self._acts.join(job)
        self._copies.add(job)
        self._state.send(peer, ParkStarted(id=message.id, job=job.id))
        refusal = self._refusal(job)
        if refusal:
            self._fail(job, "backpressure", refusal)

    def _refusal(self, job: ParkJob) -> str:
        """Why the node's own memory has no room for what it would have to know of the park, or ''."""
        state = self._state
        if len(self._jobs) > limits.MOST_PARKS:
            return f"{limits.MOST_PARKS} parks are under way already"
        if job.name not in state.conversations and len(state.conversations) >= limits.MOST_CONVERSATIONS:
            return f"this node keeps {limits.MOST_CONVERSATIONS} conversations, and no more: forget some"
        left = max(0, limits.MOST_BLOCKS - len(state.tree))
        keys = {meta.object_id.block_key for meta in job.metas} if left < len(job.metas) else set()
        if sum(state.tree.get(key) is None for key in keys) > left:
            return f"this node keeps {limits.MOST_BLOCKS} blocks, and no more: forget some, or use larger"
        return ""

    # --- moving on --------------------------------------------------------------------------------------

    def advance_all(self) -> None:
        """Something ended, somewhere: whoever waits tries again, the longest waiting first."""
        again = True
        while again:
            before_waits = False
            for job in list(self._jobs.values()):
                # Later parks must not take the room that this one waits for.
                self._advance(job, may_gather=not before_waits)
                before_waits |= job.waiting_since_s is not None
            # Then those that were looked at before have more to do.
            again = self._acts.take_changed()

    def tick(self) -> None:
        """The time of some is over: no room came, copies are too slow, or disk is not waited for longer."""
        for job in list(self._jobs.values()):
            if self._state.now_s - job.started_s < job.message.timeout_s:
                continue
            if job.running:
                self._fail(job, "deadline", "its copies did not end in time")
            elif job.ready and not job.gathered:
                missing = ", ".join(self._acts.missing(job))
                self._fail(job, "shard_missing", f"no rank parked {missing} in time")
            elif not job.gathered:
                self._fail(job, "backpressure", "host memory stayed full")
            elif job.lowered is None:
                job.lowered = ("deadline", "the disk did not finish in time")

    def _advance(self, job: ParkJob, may_gather: bool) -> None:
        if job.act is not None and job.act.lost and not job.over:
            self._fail(job, "shard_missing", job.act.lost)
        if not job.over and not job.gathered and job.failure is None:
            if job.ready:
                self._all_ready(job)
            elif may_gather:
                self._gather(job)
        if not job.over and job.failure is not None and not job.running:
            self._finish(job, "none")
        if not job.over and job.gathered:
            level = self._writes.reached(job)
            for one, agreed in self._acts.agreed(job, level) if level is not None else ():
                self._finish(one, agreed)

    def _gather(self, job: ParkJob) -> None:
        """Ask for copies as long as there is room and the job may have more of them running."""
        if self._state.draining and not job.next_batch:
            self._fail(job, "backpressure", "this node goes out of service")
            return
        if not self._state.gpu_peer:
            self._fail(job, "copy_failed", "the GPU service is not there")
            return
        if not job.next_batch and self._is_too_large(job):
            self._fail(job, "too_large", f"{job.nbytes} bytes do not fit into host memory")
            return
        stuck = ""
        while job.todo and not stuck and len(job.running) < self._state.settings.batches_in_flight:
            batch, stuck = self._holding.next_batch(job, job.id, self._held_until_s(job))
            for _, slot in batch:
                self._state.host.lease(slot, job.id, self._state.now_s + self._state.settings.copy_lease_s)
            if batch:
                self._copies.start(job, "gather", batch, last=not job.todo)
        if job.running:
            self._stop_waiting(job)
        elif job.todo:
            self._wait_or_refuse(job, stuck)
        else:
            self._all_gathered(job)

    def _held_until_s(self, job: ParkJob) -> float | None:
        """Of leases on what it holds; None where there would be no room for all of it."""
        return None if self._writes.streams(job) else job.started_s + 2 * job.message.timeout_s

    def _is_too_large(self, job: ParkJob) -> bool:
        """Whether even empty tiers would not do."""
        arenas = self._state.arena_bytes
        too_long = max(meta.nbytes for meta in job.metas) > max(arenas)
        return too_long or (job.nbytes * job.slices > sum(arenas) and not self._writes.streams(job))

    def _wait_or_refuse(self, job: ParkJob, stuck: str) -> None:
        """Nothing of the job runs and it cannot go on: is there something to wait for?"""
        others_run = self._copies.running(besides=job) or self._disk.reads.running()
        if stuck == "filling":
            # Not for room, which those behind it may have: others still need what it has more of.
            self._stop_waiting(job)
        elif stuck == "full" and not others_run:
            self._fail(job, "backpressure", "all of host memory is in use")
        elif job.waiting_since_s is None:
            job.waiting_since_s = self._state.now_s

    def _stop_waiting(self, job: ParkJob) -> None:
        if job.waiting_since_s is not None:
            self._state.counters.backpressure_s += self._state.now_s - job.waiting_since_s
            job.waiting_since_s = None

    # --- copies end -------------------------------------------------------------------------------------

    def copied(self, job: ParkJob, pairs: list[Pair], message: Copied) -> None:
        """A batch of the job ended."""
        state = self._state
        if job.over:
            for _, slot in pairs:
                state.host.release(slot, job.id)
            self._release(job)
            self._copies.settle(job)
            return
        if not (message.ok and job.failure is None and self._commit(job, pairs, message)):
            for _, slot in pairs:
                state.host.abort(slot, quiet=True)
            failed = message.failed[0][1] if message.failed else "the copy did not end in time"
            self._fail(job, "copy_failed", failed)

    def _commit(self, job: ParkJob, pairs: list[Pair], message: Copied) -> bool:
        """Make the batch visible; False when the right to its slots had ended."""
        state = self._state
        sums = [checksum for checksum in message.checksums if checksum is not None]
        if len(sums) != len(pairs):
            return False
        try:
            state.host.commit([(slot, c) for (_, slot), c in zip(pairs, sums, strict=True)])
        except StaleSlot:
            return False
        written: list[Stored] = []
        for (meta, _), checksum in zip(pairs, sums, strict=True):
            stored = state.stored_in_host(replace(meta, checksum=checksum))
            block = state.tree.get(meta.object_id.block_key)
            if block is not None:
                state.tree.name([block], job.name, job.private)
                if self._writes.streams(job):
                    # The others are held until the park is over.
                    usage.stored(state, job.name, block)
            self._holding.hold(job, meta, self._held_until_s(job))
            written.append(stored)
            job.objects_stored += 1
            job.bytes_stored += meta.nbytes
        job.error_squares += message.error_squares
        job.value_squares += message.value_squares
        state.counters.parked_bytes += sum(meta.nbytes for meta, _ in pairs)
        self._writes.begin(job, written)
        return True

    def _all_gathered(self, job: ParkJob) -> None:
        """All objects are stored: the pages may go, the conversation has a new head."""
        until_s = self._held_until_s(job)
        lost = [
            m for m in job.metas if not (self._writes.is_there(job, m) or self._holding.hold(job, m, until_s))
        ]
        if lost:
            job.rounds += 1
            if job.rounds > _ROUNDS_MOST:
                self._fail(job, "backpressure", "others took the memory before everything was stored")
                return
            job.todo = deque(lost)
            if job.waiting_since_s is None:
                job.waiting_since_s = self._state.now_s
            return
        self._stop_waiting(job)
        job.ready = True
        self._release(job)
        self._acts.ready(job)
        self._all_ready(job)

    def _all_ready(self, job: ParkJob) -> None:
        """What its other ranks park is there, too: the conversation has a new head."""
        act = job.act
        if act is None or act.head is None:
            if act is not None and not act.whole:
                return
            if act is not None and not self._writes.all_there(act):
                self._fail(job, "incomplete", "something of it was lost before all of its ranks had parked")
                return
            self._set_head(job)
        else:
            job.head, job.replaces, job.conversation = act.head, act.replaces, act.conversation
        job.gathered = True
        chain = self._state.tree.chain(job.metas[-1].object_id.block_key)
        geometry, shard = job.worker.geometry, job.worker.shard
        for object_id, shape in naming.behind_window(chain, geometry, shard, job.query.end):
            self._room.passed_by(object_id, shape)

    def _set_head(self, job: ParkJob) -> None:
        state, message = self._state, job.message
        conversation = state.conversation(job.name)
        last = job.metas[-1].object_id.block_key
        chain = state.tree.chain(last)
        state.tree.name(chain, job.name, job.private)
        head = Head(last, job.query.end, job.root.key, job.root.fingerprint, job.private, state.now_s)
        tails = naming.extended_tails(state, job.root, job.query, job.private, chain)
        job.replaces = {block.key for block in chain[:-1]} | {tail.key for tail in tails}
        job.head = head
        conversation.set_head(head, job.replaces, state.settings.max_heads)
        state.name_changed(job.name)
        if message.returns_in_s is not None:
            conversation.returns_at_s = state.now_s + message.returns_in_s
        if message.keep_for_s is not None:
            conversation.keep_until_s = state.now_s + message.keep_for_s
        if message.codec:
            conversation.codec = message.codec
        job.conversation = conversation
        usage.parked(state, message, job.root.fingerprint, chain)
        if job.act is not None:
            job.act.head, job.act.replaces, job.act.conversation = head, job.replaces, conversation

    # --- ends -------------------------------------------------------------------------------------------

    def abandon(self, job: ParkJob, reason: Reason, detail: str) -> None:
        """End the job although copies may still run: their slots are in limbo until then."""
        job.failure = (reason, detail)
        for pairs in job.running.values():
            for _, slot in pairs:
                self._state.host.abort(slot, quiet=False)
        self._copies.cancel(job)
        self._finish(job, "host" if job.gathered and reason != "forgotten" else "none")

    def expired(self, job: ParkJob) -> None:
        """The right to a slot that the job fills has ended."""
        if not job.over and job.running:
            self.abandon(job, "lease_expired", "the copy took longer than it had")

    def _fail(self, job: ParkJob, reason: Reason, detail: str) -> None:
        """Nothing more is begun; the receipt goes out when what runs has ended."""
        if job.failure is None:
            job.failure = (reason, detail)
            self._copies.cancel(job)

    def proven_quiet(self, job: ParkJob) -> None:
        """No copy of a job that is over runs or will."""
        if job.over:
            job.running.clear()
            self._release(job)
            self._copies.settle(job)

    def _release(self, job: ParkJob) -> None:
        if not job.released and not job.running:
            job.released = True
            self._state.send(job.worker.name, Released(request=job.request))

    def _finish(self, job: ParkJob, level: Level) -> None:
        state = self._state
        self._stop_waiting(job)
        self._release(job)
        if job.failure and job.failure[0] == "backpressure":
            job.retry_after_s = self._retry_after_s()
        kept = job.head if level != "none" else None
        per_hour = held_cost.of_conversation(state, kept.key) if kept is not None else None
        receipt = job.receipt(level, per_hour)
        count(state.counters.parks, receipt.reason or level)
        state.send(job.worker.name, ParkDone(request=job.request, receipt=receipt))
        job.over = True
        self._jobs.pop(job.id, None)
        self._acts.left(job)
        self._writes.over(job)
        self._holding.let_go(job)
        self._copies.settle(job)
        if level != "none":
            self._writes.drop_extended_tails(job)

    def _retry_after_s(self) -> float:
        """When the next lease ends, within bounds: room may come then."""
        end_s = self._state.next_end_s()
        wait_s = _RETRY_MOST_S if end_s is None else end_s - self._state.now_s
        return min(max(wait_s, _RETRY_LEAST_S), _RETRY_MOST_S)
