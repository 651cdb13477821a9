"""HostSlots: what lies beyond the contract's suite, which runs over it in test_host_tier.py."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from kvtier.errors import StaleSlot, TierFull
from kvtier.host.allocator import ALIGN_BYTES, room_bytes
from kvtier.host.slots import NOBODY, HostSlots, default_max_slots
from kvtier.objects import ObjectId
from kvtier.states import State
from kvtier.testing.tier_kit import default_meta as meta
from kvtier.tier import Slot

MIB = 1 << 20
UNIT = ALIGN_BYTES


def store(slots: HostSlots, index: int, nbytes: int = UNIT) -> Slot:
    slot = slots.reserve(meta(index, nbytes), holder="writer")
    slots.commit([(slot, 0)])
    return slot


def name(index: int) -> ObjectId:
    return meta(index, UNIT).object_id


# -- states


def test_the_life_of_an_object() -> None:
    slots = HostSlots([MIB])
    slot = slots.reserve(meta(1, UNIT), holder="writer")
    assert slots.state(slot) is State.FILLING
    slots.commit([(slot, 0)])
    assert slots.state(slot) is State.PRESENT
    slots.lease(slot, "a", 1.0)
    assert slots.state(slot) is State.LEASED
    slots.expire(2.0)
    assert slots.state(slot) is State.LIMBO
    assert slots.find(name(1)) == slot
    slots.lease(slot, "a", 9.0)
    assert slots.state(slot) is State.LEASED
    slots.expire(10.0)
    slots.release(slot, "a")
    assert slots.state(slot) is State.PRESENT
    assert slots.remove(name(1)) == UNIT
    assert slots.state(slot) is State.ABSENT


def test_one_holder_in_limbo_and_one_with_a_lease() -> None:
    slots = HostSlots([MIB])
    slot = store(slots, 1)
    slots.lease(slot, "late", 1.0)
    slots.lease(slot, "a", 9.0)
    slots.expire(2.0)
    assert slots.state(slot) is State.LEASED
    slots.release(slot, "a")
    assert slots.state(slot) is State.LIMBO
    assert slots.usage().limbo_bytes == UNIT
    slots.holder_ended("late")
    assert slots.state(slot) is State.PRESENT
    assert slots.usage().limbo_bytes == 0


def test_release_does_not_end_filling() -> None:
    slots = HostSlots([MIB])
    slot = slots.reserve(meta(1, UNIT), holder="writer")
    slots.release(slot, "writer")
    slots.commit([(slot, 0)])
    assert slots.find(name(1)) == slot


def test_only_the_writer_may_bound_its_hold() -> None:
    slots = HostSlots([MIB])
    slot = slots.reserve(meta(1, UNIT), holder="writer")
    with pytest.raises(StaleSlot):
        slots.lease(slot, "a", 1.0)
    slots.lease(slot, "writer", 5.0)
    slots.lease(slot, "writer", 9.0)
    assert slots.expire(8.0) == []
    assert slots.expire(10.0) == [(slot, "writer")]


def test_a_late_writer_that_says_it_is_quiet_frees_its_room() -> None:
    slots = HostSlots([MIB])
    slot = slots.reserve(meta(1, UNIT), holder="writer")
    slots.lease(slot, "writer", 5.0)
    slots.expire(6.0)
    slots.abort(slot, quiet=False)
    assert slots.usage().used_bytes == UNIT
    slots.abort(slot, quiet=True)
    assert slots.usage().used_bytes == 0


def test_a_removed_object_in_limbo_is_not_the_writers_to_abort() -> None:
    slots = HostSlots([MIB])
    slot = store(slots, 1)
    slots.lease(slot, "writer", 1.0)
    slots.expire(2.0)
    slots.remove(name(1))
    with pytest.raises(StaleSlot):
        slots.abort(slot, quiet=True)
    assert slots.usage().limbo_bytes == UNIT


def test_quarantine_withdraws_every_right_and_waits_for_the_holders() -> None:
    slots = HostSlots([MIB])
    slot = store(slots, 1)
    slots.lease(slot, "a", 100.0)
    slots.lease(slot, "b", 1.0)
    slots.expire(2.0)
    slots.quarantine(slot)
    assert slots.find(name(1)) is None
    usage = slots.usage()
    assert (usage.quarantined, usage.objects, usage.limbo_bytes) == (1, 0, UNIT)
    slots.release(slot, "a")
    assert slots.usage().used_bytes == UNIT
    slots.release(slot, "b")
    assert slots.usage().used_bytes == 0


def test_a_pin_keeps_the_room_and_not_the_object() -> None:
    slots = HostSlots([MIB])
    slot = store(slots, 1)
    entry = slots.readable(slot)
    slots.pin(entry)
    slots.pin(entry)
    assert slots.remove(name(1)) == 0
    slots.unpin(entry)
    assert slots.usage().used_bytes == UNIT
    slots.unpin(entry)
    assert slots.usage().used_bytes == 0


def test_commit_takes_a_slot_once() -> None:
    slots = HostSlots([MIB])
    slot = slots.reserve(meta(1, UNIT), holder="writer")
    with pytest.raises(ValueError):
        slots.commit([(slot, 0), (slot, 0)])
    assert slots.find(name(1)) is None
    slots.commit([(slot, 0)])


def test_an_empty_object_cannot_be_stored() -> None:
    with pytest.raises(ValueError):
        HostSlots([MIB]).reserve(meta(1, 0), holder="writer")


# -- names


def test_owners_are_published() -> None:
    told: list[tuple[int, int]] = []
    slots = HostSlots([MIB], first_generation=7, publish=lambda *pair: told.append(pair))
    slot = store(slots, 1)
    assert (slot.slot_id, slot.generation) == (0, 7)
    slots.lease(slot, "a", 1.0)
    slots.expire(2.0)
    assert told == [(0, 7)]
    slots.remove(name(1))
    assert told == [(0, 7), (0, NOBODY)]
    slots.release(slot, "a")
    aborted = slots.reserve(meta(1, UNIT), holder="writer")
    slots.abort(aborted, quiet=True)
    late = slots.reserve(meta(1, UNIT), holder="writer")
    slots.lease(late, "writer", 3.0)
    slots.expire(4.0)
    corrupt = store(slots, 2)
    slots.quarantine(corrupt)
    assert told[2:] == [(0, 8), (0, NOBODY), (0, 9), (0, NOBODY), (1, 7), (1, NOBODY)]


def test_slots_in_use_are_bounded() -> None:
    slots = HostSlots([MIB], max_slots=2)
    first = store(slots, 1)
    store(slots, 2)
    used = slots.usage().used_bytes
    with pytest.raises(TierFull, match="2 slots"):
        slots.reserve(meta(3, UNIT), holder="writer")
    assert slots.usage().used_bytes == used
    slots.remove(name(1))
    assert store(slots, 3).slot_id == first.slot_id


def test_there_are_slots_for_the_smallest_objects() -> None:
    assert default_max_slots(64 * MIB) == 64 * MIB // UNIT
    assert default_max_slots(1 << 40) == 1 << 22


# -- room


def test_mixed_geometries_fill_up_and_give_every_byte_back() -> None:
    slots = HostSlots([512 * MIB, 256 * MIB])
    random_ = random.Random(11)
    kept: dict[int, Slot] = {}
    for round_ in range(3):
        for index in range(round_ * 1000, round_ * 1000 + 1000):
            nbytes = random_.choice([2 * MIB, 32 * MIB, random_.randrange(1, 2 * MIB)])
            try:
                kept[index] = store(slots, index, nbytes)
            except TierFull:
                break
        usage = slots.usage()
        assert usage.used_bytes == sum(room_bytes(slot.nbytes) for slot in kept.values())
        assert 600 * MIB < usage.used_bytes <= usage.capacity_bytes
        for index in random_.sample(sorted(kept), len(kept) // 2):
            assert slots.remove(name(index)) == room_bytes(kept.pop(index).nbytes)
    for index, slot in kept.items():
        assert slots.remove(name(index)) == room_bytes(slot.nbytes)
    assert slots.usage().used_bytes == 0
    assert slots.largest_free_bytes() == 512 * MIB


def test_sub_arenas_are_filled_in_order_unless_preferred() -> None:
    slots = HostSlots([2 * UNIT, 2 * UNIT])
    assert [store(slots, i).address[0] for i in range(3)] == [0, 0, 1]
    for i in range(3):
        slots.remove(name(i))
    preferred = [slots.reserve(meta(i, UNIT), holder="w", prefer=1).address[0] for i in range(4)]
    assert preferred == [1, 1, 0, 0]


def test_an_object_does_not_span_sub_arenas() -> None:
    slots = HostSlots([2 * UNIT, 2 * UNIT])
    with pytest.raises(TierFull) as full:
        slots.reserve(meta(1, 3 * UNIT), holder="w")
    assert full.value.needed_bytes == 3 * UNIT


def test_room_is_given_out_as_it_gets_ready() -> None:
    slots = HostSlots([4 * UNIT], ready_bytes=[0])
    with pytest.raises(TierFull, match=f"0 of {4 * UNIT} bytes are ready"):
        slots.reserve(meta(1, UNIT), holder="w")
    slots.grow(0, UNIT)
    slots.reserve(meta(1, UNIT), holder="w")
    with pytest.raises(TierFull):
        slots.reserve(meta(2, UNIT), holder="w")
    slots.grow(0, 4 * UNIT)
    slots.reserve(meta(2, 3 * UNIT), holder="w")
    assert slots.usage().free_bytes == 0


# -- windows


def test_victims_are_the_cheapest_neighbours_that_nobody_holds() -> None:
    slots = HostSlots([8 * UNIT])
    stored = [store(slots, i) for i in range(8)]
    slots.lease(stored[1], "a", 100.0)
    slots.lease(stored[5], "a", 1.0)
    slots.expire(2.0)
    costs = {name(i): cost for i, cost in enumerate([1, 1, 5, 4, 9, 1, 1, 7])}
    assert slots.victims_window(2 * UNIT, lambda o: costs[o]) == [name(6), name(7)]
    assert slots.victims_window(3 * UNIT, lambda o: costs[o]) == [name(2), name(3), name(4)]
    assert slots.victims_window(4 * UNIT, lambda o: costs[o]) is None
    for victim in slots.victims_window(3 * UNIT, lambda o: costs[o]) or []:
        slots.remove(victim)
    slots.reserve(meta(20, 3 * UNIT), holder="w")


def test_victims_come_from_the_cheapest_sub_arena_and_free_room_costs_nothing() -> None:
    slots = HostSlots([2 * UNIT, 2 * UNIT])
    for i in range(3):
        store(slots, i)
    assert slots.victims_window(UNIT, lambda _: 1.0) == []
    assert slots.victims_window(2 * UNIT, lambda _: 1.0) == [name(2)]
    assert slots.victims_window(2 * UNIT, lambda o: None if o == name(2) else 1.0) == [name(0), name(1)]


def test_what_is_being_filled_or_read_is_no_victim() -> None:
    slots = HostSlots([2 * UNIT])
    entry = slots.readable(store(slots, 1))
    slots.pin(entry)
    filling = slots.reserve(meta(2, UNIT), holder="w")
    assert slots.victims_window(UNIT, lambda _: 1.0) is None
    slots.unpin(entry)
    assert slots.victims_window(UNIT, lambda _: 1.0) == [name(1)]
    slots.abort(filling, quiet=False)
    assert slots.victims_window(2 * UNIT, lambda _: 1.0) is None


# -- determinism

SCRIPT = """
import hashlib, random
from kvtier.errors import TierError
from kvtier.host.slots import HostSlots
from kvtier.testing.tier_kit import default_meta

