"""Full and failing devices: a typed error, nothing half done."""

from __future__ import annotations

import errno
import os
import shutil
from typing import TYPE_CHECKING

import pytest

from kvtier.checksum import checksum
from kvtier.disk.index import ConversationRecord
from kvtier.errors import (
    CorruptObject,
    StaleSlot,
    TierError,
    TierFull,
    TierUnavailable,
)
from kvtier.testing.tier_kit import content, default_meta, get

if TYPE_CHECKING:
    from tests.disk.conftest import Bench

SEGMENT_BYTES = 1 << 20
CAPACITY_BYTES = 4 << 20
NBYTES = 70_001


# -- failing devices


def test_an_unreadable_sector_is_a_miss_that_heals(bench: Bench) -> None:
    slot = bench.put(1)
    bench.ops.fail["preadv"] = errno.EIO
    with pytest.raises(CorruptObject, match="cannot be read"):
        get(bench.tier, slot)
    bench.ops.fail.clear()
    assert bench.find(1) is None
    assert get(bench.tier, bench.put(1)) == content(1, NBYTES)


def test_a_device_that_is_gone_quarantines_nothing(bench: Bench) -> None:
    slot = bench.put(1)
    bench.ops.fail["preadv"] = errno.ENODEV
    with pytest.raises(TierUnavailable):
        get(bench.tier, slot)
    bench.ops.fail.clear()
    assert get(bench.tier, slot) == content(1, NBYTES)
    assert "reading failed" in bench.tier.stats().last_error


@pytest.mark.parametrize(
    ("number", "error"),
    [(errno.EIO, TierUnavailable), (errno.EROFS, TierUnavailable), (errno.ENOSPC, TierFull)],
)
def test_a_failed_write_gives_the_room_back(bench: Bench, number: int, error: type[TierError]) -> None:
    before = bench.tier.usage()
    meta = default_meta(1, NBYTES)
    slot = bench.tier.reserve(meta, holder="w")
    bench.ops.fail["pwritev"] = number
    with pytest.raises(error):
        bench.tier.write(slot, content(1, NBYTES))
    assert bench.tier.usage() == before
    with pytest.raises(StaleSlot):
        bench.tier.commit([(slot, 0)])
    bench.ops.fail.clear()
    assert get(bench.tier, bench.put(1)) == content(1, NBYTES)


def test_a_failed_flush_commits_nothing_and_distrusts_the_segment(bench: Bench) -> None:
    data = content(1, NBYTES)
    slots = [bench.tier.reserve(default_meta(n, NBYTES), holder="w") for n in range(3)]
    for slot in slots:
        bench.tier.write(slot, data)
    bench.ops.fail["fdatasync"] = errno.EIO
    with pytest.raises(TierUnavailable, match="flushing"):
        bench.tier.commit_with_records([(slots[0], checksum(data))], [ConversationRecord("t", "c", 1, b"x")])
    bench.ops.fail.clear()
    assert bench.find(0) is None
    assert bench.tier.record("t", "c") is None
    with pytest.raises(StaleSlot, match="flushed"):
        bench.tier.commit([(slots[1], checksum(data))])
    bench.tier.abort(slots[1], quiet=True)
    bench.tier.holder_ended("w")
    assert bench.tier.usage().used_bytes == 0
    assert get(bench.tier, bench.put(1)) == data


def test_a_full_file_system_is_said_and_nothing_is_left(bench: Bench) -> None:
    bench.ops.fail["posix_fallocate"] = errno.ENOSPC
    with pytest.raises(TierFull, match="file system is full"):
        bench.put(1)
    assert os.listdir(bench.directory / "segments") == []
    assert bench.tier.usage().used_bytes == 0
    assert "full" in bench.tier.stats().last_error
    bench.ops.fail.clear()
    assert get(bench.tier, bench.put(1)) == content(1, NBYTES)


def test_a_full_index_commits_nothing(bench: Bench) -> None:
    bench.put(1)
    db = bench.tier._store.index._db
    pages = db.execute("PRAGMA page_count").fetchone()[0]
    db.execute(f"PRAGMA max_page_count = {pages}")
    before = bench.tier.usage()
    meta = default_meta(2, NBYTES)
    slot = bench.tier.reserve(meta, holder="w")
    bench.tier.write(slot, content(2, NBYTES))
    big = ConversationRecord("t", "c", 1, bytes(100_000))
    with pytest.raises(TierFull):
        bench.tier.commit_with_records([(slot, checksum(content(2, NBYTES)))], [big])
    assert bench.find(2) is None
    assert bench.tier.usage() == before
    db.execute("PRAGMA max_page_count = 100000")
    assert get(bench.tier, bench.put(2)) == content(2, NBYTES)
    assert bench.reopen().usage().objects == 2


def test_a_broken_index_is_refused_with_a_fix(bench: Bench) -> None:
    bench.put(1)
    bench.tier.close()
    (bench.directory / "index.sqlite").write_bytes(b"not a database" * 1000)
    with pytest.raises(TierUnavailable, match="index failed"):
        bench.open()
    os.unlink(bench.directory / "index.sqlite")
    with pytest.raises(TierUnavailable, match="is missing") as refusal:
        bench.open()
    assert refusal.value.fix
    shutil.rmtree(bench.directory)
    bench.open()


def test_a_directory_that_vanished_is_never_called_durable(bench: Bench) -> None:
    slot = bench.put(1)
    shutil.rmtree(bench.directory)
    assert get(bench.tier, slot) == content(1, NBYTES), "open files still read"
    with pytest.raises(TierUnavailable, match="deleted"):
        bench.put(2)
    assert bench.find(2) is None


def test_a_read_only_index_is_unavailable(bench: Bench) -> None:
    bench.put(1)
    db = bench.tier._store.index._db
    db.execute("PRAGMA query_only = ON")
    with pytest.raises(TierUnavailable, match="readonly"):
        bench.put(2)
    assert bench.find(2) is None
    db.execute("PRAGMA query_only = OFF")
    assert get(bench.tier, bench.put(2)) == content(2, NBYTES)


# -- whether it is still there


def test_a_deleted_segment_is_missed(bench: Bench) -> None:
    bench.put(1)
    assert bench.tier.is_there()
    for path in (bench.directory / "segments").iterdir():
        path.unlink()
    assert not bench.tier.is_there()


def test_a_segment_that_is_given_back_during_a_look_is_not_missed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.tier.abort(bench.tier.reserve(default_meta(1, NBYTES), holder="w"), quiet=True)
    store = bench.tier._store
    listed = store.segments.numbers_on_disk

    def meanwhile() -> list[int]:
        with store.lock:
            store.ledger.extents.remove_segment(0)
        store.segments.remove(0)
        return listed()

    monkeypatch.setattr(store.segments, "numbers_on_disk", meanwhile)
    assert bench.tier.is_there()


def test_a_look_that_fails_tells_of_nothing_deleted(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(folder: str) -> list[str]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    bench.put(1)
    with monkeypatch.context() as failing:
        failing.setattr(bench.ops, "names", exhausted)
        assert bench.tier.is_there()
    (bench.directory / "index.sqlite").unlink()
    assert not bench.tier.is_there()
