"""The disk tier with codecs: room given back, damage seen, missing packages taken for no damage."""

from __future__ import annotations

import os
import random
import sqlite3
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvtier.checksum import checksum
from kvtier.disk.buffers import PAGE, StagingPool, is_page_aligned, padded
from kvtier.disk.codecs import CODECS, CodecMissing, zstd_frame
from kvtier.disk.fsck import fsck
from kvtier.disk.header import HEADER_BYTES
from kvtier.disk.ledger import Ledger
from kvtier.disk.scrub import Scrubber
from kvtier.errors import CorruptObject
from kvtier.testing.tier_kit import content, default_meta, found, get

if TYPE_CHECKING:
    from tests.disk.conftest import Bench

NBYTES = 70_001
CODED = ["planes-lz4", "planes-zstd"]


def rows(bench: Bench) -> list[tuple[str, int]]:
    """Codec and stored length of everything in the index, in the order of writing; closes the tier."""
    bench.tier.close()
    db = sqlite3.connect(bench.directory / "index.sqlite")
    answer = db.execute("SELECT codec, stored_bytes FROM objects ORDER BY sequence").fetchall()
    db.close()
    return answer


def hide_zstandard(monkeypatch: pytest.MonkeyPatch) -> None:
    zstd_frame._library.cache_clear()
    monkeypatch.setitem(sys.modules, "zstandard", None)


# -- room


@pytest.mark.parametrize("codec", CODED)
def test_what_became_smaller_takes_less_room_now_and_after_a_restart(bench: Bench, codec: str) -> None:
    datas = {n: bench.numbers(n) for n in range(10)}
    for n, data in datas.items():
        bench.fill(n, data, codec)
    used, device = bench.tier.usage().used_bytes, bench.tier.stats().device_bytes
    free = bench.tier._ledger.extents.free_bytes
    assert bench.tier.stats().user_bytes == 10 * NBYTES
    stored = rows(bench)
    assert [name for name, _ in stored] == [codec] * 10
    assert used == device == sum(HEADER_BYTES + padded(nbytes) for _, nbytes in stored)
    assert used < 10 * (HEADER_BYTES + padded(NBYTES)) * 0.9
    tier = bench.open()
    assert (tier.usage().used_bytes, tier._ledger.extents.free_bytes) == (used, free)
    for n, data in datas.items():
        assert get(tier, found(tier, default_meta(n, NBYTES).object_id)) == data
        assert tier.remove(default_meta(n, NBYTES).object_id)
    assert tier.usage().used_bytes == 0
    tier.commit([])
    assert tier._ledger.extents.free_bytes == tier._ledger.extents.total_bytes


def test_more_fits_than_without(bench: Bench) -> None:
    count = 0
    while bench.tier.stats().segments < 2:
        bench.fill(count, bench.numbers(count), "planes-zstd")
        count += 1
    assert count - 1 > (1 << 20) // (HEADER_BYTES + padded(NBYTES))


@pytest.mark.parametrize("codec", list(CODECS))
def test_what_saves_no_page_is_stored_raw(bench: Bench, codec: str) -> None:
    bench.fill(1, content(1, NBYTES), codec)
    bench.fill(2, bench.numbers(2, PAGE), codec)
    bench.fill(3, b"", codec)
    assert rows(bench) == [("raw", NBYTES), ("raw", PAGE), ("raw", 0)]


def test_what_saves_a_few_pages_of_many_is_stored_raw(bench: Bench) -> None:
    """It would be read by way of other memory, and be unpacked, for next to nothing."""
    noise = content(1, 900_000)
    bench.fill(1, bytes(20_000) + noise[20_000:], "planes-zstd")
    bench.fill(2, bytes(60_000) + noise[60_000:], "planes-zstd")
    assert [codec for codec, _ in rows(bench)] == ["raw", "planes-zstd"]


def test_a_slot_written_twice_holds_the_later_payload(bench: Bench) -> None:
    """The room is given back when no write can follow: a later payload may need all of it."""
    slot = bench.tier.reserve(default_meta(1, NBYTES), holder="w")
    bench.tier.write(slot, bench.numbers(1), "planes-zstd")
    other = bench.tier.reserve(default_meta(2, NBYTES), holder="w")
    bench.tier.write(other, content(2, NBYTES))
    bench.tier.write(slot, content(1, NBYTES), "planes-zstd")
    bench.tier.commit([(slot, checksum(content(1, NBYTES))), (other, checksum(content(2, NBYTES)))])
    for n in (1, 2):
        assert get(bench.tier, found(bench.tier, default_meta(n, NBYTES).object_id)) == content(n, NBYTES)


