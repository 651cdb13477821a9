"""Segments made before they are needed: nobody waits for one, and no limit is passed."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from kvtier.checksum import checksum
from kvtier.disk import ahead, store
from kvtier.disk.ahead import AheadThread
from kvtier.disk.fileops import OsFileOps
from kvtier.disk.fsck import fsck
from kvtier.disk.tier import DiskTier
from kvtier.errors import TierUnavailable
from kvtier.testing.tier_kit import content, default_meta, found, get
from kvtier.tier import Slot
from kvtier.waiting import wait_until

SEGMENT_BYTES = 64 << 10
CAPACITY_BYTES = 4 * SEGMENT_BYTES + 20_000
NBYTES = 50_000
PATIENCE_S = 20.0


class MakingOps(OsFileOps):
    """Notes which threads made segments; `go` holds the making up, `fail` makes it fail."""

    def __init__(self) -> None:
        self.threads: list[str] = []
        self.entered = threading.Event()
        self.go = threading.Event()
        self.go.set()
        self.fail = 0

    def posix_fallocate(self, fd: int, offset: int, nbytes: int) -> None:
        self.threads.append(threading.current_thread().name)
        self.entered.set()
        assert self.go.wait(PATIENCE_S)
        if self.fail:
            raise OSError(self.fail, os.strerror(self.fail))
        super().posix_fallocate(fd, offset, nbytes)


class Bench:
    """A small store that keeps a segment of room ahead."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ops = MakingOps()
        self.tier = self.open()

    def open(self) -> DiskTier:
        self.tier = DiskTier(
            self.directory, CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES, ops=self.ops, direct=False
        )
        return self.tier

    def files(self) -> list[int]:
        """Lengths of the segment files."""
        return sorted(path.stat().st_size for path in (self.directory / "segments").iterdir())

    def reserve(self, index: int) -> Slot:
        return self.tier.reserve(default_meta(index, NBYTES), holder="w")


def has_segments(bench: Bench, count: int) -> bool:
    return bench.tier.stats().segments >= count


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(store, "_AHEAD_BYTES", SEGMENT_BYTES // 2)
    made = Bench(tmp_path / "store")
    yield made
    made.ops.go.set()
    made.tier.close()


def test_room_is_ready_before_anything_is_parked(bench: Bench) -> None:
    assert bench.files() == []
    bench.tier.make_room_ahead()
    assert wait_until(lambda: bench.files() == [SEGMENT_BYTES], PATIENCE_S)


def test_who_parks_makes_no_segment(bench: Bench) -> None:
    bench.tier.make_room_ahead()
    for index in range(4):
        assert wait_until(partial(has_segments, bench, index + 1), PATIENCE_S)
        bench.reserve(index)
    assert set(bench.ops.threads) == {"kvtier-disk-ahead"}


def test_without_it_who_parks_makes_it_himself(bench: Bench) -> None:
    """The control: the test above would see it."""
    bench.reserve(0)
    assert bench.ops.threads == [threading.current_thread().name]


def test_who_parks_waits_for_the_segment_that_is_being_made_and_makes_no_other(bench: Bench) -> None:
    bench.ops.go.clear()
    bench.tier.make_room_ahead()
    assert bench.ops.entered.wait(PATIENCE_S)
    parking = threading.Thread(target=lambda: bench.reserve(0))
    parking.start()
    bench.ops.go.set()
    parking.join(PATIENCE_S)
    assert not parking.is_alive()
    assert set(bench.ops.threads) == {"kvtier-disk-ahead"}


def test_commits_go_on_while_a_segment_is_being_made(bench: Bench) -> None:
    slot = bench.reserve(1)
    bench.ops.entered.clear()
    bench.ops.go.clear()
    bench.tier.make_room_ahead()
    assert bench.ops.entered.wait(PATIENCE_S)
    bench.tier.write(slot, data := content(1, NBYTES))
    bench.tier.commit([(slot, checksum(data))])
    assert get(bench.tier, found(bench.tier, default_meta(1, NBYTES).object_id)) == data
    bench.ops.go.set()


def test_the_limit_holds_and_all_of_it_is_used(bench: Bench) -> None:
    for number in range(4):
        assert bench.tier._store.make_ahead()
        assert not bench.tier._store.make_ahead(), "a segment is room enough"
        bench.reserve(number)
    assert bench.tier._store.make_ahead()
    assert not bench.tier._store.make_ahead()
    assert bench.files() == [CAPACITY_BYTES % SEGMENT_BYTES // 4096 * 4096, *[SEGMENT_BYTES] * 4]


def test_a_drive_that_has_no_room_is_left_alone_for_a_while(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.ops.fail = errno.ENOSPC
    bench.tier.make_room_ahead()
    assert wait_until(lambda: "full" in caplog.text, PATIENCE_S)
    assert bench.files() == []
    assert "full" in bench.tier.stats().last_error
    bench.ops.fail = 0
    bench.reserve(0)
    assert bench.ops.threads == ["kvtier-disk-ahead", threading.current_thread().name]


def test_a_folder_that_is_gone_gets_no_segment(bench: Bench) -> None:
    shutil.rmtree(bench.directory)
    assert not bench.tier._store.make_ahead()
    assert bench.ops.threads == []


def test_what_was_made_ahead_is_free_room_after_a_kill_and_no_damage(bench: Bench, tmp_path: Path) -> None:
    bench.tier._store.make_ahead()
    shutil.copytree(bench.directory, tmp_path / "killed")
    report = fsck(tmp_path / "killed")
    assert report.is_clean, report
    tier = DiskTier(tmp_path / "killed", CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES, direct=False)
    assert tier.stats().segment_bytes == SEGMENT_BYTES
    assert tier.stats().lost_at_open == 0
    tier.close()


def test_the_thread_goes_on_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_SICK_DEVICE_S", 0.0)
    calls = iter([None, True, False, False])
    seen = threading.Semaphore(0)

    def make() -> bool:
        call = next(calls)
        seen.release()
        if call is None:
            raise TierUnavailable("the drive is gone")
        return call

    thread = AheadThread(make)
    assert seen.acquire(timeout=PATIENCE_S)
    for calls_then in (2, 1):
        thread.wake()
        for _ in range(calls_then):
            assert seen.acquire(timeout=PATIENCE_S)
    thread.stop()
    assert not seen.acquire(blocking=False)
