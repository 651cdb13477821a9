"""Large blocks are moved in parts: one bad part fails the block, and no part goes unchecked."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kvtier.background import NICER
from kvtier.checksum import Buffer, checksum
from kvtier.disk.buffers import PAGE
from kvtier.disk.codecs import RAW
from kvtier.disk.fileops import Bytes, OsFileOps
from kvtier.disk.header import HEADER_BYTES
from kvtier.disk.mover import begun_in
from kvtier.disk.tier import DiskTier
from kvtier.disk.transfers import Lane, Transfer
from kvtier.errors import CorruptObject, StaleSlot, TierError, TierUnavailable
from kvtier.testing.tier_kit import content, default_meta, found, get
from kvtier.tier import Slot

MiB = 1 << 20
SEGMENT_BYTES = 16 * MiB
NBYTES = 7 * MiB + 123
STEP = 2 * MiB
PARTS = 4
PATIENCE_S = 20.0


class PartOps(OsFileOps):
    """Notes each transfer's offset, and calls `before` with it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.before: Callable[[int], None] = lambda offset: None

    def pwritev(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        self.calls.append(("write", offset))
        self.before(offset)
        return super().pwritev(fd, buffers, offset)

    def preadv(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        self.calls.append(("read", offset))
        self.before(offset)
        return super().preadv(fd, buffers, offset)

    def fsync(self, fd: int) -> None:
        self.calls.append(("fsync", 0))
        super().fsync(fd)


class Large:
    """A tier whose blocks are long enough for parts."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ops = PartOps()
        self.tier = self.open()

    def open(self, *, check: bool = True) -> DiskTier:
        self.tier = DiskTier(
            self.directory, 3 * SEGMENT_BYTES, segment_bytes=SEGMENT_BYTES, ops=self.ops, check=check
        )
        return self.tier

    def reserve(self, index: int) -> Slot:
        return self.tier.reserve(default_meta(index, NBYTES), holder="w")

    def write(self, index: int) -> tuple[Slot, Future[None]]:
        slot = self.reserve(index)
        return slot, self.tier.write_many([(slot, aligned(content(index, NBYTES)))])[0]

    def put(self, index: int) -> Slot:
        slot, future = self.write(index)
        future.result(PATIENCE_S)
        self.tier.commit([(slot, checksum(content(index, NBYTES)))])
        return found(self.tier, default_meta(index, NBYTES).object_id)

    def read(self, slot: Slot, into: Bytes) -> Future[None]:
        return self.tier.read_many([(slot, into)])[0]

    def fail_at(self, offset: int, number: int) -> None:
        def before(at: int) -> None:
            if at == offset:
                raise OSError(number, os.strerror(number))

        self.ops.before = before

    def segment(self, slot: Slot) -> Path:
        return self.directory / "segments" / f"{slot.address[0]:08d}.seg"


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Large]:
    made = Large(tmp_path / "store")
    yield made
    made.ops.before = lambda offset: None
    made.tier.close()


def aligned(data: bytes) -> Bytes:
    room = np.frombuffer(mmap.mmap(-1, len(data)), dtype=np.uint8)
    room[:] = np.frombuffer(data, dtype=np.uint8)
    return room


def blank(shift: int = 0) -> Bytes:
    return np.frombuffer(mmap.mmap(-1, NBYTES + PAGE), dtype=np.uint8)[shift : shift + NBYTES]


def part_at(slot: Slot, part: int) -> int:
    """Offset in the segment at which the request of a part starts; the first has the header."""
    return slot.address[1] + (HEADER_BYTES + part * STEP if part else 0)


@pytest.mark.parametrize("shift", [0, 8])
def test_a_large_block_comes_back_in_parts(large: Large, shift: int) -> None:
    slot = large.put(1)
    assert {at for call, at in large.ops.calls if call == "write"} == {
        part_at(slot, part) for part in range(PARTS)
    }
    large.ops.calls.clear()
    large.read(slot, into := blank(shift)).result(PATIENCE_S)
    assert into.tobytes() == content(1, NBYTES)
    assert len([call for call in large.ops.calls if call[0] == "read"]) >= PARTS
    assert get(large.tier, slot) == content(1, NBYTES), "and in one piece"


def test_the_parts_of_one_block_are_under_way_together(large: Large) -> None:
    slot = large.put(1)
    all_in = threading.Barrier(PARTS)
    large.ops.before = lambda offset: (all_in.wait(PATIENCE_S), None)[1]
    large.read(slot, into := blank()).result(PATIENCE_S)
    assert into.tobytes() == content(1, NBYTES)


@pytest.mark.parametrize("part", range(PARTS))
def test_an_unreadable_part_makes_the_block_a_miss(large: Large, part: int) -> None:
    slot, other = large.put(1), large.put(2)
    large.fail_at(part_at(slot, part), errno.EIO)
    with pytest.raises(CorruptObject, match="cannot be read"):
        large.read(slot, blank()).result(PATIENCE_S)
    large.ops.before = lambda offset: None
    assert large.tier.find(default_meta(1, NBYTES).object_id) is None
    assert large.tier.stats().quarantined_total == 1
    assert get(large.tier, other) == content(2, NBYTES)
    assert get(large.tier, large.put(1)) == content(1, NBYTES)


def test_a_device_that_goes_away_in_a_part_quarantines_nothing(large: Large) -> None:
    slot = large.put(1)
    large.fail_at(part_at(slot, 2), errno.ENODEV)
    with pytest.raises(TierUnavailable):
        large.read(slot, blank()).result(PATIENCE_S)
    large.ops.before = lambda offset: None
    assert get(large.tier, slot) == content(1, NBYTES)


@pytest.mark.parametrize("part", range(PARTS))
def test_a_flipped_bit_in_any_part_is_never_served(large: Large, part: int) -> None:
    slot = large.put(1)
    flip(large, slot, part)
    with pytest.raises(CorruptObject, match="checksum"):
        large.read(slot, blank()).result(PATIENCE_S)
    assert large.tier.find(default_meta(1, NBYTES).object_id) is None


def test_parts_that_changed_places_are_never_served(large: Large) -> None:
    slot = large.put(1)
    at = part_at(slot, 1)
    with open(large.segment(slot), "r+b") as file:
        one, two = os.pread(file.fileno(), STEP, at), os.pread(file.fileno(), STEP, at + STEP)
        os.pwrite(file.fileno(), two + one, at)
        os.fsync(file.fileno())
    with pytest.raises(CorruptObject, match="checksum"):
        large.read(slot, blank()).result(PATIENCE_S)


def test_without_the_sums_of_the_parts_wrong_bytes_are_served(large: Large) -> None:
    """The control: the two tests above would see it."""
    slot = large.put(1)
    flip(large, slot, 2)
    large.tier.close()
    tier = large.open(check=False)
    slot = found(tier, default_meta(1, NBYTES).object_id)
    large.read(slot, into := blank()).result(PATIENCE_S)
    assert into.tobytes() != content(1, NBYTES)


def test_a_part_behind_the_end_of_the_file_is_a_miss(large: Large) -> None:
    slot = large.put(1)
    os.truncate(large.segment(slot), part_at(slot, 2) + PAGE)
    with pytest.raises(CorruptObject, match="ends"):
        large.read(slot, blank()).result(PATIENCE_S)


@pytest.mark.parametrize("part", range(PARTS))
def test_a_part_that_cannot_be_written_gives_the_slot_back(large: Large, part: int) -> None:
    before = large.tier.usage()
    slot = large.reserve(1)
    large.fail_at(part_at(slot, part), errno.EIO)
    (future,) = large.tier.write_many([(slot, aligned(content(1, NBYTES)))])
    assert isinstance(future.exception(PATIENCE_S), TierUnavailable)
    with pytest.raises(StaleSlot):
        large.tier.commit([(slot, 0)])
    assert large.tier.usage() == before
    large.ops.before = lambda offset: None
    assert get(large.tier, large.put(1)) == content(1, NBYTES)


def test_a_failed_block_keeps_its_room_until_its_other_parts_have_ended(large: Large) -> None:
    go, entered, failed = threading.Event(), threading.Event(), threading.Event()

    def before(offset: int) -> None:
        if offset == HEADER_BYTES + STEP:
            entered.set()
            assert go.wait(PATIENCE_S)
        elif offset == HEADER_BYTES + 2 * STEP:
            assert entered.wait(PATIENCE_S)
            failed.set()
            raise OSError(errno.EIO, "bad")

    large.ops.before = before
    slot, future = large.write(1)
    assert failed.wait(PATIENCE_S)
    assert not future.done()
    with pytest.raises(ValueError, match="not ended"):
        large.tier.commit([(slot, 0)])
    large.tier.abort(slot, quiet=True)
    assert large.tier.usage().limbo_bytes > NBYTES
    go.set()
    assert isinstance(future.exception(PATIENCE_S), TierUnavailable)
    assert large.tier.usage().used_bytes == 0


def test_close_waits_for_parts_under_way(large: Large) -> None:
    slot = large.put(1)
    go, entered = threading.Event(), threading.Event()

    def before(offset: int) -> None:
        if offset == part_at(slot, 1):
            entered.set()
            assert go.wait(PATIENCE_S)

    large.ops.before = before
    future = large.read(slot, into := blank())
    assert entered.wait(PATIENCE_S)
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(large.tier.close)
        assert not future.done()
        go.set()
        closing.result(PATIENCE_S)
    future.result(0)
    assert into.tobytes() == content(1, NBYTES)


def test_a_closed_tier_refuses_blocks_and_lets_them_go(large: Large) -> None:
    slot, written = large.reserve(1), large.put(2)
    with large.tier._lock:
        entry = large.tier._ledger.readable(written)
    for lane in (large.tier._writes, large.tier._spills, large.tier._reads):
        lane.close()
    # As in the middle of a `close`: the books are open still.
    futures = [
        *large.tier.write_many([(slot, aligned(content(1, NBYTES)))]),
        *large.tier.write_many([(slot, aligned(content(1, NBYTES)))], spill=True),
        *large.tier.read_many([(written, blank())]),
    ]
    assert all(isinstance(future.exception(PATIENCE_S), TierUnavailable) for future in futures)
    assert entry.pins == 0
    large.tier.close()
    late = large.tier.read_many([(written, blank())])[0]
    assert isinstance(late.exception(PATIENCE_S), TierUnavailable)


def test_nothing_is_under_way_when_blocks_cannot_be_begun(large: Large) -> None:
    first, second = [large.reserve(n) for n in range(2)]
    data, began = aligned(content(0, NBYTES)), []

    def begin(slot: Slot, data: Buffer) -> Transfer:
        if slot == second:
            raise MemoryError("no room")
        began.append(large.tier._mover.writing(slot, data, RAW, 2))
        return began[0]

    lane = Lane(1, "test-lane")
    with pytest.raises(MemoryError):
        begun_in(lane, begin, [(first, data), (second, data)], None)
    assert began[0].future.done()
    lane.close()


def test_each_block_is_told_once(large: Large) -> None:
    told: list[tuple[Slot, TierError | None]] = []
    slots = [large.reserve(n) for n in range(3)]
    data = aligned(content(1, NBYTES))
    large.fail_at(part_at(slots[1], 0), errno.EIO)
    futures = large.tier.write_many([(slot, data) for slot in slots], lambda *said: told.append(said))
    bad = [isinstance(future.exception(PATIENCE_S), TierUnavailable) for future in futures]
    assert sorted(slot.slot_id for slot, _ in told) == sorted(slot.slot_id for slot in slots)
    assert any(bad)
    assert {slot for slot, problem in told if problem} == {s for s, b in zip(slots, bad, strict=True) if b}


# -- what nobody waits for


def nice_now() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_a_spill_leaves_the_processor_to_others_and_a_park_does_not(large: Large) -> None:
    seen: dict[int, int] = {}
    large.ops.before = lambda offset: seen.update({offset: nice_now()})
    spilled, parked = large.reserve(0), large.reserve(1)
    for slot, spill in ((spilled, True), (parked, False)):
        block = [(slot, aligned(content(slot.slot_id, NBYTES)))]
        large.tier.write_many(block, spill=spill)[0].result(PATIENCE_S)
    assert {seen[part_at(parked, part)] for part in range(PARTS)} == {nice_now()}
    assert seen[part_at(spilled, 0)] == min(19, nice_now() + NICER)


def test_a_park_does_not_wait_behind_spills(large: Large) -> None:
    go = threading.Event()
    spilled, parked = large.reserve(0), large.reserve(1)
    spilling = range(spilled.address[1], spilled.address[1] + NBYTES)
    large.ops.before = lambda offset: assert_waited(go) if offset in spilling else None
    first = large.tier.write_many([(spilled, aligned(content(0, NBYTES)))], spill=True)[0]
    large.tier.write_many([(parked, aligned(content(1, NBYTES)))])[0].result(PATIENCE_S)
    assert not first.done()
    go.set()
    first.result(PATIENCE_S)


def test_the_scrub_leaves_the_processor_to_others(large: Large) -> None:
    large.put(0)
    read, seen = threading.Event(), set()

    def before(offset: int) -> None:
        seen.add(nice_now())
        read.set()

    large.ops.before = before
    large.tier.start_scrub(1 << 40)
    assert read.wait(PATIENCE_S)
    assert seen == {min(19, nice_now() + NICER)}


def assert_waited(event: threading.Event) -> None:
    assert event.wait(PATIENCE_S)


# -- new segments


def test_nobody_waits_for_a_flush_of_a_new_segment_before_the_commit(large: Large) -> None:
    large.ops.calls.clear()
    slots = [large.write(n) for n in range(3)]
    for _, future in slots:
        future.result(PATIENCE_S)
    store = large.tier._store
    assert {slot.address[0] for slot, _ in slots} == {0, 1}
    assert "fsync" not in {call for call, _ in large.ops.calls}
    large.tier.commit([])
    assert store.index.segments() == {}, "it may be gone after power loss, so the index does not know it"
    large.tier.commit([(slot, checksum(content(n, NBYTES))) for n, (slot, _) in enumerate(slots)][:1])
    assert store.index.segments() == {slots[0][0].address[0]: SEGMENT_BYTES}
    large.tier.commit([(slots[2][0], checksum(content(2, NBYTES)))])
    assert set(store.index.segments()) == {0, 1}


def flip(large: Large, slot: Slot, part: int) -> None:
    at = slot.address[1] + HEADER_BYTES + part * STEP + 99
    with open(large.segment(slot), "r+b") as file:
        old = os.pread(file.fileno(), 1, at)[0]
        os.pwrite(file.fileno(), bytes([old ^ 4]), at)
        os.fsync(file.fileno())
