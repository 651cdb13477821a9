"""The disk tier's books: which object has which room, in which state, held by whom. Pure: no I/O, no locks.

An object at rest is a row.  An `Entry` is made of it when something happens to it, and there is one for as
long as it is written, read, quarantined, or held after its end.

Room comes back in two steps.  When an object has lost its name and nobody is in its slot any more, its
bytes count as free.  They are handed out again only once the index no longer lists the object
(`changes_done`), so that no index, at whatever moment the power fails, lists an object whose room was
given to another.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import numpy as np

from kvtier.disk.entry import Changes, Entry, entry_of, room_for
from kvtier.disk.extents import ExtentAllocator
from kvtier.disk.name_table import NameTable
from kvtier.disk.rows import FREE, LISTED, QUARANTINED, Numbers, Rows
from kvtier.disk.sweep import Sweep
from kvtier.errors import ObjectExists, SlotLeased, StaleSlot
from kvtier.leases import LeaseBook
from kvtier.objects import KEY_BYTES, ObjectId, ObjectMeta
from kvtier.states import State
from kvtier.tier import Slot, TierUsage


class Ledger:
    """The books of one tier. Its owner has a lock.

    first_generation: generations count up from here; the owner takes it above every earlier one.
    rows: what the index lists, checksums unmasked; they belong to the ledger from now on.  Their room must
    be kept out of the extents by the owner.
    """

    def __init__(self, capacity_bytes: int, first_generation: int, rows: Rows | None = None) -> None:
        self.capacity_bytes = capacity_bytes
        self.extents = ExtentAllocator()
        self.rows = rows or Rows()
        self._generation = first_generation
        self._leases = LeaseBook()
        # Durable objects. A slot's id is the number of its row.
        self._names = NameTable(self.rows)
        self._free_ids: list[int] = self.rows.numbers(FREE).tolist()
        # By slot id: what is being written, read, quarantined, or held after its end.
        self._awake: dict[int, Entry] = {}
        # What is being written; a durable object of the same name stands until the other takes its place.
        self._writing: dict[ObjectId, Entry] = {}
        self._quarantined: dict[ObjectId, Entry] = {}
        self._changes = Changes()
        self._sweeps: list[Sweep] = []
        self._used = self._limbo = self._filling = 0
        self._take_over()

    # -- filling

    def reserve(self, meta: ObjectMeta, holder: str, *, replacing: bool = False) -> Entry | None:
        """Room for an object, or None when no free extent is long enough. Raises ObjectExists, ValueError.

        replacing: a durable object of that name is no obstacle; it stays until the new one is published.
        """
        name = meta.object_id
        if {len(name.block_key), len(meta.parent_key)} != {KEY_BYTES}:
            raise ValueError(f"the keys of {name} are not {KEY_BYTES} bytes long")
        if name in self._writing or (not replacing and self._names.find(name) >= 0):
            raise ObjectExists(f"{name} is on disk, or being written")
        room = room_for(meta.nbytes)
        place = self.extents.allocate(room)
        if place is None:
            return None
        slot_id = heapq.heappop(self._free_ids) if self._free_ids else self.rows.add()
        entry = Entry(slot_id, self._generation, meta, *place, room, State.WRITING, meta.nbytes)
        self._generation += 1
        entry.writer = holder
        self._leases.hold(slot_id, holder)
        self._awake[slot_id] = self._writing[name] = entry
        self._used += room
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
            name = entry.meta.object_id
            replaced = self.find(name)
            if replaced is not None:
                # Its room comes back with the next transaction: until then its write is not noted as ended.
                self.discard(replaced)
                for sweep in self._sweeps:
                    sweep.replaced(name, replaced.slot_id, entry.slot_id)
            entry.move(State.DURABLE)
            entry.committing = False
            entry.key = None
            entry.in_index = True
            del self._writing[name], self._awake[entry.slot_id]
            self.rows.put(entry.slot_id, entry.row)
            self._names.add(entry.slot_id)
            self._filling -= entry.room
            self._leases.release(entry.slot_id, entry.writer)

    def fail_writers(self, segments: set[int]) -> None:
        """Whatever is being written to these segments may not reach the disk: it cannot be committed."""
        for entry in self._writing.values():
            if entry.segment in segments:
                entry.failed = True

    def replaced_by(self, entries: Iterable[Entry]) -> list[Entry]:
        """The durable entries in whose place these come."""
        return [old for entry in entries if (old := self.find(entry.meta.object_id)) is not None]

    # -- looking

    def find(self, object_id: ObjectId) -> Entry | None:
        """The committed entry of an object; changed only by `pin`, `quarantine` and `discard`, at once."""
        number = self._names.find(object_id)
        return None if number < 0 else self._awake.get(number) or entry_of(number, self.rows.get(number))

    def slot_of(self, object_id: ObjectId) -> Slot | None:
        """The committed slot of an object."""
        number = self._names.find(object_id)
        return None if number < 0 else self.rows.slot(number)

    def readable(self, slot: Slot) -> Entry:
        """The entry of a committed slot, as `find` answers it. Raises StaleSlot."""
        entry = self._current(slot)
        if entry.state is not State.DURABLE:
            raise StaleSlot(f"{slot} holds no committed object")
        return entry

    def sweep(self) -> Sweep:
        """Begin to look at every committed object."""
        self._sweeps = [sweep for sweep in self._sweeps if not sweep.ended]
        self._sweeps.append(Sweep(self.rows, self._names))
        return self._sweeps[-1]

    def usage(self) -> TierUsage:
        """Bytes and counts, in constant time."""
        return TierUsage(
            capacity_bytes=self.capacity_bytes,
            used_bytes=self._used,
            limbo_bytes=self._limbo,
            filling_bytes=self._filling,
            objects=self._names.count,
            quarantined=len(self._quarantined),
        )

    # -- holding

    def pin(self, entry: Entry) -> None:
        """An I/O call begins on the entry's room."""
        entry.pins += 1
        self._awake[entry.slot_id] = entry

    def unpin(self, entry: Entry) -> None:
        """It ended."""
        entry.pins -= 1
        if self._is_nameless(entry):
            self._settle(entry)
        elif entry.state is State.DURABLE and not entry.pins:
            del self._awake[entry.slot_id]

    def lease(self, slot: Slot, holder: str, until_s: float) -> None:
        """See Tier.lease; the writer may put an end to its own hold."""
        if not self.rows.holds(slot.slot_id, slot.generation):
            entry = self._current(slot)
            if entry.state is not State.WRITING or entry.writer != holder:
                raise StaleSlot(f"{slot} holds no committed object")
        self._leases.lease(slot.slot_id, holder, until_s)

    def release(self, slot: Slot, holder: str) -> None:
        """See Tier.release; a writer that lets go of what it has not committed gives it up."""
        entry = self._awake.get(slot.slot_id)
        if entry is None:
            if self.rows.holds(slot.slot_id, slot.generation):
                self._leases.release(slot.slot_id, holder)
        elif entry.generation == slot.generation and not entry.committing:
            self._leases.release(slot.slot_id, holder)
            self._after_release(entry, holder)

    def expire(self, now_s: float) -> list[tuple[Slot, str]]:
        """See Tier.expire."""
        ended = []
        for slot_id, holder in self._leases.expire(now_s):
            entry = self._awake.get(slot_id)
            ended.append((self.rows.slot(slot_id) if entry is None else entry.slot, holder))
            if entry and entry.state is State.WRITING and entry.writer == holder and not entry.committing:
                self._unwrite(entry)
        return ended

    def holder_ended(self, holder: str) -> None:
        """See Tier.holder_ended."""
        for slot_id in self._leases.holder_ended(holder):
            entry = self._awake.get(slot_id)
            if entry is not None:
                self._after_release(entry, holder)

    # -- ending

    def quarantine(self, entry: Entry) -> bool:
        """A check failed: the object is not found any more; its room is kept until removed or healed.

        Answers False, and does nothing, when it was removed or quarantined meanwhile.
        """
        if entry.state is not State.DURABLE:
            return False
        self._unlist(entry)
        entry.move(State.QUARANTINED)
        self._awake[entry.slot_id] = self._quarantined[entry.meta.object_id] = entry
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
            self._unlist(entry)
            entry.move(State.EVICTING)
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

    @property
    def next_generation(self) -> int:
        """What the next reservation gets."""
        return self._generation

    def living(self) -> Numbers:
        """Generations of everything that is listed, quarantined or being written."""
        listed = self.rows.column("sequence", self.rows.numbers(LISTED))
        states = (State.WRITING, State.QUARANTINED)
        others = [entry.generation for entry in self._awake.values() if entry.state in states]
        return np.concatenate([listed, np.array(others, dtype=np.int64)])

    # -- inside

    def _take_over(self) -> None:
        rows = self.rows
        for number in rows.numbers(QUARANTINED).tolist():
            entry = entry_of(number, rows.get(number))
            self._awake[number] = self._quarantined[entry.meta.object_id] = entry
            self._used += entry.room
            rows.clear(number)
        stored, counts = np.unique(rows.column("stored_bytes", rows.numbers(LISTED)), return_counts=True)
        for stored_bytes, count in zip(stored.tolist(), counts.tolist(), strict=True):
            self._used += count * room_for(stored_bytes)

    def _current(self, slot: Slot) -> Entry:
        entry = self._awake.get(slot.slot_id)
        if entry is None and self.rows.holds(slot.slot_id, slot.generation):
            return entry_of(slot.slot_id, self.rows.get(slot.slot_id))
        if entry is None or entry.generation != slot.generation:
            raise StaleSlot(f"{slot} belongs to nobody by now")
        return entry

    def _is_nameless(self, entry: Entry) -> bool:
        return entry.state is State.ABSENT and not entry.settled

    def _unlist(self, entry: Entry) -> None:
        self._names.remove(entry.slot_id)
        self.rows.clear(entry.slot_id)

    def _unwrite(self, entry: Entry) -> None:
        entry.move(State.ABSENT)
        entry.committing = False
        del self._writing[entry.meta.object_id]
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
            self._awake[entry.slot_id] = entry
            return 0
        entry.settled = True
        self._used -= entry.room
        self._awake.pop(entry.slot_id, None)
        heapq.heappush(self._free_ids, entry.slot_id)
        if not entry.in_index:
            self.extents.free(entry.segment, entry.at, entry.room)
        return entry.room
