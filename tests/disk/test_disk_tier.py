"""What the disk tier promises beyond the contract: bounds, durability with records, several at once."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvtier.checksum import checksum
from kvtier.disk.buffers import PAGE
from kvtier.disk.entry import room_for
from kvtier.disk.fsck import fsck
from kvtier.disk.header import HEADER_BYTES
from kvtier.disk.index import Batch, ConversationRecord
from kvtier.disk.tier import DiskTier
from kvtier.errors import (
    ConfigError,
    CorruptObject,
    ObjectExists,
    SlotLeased,
    StaleSlot,
    TierError,
    TierFull,
    TierUnavailable,
)
from kvtier.objects import ObjectId
from kvtier.testing.tier_kit import content, default_meta, found, get
from kvtier.tier import Slot

if TYPE_CHECKING:
    from tests.disk.conftest import Bench

SEGMENT_BYTES = 1 << 20
CAPACITY_BYTES = 4 << 20
NBYTES = 70_001


# -- bounds and callers


def test_the_limit_holds_from_the_first_byte_and_after_it_was_lowered(bench: Bench) -> None:
    def on_disk() -> int:
        folder = bench.directory / "segments"
        return sum(os.stat(folder / name).st_size for name in os.listdir(folder))

    stored = 0
    while True:
        try:
            bench.put(stored)
        except TierFull:
            break
        stored += 1
        assert on_disk() <= CAPACITY_BYTES
    assert stored > 40
    tier = bench.reopen(capacity_bytes=SEGMENT_BYTES)
    with pytest.raises(TierFull):
        bench.put(1000)
    for index in range(stored):
        assert get(tier, found(tier, default_meta(index, NBYTES).object_id)) == content(index, NBYTES)
        tier.remove(default_meta(index, NBYTES).object_id)
    bench.put(1000)
    assert on_disk() <= SEGMENT_BYTES
    assert get(bench.reopen(capacity_bytes=SEGMENT_BYTES), bench.find(1000) or pytest.fail()) == content(
        1000, NBYTES
    )


def test_room_of_a_removed_object_is_not_reused_before_the_index_forgot_it(bench: Bench) -> None:
    slots = [bench.put(index) for index in range(3)]
    bench.tier.remove(default_meta(1, NBYTES).object_id)
    assert bench.tier.reserve(default_meta(8, NBYTES), holder="w").address != slots[1].address
    bench.tier.commit([])
    assert bench.tier.reserve(default_meta(9, NBYTES), holder="w").address == slots[1].address


def test_an_object_longer_than_a_segment_is_refused_with_a_fix(bench: Bench) -> None:
    with pytest.raises(TierFull) as refusal:
        bench.tier.reserve(default_meta(1, SEGMENT_BYTES), holder="w")
    assert "segment_bytes" in refusal.value.fix
    bench.tier.reserve(default_meta(1, SEGMENT_BYTES - HEADER_BYTES), holder="w")


@pytest.mark.parametrize(
    ("capacity", "segment"), [(4096, 1 << 20), (1 << 20, 4096), (1 << 20, 10_000), (1 << 50, 8192)]
)
def test_sizes_that_cannot_work_are_refused(tmp_path: Path, capacity: int, segment: int) -> None:
    with pytest.raises(ConfigError, match=r"disk\."):
        DiskTier(tmp_path / "store", capacity, segment_bytes=segment)
    assert not (tmp_path / "store").exists()


def test_what_was_not_written_cannot_be_committed(bench: Bench) -> None:
    slot = bench.tier.reserve(default_meta(1, NBYTES), holder="w")
    with pytest.raises(ValueError, match="write"):
        bench.tier.commit([(slot, 0)])
    bench.tier.write(slot, content(1, NBYTES))
    said = (slot, checksum(content(1, NBYTES)))
    with pytest.raises(ValueError, match="twice"):
        bench.tier.commit([said, said])
    bench.tier.commit([said])


def test_a_removed_object_keeps_its_room_while_it_is_being_read(bench: Bench) -> None:
    slot = bench.put(1)
    bench.ops.go = threading.Event()
    futures = bench.tier.read_many([(slot, into := bytearray(NBYTES))])
    assert bench.ops.entered.wait(20)
    assert bench.tier.remove(default_meta(1, NBYTES).object_id) == 0
    assert bench.tier.usage().limbo_bytes > NBYTES
    with pytest.raises(StaleSlot):
        bench.tier.read(slot, bytearray(NBYTES))
    assert bench.put(1, seed=9).address != slot.address
    bench.ops.go.set()
    futures[0].result(20)
    assert into == content(1, NBYTES)
    assert bench.tier.usage().limbo_bytes == 0


def test_a_leased_quarantined_object_is_held_until_released(bench: Bench) -> None:
    slot = bench.put(1)
    bench.tier.lease(slot, "a", 10.0)
    bench.flip(slot.address[0], (slot.address[1] + HEADER_BYTES) * 8)
    with pytest.raises(CorruptObject):
        get(bench.tier, slot)
    with pytest.raises(SlotLeased):
        bench.tier.remove(default_meta(1, NBYTES).object_id)
    bench.put(1)
    assert bench.tier.usage().limbo_bytes > 0
    bench.tier.release(slot, "a")
    assert bench.tier.usage().limbo_bytes == 0


def test_many_are_written_and_read_at_once_and_each_is_told(bench: Bench) -> None:
    told: list[tuple[Slot, TierError | None]] = []
    lock = threading.Lock()

    def on_each(slot: Slot, problem: TierError | None) -> None:
        with lock:
            told.append((slot, problem))

    slots = [bench.tier.reserve(default_meta(n, NBYTES), holder="w") for n in range(12)]
    datas = [content(n, NBYTES) for n in range(12)]
    for future in bench.tier.write_many(list(zip(slots, datas, strict=True)), on_each):
        future.result(20)
    bench.tier.commit([(slot, checksum(data)) for slot, data in zip(slots, datas, strict=True)])
    assert bench.tier.stats().flushes == 1, "one flush for many"
    intos = [bytearray(NBYTES) for _ in slots]
    bench.tier.remove(default_meta(3, NBYTES).object_id)
    futures = bench.tier.read_many(list(zip(slots, intos, strict=True)), on_each)
    assert isinstance(futures[3].exception(20), StaleSlot)
    for n in set(range(12)) - {3}:
        futures[n].result(20)
        assert intos[n] == datas[n]
    assert len(told) == 24
    assert [type(problem) for _, problem in told if problem is not None] == [StaleSlot]


def test_records_and_state_become_durable_with_the_objects(bench: Bench) -> None:
    data = content(1, NBYTES)
    slot = bench.tier.reserve(default_meta(1, NBYTES), holder="w")
    bench.tier.write(slot, data)
    record = ConversationRecord("acme", "chat-42", 3, b"chain")
    bench.tier.commit_with_records([(slot, checksum(data))], [record], {"policy": b"state"})
    tier = bench.reopen()
    assert tier.record("acme", "chat-42") == record
    assert list(tier.record_batches(10)) == [[record]]
    assert tier.state("policy") == b"state"
    with pytest.raises(ObjectExists):
        tier.reserve(default_meta(1, NBYTES), holder="w")


def test_device_bytes_count_headers_and_padding(bench: Bench) -> None:
    bench.put(1)
    stats = bench.tier.stats()
    assert stats.user_bytes == NBYTES
    assert stats.device_bytes == HEADER_BYTES + -(-NBYTES // PAGE) * PAGE


def test_after_close_everything_is_refused(bench: Bench) -> None:
    slot = bench.put(1)
    bench.tier.close()
    for call in (
        lambda: bench.tier.read(slot, bytearray(NBYTES)),
        lambda: bench.tier.reserve(default_meta(2, 1), holder="w"),
        lambda: bench.tier.commit([]),
    ):
        with pytest.raises(TierUnavailable, match="closed"):
            call()
    bench.tier.close()


# -- in the place of another


def beside(bench: Bench, nbytes: int = 2 * NBYTES) -> tuple[Slot, bytes]:
    """Object 0 is there, and another one of its name is written and not committed."""
    bench.put(0)
    slot = bench.tier.reserve(default_meta(0, nbytes), holder="w", replacing=True)
    data = content(77, nbytes)
    bench.tier.write(slot, data)
    return slot, data


def stored(bench: Bench) -> bytes:
    return get(bench.tier, found(bench.tier, default_meta(0, 1).object_id))


def test_an_object_stays_until_the_commit_of_the_one_in_its_place(bench: Bench) -> None:
    slot, data = beside(bench)
    for replacing in (False, True):
        with pytest.raises(ObjectExists):
            bench.tier.reserve(default_meta(0, NBYTES), holder="x", replacing=replacing)
    assert stored(bench) == content(0, NBYTES)
    bench.tier.commit([(slot, checksum(data))])
    assert stored(bench) == data
    bench.tier.commit([])
    usage = bench.tier.usage()
    assert (usage.objects, usage.filling_bytes) == (1, 0)
    assert usage.used_bytes == room_for(2 * NBYTES)
    bench.reopen()
    assert stored(bench) == data
    assert bench.tier.usage().used_bytes == room_for(2 * NBYTES)
    bench.tier.remove(object_id(0))
    bench.reopen()
    assert bench.find(0) is None


@pytest.mark.parametrize("call", ["", "fdatasync"])
def test_an_object_stays_when_the_one_in_its_place_does_not_come(bench: Bench, call: str) -> None:
    slot, data = beside(bench)
    if call:
        bench.ops.fail[call] = errno.EIO
        with pytest.raises(TierError):
            bench.tier.commit([(slot, checksum(data))])
        bench.ops.fail.clear()
    else:
        bench.tier.abort(slot, quiet=True)
    assert stored(bench) == content(0, NBYTES)
    bench.reopen()
    assert stored(bench) == content(0, NBYTES)
    usage = bench.tier.usage()
    assert (usage.objects, usage.used_bytes) == (1, room_for(NBYTES))


def test_an_object_stays_when_the_index_cannot_list_the_one_in_its_place(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot, data = beside(bench)

    def apply(batch: Batch) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(bench.tier._store.index, "apply", apply)
        with pytest.raises(TierError):
            bench.tier.commit([(slot, checksum(data))])
    assert stored(bench) == content(0, NBYTES)
    bench.tier.commit([])
    bench.reopen()
    assert stored(bench) == content(0, NBYTES)


def test_what_is_removed_while_it_is_replaced_is_not_there_twice(bench: Bench) -> None:
    slot, data = beside(bench)
    bench.tier.remove(object_id(0))
    assert bench.find(0) is None
    bench.tier.commit([(slot, checksum(data))])
    bench.tier.commit([])
    assert stored(bench) == data
    assert bench.tier.usage().used_bytes == room_for(2 * NBYTES)


def test_an_index_made_anew_has_the_newer_of_two(bench: Bench) -> None:
    slot, data = beside(bench)
    bench.tier.commit([(slot, checksum(data))])
    bench.tier.close()
    for path in bench.directory.glob("index.sqlite*"):
        path.unlink()
    fsck(bench.directory, repair=True)
    bench.open()
    assert stored(bench) == data
    assert bench.tier.usage().objects == 1


def object_id(index: int) -> ObjectId:
    return default_meta(index, 1).object_id