def test_room_given_back_before_the_last_write_would_be_seen(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above with the room given back as soon as a write ended."""
    write = type(bench.tier).write

    def hasty(self: object, slot: object, data: bytes, codec: str = "raw") -> None:
        write(bench.tier, slot, data, codec)  # type: ignore[arg-type]
        bench.tier._ledger.shrink(bench.tier._ledger.writing(slot))  # type: ignore[arg-type]

    monkeypatch.setattr(type(bench.tier), "write", hasty)
    with pytest.raises((CorruptObject, ValueError)):
        test_a_slot_written_twice_holds_the_later_payload(bench)


def test_an_aborted_write_gives_everything_back(bench: Bench) -> None:
    before = bench.tier.usage()
    slot = bench.tier.reserve(default_meta(1, NBYTES), holder="w")
    bench.tier.write(slot, bench.numbers(1), "planes-zstd")
    bench.tier.abort(slot, quiet=True)
    assert bench.tier.usage() == before
    assert bench.tier._ledger.extents.free_bytes == bench.tier._ledger.extents.total_bytes


def test_raw_goes_straight_from_and_to_the_callers_memory(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses: list[int] = []
    for call in ("pwritev", "preadv"):
        real = getattr(bench.ops, call)

        def noted(fd: int, buffers: list[np.ndarray], offset: int, real=real) -> int:  # type: ignore
            addresses.extend(b.ctypes.data for b in buffers)
            return int(real(fd, buffers, offset))

        monkeypatch.setattr(bench.ops, call, noted)
    staging = bench.tier._store.coder._staging
    with StagingPool(1 << 20).take(2 * padded(NBYTES)) as room:
        payload, into = room[:NBYTES], room[padded(NBYTES) : padded(NBYTES) + NBYTES]
        payload[:] = np.frombuffer(content(1, NBYTES), dtype=np.uint8)
        slot = bench.tier.reserve(default_meta(1, NBYTES), holder="w")
        bench.tier.write(slot, payload)
        bench.tier.commit([(slot, checksum(payload))])
        bench.tier.read(slot, into)
        assert {payload.ctypes.data, into.ctypes.data} <= set(addresses)
        assert staging.held_bytes == 0
        assert np.array_equal(payload, into)
    get(bench.tier, bench.fill(2, bench.numbers(2), "planes-lz4"))
    assert staging.held_bytes > 0


def test_an_unknown_codec_is_refused_before_anything_is_written(bench: Bench) -> None:
    slot = bench.tier.reserve(default_meta(1, NBYTES), holder="w")
    with pytest.raises(ValueError, match="lz9"):
        bench.tier.write(slot, bytes(NBYTES), "lz9")
    assert bench.tier.stats().device_bytes == 0


# -- damage


@pytest.mark.parametrize("codec", CODED)
def test_flips_anywhere_are_misses_that_heal(bench: Bench, codec: str) -> None:
    draw = random.Random(7)
    data, other = bench.numbers(1), bench.numbers(2)
    slot = bench.fill(1, data, codec)
    bench.fill(2, other, codec)
    used = bench.tier.usage().used_bytes
    stored = bench.tier._ledger.readable(slot).stored_bytes
    for turn in range(60):
        slot = found(bench.tier, default_meta(1, NBYTES).object_id)
        within = draw.randrange(HEADER_BYTES if turn % 3 == 0 else stored)
        at = within if turn % 3 == 0 else HEADER_BYTES + within
        bench.flip(slot.address[0], (slot.address[1] + at) * 8 + draw.randrange(8))
        with pytest.raises(CorruptObject):
            get(bench.tier, slot)
        assert bench.find(1) is None
        assert get(bench.tier, bench.fill(1, data, codec)) == data
        assert get(bench.tier, found(bench.tier, default_meta(2, NBYTES).object_id)) == other
        assert bench.tier.usage().used_bytes == used
    assert bench.tier.stats().quarantined_total == 60


def test_a_flip_in_a_stored_plane_goes_unnoticed_without_the_checksum(bench: Bench) -> None:
    data = bench.numbers(1)
    slot = bench.fill(1, data, "planes-lz4")
    bench.flip(slot.address[0], (slot.address[1] + HEADER_BYTES + 4 + 4 + 10) * 8)
    tier = bench.reopen(check=False)
    assert get(tier, found(tier, default_meta(1, NBYTES).object_id)) != data


@pytest.mark.parametrize(
    "lie",
    [
        "UPDATE objects SET codec = 'planes-lz4'",
        "UPDATE objects SET stored_bytes = stored_bytes - 1",
        "UPDATE objects SET stored_bytes = 5",
        "UPDATE objects SET stored_bytes = nbytes, codec = 'raw'",
        "UPDATE objects SET nbytes = nbytes + 1",
    ],
)
def test_whatever_the_index_says_wrong_is_a_miss(bench: Bench, lie: str) -> None:
    bench.fill(1, bench.numbers(1), "planes-zstd")
    bench.sql(lie)
    tier = bench.open()
    (meta,) = tier.objects()
    with pytest.raises(CorruptObject):
        get(tier, found(tier, meta.object_id))


@pytest.mark.parametrize(
    "lie",
    [
        "UPDATE objects SET stored_bytes = nbytes + 1",
        "UPDATE objects SET stored_bytes = -1",
        "UPDATE objects SET nbytes = 1 << 40",
        "UPDATE objects SET codec = 'raw'",
        "UPDATE objects SET codec = 'lz9'",
    ],
)
def test_what_cannot_be_is_left_out_at_open(bench: Bench, lie: str) -> None:
    bench.fill(1, bench.numbers(1), "planes-zstd")
    bench.sql(lie)
    tier = bench.open()
    assert (list(tier.objects()), tier.stats().lost_at_open) == ([], 1)


def test_the_scrub_unpacks_and_finds_what_is_damaged(bench: Bench) -> None:
    slots = [bench.fill(n, bench.numbers(n), CODED[n % 2]) for n in range(8)]
    slots.append(bench.fill(8, bench.numbers(8, 900_000), "planes-zstd"))
    bench.flip(slots[3].address[0], (slots[3].address[1] + HEADER_BYTES + 5000) * 8)
    scrubber = Scrubber(bench.tier._store, 1 << 30, lambda: False, bench.tier._mover.quarantine)
    now_s = 0.0
    while scrubber.stats.passes < 1:
        now_s += scrubber.step(now_s)
    assert (scrubber.stats.found_bad, bench.tier.stats().quarantined_total) == (1, 1)
    assert scrubber.stats.read_bytes == bench.tier.usage().used_bytes
    assert [n for n in range(9) if bench.find(n) is None] == [3]


def test_fsck_checks_and_rebuilds_what_is_encoded(bench: Bench) -> None:
    codecs = list(CODECS)
    for n in range(12):
        bench.fill(n, bench.numbers(n), codecs[n % len(codecs)])
    slot = found(bench.tier, default_meta(3, NBYTES).object_id)
    used = bench.tier.usage().used_bytes
    bench.tier.close()
    assert fsck(bench.directory).is_clean
    bench.flip(slot.address[0], (slot.address[1] + HEADER_BYTES + 100) * 8)
    report = fsck(bench.directory)
    assert (report.damaged_payloads, report.objects, report.unchecked) == (1, 11, 0)
    os.unlink(bench.directory / "index.sqlite")
    assert fsck(bench.directory, repair=True).objects == 11
    tier = bench.open()
    assert tier.usage().used_bytes < used
    for n in set(range(12)) - {3}:
        assert get(tier, found(tier, default_meta(n, NBYTES).object_id)) == bench.numbers(n)


# -- a package that is missing


def test_a_missing_package_is_no_damage(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = bench.numbers(1)
    slot = bench.fill(1, data, "planes-zstd")
    bench.fill(2, bench.numbers(2), "planes-lz4")
    with monkeypatch.context() as patch:
        hide_zstandard(patch)
        tier = bench.reopen()
        assert "1 blocks of the codec planes-zstd cannot be read" in caplog.text
        slot = found(tier, default_meta(1, NBYTES).object_id)
        with pytest.raises(CodecMissing):
            get(tier, slot)
        assert get(tier, found(tier, default_meta(2, NBYTES).object_id)) == bench.numbers(2)
        scrubber = Scrubber(tier._store, 1 << 30, lambda: False, tier._mover.quarantine)
        for now_s in range(20):
            scrubber.step(float(now_s))
        assert (scrubber.stats.passes, scrubber.stats.found_bad) == (1, 0)
        waiting = tier.reserve(default_meta(3, NBYTES), holder="w")
        with pytest.raises(CodecMissing):
            tier.write(waiting, bench.numbers(3), "planes-zstd")
        tier.write(waiting, bench.numbers(3))
        tier.commit([(waiting, checksum(bench.numbers(3)))])
        tier.close()
        report = fsck(bench.directory)
        assert report.is_clean
        assert (report.unchecked, report.unchecked_why) == (1, ["the package zstandard is not installed"])
        tier = bench.open()
        assert tier.usage().quarantined == 0
    assert get(tier, found(tier, default_meta(1, NBYTES).object_id)) == data


# -- memory


def test_staging_memory_is_aligned_bounded_and_used_again() -> None:
    pool = StagingPool(1 << 20)
    with pool.take(300_000) as room:
        assert room.nbytes >= 300_000
        assert is_page_aligned(room)
        first = room.ctypes.data
    with pool.take(200_000) as room:
        assert room.ctypes.data == first
    for nbytes in (1, 5000, 900_000, 100, 600_000, 3 << 20, 40_000, 0):
        with pool.take(nbytes) as room:
            assert room.nbytes >= nbytes
            assert pool.held_bytes <= max(1 << 20, padded(nbytes))
        assert pool.held_bytes <= 1 << 20


def test_staging_beyond_the_limit_waits_its_turn() -> None:
    pool, order, begun = StagingPool(10 * PAGE), [], threading.Semaphore(0)

    class Told(type(pool._waiting)):  # type: ignore[misc]
        def append(self, ticket: object) -> None:
            super().append(ticket)
            begun.release()

    pool._waiting = Told()

    def take(pages: int) -> None:
        with pool.take(pages * PAGE):
            order.append(pages)
            assert pool._out_bytes <= 10 * PAGE

    with ThreadPoolExecutor(3) as threads:
        with pool.take(8 * PAGE):
            begun.acquire()
            futures = []
            for pages in (9, 1, 2):
                futures.append(threads.submit(take, pages))
                assert begun.acquire(timeout=20)
            assert order == [], "the small ones do not overtake the large one"
        for future in futures:
            future.result(20)
    assert order[0] == 9
    assert pool.held_bytes <= 10 * PAGE


def test_many_at_once_share_little_staging_memory(bench: Bench) -> None:
    bench.tier._store.coder._staging = StagingPool(200_000)
    datas = [bench.numbers(n) for n in range(12)]
    slots = [bench.tier.reserve(default_meta(n, NBYTES), holder="w") for n in range(12)]
    for future in bench.tier.write_many(list(zip(slots, datas, strict=True)), codec="planes-zstd"):
        future.result(20)
    bench.tier.commit([(slot, checksum(data)) for slot, data in zip(slots, datas, strict=True)])
    intos = [bytearray(NBYTES) for _ in slots]
    for future in bench.tier.read_many(list(zip(slots, intos, strict=True))):
        future.result(20)
    assert [bytes(into) for into in intos] == datas
    assert bench.tier._store.coder._staging.held_bytes <= 200_000


def test_the_ledger_gives_nothing_back_twice() -> None:
    ledger = Ledger(1 << 20, 0)
    ledger.extents.add_segment(0, 1 << 20)
    entry = ledger.reserve(default_meta(1, 10 * PAGE), "w")
    assert entry is not None
    entry.stored_bytes = 3 * PAGE - 5
    for _ in range(2):
        ledger.shrink(entry)
        assert (entry.room, ledger.usage().used_bytes) == (4 * PAGE, 4 * PAGE)
        assert ledger.usage().filling_bytes == 4 * PAGE
        assert ledger.extents.free_bytes == (1 << 20) - 4 * PAGE
