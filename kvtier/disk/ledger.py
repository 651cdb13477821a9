"""The disk tier's books: which object has which room, in which state, held by whom. Pure: no I/O, no locks.

Room comes back in two steps.  When an object has lost its name and nobody is in its slot any more, its
bytes count as free.  They are handed out again only once the index no longer lists the object
(`changes_done`), so that no index, at whatever moment the power fails, lists an object whose room was
given to another.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from kvtier.disk.buffers import padded
from kvtier.disk.codecs import RAW
from kvtier.disk.extents import ExtentAllocator
from kvtier.disk.header import HEADER_BYTES
from kvtier.disk.index import ObjectRow
from kvtier.errors import ObjectExists, SlotLeased, StaleSlot
from kvtier.leases import LeaseBook
from kvtier.objects import ObjectId, ObjectMeta
from kvtier.states import State, check_move
from kvtier.tier import Slot, TierUsage

if TYPE_CHECKING:
    from kvtier.disk.sealing import DataKey


def room_for(stored_bytes: int) -> int:
    """Bytes on disk of an object stored in `stored_bytes`: a header page and whole pages of payload."""
    return HEADER_BYTES + padded(stored_bytes)


@dataclass(slots=True, eq=False)
class Entry:
    """One slot in use.

    pins: I/O calls of this process that touch its room now.  codec, stored_bytes, sealed: how its payload
    stands on disk, once it is written.  key: what it was sealed with, until it is committed.
    """

    slot_id: int
    generation: int
    meta: ObjectMeta
    segment: int
    at: int
    room: int
    state: State
    stored_bytes: int
    codec: str = RAW
    sealed: bool = False
    key: DataKey | None = None
    writer: str = ""
    pins: int = 0
    written: bool = False
    failed: bool = False
    committing: bool = False
    in_index: bool = False
    in_limbo: bool = False
    settled: bool = False

    @property
    def slot(self) -> Slot:
        """The slot as its owner knows it."""
        return Slot(self.slot_id, self.generation, (self.segment, self.at), self.meta.nbytes)

    def move(self, state: State) -> None:
        """Change the state along the table."""
        check_move(self.state, state)
        self.state = state


@dataclass(slots=True)
class Changes:
    """What the index does not know yet, and generations whose writes were given up before it knew them."""

    drop: list[Entry] = field(default_factory=list)
    quarantine: list[Entry] = field(default_factory=list)
    given_up: list[int] = field(default_factory=list)


class Ledger:
    """The books of one tier. Its owner has a lock.

    first_generation: generations count up from here; the owner takes it above every earlier one.
    """

    def __init__(self, capacity_bytes: int, first_generation: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.extents = ExtentAllocator()
        self._generation = first_generation
        self._leases = LeaseBook()
        # By slot id; None where the id is free.
        self._slots: list[Entry | None] = []
        self._free_ids: list[int] = []
        self._names: dict[ObjectId, Entry] = {}
        # What is being written beside the durable object of the same name, to take its place.
        self._replacing: dict[ObjectId, Entry] = {}
        self._quarantined: dict[ObjectId, Entry] = {}
        self._changes = Changes()
        self._used = self._limbo = self._filling = self._objects = 0

    # -- filling

    def reserve(self, meta: ObjectMeta, holder: str, *, replacing: bool = False) -> Entry | None:
        """Room for an object, or None when no free extent is long enough. Raises ObjectExists.

        replacing: a durable object of that name is no obstacle; it stays until the new one is published.
        """
        beside = replacing and self.find(meta.object_id) is not None
        if meta.object_id in self._replacing or (meta.object_id in self._names and not beside):
            raise ObjectExists(f"{meta.object_id} is on disk, or being written")
        room = room_for(meta.nbytes)
        place = self.extents.allocate(room)
        if place is None:
            return None
        entry = self._enter(meta, self._generation, place, State.WRITING, meta.nbytes)
        self._generation += 1
        entry.writer = holder
        self._leases.hold(entry.slot_id, holder)
        (self._replacing if beside else self._names)[meta.object_id] = entry
        self._filling += room
        return entry

    def writing(self, slot: Slot) -> Entry:
        """The entry of a slot that its writer may still write. Raises StaleSlot."""
        entry = self._current(slot)
        if entry.state is not State.WRITING or entry.committing:
            raise StaleSlot(f"{slot} is no longer being written")
        return entry

    def give_up(self, entry: Entry, *, quiet: bool) -> None:
        """End the writing of an uncommitted entry; unless quiet, its room stays in limbo."""
        if quiet:
            self._leases.release(entry.slot_id, entry.writer)
        else:
            self._leases.withdraw(entry.slot_id)
        self._unwrite(entry)

    def shrink(self, entry: Entry) -> None:
        """Give the room back that a written entry does not need, since its payload became smaller."""
        room = room_for(entry.stored_bytes)
        spare = entry.room - room
        if spare:
            self.extents.free(entry.segment, entry.at + room, spare)
            entry.room = room
            self._used -= spare
            self._filling -= spare

    def publish(self, entries: Iterable[Entry]) -> None:
        """Make written entries visible; they are in the index now, and what they replace is not."""
        for entry in entries:
            if self._replacing.get(entry.meta.object_id) is entry:
                self._take_place(entry)
            entry.move(State.DURABLE)
            entry.committing = False
            entry.key = None
            entry.in_index = True
            self._filling -= entry.room
            self._objects += 1
            self._leases.release(entry.slot_id, entry.writer)

    def fail_writers(self, segments: set[int]) -> None:
        """Whatever is being written to these segments may not reach the disk: it cannot be committed."""
        for entry in [*self._names.values(), *self._replacing.values()]:
            if entry.state is State.WRITING and entry.segment in segments:
                entry.failed = True

    def replaced_by(self, entries: Iterable[Entry]) -> list[Entry]:
        """The durable entries in whose place these come."""
        names = [e.meta.object_id for e in entries if self._replacing.get(e.meta.object_id) is e]
        return [old for old in map(self.find, names) if old is not None]

    # -- looking

    def find(self, object_id: ObjectId) -> Entry | None:
        """The committed entry of an object."""
        entry = self._names.get(object_id)
        return entry if entry is not None and entry.state is State.DURABLE else None

    def readable(self, slot: Slot) -> Entry:
        """The entry of a committed slot. Raises StaleSlot."""
        entry = self._current(slot)
        if entry.state is not State.DURABLE:
            raise StaleSlot(f"{slot} holds no committed object")
        return entry

    def names(self) -> list[ObjectId]:
        """Names of every object, those being written among them."""
        return list(self._names)

    def usage(self) -> TierUsage:
        """Bytes and counts, in constant time."""
        return TierUsage(
            capacity_bytes=self.capacity_bytes,
            used_bytes=self._used,
            limbo_bytes=self._limbo,
            filling_bytes=self._filling,
            objects=self._objects,
            quarantined=len(self._quarantined),
        )

    # -- holding

    def pin(self, entry: Entry) -> None:
        """An I/O call begins on the entry's room."""
        entry.pins += 1

    def unpin(self, entry: Entry) -> None:
        """It ended."""
        entry.pins -= 1
        if self._is_nameless(entry):
            self._settle(entry)

    def lease(self, slot: Slot, holder: str, until_s: float) -> None:
        """See Tier.lease; the writer may put an end to its own hold."""
        entry = self._current(slot)
        if entry.state is not State.DURABLE and not (entry.state is State.WRITING and entry.writer == holder):
            raise StaleSlot(f"{slot} holds no committed object")
        self._leases.lease(slot.slot_id, holder, until_s)

    def release(self, slot: Slot, holder: str) -> None:
        """See Tier.release; a writer that lets go of what it has not committed gives it up."""
        entry = self._at(slot.slot_id)
        if entry is None or entry.generation != slot.generation or entry.committing:
            return
        self._leases.release(slot.slot_id, holder)
        self._after_release(entry, holder)

    def expire(self, now_s: float) -> list[tuple[Slot, str]]:
        """See Tier.expire."""
        ended = []
        for slot_id, holder in self._leases.expire(now_s):
            entry = self._held(slot_id)
            ended.append((entry.slot, holder))
            if entry.state is State.WRITING and entry.writer == holder and not entry.committing:
                self._unwrite(entry)
        return ended

    def holder_ended(self, holder: str) -> None:
        """See Tier.holder_ended."""
        for slot_id in self._leases.holder_ended(holder):
            self._after_release(self._held(slot_id), holder)

    # -- ending

    def quarantine(self, entry: Entry) -> bool:
        """A check failed: the object is not found any more; its room is kept until removed or healed.

        Answers False, and does nothing, when it was removed or quarantined meanwhile.
        """
        if entry.state is not State.DURABLE:
            return False
        entry.move(State.QUARANTINED)
        del self._names[entry.meta.object_id]
        self._objects -= 1
        self._quarantined[entry.meta.object_id] = entry
        self._changes.quarantine.append(entry)
        return True

    def quarantined(self, object_id: ObjectId) -> Entry | None:
        """The quarantined entry of that name, if there is one."""
        return self._quarantined.get(object_id)

    def remove(self, object_id: ObjectId) -> int:
        """See Tier.remove; a quarantined object of that name goes as well."""
        entries = [e for e in (self.find(object_id), self._quarantined.get(object_id)) if e is not None]
        if any(self._leases.active(entry.slot_id) for entry in entries):
            raise SlotLeased(f"{object_id} is leased")
        return sum(self.discard(entry) for entry in entries)

    def discard(self, entry: Entry) -> int:
        """Take a durable or quarantined entry off the books; answers the bytes freed now."""
        if entry.state is State.QUARANTINED:
            del self._quarantined[entry.meta.object_id]
        else:
            entry.move(State.EVICTING)
            del self._names[entry.meta.object_id]
            self._objects -= 1
        entry.move(State.ABSENT)
        self._changes.drop.append(entry)
        return self._settle(entry)

    # -- what the index is told

    def take_changes(self) -> Changes:
        """Everything the index has to be told, for one transaction; then `changes_done` or `_failed`."""
        taken, self._changes = self._changes, Changes()
        return taken

    def changes_done(self, changes: Changes) -> None:
        """The index knows them: room that waited for it may be handed out."""
        for entry in changes.drop:
            entry.in_index = False
            if entry.settled:
                self.extents.free(entry.segment, entry.at, entry.room)

    def changes_failed(self, changes: Changes) -> None:
        """The index does not know them: tell it next time."""
        self._changes.drop[:0] = changes.drop
        self._changes.quarantine[:0] = changes.quarantine
        self._changes.given_up[:0] = changes.given_up

    @property
    def has_drops(self) -> bool:
        """Whether room may come back by telling the index."""
        return bool(self._changes.drop)

    # -- recovery

    def entries(self) -> list[Entry]:
        """Every slot in use, as of now."""
        return [entry for entry in self._slots if entry is not None]

    @property
    def next_generation(self) -> int:
        """What the next reservation gets."""
        return self._generation

    def adopt(self, row: ObjectRow) -> None:
        """Enter an object that the index lists, its checksum unmasked.

        Its room must be kept out of the extents by the owner.
        """
        meta = row.meta
        state = State.QUARANTINED if row.quarantined else State.DURABLE
        entry = self._enter(meta, row.sequence, (row.segment, row.at), state, row.stored_bytes)
        entry.codec, entry.sealed = row.codec, row.sealed
        entry.in_index = True
        if row.quarantined:
            self._quarantined[meta.object_id] = entry
        else:
            self._names[meta.object_id] = entry
            self._objects += 1

    # -- inside

    def _enter(
        self, meta: ObjectMeta, generation: int, place: tuple[int, int], state: State, stored_bytes: int
    ) -> Entry:
        if not self._free_ids:
            self._free_ids.append(len(self._slots))
            self._slots.append(None)
        slot_id = heapq.heappop(self._free_ids)
        room = room_for(stored_bytes)
        entry = Entry(slot_id, generation, meta, *place, room, state, stored_bytes)
        self._slots[slot_id] = entry
        self._used += room
        return entry

    def _at(self, slot_id: int) -> Entry | None:
        return self._slots[slot_id] if 0 <= slot_id < len(self._slots) else None

    def _held(self, slot_id: int) -> Entry:
        """The entry of a slot that somebody holds, and that is therefore in use."""
        entry = self._slots[slot_id]
        if entry is None:
            raise StaleSlot(f"slot {slot_id} is held and not in use")
        return entry

    def _current(self, slot: Slot) -> Entry:
        entry = self._at(slot.slot_id)
        if entry is None or entry.generation != slot.generation:
            raise StaleSlot(f"{slot} belongs to nobody by now")
        return entry

    def _is_nameless(self, entry: Entry) -> bool:
        return entry.state is State.ABSENT and not entry.settled

    def _take_place(self, entry: Entry) -> None:
        """Its room comes back with the next transaction: until then its write is not noted as ended."""
        old = self.find(entry.meta.object_id)
        if old is not None:
            self.discard(old)
        del self._replacing[entry.meta.object_id]
        self._names[entry.meta.object_id] = entry

    def _unwrite(self, entry: Entry) -> None:
        entry.move(State.ABSENT)
        entry.committing = False
        if self._replacing.get(entry.meta.object_id) is entry:
            del self._replacing[entry.meta.object_id]
        else:
            del self._names[entry.meta.object_id]
        self._filling -= entry.room
        self._changes.given_up.append(entry.generation)
        self._settle(entry)

    def _after_release(self, entry: Entry, holder: str) -> None:
        if entry.state is State.WRITING and entry.writer == holder and not entry.committing:
            self._unwrite(entry)
        elif self._is_nameless(entry):
            self._settle(entry)

    def _settle(self, entry: Entry) -> int:
        """Free a nameless entry unless somebody is in it; answers the bytes freed."""
        held = entry.pins > 0 or self._leases.held(entry.slot_id)
        if held != entry.in_limbo:
            self._limbo += entry.room if held else -entry.room
            entry.in_limbo = held
        if held:
            return 0
        entry.settled = True
        self._used -= entry.room
        self._slots[entry.slot_id] = None
        heapq.heappush(self._free_ids, entry.slot_id)
        if not entry.in_index:
            self.extents.free(entry.segment, entry.at, entry.room)
        return entry.room


def batches(ids: list[ObjectId], size: int) -> Iterator[list[ObjectId]]:
    """The ids in lists of at most `size`."""
    rest = iter(ids)
    while part := list(islice(rest, size)):
        yield part
