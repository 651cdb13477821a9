"""What is asked of the disk service, and what its answers change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from kvtier.node import wire
from kvtier.node.blocks import Stored
from kvtier.node.conversations import Conversation, from_bytes
from kvtier.node.state import NodeState, count
from kvtier.objects import ObjectMeta
from kvtier.tier import Slot
from kvtier.tier_messages import (
    Announce,
    DiskRead,
    DiskReadDone,
    DiskRemove,
    DiskRemoved,
    DiskUsage,
    DiskWrite,
    DiskWritten,
    WireRecord,
)

# On disk an object takes whole units of this, and one more for its header.
_UNIT_BYTES = 4096
# A write or read that the disk service has not answered by then no longer has a right to its slots.
_DISK_LEASE_S = 60.0

# Who waits for a write: told whether it is durable, and why not.
WriteDone: TypeAlias = Callable[[bool, str, str], None]
# Who waits for a read: told the reason for each object that failed, by its place in the read.
ReadDone: TypeAlias = Callable[[dict[int, str], int, float], None]
RemoveDone: TypeAlias = Callable[[bool, str], None]


@dataclass(slots=True)
class _Write:
    objects: list[Stored]
    slots: list[Slot]
    done: WriteDone
    purpose: Literal["park", "spill", "record"]


@dataclass(slots=True)
class _Read:
    slots: list[Slot]
    done: ReadDone


@dataclass(slots=True)
class _Waits:
    writes: dict[str, _Write] = field(default_factory=dict)
    reads: dict[str, _Read] = field(default_factory=dict)
    removes: dict[str, RemoveDone | None] = field(default_factory=dict)


def disk_bytes(meta: ObjectMeta) -> int:
    """Room that the object takes on disk."""
    return -(-meta.nbytes // _UNIT_BYTES) * _UNIT_BYTES + _UNIT_BYTES


class DiskSide:
    """The node's half of the conversation with the disk service."""

    def __init__(self, state: NodeState) -> None:
        self._state = state
        self._waits = _Waits()
        self._orphans: dict[str, list[str]] = {}
        self._announced: list[ObjectMeta] = []
        self._announced_records: list[Conversation] = []

    def joined(self, peer: str) -> None:
        """A disk service connected; it is ready when it has announced what it holds."""
        if self._state.disk.peer:
            self.lost()
        self._state.disk.peer = peer

    def usable(self) -> bool:
        """Whether writes are worth asking for."""
        disk = self._state.disk
        return disk.ready and disk.health == "ready"

    def writes_running(self) -> bool:
        """Whether a write is under way whose end makes host memory evictable."""
        return any(w.objects for w in self._waits.writes.values())

    # --- asking -----------------------------------------------------------------------------------------

    def write(
        self,
        objects: Sequence[Stored],
        records: Sequence[Conversation],
        purpose: Literal["park", "spill", "record"],
        done: WriteDone,
    ) -> None:
        """Make objects that lie in host memory durable, then the records; `done` is told."""
        state = self._state
        if not self.usable():
            done(False, "no_disk", state.disk.detail or "this node has no working disk tier")
            return
        if not self._make_room(sum(disk_bytes(s.meta) for s in objects)):
            done(False, "disk_full", "everything on disk is in use")
            return
        job = state.next_id("w")
        slots: list[Slot] = []
        for stored in objects:
            slot = state.host.find(stored.meta.object_id)
            assert slot is not None, "only what lies in host memory can be written"
            state.host.lease(slot, job, state.now_s + _DISK_LEASE_S)
            stored.writing = job
            slots.append(slot)
        self._waits.writes[job] = _Write(list(objects), slots, done, purpose)
        roots, metas = wire.pack_metas(s.meta for s in objects)
        models = {r.fingerprint: state.models.get(r.fingerprint, "") for r in roots}
        state.send(
            state.disk.peer,
            DiskWrite(
                job=job,
                roots=roots,
                metas=metas,
                slots=[wire.item(s.meta, slot) for s, slot in zip(objects, slots, strict=True)],
                records=[_record(c) for c in records],
                models=sorted(models.items()),
            ),
        )

    def spill(self, objects: Sequence[Stored]) -> None:
        """Write what host memory wants to be rid of; room comes when it is done."""
        state = self._state
        state.counters.spilled_bytes += sum(s.meta.nbytes for s in objects)
        blocks = [state.tree.get(s.meta.object_id.block_key) for s in objects]
        names = sorted({name for block in blocks if block is not None for name in block.names})
        # With the records, what is spilled has its conversation's name after a restart too.
        records = [state.conversations[name] for name in names if name in state.conversations]
        self.write(objects, records, "spill", lambda ok, reason, detail: None)

    def save_record(self, conversation: Conversation) -> None:
        """Keep a changed record, when the disk works; nobody waits for it."""
        if self.usable():
            self.write([], [conversation], "record", lambda ok, reason, detail: None)

    def read(self, job: str, pairs: Sequence[tuple[Stored, Slot]], done: ReadDone) -> None:
        """Read objects into host slots that were reserved by `job`; `done` is told what failed."""
        state = self._state
        self._waits.reads[job] = _Read([slot for _, slot in pairs], done)
        state.send(
            state.disk.peer,
            DiskRead(
                job=job,
                batch=0,
                object_keys=[wire.key_of(s.meta.object_id) for s, _ in pairs],
                slots=[wire.item(s.meta, slot) for s, slot in pairs],
            ),
        )

    def remove(
        self,
        objects: Iterable[Stored],
        records: Sequence[tuple[str, str]] = (),
        *,
        durable: bool = False,
        done: RemoveDone | None = None,
    ) -> None:
        """Remove objects, and the records of (tenant, conversation); noted at once, done in order."""
        state = self._state
        keys = []
        for stored in list(objects):
            block = state.tree.get(stored.meta.object_id.block_key)
            if block is not None and stored.durable:
                keys.append(wire.key_of(stored.meta.object_id))
                state.removed_from_disk(block, stored)
        job = state.next_id("d")
        if not state.disk.ready:
            if done is not None:
                done(not state.disk.peer, "the disk tier does not answer")
            return
        if not keys and not records:
            if done is not None:
                done(True, "")
            return
        self._waits.removes[job] = done
        gone = [WireRecord(tenant, name, 0, b"") for tenant, name in records]
        state.send(state.disk.peer, DiskRemove(job=job, object_keys=keys, records=gone, durable=durable))

    def _make_room(self, needed_bytes: int) -> bool:
        """Evict from disk until the new objects fit under its limit."""
        state = self._state
        coming = sum(disk_bytes(s.meta) for w in self._waits.writes.values() for s in w.objects)
        over = state.disk.used_bytes + coming + needed_bytes - state.disk.capacity_bytes
        if over <= 0:
            return True
        going: list[Stored] = []
        freed = 0
        for key in state.policies.disk.victims(state.now_s):
            block = state.tree.get(key)
            if block is None or any(s.pins or s.writing for s in block.parts.values()):
                continue
            parts = [s for s in block.parts.values() if s.durable]
            freed += sum(disk_bytes(s.meta) for s in parts)
            going += parts
            state.policies.disk.removed(key)
            if freed >= over:
                break
        state.disk.used_bytes -= freed
        state.counters.evicted_objects += len(going)
        if going:
            self.remove(going)
        return freed >= over

    # --- hearing ----------------------------------------------------------------------------------------

    def on_written(self, message: DiskWritten) -> None:
        """The answer to a write."""
        write = self._waits.writes.pop(message.job, None)
        if write is None:
            self._state.host.holder_ended(message.job)
            return
        self._end_write(message.job, write, message.ok)
        if message.ok:
            state = self._state
            state.disk.used_bytes += sum(disk_bytes(s.meta) for s in write.objects)
        else:
            count(self._state.counters.errors, message.reason or "disk_error")
        write.done(message.ok, message.reason or "disk_error", message.detail)

    def _end_write(self, job: str, write: _Write, ok: bool) -> None:
        state = self._state
        for stored, slot in zip(write.objects, write.slots, strict=True):
            state.host.release(slot, job)
            stored.writing = ""
            if ok and state.tree.stored(stored.meta.object_id) is stored:
                state.stored_on_disk(stored.meta)

    def on_read(self, message: DiskReadDone) -> None:
        """The answer to a read."""
        read = self._waits.reads.pop(message.job, None)
        if read is None:
            self._state.host.holder_ended(message.job)
        else:
            read.done(dict(message.failed), message.bytes, message.seconds)

    def on_removed(self, message: DiskRemoved) -> None:
        """The answer to a removal."""
        done = self._waits.removes.pop(message.job, None)
        if done is not None:
            done(message.ok, message.detail)

    def on_usage(self, message: DiskUsage) -> None:
        """The service's own count, and its health."""
        disk = self._state.disk
        disk.capacity_bytes = message.capacity_bytes
        disk.used_bytes = message.used_bytes
        disk.objects = message.objects
        disk.quarantined = message.quarantined
        disk.written_bytes = message.written_bytes
        disk.health = message.state
        disk.detail = message.detail

    def on_announce(self, message: Announce) -> None:
        """A batch of what the disk holds; with the last one the disk is ready."""
        state = self._state
        for fingerprint, model in message.models:
            state.models.setdefault(fingerprint, model)
        self._announced += wire.unpack_metas(message.roots, message.metas)
        self._announced_records += [
            from_bytes(r.tenant, r.conversation, r.version, r.data) for r in message.records
        ]
        if message.last:
            self._adopt()

    def _adopt(self) -> None:
        state = self._state
        metas, self._announced = self._announced, []
        records, self._announced_records = self._announced_records, []
        present = {meta.object_id for meta in metas}
        for block in state.tree:
            for stored in list(block.parts.values()):
                if stored.durable and stored.meta.object_id not in present:
                    state.removed_from_disk(block, stored)
        for meta in sorted(metas, key=lambda m: m.start):
            state.stored_on_disk(meta)
        for record in records:
            known = state.conversations.get(record.id)
            if known is None or known.version < record.version:
                self._adopt_record(record)
        state.disk.ready = True

    def _adopt_record(self, record: Conversation) -> None:
        state = self._state
        record.heads = [h for h in record.heads if state.tree.get(h.key) is not None]
        for head in record.heads:
            for block in state.tree.chain(head.key):
                block.names.add(record.id)
        if record.heads:
            state.conversations[record.id] = record

    def lost(self) -> None:
        """The disk service's connection closed: what it was doing is over, its slots are in limbo."""
        state = self._state
        waits, self._waits = self._waits, _Waits()
        # Their slots stay held until the leases end, or the process is known to be gone.
        self._orphans.setdefault(state.disk.peer, []).extend([*waits.writes, *waits.reads])
        state.disk.peer, state.disk.ready = "", False
        self._announced, self._announced_records = [], []
        for write in waits.writes.values():
            for stored in write.objects:
                stored.writing = ""
            write.done(False, "no_disk", "the disk service went away")
        for read in waits.reads.values():
            read.done({i: "disk_error" for i in range(len(read.slots))}, 0, 0.0)
        for done in waits.removes.values():
            if done is not None:
                done(False, "the disk service went away")

    def process_ended(self, peer: str) -> None:
        """A disk service's process is gone: nothing of it touches a slot any more."""
        for job in self._orphans.pop(peer, []):
            self._state.host.holder_ended(job)


def _record(conversation: Conversation) -> WireRecord:
    return WireRecord(
        conversation.tenant, conversation.name, conversation.version, conversation.to_bytes()
    )
