"""A disk tier whose directory, index and system calls a test can spoil."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from kvtier.checksum import checksum
from kvtier.disk.fileops import Bytes, OsFileOps
from kvtier.disk.store import OpenVault
from kvtier.disk.tier import DiskTier
from kvtier.disk.vault import Vault
from kvtier.testing.tier_kit import TierKit, content, default_meta, found, get, put
from kvtier.tier import Slot

SEGMENT_BYTES = 1 << 20
CAPACITY_BYTES = 4 << 20
NBYTES = 70_001
MASTER_KEY = bytes(range(32))


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

    def fsync(self, fd: int) -> None:
        """As a flush of a device that cannot flush: it fails with the same."""
        self._maybe("fdatasync")
        super().fsync(fd)

    def posix_fallocate(self, fd: int, offset: int, nbytes: int) -> None:
        self._maybe("posix_fallocate")
        super().posix_fallocate(fd, offset, nbytes)


class Bench:
    """A tier in a directory with faulty system calls, that can be closed, spoiled and opened again.

    master_key: of a key store beside the directory; without one, nothing is sealed.
    """

    def __init__(self, directory: Path, master_key: bytes | None = None) -> None:
        self.directory = directory
        self.master_key = master_key
        self.kit = TierKit(make=self.open)
        self.ops = FaultyOps()
        self.tier = self.open()

    def open(self, *, capacity_bytes: int = CAPACITY_BYTES, check: bool = True) -> DiskTier:
        self.tier = DiskTier(
            self.directory,
            capacity_bytes,
            segment_bytes=SEGMENT_BYTES,
            ops=self.ops,
            check=check,
            open_vault=self.open_vault,
        )
        return self.tier

    @property
    def open_vault(self) -> OpenVault | None:
        if self.master_key is None:
            return None
        key, folder = self.master_key, self.directory.parent / "vault"
        return lambda store_id: Vault(folder, store_id, key)

    def fill(self, index: int, data: bytes, codec: str) -> Slot:
        """Store `data` as object `index`, the way an owner of a codec does."""
        slot = self.tier.reserve(default_meta(index, len(data)), holder="w")
        self.tier.write(slot, data, codec)
        self.tier.commit([(slot, checksum(data))])
        return found(self.tier, default_meta(index, len(data)).object_id)

    def read(self, index: int) -> bytes:
        return get(self.tier, found(self.tier, default_meta(index, NBYTES).object_id))

    def there(self) -> set[int]:
        """Which of the first ten objects are there; each must hold its `numbers`."""
        indexes = {n for n in range(10) if self.find(n) is not None}
        for n in indexes:
            assert self.read(n) == self.numbers(n)
        return indexes

    def forget(self, *indexes: int) -> None:
        for n in indexes:
            self.tier.remove(default_meta(n, NBYTES).object_id)
        self.tier.commit_with_records([], [], forget=True)

    def copy_data(self) -> Path:
        """A copy of everything but the keys; the tier is closed for it, and opened again."""
        self.tier.close()
        copy = self.directory.parent / "copy"
        shutil.copytree(self.directory, copy)
        self.open()
        return copy

    def put_back(self, copy: Path) -> None:
        """Put the copy in the place of everything but the keys."""
        self.tier.close()
        shutil.rmtree(self.directory)
        shutil.copytree(copy, self.directory)
        self.open()

    @staticmethod
    def numbers(seed: int, nbytes: int = NBYTES) -> bytes:
        """Like bf16: every second byte is noise, and the others take few values."""
        data = np.frombuffer(content(seed, nbytes), dtype=np.uint8).copy()
        data[1::2] = 60 + (data[1::2] & 3)
        return data.tobytes()

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


@pytest.fixture
def sealed(tmp_path: Path) -> Iterator[Bench]:
    """A bench whose blocks are sealed."""
    made = Bench(tmp_path / "sealed" / "store", MASTER_KEY)
    yield made
    made.ops.fail.clear()
    made.tier.close()
