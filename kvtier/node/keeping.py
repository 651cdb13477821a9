"""Conversations of other nodes that this one is asked to keep: read there, and named as if parked here.

The answer goes out when all of a conversation is here and its branch is known by name, so that a plan finds
it although the node that it was parked at is gone.  Few are read at once, the others wait in turn; each has
a deadline of its own.  What has come of one that failed is a cache, like all that is read for a restore.
It is said to be on disk once the disk has a record, too, that names its end: then it counts here like an end
that was parked to the disk.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from kvtier.messages.cluster import DIRECTORY, KEEP_MOST_S, Erase, Keep, Kept
from kvtier.node import limits, usage
from kvtier.node.blocks import ConversationId, Stored
from kvtier.node.conversations import Head
from kvtier.node.counters import count
from kvtier.node.disk_requests import Written
from kvtier.node.disk_side import DiskSide
from kvtier.node.graves import Burials
from kvtier.node.holding import Holding
from kvtier.node.keep_request import checked, fits, follow_each_other
from kvtier.node.naming import drop_tails
from kvtier.node.peer_reads import PeerReads
from kvtier.node.replicas import wanted_bytes
from kvtier.node.room import Room
from kvtier.node.state import NodeState
from kvtier.objects import ObjectId, ObjectMeta
from kvtier.tier import Slot

# Read at once; others wait their turn, up to a number of them.
_AT_ONCE, _WAITING_MOST = 2, 256
# No conversation takes more of host memory than this share of it while it comes.
_SHARE = 2
# How often what others took meanwhile is read again.
_ROUNDS_MOST = 2
# What is held for one is let go this long after its time, should nobody come round to it before.
_MORE_S = 10.0


@dataclass(slots=True, eq=False)
class _Job:
    """One Keep. todo: objects that are not known to be here.  held: those that are, kept from leaving.

    head: its end, once all is here; replaces: keys of blocks where earlier ends are continued by it.
    recording, recorded: the record that names the end is on its way to disk, or there.
    """

    id: str
    peer: str
    message: Keep
    metas: list[ObjectMeta]
    until_s: float
    todo: deque[ObjectMeta]
    held: dict[ObjectId, Stored] = field(default_factory=dict)
    reading: int = 0
    rounds: int = 0
    read_bytes: int = 0
    failure: str = ""
    head: Head | None = None
    replaces: set[bytes] = field(default_factory=set)
    recording: bool = False
    recorded: bool = False

    @property
    def name(self) -> ConversationId:
        """(tenant, conversation)."""
        return (self.message.tenant, self.message.conversation)

    @property
    def held_until_s(self) -> float:
        """Of its leases."""
        return self.until_s + _MORE_S


class Keeping:
    """See the module's text. reads: from other nodes."""

    def __init__(
        self, state: NodeState, reads: PeerReads, disk: DiskSide, room: Room, burials: Burials
    ) -> None:
        self._state = state
        self._reads = reads
        self._disk = disk
        self._holding = Holding(state, room)
        self._burials = burials
        self._jobs: dict[str, _Job] = {}

    def keep(self, peer: str, message: Keep) -> None:
        """Answer Keep, when all of it is here or it is known that it will not be.

        Raises KvtierError for what no honest node sends.
        """
        metas = checked(self._state, message)
        refusal = self._refusal(message, metas)
        if refusal:
            self._state.send(peer, Kept(reason=refusal))
            return
        timeout_s = min(message.timeout_s, KEEP_MOST_S)
        until_s = self._state.now_s + timeout_s
        job = _Job(self._state.next_id("k"), peer, message, metas, until_s, deque(metas))
        self._jobs[job.id] = job

    def advance_all(self) -> None:
        """Something ended, somewhere; the first ones go on."""
        for job in list(self._jobs.values())[:_AT_ONCE]:
            self._advance(job)

    def tick(self) -> None:
        """The time of some is over."""
        for job in [job for job in self._jobs.values() if job.until_s <= self._state.now_s]:
            if not job.recording:
                job.failure = job.failure or "deadline"
            if not job.reading:
                self._finish(job)

    # --- what is asked for ------------------------------------------------------------------------------

    def _refusal(self, message: Keep, metas: list[ObjectMeta]) -> str:
        state = self._state
        name = (message.tenant, message.conversation)
        if self._is_forgotten(message):
            return "forgotten"
        if self._erases_first(name, message):
            return "busy"
        if state.draining:
            return "draining"
        if wanted_bytes(metas) > sum(state.arena_bytes) // _SHARE:
            return "too_large"
        if not follow_each_other(metas, state.tree, metas[0].root):
            return "incomplete"
        full = len(state.tree) + len(metas) > limits.MOST_BLOCKS
        many = name not in state.conversations and len(state.conversations) >= limits.MOST_CONVERSATIONS
        late = state.now_s < state.serves_from_s
        return "busy" if full or many or late or len(self._jobs) >= _WAITING_MOST else ""

    def _erases_first(self, name: ConversationId, message: Keep) -> bool:
        """Whether what is here is from before a tombstone that this node has yet to carry out: it goes."""
        state = self._state
        carried_out = self._burials.carried_out(name)
        unknown = [stone for stone in message.stones if stone.id not in carried_out]
        known = name in state.conversations or name in state.ended or bool(state.tree.named(name))
        unread = state.settings.disk_expected and not state.disk.ready
        if not unknown or not (known or unread):
            return False
        for stone in unknown:
            self._burials.on_erase(DIRECTORY, Erase(stone=stone))
        return True

    def _is_forgotten(self, message: Keep) -> bool:
        known = self._state.stones_of((message.tenant, message.conversation))
        return not set(known) <= set(message.after)

    # --- moving on --------------------------------------------------------------------------------------

    def _advance(self, job: _Job) -> None:
        if not job.failure and self._is_forgotten(job.message):
            job.failure = "forgotten"
        stuck = ""
        in_flight = self._state.settings.batches_in_flight
        while not (job.failure or stuck) and job.todo and job.reading < in_flight:
            read_id = self._state.next_id("x")
            pairs, stuck = self._holding.next_batch(job, read_id, job.held_until_s)
            if pairs:
                self._read(job, read_id, pairs)
        if stuck == "full" and not (job.reading or self._reads.running() or self._disk.reads.running()):
            job.failure = "busy"
        if not (job.reading or job.recording) and (job.failure or not job.todo):
            self._all_there(job)

    def _read(self, job: _Job, read_id: str, pairs: list[tuple[ObjectMeta, Slot]]) -> None:
        job.reading += 1

        def done(failed: dict[int, str], nbytes: int, seconds: float) -> None:
            job.reading -= 1
            forgotten = self._is_forgotten(job.message)
            for index, (meta, slot) in enumerate(pairs):
                if index in failed:
                    count(self._state.counters.errors, f"peer_{failed[index]}")
                    job.failure = job.failure or _FAILURES.get(failed[index], "peer_lost")
                elif forgotten or not fits(self._state.tree, meta):
                    # On its way while it was forgotten: it does not come back. Nor does what another node
                    # has said otherwise of meanwhile.
                    self._state.host.abort(slot, quiet=True)
                    job.failure = job.failure or ("forgotten" if forgotten else "incomplete")
                else:
                    self._arrived(job, meta, slot)

        message, state = job.message, self._state
        timeout_s = max(job.until_s - state.now_s, 0.01)
        self._reads.start(read_id, message.owner, message.epoch, pairs, timeout_s, done, behind=True)

    def _arrived(self, job: _Job, meta: ObjectMeta, slot: Slot) -> None:
        state = self._state
        assert meta.checksum is not None, "only such are asked for"
        state.host.commit([(slot, meta.checksum)])
        state.stored_in_host(meta)
        block = state.tree.get(meta.object_id.block_key)
        if block is not None:
            state.tree.name([block], job.name, job.message.private)
        state.counters.kept_bytes += meta.nbytes
        job.read_bytes += meta.nbytes
        if job.id in self._jobs:
            self._holding.hold(job, meta, job.held_until_s)

    # --- ends -------------------------------------------------------------------------------------------

    def _all_there(self, job: _Job) -> None:
        """All of it is held, or it has failed: answer; unless something went again meanwhile."""
        if not job.failure:
            lost = [meta for meta in job.metas if not self._holding.hold(job, meta, job.held_until_s)]
            if lost and job.rounds < _ROUNDS_MOST:
                job.rounds += 1
                job.todo = deque(lost)
                return
            if lost or not self._set_head(job):
                job.failure = "incomplete"
            elif self._disk.usable() and all(stored.durable for stored in job.held.values()):
                self._record(job)
                return
        self._finish(job)

    def _record(self, job: _Job) -> None:
        """The disk has all of it: have it name the end, too, before anybody is told so."""
        conversation, head = self._state.conversations[job.name], job.head
        assert head is not None, "its end is known"
        conversation.keep_end(head)
        job.recording = True

        def done(result: Written) -> None:
            job.recording = False
            if job.id not in self._jobs:
                return
            if result.ok:
                job.recorded = True
                conversation.reached_disk(head, job.replaces)
            if self._is_forgotten(job.message):
                job.failure = "forgotten"
            self._finish(job)

        self._disk.write([], [conversation], "record", done)

    def _set_head(self, job: _Job) -> bool:
        """The conversation has a branch that ends here now."""
        state, message = self._state, job.message
        last = job.metas[-1].object_id.block_key
        chain = state.tree.chain(last)
        if not chain or chain[-1].end != message.tokens:
            return False
        for fingerprint, model, width in message.models:
            state.models.setdefault(fingerprint, model)
            if width:
                # 0: its owner does not know it either; whoever does comes in time.
                state.item_bytes.setdefault(fingerprint, width)
        conversation = state.conversation(job.name)
        conversation.after = tuple(dict.fromkeys((*conversation.after, *message.after)))
        state.tree.name(chain, job.name, message.private)
        for block in chain:
            block.kept = True
        root = job.metas[-1].root
        head = Head(last, message.tokens, root.key, root.fingerprint, message.private, message.parked_at_s)
        job.head, job.replaces = head, {block.key for block in chain[:-1]} | set(message.replaces)
        continued = (h for h in conversation.heads if h.tokens > message.tokens)
        if not any(block.key == last for h in continued for block in state.tree.chain(h.key)):
            conversation.set_head(head, job.replaces, state.settings.max_heads)
        conversation.returns_at_s = message.returns_at_s
        conversation.keep_until_s = message.keep_until_s
        conversation.codec = message.codec or conversation.codec
        state.name_changed(job.name)
        usage.kept(state, conversation, root.fingerprint, chain)
        return True

    def _finish(self, job: _Job) -> None:
        state = self._state
        tier = ""
        if not job.failure:
            tier = "disk" if job.recorded else "host"
        kept = Kept(tier=tier, reason=job.failure, bytes=job.read_bytes, epoch=state.epoch)
        state.send(job.peer, kept)
        self._jobs.pop(job.id, None)
        self._holding.let_go(job)
        state.host.holder_ended(job.id)
        if tier and job.head is not None:
            tails = [tail for key in job.message.replaces if (tail := state.tree.get(key)) is not None]
            drop_tails(state, self._disk, state.tree.chain(job.head.key), tails)


_FAILURES = {"deadline": "deadline", "busy": "busy", "missing": "incomplete"}
