"""A disk tier whose directory, index and system calls a test can spoil."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from kvtier.disk.fileops import Bytes, OsFileOps
from kvtier.disk.tier import DiskTier
from kvtier.testing.tier_kit import TierKit, default_meta, put
from kvtier.tier import Slot

SEGMENT_BYTES = 1 << 20
CAPACITY_BYTES = 4 << 20
NBYTES = 70_001


class FaultyOps(OsFileOps):
    """Raises the errno set for a call by its name; `entered` and `go` hold a read in the middle."""

    def __init__(self) -> None:
        self.fail: dict[str, int] = {}
        self.entered = threading.Event()
        self.go: threading.Event | None = None

    def _maybe(self, call: str) -> None:
        number = self.fail.get(call)
        if number is not None:
            raise OSError(number, os.strerror(number))

    def pwritev(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        self._maybe("pwritev")
        return super().pwritev(fd, buffers, offset)

    def preadv(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        self._maybe("preadv")
        if self.go is not None:
            self.entered.set()
            assert self.go.wait(20)
        return super().preadv(fd, buffers, offset)

    def fdatasync(self, fd: int) -> None:
        self._maybe("fdatasync")
        super().fdatasync(fd)

    def posix_fallocate(self, fd: int, offset: int, nbytes: int) -> None:
        self._maybe("posix_fallocate")
        super().posix_fallocate(fd, offset, nbytes)


class Bench:
    """A tier in a directory with faulty system calls, that can be closed, spoiled and opened again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.kit = TierKit(make=self.open)
        self.ops = FaultyOps()
        self.tier = self.open()

    def open(self, *, capacity_bytes: int = CAPACITY_BYTES, check: bool = True) -> DiskTier:
        self.tier = DiskTier(
            self.directory, capacity_bytes, segment_bytes=SEGMENT_BYTES, ops=self.ops, check=check
        )
        return self.tier

    def reopen(self, *, capacity_bytes: int = CAPACITY_BYTES, check: bool = True) -> DiskTier:
        self.tier.close()
        return self.open(capacity_bytes=capacity_bytes, check=check)

    def put(self, index: int, nbytes: int = NBYTES, *, seed: int | None = None) -> Slot:
        return put(self.kit, self.tier, index, nbytes, seed=seed)

    def find(self, index: int) -> Slot | None:
        return self.tier.find(default_meta(index, NBYTES).object_id)

    def segment(self, number: int) -> Path:
        return self.directory / "segments" / f"{number:08d}.seg"

    def flip(self, segment: int, bit: int) -> None:
        with open(self.segment(segment), "r+b") as file:
            old = os.pread(file.fileno(), 1, bit // 8)[0]
            os.pwrite(file.fileno(), bytes([old ^ 1 << bit % 8]), bit // 8)
            os.fsync(file.fileno())

    def sql(self, *statements: str) -> None:
        """Change the index behind the tier's back, while it is closed."""
        self.tier.close()
        db = sqlite3.connect(self.directory / "index.sqlite")
        for statement in statements:
            db.execute(statement)
        db.commit()
        db.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path / "store")
    yield made
    made.ops.fail.clear()
    made.tier.close()