random_ = random.Random(5)
said = hashlib.sha256()
slots = HostSlots([1 << 20, 1 << 19], publish=lambda *pair: said.update(repr(pair).encode()))
open_ = []
for turn in range(4000):
    index, holder, pick = random_.randrange(80), f"h{random_.randrange(5)}", random_.random()
    object_id = default_meta(index, 1).object_id
    slot = slots.find(object_id)
    answer = None
    try:
        if pick < 0.4:
            answer = slots.reserve(default_meta(index, random_.randrange(1, 60_000)), holder=holder)
            open_.append(answer)
        elif pick < 0.6 and open_:
            slots.commit([(open_.pop(0), turn)])
        elif pick < 0.65 and open_:
            slots.abort(open_.pop(), quiet=pick < 0.62)
        elif pick < 0.75 and slot:
            slots.lease(slot, holder, turn + 40)
        elif pick < 0.8 and slot:
            slots.release(slot, holder)
        elif pick < 0.9:
            answer = slots.remove(object_id)
        elif pick < 0.95:
            answer = slots.expire(turn)
        elif pick < 0.97:
            slots.holder_ended(holder)
        else:
            answer = slots.victims_window(90_000, lambda o: float(o.block_key[0]))
    except TierError as error:
        answer = (type(error).__name__, str(error))
    said.update(repr((turn, answer, slots.usage(), slots.next_end_s())).encode())
print(said.hexdigest(), slots.usage().objects)
"""


def test_equal_calls_give_equal_answers_in_every_process() -> None:
    answers = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
        )
        answers.add(done.stdout)
    assert len(answers) == 1
    assert int(answers.pop().split()[1]) > 5
