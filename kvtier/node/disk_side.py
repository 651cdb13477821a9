"""What is asked of the disk service, and what its answers change."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from math import inf

import msgspec

from kvtier.messages.tiers import (
    DiskRemove,
    DiskRemoved,
    DiskUsage,
    DiskWrite,
    DiskWritten,
    WireRecord,
)
from kvtier.node import wire
from kvtier.node.blocks import ConversationId, Stored
from kvtier.node.conversations import Conversation
from kvtier.node.counters import count
from kvtier.node.disk_dues import DiskDues
from kvtier.node.disk_reads import DISK_LEASE_S, DiskReads
from kvtier.node.disk_requests import (
    DiskRequests,
    Purpose,
    RemoveDone,
    RemoveRequest,
    Request,
    WriteDone,
    WriteRequest,
    Written,
)
from kvtier.node.disk_room import drop_copies, evict
from kvtier.node.reads import Orphans
from kvtier.node.state import NodeState, disk_bytes, room_bytes
from kvtier.objects import ObjectMeta
from kvtier.tier import Slot

# How long a disk tier that went away is waited for with what was promised to other nodes: its service starts
# again, and takes over what it holds.
_RETURNS_S = 120.0
_FORGETS_LATER = (
    "the disk tier is not there; what it has of the conversation goes once it is,"
    " unless this node restarts before"
)
_FORGETS_NOT = "the disk tier is not there, and too many were forgotten since: ask again once it is"


class DiskSide:
    """The node's half of the conversation with the disk service."""

    def __init__(self, state: NodeState) -> None:
        self._state = state
        self._requests = DiskRequests()
        self._orphans = Orphans(state)
        self.reads = DiskReads(state, self._orphans)
        self.dues = DiskDues(state)
        self._seen = False
        self._usable_s: float | None = None
        # Grows whenever a write is over, for those who wait for room.
        self.writes_ended = 0

    def usable(self) -> bool:
        """Whether writes are worth asking for."""
        disk = self._state.disk
        return disk.ready and disk.said.state == "ready"

    def returns(self) -> bool:
        """Whether the disk takes no writes now, and may do so soon."""
        state = self._state
        since_s = self._usable_s if self._usable_s is not None else state.started_s or 0.0
        return state.settings.disk_expected and not self.usable() and state.now_s < since_s + _RETURNS_S

    def wear_left_bytes(self) -> float:
        """What the drive may still be written today, as far as its service has said."""
        said = self._state.disk.said
        return said.wear_left_bytes if said.wear_limit_bytes else inf

    def writes_running(self) -> bool:
        """Whether a write is under way whose end makes host memory evictable."""
        return any(write.objects for write in self._requests.writes())

    def writing_bytes(self) -> int:
        """What is being written, or is asked to be, as it lies in host memory."""
        return sum(write.host_bytes for write in self._requests.writes())

    def spilling(self) -> list[int]:
        """For each spill under way the host memory that becomes evictable when it has ended."""
        return [write.host_bytes for write in self._requests.writes() if write.spills]

    # --- writing ----------------------------------------------------------------------------------------

    def write(
        self,
        objects: Sequence[Stored],
        records: Sequence[Conversation],
        purpose: Purpose,
        done: WriteDone,
        codec: str = "",
    ) -> None:
        """Make objects that lie in host memory durable, then the records; `done` is told.

        codec: of all the objects; '' for what their conversations and tenants want.
        """
        state = self._state
        if not self.usable():
            done(Written(False, "no_disk", state.disk.said.detail or "this node has no working disk tier"))
            return
        if objects and not self._make_room(sum(disk_bytes(s.meta) for s in objects), purpose):
            done(Written(False, "disk_full", "everything on disk is in use"))
            return
        # What had to go for them may have been the last of a conversation.
        alive = [c for c in records if state.conversations.get(c.id) is c]
        self._requests.add(self._write_request(objects, alive, purpose, done, codec))
        self._send_requests()

    def _write_request(
        self,
        objects: Sequence[Stored],
        records: Sequence[Conversation],
        purpose: Purpose,
        done: WriteDone,
        codec: str = "",
    ) -> WriteRequest:
        state = self._state
        job = state.next_id("w")
        slots: list[Slot] = []
        for stored in objects:
            slot = state.host.find(stored.meta.object_id)
            assert slot is not None, "only what lies in host memory can be written"
            state.host.lease(slot, job, state.now_s + DISK_LEASE_S)
            stored.writing = job
            slots.append(slot)
        for conversation in records:
            conversation.recorded = True
            state.records_changed.pop(conversation.id, None)
            self.dues.wishes.pop(conversation.id, None)
        metas = [s.meta for s in objects]
        wishes = [codec or state.codec_of(meta) for meta in metas]
        message = msgspec.structs.replace(
            self._write_message(job, metas, slots, records),
            spill=purpose in ("spill", "ahead"),
            codecs=wishes if any(wishes) else [],
        )
        ids: list[Hashable] = [meta.object_id for meta in metas]
        names = frozenset([*ids, *(c.id for c in records)])
        return WriteRequest(
            message,
            list(objects),
            metas,
            slots,
            names,
            purpose,
            done,
            host_bytes=sum(map(room_bytes, metas)),
            disk_bytes=sum(map(disk_bytes, metas)),
        )

    def _write_message(
        self, job: str, metas: Sequence[ObjectMeta], slots: Sequence[Slot], records: Sequence[Conversation]
    ) -> DiskWrite:
        roots, wire_metas = wire.pack_metas(metas)
        models = {r.fingerprint: self._state.models.get(r.fingerprint, "") for r in roots}
        return DiskWrite(
            job=job,
            roots=roots,
            metas=wire_metas,
            slots=[wire.item(meta, slot) for meta, slot in zip(metas, slots, strict=True)],
            records=[WireRecord(c.tenant, c.name, c.version, c.to_bytes()) for c in records],
            models=sorted(models.items()),
            item_bytes=[wire.item_bytes(root, self._state.item_bytes) for root in roots],
        )

    def save_record(self, conversation: Conversation) -> None:
        """Keep a changed record, with all others that change until the next tick; nobody waits for it."""
        self.dues.wishes[conversation.id] = None

    def tick(self) -> None:
        """Time passed: records whose wishes changed are written, in one request."""
        if self.dues.wishes and self.usable():
            self._state.records_changed.update(self.dues.wishes)
            self.dues.wishes.clear()

    def on_written(self, peer: str, message: DiskWritten) -> None:
        """The answer to a write."""
        write = self._requests.written(message.job)
        if write is None:
            self._orphans.answered(peer, message.job)
            return
        if message.reason == "disk_full" and not write.retried and self._retry(write):
            return
        self._end_write(write, message.ok)
        if not message.ok:
            count(self._state.counters.errors, message.reason or "disk_error")
        elif write.spills:
            self._state.counters.spilled_bytes += sum(meta.nbytes for meta in write.metas)
        write.done(Written(message.ok, message.reason or "disk_error", message.detail, message.retry_after_s))
        self._send_requests()

    def _retry(self, write: WriteRequest) -> bool:
        """The disk has less room than was thought: evict as much as is to be written, and try once more."""
        going = evict(self._state, write.disk_bytes, write.purpose)
        if not going:
            return False
        write.retried = True
        self._requests.add_first(*self._removal(going, {}, durable=False), write)
        self._send_requests()
        return True

    def _end_write(self, write: WriteRequest, ok: bool) -> None:
        state = self._state
        self.writes_ended += 1
        unknown: list[ObjectMeta] = []
        for stored, meta, slot in zip(write.objects, write.metas, write.slots, strict=True):
            state.host.release(slot, write.message.job)
            stored.writing = ""
            if ok and state.is_stored(stored):
                state.stored_on_disk(meta)
            elif ok:
                unknown.append(meta)
        if unknown:
            # Forgotten, or found to be corrupt, while it was being written.
            self._requests.add_first(*self._removal(unknown, {}, durable=True))

    # --- removing ---------------------------------------------------------------------------------------

    def remove(self, objects: Iterable[Stored]) -> None:
        """Remove the disk copies of objects; they count as gone at once."""
        metas = drop_copies(self._state, objects)
        if metas and self._state.disk.ready:
            self._requests.add(*self._removal(metas, {}, durable=False))
            self._send_requests()
        elif metas:
            self.dues.removal_failed(metas)

    def erase(
        self, objects: Iterable[Stored], name: ConversationId, done: RemoveDone, stone: str = ""
    ) -> None:
        """Remove objects and what is left of a conversation that has ended; `done` when that is durable.

        stone: id of the tombstone of another node's that says so.
        """
        state = self._state
        objects = list(objects)
        being_written = [s.meta for s in objects if s.writing]
        metas = drop_copies(self._state, objects) + being_written
        records = {name: state.ended[name]} if name in state.ended else {}
        if not state.disk.ready:
            # With its record it goes when the disk is there: what nobody names is not adopted.
            never_written = not (self._seen or state.settings.disk_expected)
            if never_written:
                done(True, "")
                return
            noted = self.dues.forgotten(name, stone)
            # The disk may have announced them already, and be looked through no more.
            self.dues.removal_failed(metas)
            done(False, _FORGETS_LATER if noted else _FORGETS_NOT)
            return
        metas += self.dues.take_objects()
        if metas or records:
            self._requests.add(*self._removal(metas, records, durable=True, done=done))
            self._send_requests()
        else:
            done(True, "")

    def tidy_records(self) -> None:
        """Bring the records up to date of conversations that have ended, or have lost an end on disk.

        What could not be removed is tried again, when the disk says that it works.
        """
        state = self._state
        if not state.disk.ready:
            return
        ended: dict[ConversationId, int] = {}
        metas: list[ObjectMeta] = []
        again = False
        if self.usable() and not self.dues.pause():
            again = self.dues.take_again()
            metas = self.dues.take_objects()
            ended = self.dues.take_ended()
        if metas or ended or state.records_changed:
            self._requests.add(*self._removal(metas, ended, durable=again))
            self._send_requests()

    def remove_unnamed(self, metas: Sequence[ObjectMeta]) -> None:
        """Remove what the disk holds and nobody names, for good: it may have been forgotten meanwhile."""
        stored = [self._state.tree.stored(meta.object_id) for meta in metas]
        going = drop_copies(self._state, [s for s in stored if s is not None])
        if going:
            self._requests.add(*self._removal(going, {}, durable=True))
            self._send_requests()

    def _removal(
        self,
        metas: Sequence[ObjectMeta],
        records: dict[ConversationId, int],
        *,
        durable: bool,
        done: RemoveDone | None = None,
    ) -> list[Request]:
        """Requests for a removal: before it, the records that would name what is gone."""
        state = self._state
        changed = [state.conversations[n] for n in state.records_changed if n in state.conversations]
        state.records_changed.clear()
        before: list[Request] = []
        if changed:
            before.append(self._write_request([], changed, "record", _nobody_waits))
        if not (metas or records):
            return before
        self.dues.removing.update(records)
        message = DiskRemove(
            job=state.next_id("d"),
            object_keys=[wire.key_of(meta.object_id) for meta in metas],
            records=[WireRecord(tenant, name, v, b"") for (tenant, name), v in records.items()],
            durable=durable,
        )
        ids: list[Hashable] = [meta.object_id for meta in metas]
        names = frozenset([*ids, *records, *(c.id for c in changed)])
        return [*before, RemoveRequest(message, list(metas), names, done)]

    def on_removed(self, message: DiskRemoved) -> None:
        """The answer to a removal."""
        removal = self._requests.removed(message.job)
        if removal is None:
            return
        for record in removal.message.records:
            name = (record.tenant, record.conversation)
            self.dues.record_removed(name, record.version if message.ok else None)
        if not message.ok:
            self.dues.removal_failed(removal.metas)
        if removal.done is not None:
            removal.done(message.ok, message.detail)

    # --- room on disk -----------------------------------------------------------------------------------

    def _make_room(self, needed_bytes: int, purpose: Purpose) -> bool:
        """Evict from disk until the new objects fit under its limit."""
        state = self._state
        coming = sum(write.disk_bytes for write in self._requests.writes())
        over = state.disk_held_bytes + coming + needed_bytes - state.disk.capacity_bytes
        if over <= 0:
            return True
        going = evict(self._state, over, purpose)
        self._requests.add(*self._removal(going, {}, durable=False))
        return bool(going)

    # --- coming and going -------------------------------------------------------------------------------

    def joined(self, peer: str, pid: int, capacity_bytes: int) -> None:
        """A disk service connected; it is ready when it has announced what it holds."""
        state = self._state
        if state.disk.peer:
            self.lost()
        self._orphans.connected_again(peer, pid)
        self._seen = True
        state.disk.peer, state.disk.capacity_bytes = peer, capacity_bytes

    def announced(self) -> None:
        """The service has said what it holds: it takes work from now on."""
        self._state.disk.ready = True
        self.dues.announced()

    def on_usage(self, peer: str, message: DiskUsage) -> None:
        """The service's own count, and its health."""
        disk = self._state.disk
        if peer != disk.peer:
            return
        self._note_usable()
        disk.capacity_bytes = message.capacity_bytes
        disk.said = message

    def lost(self) -> None:
        """The disk service's connection closed: what it was doing is over, its slots are in limbo."""
        self._note_usable()
        state = self._state
        peer = state.disk.peer
        sent, unsent = self._requests.take_all()
        self._orphans.add(peer, [r.message.job for r in sent if isinstance(r, WriteRequest)])
        state.disk.peer, state.disk.ready = "", False
        for request in unsent:
            if isinstance(request, WriteRequest):
                state.host.holder_ended(request.message.job)
        self.reads.lost(peer)
        for request in [*sent, *unsent]:
            self._give_up(request)

    def _note_usable(self) -> None:
        """Before what may end it."""
        if self.usable():
            self._usable_s = self._state.now_s

    def _give_up(self, request: Request) -> None:
        if isinstance(request, WriteRequest):
            for stored in request.objects:
                stored.writing = ""
            request.done(Written(False, "no_disk", "the disk service went away"))
            return
        if request.message.durable:
            self.dues.removal_failed(request.metas)
        if request.done is not None:
            request.done(False, "the disk service went away")

    def process_ended(self, peer: str) -> None:
        """A disk service's process is gone: nothing of it touches a slot any more."""
        self._orphans.ended(peer)

    def _send_requests(self) -> None:
        for request in self._requests.sendable():
            self._state.send(self._state.disk.peer, request.message)


def _nobody_waits(result: Written) -> None:
    """For writes of records that will be written again when the conversation goes on."""
