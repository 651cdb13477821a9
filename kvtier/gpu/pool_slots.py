"""The parking area without its bytes: runs of pages, slot ids, generations, states, leases. Pure.

Not thread-safe: `PoolTier` has the lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvtier.errors import GeometryError, ObjectExists, SlotLeased, StaleSlot, TierFull
from kvtier.gpu.layout import PoolLayout
from kvtier.gpu.page_runs import PageRuns
from kvtier.leases import LeaseBook
from kvtier.objects import ObjectId, ObjectMeta
from kvtier.states import State, check_move
from kvtier.tier import Slot, TierUsage


@dataclass(slots=True, eq=False)
class Room:
    """One slot in use. known: the object is in the index; pins: copies of the tier itself that run."""

    slot: Slot
    meta: ObjectMeta
    writer: str
    pages: int
    nbytes: int
    state: State = State.ABSENT
    known: bool = True
    pins: int = 0


class PoolSlots:
    """The calls of `kvtier.tier.Tier` but write and read, with the same errors and answers.

    A slot's address is (layer group, first page): each group's planes have pages of their own.
    """

    def __init__(self, layout: PoolLayout) -> None:
        self._layout = layout
        self._geometry = layout.geometry
        self._runs = [PageRuns(layout.pages(g)) for g in range(len(layout.groups))]
        self._page_bytes = [layout.token_bytes(g) * layout.page_tokens(g) for g in range(len(layout.groups))]
        self._book = LeaseBook()
        self._rooms: dict[int, Room] = {}
        self._by_id: dict[ObjectId, Room] = {}
        self._free_ids: list[int] = []
        self._generations: list[int] = []
        self._quarantined = self._objects = 0
        self._bytes_in = dict.fromkeys(State, 0)

    def reserve(self, meta: ObjectMeta, *, holder: str) -> Slot:
        """As in the contract. Raises GeometryError for an object that is not of this pool's geometry."""
        count = self._pages_of(meta)
        if meta.object_id in self._by_id:
            raise ObjectExists(f"{meta.object_id} is {self._by_id[meta.object_id].state.value}")
        group = meta.object_id.group
        first = self._runs[group].take(count)
        room_bytes = count * self._page_bytes[group]
        if first is None:
            raise TierFull(f"no {count} free pages side by side in group {group}", needed_bytes=room_bytes)
        if not self._free_ids:
            self._free_ids.append(len(self._generations))
            self._generations.append(0)
        slot_id = self._free_ids.pop()
        self._generations[slot_id] += 1
        slot = Slot(slot_id, self._generations[slot_id], (group, first), meta.nbytes)
        self._rooms[slot_id] = self._by_id[meta.object_id] = Room(slot, meta, holder, count, room_bytes)
        self._book.hold(slot_id, holder)
        self._move(self._rooms[slot_id], State.FILLING)
        return slot

    def commit(self, slots: Sequence[tuple[Slot, int]]) -> None:
        """As in the contract. Raises ValueError when a slot is in `slots` twice."""
        rooms = [self.filling(slot) for slot, _ in slots]
        if len({slot.slot_id for slot, _ in slots}) < len(rooms):
            raise ValueError("one slot is to be committed twice")
        for room, (slot, checksum) in zip(rooms, slots, strict=True):
            self._book.release(slot.slot_id, room.writer)
            room.meta = replace(room.meta, checksum=checksum)
            self._move(room, State.PRESENT)
        self._objects += len(rooms)

    def abort(self, slot: Slot, *, quiet: bool) -> None:
        """As in the contract. A quiet abort of a slot in limbo is its writer's release."""
        room = self._room(slot)
        if room.meta.checksum is not None:
            raise StaleSlot(f"slot {slot.slot_id} is {room.state.value}, not being filled")
        self._forget(room)
        self._book.withdraw(slot.slot_id)
        if quiet:
            self._book.release(slot.slot_id, room.writer)
        self.settle(room)

    def committed(self, object_id: ObjectId) -> Room | None:
        """The room of a committed object."""
        room = self._by_id.get(object_id)
        return None if room is None or room.state is State.FILLING else room

    def objects(self) -> list[ObjectMeta]:
        """Every committed object."""
        return [room.meta for room in self._by_id.values() if room.state is not State.FILLING]

    def filling(self, slot: Slot) -> Room:
        """The room that its writer may write to. Raises StaleSlot."""
        room = self._room(slot)
        if room.state is not State.FILLING:
            raise StaleSlot(f"slot {slot.slot_id} is {room.state.value}, not being filled")
        return room

    def readable(self, slot: Slot) -> Room:
        """The room of a committed object. Raises StaleSlot."""
        room = self._room(slot)
        if not room.known or room.state is State.FILLING:
            raise StaleSlot(f"slot {slot.slot_id} holds no committed object")
        return room

    def lease(self, slot: Slot, holder: str, until_s: float) -> None:
        """As in the contract; on a slot that is being filled it puts an end to its writer's hold."""
        room = self._room(slot)
        if not room.known or (room.state is State.FILLING and holder != room.writer):
            raise StaleSlot(f"slot {slot.slot_id} is not for {holder} to lease")
        self._book.lease(slot.slot_id, holder, until_s)
        self.settle(room)

    def release(self, slot: Slot, holder: str) -> None:
        """As in the contract. While the slot is being filled it does nothing."""
        room = self._rooms.get(slot.slot_id)
        if room is None or room.slot.generation != slot.generation or room.state is State.FILLING:
            return
        self._book.release(slot.slot_id, holder)
        self.settle(room)

    def expire(self, now_s: float) -> list[tuple[Slot, str]]:
        """As in the contract, writers included."""
        answer = []
        for slot_id, holder in self._book.expire(now_s):
            room = self._rooms[slot_id]
            answer.append((room.slot, holder))
            if room.state is State.FILLING:
                self._forget(room)
            self.settle(room)
        return answer

    def holder_ended(self, holder: str) -> None:
        """As in the contract; what the holder was filling is forgotten."""
        for slot_id in self._book.holder_ended(holder):
            room = self._rooms[slot_id]
            if room.state is State.FILLING:
                self._forget(room)
            self.settle(room)

    def remove(self, object_id: ObjectId) -> int:
        """As in the contract; bytes are those of the pages."""
        room = self.committed(object_id)
        if room is None:
            return 0
        if self._book.active(room.slot.slot_id):
            raise SlotLeased(f"{object_id} is leased by {self._book.holders(room.slot.slot_id)}")
        self._forget(room)
        self.settle(room)
        return room.nbytes if room.state is State.ABSENT else 0

    def quarantine(self, room: Room) -> None:
        """Forget a committed object whose bytes are wrong, and count it; nothing when it is gone already."""
        if room.known:
            self._quarantined += 1
            self._book.withdraw(room.slot.slot_id)
            self.settle(room)
            self._forget(room)
            self.settle(room)

    def usage(self) -> TierUsage:
        """As in the contract."""
        capacity, used = (
            sum(number * size for number, size in zip(numbers, self._page_bytes, strict=True))
            for numbers in ([runs.pages for runs in self._runs], [runs.used for runs in self._runs])
        )
        limbo, filling = self._bytes_in[State.LIMBO], self._bytes_in[State.FILLING]
        return TierUsage(capacity, used, limbo, filling, self._objects, self._quarantined)

    def settle(self, room: Room) -> None:
        """Move the room to the state that its holders and pins ask for; frees it when nobody is in it."""
        slot_id = room.slot.slot_id
        held, active = self._book.held(slot_id), self._book.active(slot_id)
        if room.known:
            if room.state is not State.FILLING:
                self._move(room, State.LEASED if active else State.LIMBO if held else State.PRESENT)
        elif held:
            self._move(room, State.LIMBO)
        elif room.pins:
            # A copy of the tier's own still runs: settled again when it ends.
            self._move(room, State.EVICTING if room.state in (State.PRESENT, State.EVICTING) else State.LIMBO)
        else:
            self._free(room)

    def _free(self, room: Room) -> None:
        if room.state is State.PRESENT:
            self._move(room, State.EVICTING)
        self._move(room, State.ABSENT)
        group, first = room.slot.address
        self._runs[group].give(first, room.pages)
        del self._rooms[room.slot.slot_id]
        self._free_ids.append(room.slot.slot_id)

    def _move(self, room: Room, state: State) -> None:
        if room.state is State.LIMBO and state is State.LEASED:
            self._move(room, State.PRESENT)
        if room.state is not state:
            check_move(room.state, state)
            self._bytes_in[room.state] -= room.nbytes
            self._bytes_in[state] += room.nbytes
            room.state = state

    def _forget(self, room: Room) -> None:
        if room.known:
            room.known = False
            self._objects -= room.state is not State.FILLING
            del self._by_id[room.meta.object_id]

    def _room(self, slot: Slot) -> Room:
        room = self._rooms.get(slot.slot_id)
        if room is None or room.slot.generation != slot.generation:
            raise StaleSlot(f"slot {slot.slot_id} is no longer of generation {slot.generation}")
        return room

    def _pages_of(self, meta: ObjectMeta) -> int:
        group = meta.object_id.group
        if not 0 <= group < len(self._runs) or not 0 <= meta.first_valid < meta.tokens:
            raise GeometryError(f"{meta.object_id} is of no group of this pool, or empty")
        wanted = self._geometry.groups[group].object_bytes(meta.tokens, meta.first_valid)
        if meta.nbytes != wanted or meta.tokens > self._layout.block_tokens:
            raise GeometryError(
                f"an object of {meta.tokens} tokens is {wanted} bytes here, not {meta.nbytes}"
            )
        size = self._layout.page_tokens(group)
        return -(-meta.tokens // size) - meta.first_valid // size
