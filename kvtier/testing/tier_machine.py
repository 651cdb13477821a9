"""A hypothesis state machine that drives a tier and a model of dictionaries side by side.

It finds the orders of calls that the plain tests do not think of.  The model knows what must be found, what
must be readable, who holds what, and which room may not come back yet; it does not know where things lie.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtier.checksum import checksum
from kvtier.errors import ObjectExists, SlotLeased, StaleSlot, TierFull
from kvtier.testing.tier_kit import TierKit, check_disjoint, content, get
from kvtier.tier import Slot, Tier

# Few of each, so that calls meet.
OBJECTS = 4
INDEXES = st.integers(0, OBJECTS - 1)
HOLDERS = st.sampled_from(["a", "b"])
PICK = st.integers(0, 1 << 16)


@dataclass
class _Room:
    """What the model knows of one reservation, from reserve until its room is free."""

    index: int
    slot: Slot
    writer: str
    data: bytes
    phase: str = "filling"  # then 'present' or 'gone': forgotten, but held
    active: dict[str, float] = field(default_factory=dict)
    limbo: set[str] = field(default_factory=set)

    @property
    def held(self) -> bool:
        return bool(self.active or self.limbo)


class TierMachine(RuleBasedStateMachine):
    """The rules. `kit` is set by `tier_machine`."""

    kit: TierKit

    @initialize()
    def start(self) -> None:
        self.tier: Tier = self.kit.make()
        self.base_bytes = self.tier.usage().used_bytes
        self.now_s = 0.0
        self.seed = 0
        self.rooms: list[_Room] = []
        self.stale: list[Slot] = []
        self.names: set[tuple[int, int]] = set()

    # -- the model

    def _in(self, *phases: str) -> list[_Room]:
        return [room for room in self.rooms if room.phase in phases]

    def _of(self, index: int, *phases: str) -> _Room | None:
        return next((room for room in self._in(*phases) if room.index == index), None)

    def _settle(self, room: _Room) -> None:
        """Forget the room once it is gone and nobody holds it."""
        if room.phase == "gone" and not room.held:
            self.rooms.remove(room)
            self.stale.append(room.slot)

    def _end(self, room: _Room) -> None:
        room.phase = "gone"
        self._settle(room)

    # -- filling

    @rule(index=INDEXES, writer=HOLDERS, size=PICK)
    def reserve(self, index: int, writer: str, size: int) -> None:
        meta = self.kit.meta(index, self.kit.sizes[size % len(self.kit.sizes)])
        if self._of(index, "filling", "present") is not None:
            with pytest.raises(ObjectExists):
                self.tier.reserve(meta, holder=writer)
            return
        try:
            slot = self.tier.reserve(meta, holder=writer)
        except TierFull:
            assert self.rooms, "an empty tier has no room for one object"
            return
        assert slot.nbytes == meta.nbytes
        assert (slot.slot_id, slot.generation) not in self.names
        self.names.add((slot.slot_id, slot.generation))
        self.seed += 1
        data = content(self.seed, meta.nbytes)
        self.tier.write(slot, data)
        self.rooms.append(_Room(index, slot, writer, data))

    @rule(index=INDEXES, size=PICK)
    def store(self, index: int, size: int) -> None:
        """Reserve and commit, since little else can happen before."""
        self.reserve(index, "a", size)
        room = self._of(index, "filling")
        if room is not None:
            self.tier.commit([(room.slot, checksum(room.data))])
            room.phase = "present"
            room.active.clear()

    @precondition(lambda self: self._in("filling"))
    @rule(pick=PICK, count=st.integers(1, 3), spoil=st.booleans())
    def commit(self, pick: int, count: int, spoil: bool) -> None:
        filling = self._in("filling")
        first = pick % len(filling)
        chosen = filling[first : first + count]
        ready = [(room.slot, checksum(room.data)) for room in chosen]
        if spoil and self.stale:
            with pytest.raises(StaleSlot):
                self.tier.commit([*ready, (self.stale[pick % len(self.stale)], 0)])
            return
        self.tier.commit(ready)
        for room in chosen:
            room.phase = "present"
            room.active.clear()

    @precondition(lambda self: self._in("filling"))
    @rule(pick=PICK, quiet=st.booleans())
    def abort(self, pick: int, quiet: bool) -> None:
        filling = self._in("filling")
        room = filling[pick % len(filling)]
        self.tier.abort(room.slot, quiet=quiet)
        room.active.clear()
        if not quiet:
            room.limbo.add(room.writer)
        self._end(room)

    @precondition(lambda self: self.kit.writer_expires and self._in("filling"))
    @rule(pick=PICK, for_s=st.integers(1, 5))
    def bound_the_writer(self, pick: int, for_s: int) -> None:
        filling = self._in("filling")
        self._lease(filling[pick % len(filling)], for_s, holder=None)

    # -- leases

    def _lease(self, room: _Room, for_s: int, holder: str | None) -> None:
        name = room.writer if holder is None else holder
        until_s = max(self.now_s + for_s, room.active.get(name, 0.0))
        self.tier.lease(room.slot, name, until_s)
        room.active[name] = until_s
        room.limbo.discard(name)

    @precondition(lambda self: self._in("present"))
    @rule(pick=PICK, holder=HOLDERS, for_s=st.integers(1, 5))
    def lease(self, pick: int, holder: str, for_s: int) -> None:
        present = self._in("present")
        self._lease(present[pick % len(present)], for_s, holder)

    @precondition(lambda self: self._in("present", "gone"))
    @rule(pick=PICK, holder=HOLDERS)
    def release(self, pick: int, holder: str) -> None:
        rooms = self._in("present", "gone")
        room = rooms[pick % len(rooms)]
        self.tier.release(room.slot, holder)
        room.active.pop(holder, None)
        room.limbo.discard(holder)
        self._settle(room)

    @rule(passed_s=st.integers(0, 4))
    def expire(self, passed_s: int) -> None:
        """Half a second off every end time, which are whole numbers."""
        self.now_s += passed_s
        ended = []
        for room in list(self.rooms):
            for holder, until_s in list(room.active.items()):
                if until_s < self.now_s + 0.5:
                    del room.active[holder]
                    room.limbo.add(holder)
                    ended.append((room.slot.slot_id, room.slot.generation, holder))
            if room.phase == "filling" and room.limbo:
                room.phase = "gone"
        answer = [(slot.slot_id, slot.generation, h) for slot, h in self.tier.expire(self.now_s + 0.5)]
        assert sorted(answer) == sorted(ended)

    @rule(holder=HOLDERS)
    def holder_ended(self, holder: str) -> None:
        self.tier.holder_ended(holder)
        for room in list(self.rooms):
            room.active.pop(holder, None)
            room.limbo.discard(holder)
            if room.phase == "filling" and room.writer == holder:
                room.phase = "gone"
            self._settle(room)

    @precondition(lambda self: self._in("present"))
    @rule(pick=PICK, holder=HOLDERS)
    def outlive_a_lease(self, pick: int, holder: str) -> None:
        """A right that ends, and the object removed: seldom met by chance, and where room is reused early."""
        present = self._in("present")
        room = present[pick % len(present)]
        self._lease(room, 1, holder)
        self.expire(int(max(room.active.values()) - self.now_s))
        self.remove(room.index)

    # -- removing, and asking through old slots

    @rule(index=INDEXES)
    def remove(self, index: int) -> None:
        object_id = self.kit.object_id(index)
        room = self._of(index, "present")
        used = self.tier.usage().used_bytes
        if room is not None and room.active:
            with pytest.raises(SlotLeased):
                self.tier.remove(object_id)
            return
        freed = self.tier.remove(object_id)
        assert self.tier.usage().used_bytes == used - freed
        if room is None or room.limbo:
            assert freed == 0
        else:
            assert freed >= room.slot.nbytes
        if room is not None:
            self._end(room)

    @precondition(lambda self: self.stale or self._in("gone"))
    @rule(pick=PICK, holder=HOLDERS)
    def use_a_stale_slot(self, pick: int, holder: str) -> None:
        old = self.stale + [room.slot for room in self._in("gone")]
        slot = old[pick % len(old)]
        with pytest.raises(StaleSlot):
            self.tier.read(slot, bytearray(slot.nbytes))
        with pytest.raises(StaleSlot):
            self.tier.write(slot, bytes(slot.nbytes))
        with pytest.raises(StaleSlot):
            self.tier.lease(slot, holder, 1e9)
        with pytest.raises(StaleSlot):
            self.tier.commit([(slot, 0)])
        if slot in self.stale:
            self.tier.release(slot, holder)

    def _reused(self) -> list[tuple[Slot, _Room]]:
        """Old slots, each with the object that has its place by now."""
        return [
            (old, room)
            for room in self._in("present")
            for old in self.stale
            if old.slot_id == room.slot.slot_id
        ]

    @precondition(lambda self: self._reused())
    @rule(pick=PICK, holder=HOLDERS)
    def release_what_one_has_no_longer(self, pick: int, holder: str) -> None:
        """By the old slot of a place that is leased again."""
        reused = self._reused()
        old, room = reused[pick % len(reused)]
        self._lease(room, 1, holder)
        self.tier.release(old, holder)
        self.remove(room.index)

    # -- what always holds

    @invariant()
    def what_is_found_is_what_was_committed(self) -> None:
        for index in range(OBJECTS):
            object_id = self.kit.object_id(index)
            room, slot = self._of(index, "present"), self.tier.find(object_id)
            if room is None:
                assert slot is None
                assert self.tier.meta(object_id) is None
            else:
                assert slot is not None
                assert (slot.slot_id, slot.generation) == (room.slot.slot_id, room.slot.generation)
                assert get(self.tier, slot) == room.data
        metas = {meta.object_id: meta for meta in self.tier.objects()}
        assert metas == {
            meta.object_id: replace(meta, checksum=checksum(room.data))
            for room in self._in("present")
            for meta in [self.kit.meta(room.index, room.slot.nbytes)]
        }

    @invariant()
    def the_books_are_right(self) -> None:
        usage = self.tier.usage()
        assert usage.objects == len(self._in("present"))
        assert usage.used_bytes - self.base_bytes >= sum(room.slot.nbytes for room in self.rooms)
        assert usage.used_bytes <= usage.capacity_bytes
        assert usage.filling_bytes >= sum(room.slot.nbytes for room in self._in("filling"))
        assert usage.limbo_bytes >= sum(room.slot.nbytes for room in self._in("gone"))
        assert usage.filling_bytes + usage.limbo_bytes <= usage.used_bytes
        assert bool(usage.filling_bytes) == bool(self._in("filling"))
        if not any(room.limbo for room in self.rooms):
            assert usage.limbo_bytes == 0
        check_disjoint(self.kit, [room.slot for room in self.rooms])
        if not self.rooms:
            assert usage.used_bytes == self.base_bytes

    def teardown(self) -> None:
        if not hasattr(self, "tier"):
            return
        try:
            for holder in ("a", "b"):
                self.tier.holder_ended(holder)
            for room in self._in("present"):
                self.tier.remove(self.kit.object_id(room.index))
            assert self.tier.usage().used_bytes == self.base_bytes
        finally:
            self.kit.dispose(self.tier)


def tier_machine(kit: TierKit, *, max_examples: int = 40, steps: int = 40) -> Any:
    """The machine over `kit` as a unittest TestCase class; assign it to a name that starts with Test."""
    return bare_machine(kit, max_examples=max_examples, steps=steps).TestCase


def bare_machine(kit: TierKit, *, max_examples: int, steps: int) -> type[TierMachine]:
    """The machine itself, for `hypothesis.stateful.run_state_machine_as_test`."""
    machine: type[TierMachine] = type("BoundTierMachine", (TierMachine,), {"kit": kit})
    machine.TestCase.settings = settings(
        max_examples=max_examples,
        stateful_step_count=steps,
        suppress_health_check=list(HealthCheck),
    )
    return machine
