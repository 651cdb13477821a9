"""The host tier: the conformance suite, and what is its own."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvtier.checksum import checksum
from kvtier.errors import ConfigError, CorruptObject, StaleSlot, TierFull, TierUnavailable
from kvtier.host import ArenaView, HostTier, MemoryLimit
from kvtier.host.arena import Arena
from kvtier.host.slots import HostSlots
from kvtier.host.sysmem import Bytes
from kvtier.states import State
from kvtier.testing.tier_contract import TierContract
from kvtier.testing.tier_kit import TierKit, content, found, get, put
from kvtier.testing.tier_kit import default_meta as meta
from kvtier.testing.tier_machine import tier_machine
from kvtier.tier import Slot, Tier

MIB = 1 << 20
CAPACITY_BYTES = 2 * MIB
UNIT = 4096
WAIT_S = 30.0


def faulted_in(tier: HostTier) -> HostTier:
    assert tier.wait_ready(WAIT_S)
    return tier


def make() -> HostTier:
    return faulted_in(HostTier(CAPACITY_BYTES, numa_nodes=()))


def make_two() -> HostTier:
    return faulted_in(HostTier(CAPACITY_BYTES, numa_nodes=(0, 0)))


def flip(tier: Tier, slot: Slot) -> None:
    assert isinstance(tier, HostTier)
    tier.view(slot)[slot.nbytes // 2] ^= 1


KIT = TierKit(make=make, corrupt=flip)
KIT_OF_TWO = TierKit(make=make_two, corrupt=flip)


class TestHostTierContract(TierContract):
    @pytest.fixture(params=[KIT, KIT_OF_TWO], ids=["one", "two sub-arenas"])
    def kit(self, request: pytest.FixtureRequest) -> TierKit:
        kit: TierKit = request.param
        return kit


TestHostTierMachine = tier_machine(KIT)
TestHostTierOfTwoMachine = tier_machine(KIT_OF_TWO)


@pytest.fixture
def tier() -> Iterator[HostTier]:
    made = make()
    yield made
    made.close()


# -- bytes


def test_padding_is_zeroed_for_the_next_owner(tier: HostTier) -> None:
    before = put(KIT, tier, 1, 2 * UNIT)
    tier.view(before)[:] = 0xEE
    tier.remove(meta(1, 1).object_id)
    slot = tier.reserve(meta(2, UNIT + 10), holder="w")
    assert slot.address == before.address
    assert (tier.view(slot) == 0xEE).all(), "the old owner's bytes are there until they are written over"
    room = tier.room(slot)
    assert room.nbytes == 2 * UNIT
    assert not room[slot.nbytes :].any()
    assert room.ctypes.data % UNIT == 0


def test_a_view_is_for_who_is_in_the_slot(tier: HostTier) -> None:
    slot = tier.reserve(meta(1, 100), holder="w")
    tier.view(slot)[:] = 5
    tier.commit([(slot, checksum(bytes([5] * 100)))])
    assert get(tier, slot) == bytes([5] * 100)
    tier.remove(meta(1, 100).object_id)
    for access in (tier.view, tier.room):
        with pytest.raises(StaleSlot):
            access(slot)


def test_numpy_arrays_are_buffers_too(tier: HostTier) -> None:
    data = np.frombuffer(content(3, 1000), dtype=np.uint8)
    slot = tier.reserve(meta(1, 1000), holder="w")
    tier.write(slot, data)
    tier.commit([(slot, checksum(data))])
    into = np.zeros(1000, dtype=np.uint8)
    tier.read(slot, into)
    assert (into == data).all()
    with pytest.raises(ValueError, match="read-only"):
        tier.read(slot, bytes(1000))


def test_objects_of_many_pieces_are_checked_as_a_whole(tier: HostTier) -> None:
    nbytes = 3 * 256 * 1024 + 5
    slot = put(KIT, tier, 1, nbytes)
    assert get(tier, slot) == content(1, nbytes)
    view = tier.view(slot)
    view[: 256 * 1024], view[256 * 1024 : 512 * 1024] = (
        view[256 * 1024 : 512 * 1024].copy(),
        view[: 256 * 1024].copy(),
    )
    with pytest.raises(CorruptObject):
        get(tier, slot)


# -- copies against frees


def remove_during_the_copy(tier: HostTier, monkeypatch: pytest.MonkeyPatch) -> tuple[bytes, Slot]:
    """Read object 1; just before the copy it is removed, and object 2 of its size is stored."""
    slot = put(KIT, tier, 1)
    new: list[Slot] = []
    real = Arena.view

    def interrupted(self: Arena, address: tuple[int, int], nbytes: int) -> Bytes:
        monkeypatch.setattr(Arena, "view", real)
        tier.remove(meta(1, 1).object_id)
        new.append(put(KIT, tier, 2))
        return real(self, address, nbytes)

    monkeypatch.setattr(Arena, "view", interrupted)
    return get(tier, slot), new[0]


def test_a_read_that_began_before_remove_ends_well(tier: HostTier, monkeypatch: pytest.MonkeyPatch) -> None:
    data, new = remove_during_the_copy(tier, monkeypatch)
    assert data == content(1, UNIT)
    assert get(tier, new) == content(2, UNIT)
    tier.remove(meta(2, 1).object_id)
    assert tier.usage().used_bytes == 0


def test_without_pins_the_room_would_be_reused(tier: HostTier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostSlots, "pin", lambda self, entry: None)
    monkeypatch.setattr(HostSlots, "unpin", lambda self, entry: None)
    with pytest.raises(CorruptObject):
        remove_during_the_copy(tier, monkeypatch)


def test_a_write_keeps_its_room_whatever_the_owner_says(
    tier: HostTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = tier.reserve(meta(1, UNIT), holder="w")
    seen: list[Slot] = []
    real = Arena.view

    def interrupted(self: Arena, address: tuple[int, int], nbytes: int) -> Bytes:
        monkeypatch.setattr(Arena, "view", real)
        tier.abort(slot, quiet=True)
        seen.append(tier.reserve(meta(2, UNIT), holder="w"))
        return real(self, address, nbytes)

    monkeypatch.setattr(Arena, "view", interrupted)
    tier.write(slot, content(1, UNIT))
    assert seen[0].address != slot.address
    tier.abort(seen[0], quiet=True)
    assert tier.usage().used_bytes == 0


# -- what attachers see


def test_a_copy_past_its_right_is_seen_by_its_generation(tier: HostTier) -> None:
    worker = ArenaView.from_fds(tier.fds, tier.sizes)
    slot = put(KIT, tier, 1)
    tier.lease(slot, "worker", 10.0)
    copy = bytes(worker.view(slot.address, slot.nbytes))
    assert worker.generation(slot.slot_id) == slot.generation
    assert copy == content(1, slot.nbytes)
    tier.expire(11.0)
    assert worker.generation(slot.slot_id) == slot.generation, "the bytes are still the object's"
    tier.remove(meta(1, 1).object_id)
    assert worker.generation(slot.slot_id) == 0
    tier.release(slot, "worker")
    again = put(KIT, tier, 2)
    assert again.slot_id == slot.slot_id
    assert worker.generation(slot.slot_id) == again.generation != slot.generation
    worker.close()


def test_a_writer_past_its_lease_is_seen_by_its_generation(tier: HostTier) -> None:
    worker = ArenaView.from_fds(tier.fds, tier.sizes)
    slot = tier.reserve(meta(1, UNIT), holder="worker")
    tier.lease(slot, "worker", 10.0)
    assert worker.generation(slot.slot_id) == slot.generation
    tier.expire(11.0)
    assert worker.generation(slot.slot_id) == 0
    other = put(KIT, tier, 2)
    worker.view(slot.address, slot.nbytes)[:] = 0xBB
    assert get(tier, other) == content(2, UNIT), "the late write went into limbo"
    worker.close()


def test_generations_go_on_after_a_restart() -> None:
    first = make()
    old = put(KIT, first, 1)
    first.close()
    second = faulted_in(HostTier(CAPACITY_BYTES, first_generation=1 << 32))
    put(KIT, second, 2)
    with pytest.raises(StaleSlot):
        get(second, old)
    second.close()


# -- memory


def test_it_serves_from_the_first_part_on(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = threading.Semaphore(0)
    ready = threading.Semaphore(0)
    real_populate, real_grow = Arena.populate, HostTier.grow

    def populate(self: Arena, sub_arena: int, offset: int, nbytes: int) -> None:
        assert steps.acquire(timeout=WAIT_S)
        real_populate(self, sub_arena, offset, nbytes)

    def grow(self: HostTier, sub_arena: int, ready_bytes: int) -> None:
        real_grow(self, sub_arena, ready_bytes)
        ready.release()

    monkeypatch.setattr(Arena, "populate", populate)
    monkeypatch.setattr(HostTier, "grow", grow)
    tier = HostTier(CAPACITY_BYTES, step_bytes=MIB, numa_nodes=())
    with pytest.raises(TierFull, match="0 of"):
        tier.reserve(meta(1, UNIT), holder="w")
    steps.release()
    assert ready.acquire(timeout=WAIT_S)
    assert tier.ready_bytes() == MIB
    assert not tier.wait_ready(0)
    put(KIT, tier, 1, MIB)
    with pytest.raises(TierFull):
        tier.reserve(meta(2, UNIT), holder="w")
    steps.release()
    assert tier.wait_ready(WAIT_S)
    put(KIT, tier, 2, MIB)
    assert tier.usage().free_bytes == 0
    tier.close()


def test_memory_that_runs_out_halfway_leaves_the_first_half(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Arena.populate

    def populate(self: Arena, sub_arena: int, offset: int, nbytes: int) -> None:
        if offset:
            raise TierUnavailable("no memory")
        real(self, sub_arena, offset, nbytes)

    monkeypatch.setattr(Arena, "populate", populate)
    tier = HostTier(CAPACITY_BYTES, step_bytes=MIB, numa_nodes=())
    with pytest.raises(TierUnavailable, match="no memory"):
        tier.wait_ready(WAIT_S)
    put(KIT, tier, 1, MIB)
    tier.close()


def test_an_owner_may_grow_it_in_its_own_time() -> None:
    told: list[tuple[int, int]] = []
    tier = HostTier(CAPACITY_BYTES, step_bytes=MIB, numa_nodes=(), on_ready=lambda *part: told.append(part))
    assert tier.wait_ready(WAIT_S)
    assert told == [(0, MIB), (0, 2 * MIB)]
    with pytest.raises(TierFull):
        tier.reserve(meta(1, UNIT), holder="w")
    tier.grow(*told[0])
    assert tier.ready_bytes() == MIB
    put(KIT, tier, 1, MIB)
    tier.close()


def test_memory_that_is_not_faulted_in_is_ready_at_once() -> None:
    tier = HostTier(CAPACITY_BYTES, numa_nodes=(0, 0), fault_in=False)
    assert tier.wait_ready(0)
    assert tier.ready_bytes() == CAPACITY_BYTES
    assert [os.fstat(fd).st_blocks for fd in tier.fds[:2]] == [0, 0]
    assert get(tier, put(KIT, tier, 1)) == content(1, UNIT)
    tier.close()


def test_the_table_has_an_entry_for_every_slot(tier: HostTier) -> None:
    assert tier.generation_slots == CAPACITY_BYTES // UNIT
    assert tier.sizes == (CAPACITY_BYTES, tier.generation_slots * 8)
    small = HostTier(CAPACITY_BYTES, max_slots=3)
    assert small.generation_slots == 3
    small.close()


def test_it_answers_what_only_memory_can(tier: HostTier) -> None:
    slot = put(KIT, tier, 1)
    assert tier.next_end_s() is None
    tier.lease(slot, "a", 9.0)
    assert (tier.state(slot), tier.next_end_s()) == (State.LEASED, 9.0)
    assert tier.withdraw(slot)
    assert not tier.withdraw(slot)
    assert (tier.state(slot), tier.usage().quarantined) == (State.LIMBO, 0)
    tier.release(slot, "a")
    assert (tier.state(slot), tier.next_end_s(), tier.usage().used_bytes) == (State.ABSENT, None, 0)
    filling = tier.reserve(meta(1, UNIT), holder="w")
    assert not tier.withdraw(filling)
    assert tier.state(filling) is State.FILLING


def test_close_while_memory_is_faulted_in() -> None:
    tier = HostTier(64 * MIB, step_bytes=MIB)
    tier.close()
    tier.close()
    with pytest.raises(TierUnavailable):
        tier.reserve(meta(1, UNIT), holder="w")


def test_after_close_nothing_crashes(tier: HostTier) -> None:
    slot = put(KIT, tier, 1)
    filling = tier.reserve(meta(2, UNIT), holder="w")
    tier.close()
    with pytest.raises(TierUnavailable):
        get(tier, slot)
    with pytest.raises(TierUnavailable):
        tier.write(filling, bytes(UNIT))
    tier.holder_ended("w")
    tier.remove(meta(1, 1).object_id)
    assert tier.usage().used_bytes == 0
    assert tier.fds == ()


def test_capacity_is_a_hard_bound(tier: HostTier) -> None:
    with pytest.raises(TierFull):
        tier.reserve(meta(1, CAPACITY_BYTES + 1), holder="w")
    slot = tier.reserve(meta(1, CAPACITY_BYTES), holder="w")
    with pytest.raises(TierFull):
        tier.reserve(meta(2, 1), holder="w")
    tier.abort(slot, quiet=True)


def test_an_arena_above_the_memory_limit_is_refused_before_anything_is_mapped() -> None:
    limit = MemoryLimit(8 * MIB, "/sys/fs/cgroup/memory.max", 8 * MIB)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match=f"{6 * MIB} or less"):
        HostTier(7 * MIB, headroom_bytes=2 * MIB, limit=limit)
    assert len(os.listdir("/proc/self/fd")) == before
    HostTier(6 * MIB, headroom_bytes=2 * MIB, limit=limit).close()
    with pytest.raises(ConfigError):
        HostTier(1 << 60)


def test_two_sub_arenas_take_the_preferred_one_first() -> None:
    tier = make_two()
    assert len(tier.fds) == 3
    assert tier.sizes[:2] == (MIB, MIB)
    assert tier.reserve(meta(1, UNIT), holder="w", prefer=1).address[0] == 1
    assert tier.reserve(meta(2, UNIT), holder="w").address[0] == 0
    tier.close()


def test_room_is_made_where_it_is_cheapest(tier: HostTier) -> None:
    for i in range(8):
        put(KIT, tier, i, 256 * 1024)
    victims = tier.victims_window(500_000, lambda o: 0.0 if o == meta(5, 1).object_id else 1.0)
    assert victims is not None
    assert len(victims) == 2
    assert meta(5, 1).object_id in victims
    for victim in victims:
        tier.remove(victim)
    put(KIT, tier, 100, 500_000)
    assert get(tier, found(tier, meta(100, 1).object_id)) == content(100, 500_000)


def test_quarantine_of_what_is_gone_is_no_error(tier: HostTier) -> None:
    slot = put(KIT, tier, 1)
    tier.quarantine(slot)
    tier.quarantine(slot)
    assert tier.usage().quarantined == 1


def test_the_import_is_light() -> None:
    script = (
        "import sys; import kvtier.host; from importlib.metadata import packages_distributions as d;"
        "print(sorted({m.partition('.')[0] for m in sys.modules} & set(d())))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    loaded = set(ast.literal_eval(done.stdout)) - {"kvtier", "_distutils_hack"}
    assert {"numpy", "xxhash"} <= loaded
    assert not loaded & {"ray", "torch", "cupy", "msgpack", "aiofiles", "transformers", "pydantic"}
