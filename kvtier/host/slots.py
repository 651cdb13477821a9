"""The host tier without its bytes: extents, slot ids, generations, states, leases.

A pure state machine behind the Tier contract.  The node core drives it in the simulator and when it replays
a log, the host tier drives it over real memory; equal calls give equal answers.  It touches neither memory
nor clocks, and is not thread-safe: its owner has a lock.

Limbo has two faces, and one state.  A committed object whose leases all expired is in limbo while their
copies may still run: it is found, read and leased as before, but its room cannot be freed.  A forgotten
object (aborted, expired while filling, removed, quarantined) is in limbo until nobody holds its room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from kvtier.errors import ObjectExists, SlotLeased, StaleSlot, TierFull
from kvtier.host.allocator import ALIGN_BYTES, ExtentAllocator, Window, room_bytes
from kvtier.leases import LeaseBook
from kvtier.objects import ObjectId, ObjectMeta
from kvtier.states import State, check_move
from kvtier.tier import Slot, TierUsage

NOBODY = 0
MAX_SLOTS = 1 << 22


@dataclass(slots=True)
class Entry:
    """One slot in use, for the host tier's eyes only.

    known: the object is in the index; pins: copies of the owner itself that run.
    """

    slot: Slot
    meta: ObjectMeta
    writer: str
    room: int
    state: State = State.ABSENT
    known: bool = True
    committed: bool = False
    pins: int = 0


def default_max_slots(capacity_bytes: int) -> int:
    """One slot for each unit of room, up to 4 Mi: tables over it are sparse, so unused ids cost nothing."""
    return min(capacity_bytes // ALIGN_BYTES, MAX_SLOTS)


class HostSlots:
    """The calls of `kvtier.tier.Tier` but write and read, with the same errors and answers.

    capacities: bytes of each sub-arena, multiples of 4096.  ready_bytes: how much of each can be given out
    at first, everything when None.  max_slots: slots in use at once.  first_generation: at least 1; an
    owner that starts again passes a greater number than any that was used before, so that slots of its
    former life stay stale.  publish(slot_id, generation): called whenever a slot gets another owner, with
    0 when it is nobody's: from then on a copy out of it must be thrown away.
    """

    def __init__(
        self,
        capacities: Sequence[int],
        *,
        ready_bytes: Sequence[int] | None = None,
        max_slots: int | None = None,
        first_generation: int = 1,
        publish: Callable[[int, int], None] | None = None,
    ) -> None:
        ready = capacities if ready_bytes is None else ready_bytes
        self._arenas = [ExtentAllocator(c, ready_bytes=r) for c, r in zip(capacities, ready, strict=True)]
        self._at: list[dict[int, Entry]] = [{} for _ in self._arenas]
        self._capacity_bytes = sum(capacities)
        self._max_slots = default_max_slots(self._capacity_bytes) if max_slots is None else max_slots
        self._first_generation = first_generation
        self._publish = publish
        self._book = LeaseBook()
        self._entries: dict[int, Entry] = {}
        self._by_id: dict[ObjectId, Entry] = {}
        self._free_ids: list[int] = []
        self._generations: list[int] = []
        self._objects = self._quarantined = 0
        self._filling_bytes = self._limbo_bytes = 0

    # -- filling

    def reserve(self, meta: ObjectMeta, *, holder: str, prefer: int | None = None) -> Slot:
        """As in the contract. prefer: the sub-arena to try first; then the others in their order."""
        if meta.nbytes <= 0:
            raise ValueError(f"an object of {meta.nbytes} bytes cannot be stored")
        if meta.object_id in self._by_id:
            raise ObjectExists(f"{meta.object_id} is {self._by_id[meta.object_id].state.value}")
        if not self._free_ids and len(self._generations) == self._max_slots:
            raise TierFull(f"all {self._max_slots} slots are in use", needed_bytes=meta.nbytes)
        address = self._allocate(meta.nbytes, prefer)
        slot = self._name(address, meta.nbytes)
        entry = Entry(slot, meta, holder, room_bytes(meta.nbytes))
        self._entries[slot.slot_id] = self._by_id[meta.object_id] = self._at[address[0]][address[1]] = entry
        self._book.hold(slot.slot_id, holder)
        self._move(entry, State.FILLING)
        return slot

    def commit(self, slots: Sequence[tuple[Slot, int]]) -> None:
        """As in the contract. Raises ValueError when a slot is in `slots` twice."""
        entries = [self.filling(slot) for slot, _ in slots]
        if len({slot.slot_id for slot, _ in slots}) < len(entries):
            raise ValueError("one slot is to be committed twice")
        for entry, (slot, checksum) in zip(entries, slots, strict=True):
            self._book.release(slot.slot_id, entry.writer)
            if entry.meta.checksum != checksum:
                entry.meta = replace(entry.meta, checksum=checksum)
            entry.committed = True
            self._move(entry, State.PRESENT)
        self._objects += len(entries)

    def abort(self, slot: Slot, *, quiet: bool) -> None:
        """As in the contract. A quiet abort of a slot that is in limbo already is the writer's release."""
        entry = self._entry(slot)
        if entry.state is State.FILLING:
            self._forget(entry)
            self._move(entry, State.LIMBO)
            self._book.withdraw(slot.slot_id)
        elif entry.committed:
            raise StaleSlot(f"slot {slot.slot_id} is {entry.state.value}, not being filled")
        if quiet:
            self._book.release(slot.slot_id, entry.writer)
            self._vacate(entry)

    # -- asking

    def find(self, object_id: ObjectId) -> Slot | None:
        """As in the contract."""
        entry = self._committed(object_id)
        return None if entry is None else entry.slot

    def meta(self, object_id: ObjectId) -> ObjectMeta | None:
        """As in the contract."""
        entry = self._committed(object_id)
        return None if entry is None else entry.meta

    def objects(self) -> Iterator[ObjectMeta]:
        """As in the contract, as of the moment of the call."""
        return iter([entry.meta for entry in self._by_id.values() if entry.state is not State.FILLING])

    def state(self, slot: Slot) -> State:
        """Where the slot stands; ABSENT when it is somebody else's by now."""
        entry = self._entries.get(slot.slot_id)
        return entry.state if entry and entry.slot.generation == slot.generation else State.ABSENT

    def filling(self, slot: Slot) -> Entry:
        """The entry of a slot that its writer may write to. Raises StaleSlot for any other."""
        entry = self._entry(slot)
        if entry.state is not State.FILLING:
            raise StaleSlot(f"slot {slot.slot_id} is {entry.state.value}, not being filled")
        return entry

    def known(self, slot: Slot) -> Entry:
        """The entry of a slot that holds a committed object or is being filled. Raises StaleSlot."""
        entry = self._entry(slot)
        if not entry.known:
            raise StaleSlot(f"the object of slot {slot.slot_id} was forgotten")
        return entry

    def readable(self, slot: Slot) -> Entry:
        """The entry of a slot that holds a committed object. Raises StaleSlot for any other."""
        entry = self.known(slot)
        if entry.state is State.FILLING:
            raise StaleSlot(f"slot {slot.slot_id} is not committed yet")
        return entry

    def usage(self) -> TierUsage:
        """As in the contract. limbo_bytes is all room in the state limbo, findable objects included."""
        return TierUsage(
            capacity_bytes=self._capacity_bytes,
            used_bytes=sum(arena.used_bytes for arena in self._arenas),
            limbo_bytes=self._limbo_bytes,
            filling_bytes=self._filling_bytes,
            objects=self._objects,
            quarantined=self._quarantined,
        )

    def ready_bytes(self) -> int:
        """Bytes that can be given out by now, used ones included."""
        return sum(arena.ready_bytes for arena in self._arenas)

    def largest_free_bytes(self) -> int:
        """The longest object that `reserve` would take now."""
        return max(arena.largest_free_bytes() for arena in self._arenas)

    def next_end_s(self) -> float | None:
        """The first end time of a lease, or None when no lease is active."""
        return self._book.next_end_s()

    # -- leases

    def lease(self, slot: Slot, holder: str, until_s: float) -> None:
        """As in the contract. On a slot that is being filled it puts an end to its writer's hold.

        Raises StaleSlot, also for another holder than the writer while the slot is being filled.
        """
        entry = self.known(slot)
        if entry.state is State.FILLING and holder != entry.writer:
            raise StaleSlot(f"slot {slot.slot_id} is being filled by {entry.writer}, not by {holder}")
        self._book.lease(slot.slot_id, holder, until_s)
        if entry.state is State.LIMBO:
            self._move(entry, State.PRESENT)
        if entry.state is State.PRESENT:
            self._move(entry, State.LEASED)

    def release(self, slot: Slot, holder: str) -> None:
        """As in the contract. While the slot is being filled it does nothing: commit and abort end that."""
        entry = self._entries.get(slot.slot_id)
        if entry is None or entry.slot.generation != slot.generation or entry.state is State.FILLING:
            return
        if self._book.release(slot.slot_id, holder):
            self._settle(entry)

    def expire(self, now_s: float) -> list[tuple[Slot, str]]:
        """As in the contract: rights whose end time is before `now_s`, those of writers included."""
        ended = self._book.expire(now_s)
        answer = []
        for slot_id, holder in ended:
            entry = self._entries[slot_id]
            answer.append((entry.slot, holder))
            if entry.state is State.FILLING:
                self._forget(entry)
                self._move(entry, State.LIMBO)
            else:
                self._settle(entry)
        return answer

    def holder_ended(self, holder: str) -> None:
        """As in the contract; what the holder was filling is forgotten and its room free."""
        for slot_id in self._book.holder_ended(holder):
            entry = self._entries[slot_id]
            if entry.state is State.FILLING:
                self._forget(entry)
                self._vacate(entry)
            else:
                self._settle(entry)

    def pin(self, entry: Entry) -> None:
        """Keep the entry's room from being reused during a copy of the owner itself; ended by `unpin`.

        Unlike a lease it does not keep the object from being removed.
        """
        entry.pins += 1

    def unpin(self, entry: Entry) -> None:
        """End one `pin`; frees the room when the object was forgotten meanwhile."""
        entry.pins -= 1
        if not entry.known:
            self._vacate(entry)

    # -- leaving

    def remove(self, object_id: ObjectId) -> int:
        """As in the contract; bytes are those of the room."""
        entry = self._committed(object_id)
        if entry is None:
            return 0
        if self._book.active(entry.slot.slot_id):
            raise SlotLeased(f"{object_id} is leased by {self._book.holders(entry.slot.slot_id)}")
        return self._drop(entry)

    def quarantine(self, slot: Slot) -> None:
        """Forget a committed object whose bytes are wrong, leased or not, and count it; see `withdraw`."""
        if self.withdraw(slot):
            self._quarantined += 1

    def withdraw(self, slot: Slot) -> bool:
        """Forget a committed object, leased or not; answers whether it was there still.

        Its holders' rights are withdrawn; the room is free once they are out.
        """
        entry = self._entries.get(slot.slot_id)
        if entry is None or entry.slot.generation != slot.generation or not entry.known:
            return False
        if entry.state is State.FILLING:
            return False
        self._book.withdraw(slot.slot_id)
        self._settle(entry)
        self._drop(entry)
        return True

    def victims_window(
        self, nbytes: int, cost_of: Callable[[ObjectId], float | None]
    ) -> list[ObjectId] | None:
        """The cheapest neighbouring objects whose removal makes room for nbytes; in address order.

        cost_of: what losing an object costs, finite and not negative, or None when it must stay; asked
        only for objects that nobody holds.  Answers [] when there is room already, None when no eviction
        makes room.  O(objects); for an owner whose `reserve` raised TierFull.
        """
        best: tuple[Window, dict[int, Entry]] | None = None
        for arena, at in zip(self._arenas, self._at, strict=True):

            def cost_at(offset: int, at: dict[int, Entry] = at) -> float | None:
                entry = at[offset]
                if entry.state is not State.PRESENT or entry.pins:
                    return None
                return cost_of(entry.meta.object_id)

            window = arena.cheapest_window(nbytes, cost_at)
            if window is not None and (best is None or window.cost < best[0].cost):
                best = (window, at)
        return None if best is None else [best[1][offset].meta.object_id for offset in best[0].offsets]

    def grow(self, sub_arena: int, ready_bytes: int) -> None:
        """Let the first `ready_bytes` of a sub-arena be given out; it never shrinks."""
        self._arenas[sub_arena].grow(ready_bytes)

    # -- the moves

    def _allocate(self, nbytes: int, prefer: int | None) -> tuple[int, int]:
        order = list(range(len(self._arenas)))
        if prefer is not None:
            order.insert(0, order.pop(prefer))
        for sub_arena in order:
            offset = self._arenas[sub_arena].allocate(nbytes)
            if offset is not None:
                return sub_arena, offset
        raise TierFull(
            f"no room of {nbytes} bytes: {self.largest_free_bytes()} in one piece at most, "
            f"{self.ready_bytes()} of {self._capacity_bytes} bytes are ready",
            needed_bytes=nbytes,
        )

    def _name(self, address: tuple[int, int], nbytes: int) -> Slot:
        """The next owner's name for the room: a free slot id under its next generation."""
        if self._free_ids:
            slot_id = self._free_ids.pop()
            self._generations[slot_id] += 1
        else:
            slot_id = len(self._generations)
            self._generations.append(self._first_generation)
        generation = self._generations[slot_id]
        if self._publish is not None:
            self._publish(slot_id, generation)
        return Slot(slot_id, generation, address, nbytes)

    def _entry(self, slot: Slot) -> Entry:
        entry = self._entries.get(slot.slot_id)
        if entry is None or entry.slot.generation != slot.generation:
            raise StaleSlot(f"slot {slot.slot_id} is no longer of generation {slot.generation}")
        return entry

    def _committed(self, object_id: ObjectId) -> Entry | None:
        entry = self._by_id.get(object_id)
        return None if entry is None or entry.state is State.FILLING else entry

    def _move(self, entry: Entry, after: State) -> None:
        before = entry.state
        check_move(before, after)
        self._filling_bytes += entry.room * ((after is State.FILLING) - (before is State.FILLING))
        self._limbo_bytes += entry.room * ((after is State.LIMBO) - (before is State.LIMBO))
        entry.state = after

    def _settle(self, entry: Entry) -> None:
        """Follow the lease book after somebody left or lost a right."""
        slot_id = entry.slot.slot_id
        held = self._book.held(slot_id)
        if entry.state is State.LEASED and not self._book.active(slot_id):
            self._move(entry, State.LIMBO if held else State.PRESENT)
        elif entry.state is State.LIMBO and not held:
            if entry.known:
                self._move(entry, State.PRESENT)
            else:
                self._vacate(entry)

    def _drop(self, entry: Entry) -> int:
        """Forget a committed object without active leases; answers the bytes freed now."""
        self._objects -= 1
        self._forget(entry)
        if entry.state is State.PRESENT:
            self._move(entry, State.EVICTING)
        return self._vacate(entry)

    def _forget(self, entry: Entry) -> None:
        del self._by_id[entry.meta.object_id]
        entry.known = False
        if self._publish is not None:
            self._publish(entry.slot.slot_id, NOBODY)

    def _vacate(self, entry: Entry) -> int:
        """Free the room of a forgotten object once nobody is in it; answers the bytes freed."""
        slot_id, (sub_arena, offset) = entry.slot.slot_id, entry.slot.address
        if entry.pins or self._book.held(slot_id):
            if entry.state is State.FILLING:
                self._move(entry, State.LIMBO)
            return 0
        self._move(entry, State.ABSENT)
        del self._entries[slot_id], self._at[sub_arena][offset]
        self._free_ids.append(slot_id)
        return self._arenas[sub_arena].free(offset)
