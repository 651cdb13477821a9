"""What a drive can do: the ways of writing durably and of reading cold that a file system offers."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtier.bench.memory import Bytes, faulted

MiB = 1 << 20


@dataclass(frozen=True, slots=True)
class Way:
    """How a file is read or written: bytes of one request, how many at once, past the page cache or not."""

    direct: bool
    request_bytes: int
    threads: int

    def __str__(self) -> str:
        kind = "O_DIRECT" if self.direct else "buffered"
        return f"{kind} {self.request_bytes // MiB} MiB x {self.threads}"


WRITES = [Way(True, size * MiB, threads) for size in (2, 8, 32) for threads in (1, 4, 8)]
READS = [Way(True, size * MiB, threads) for size in (2, 8, 32) for threads in (1, 4, 8)] + [
    Way(False, 8 * MiB, threads) for threads in (1, 4, 8)
]


class Drive:
    """A file of its own in `folder`, as long as `nbytes`, and memory to fill it from and into.

    direct: whether the file system takes O_DIRECT.
    """

    def __init__(self, folder: Path, nbytes: int) -> None:
        self.path = folder / "limit.bin"
        self.nbytes = nbytes
        self.memory: Bytes = faulted(nbytes, huge=True)
        self._fill()
        self.renew()
        self.direct = self._takes_direct()

    def _fill(self) -> None:
        """With noise: a drive may be quicker with zeros."""
        seed = os.urandom(16 * MiB)
        for at in range(0, self.nbytes, len(seed)):
            part = self.memory[at : at + len(seed)]
            part[:] = memoryview(seed)[: part.nbytes]
            part[:16] = memoryview(os.urandom(16))

    def renew(self) -> None:
        """A new file, preallocated, nothing of it written: what a store's next segment is."""
        self.path.unlink(missing_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.posix_fallocate(fd, 0, self.nbytes)
            os.fsync(fd)
        finally:
            os.close(fd)

    def _takes_direct(self) -> bool:
        try:
            with self._open(Way(True, MiB, 1)) as fd:
                # Some file systems refuse only the transfer.
                _pread_into(fd, self.memory[: mmap.PAGESIZE], 0)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            return False
        return True

    def write(self, way: Way) -> None:
        """All of the file, durable at the end."""
        with self._open(way) as fd:
            self._each(way, lambda at, part: _whole(os.pwrite, fd, part, at))
            os.fdatasync(fd)

    def read(self, way: Way) -> None:
        """All of the file."""
        with self._open(way) as fd:
            if not way.direct:
                os.posix_fadvise(fd, 0, self.nbytes, os.POSIX_FADV_SEQUENTIAL)
                os.posix_fadvise(fd, 0, self.nbytes, os.POSIX_FADV_WILLNEED)
            self._each(way, lambda at, part: _whole(_pread_into, fd, part, at))

    def close(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)

    @contextmanager
    def _open(self, way: Way) -> Iterator[int]:
        fd = os.open(self.path, os.O_RDWR | (os.O_DIRECT if way.direct else 0))
        try:
            yield fd
        finally:
            os.close(fd)

    def _each(self, way: Way, work: Callable[[int, Bytes], None]) -> None:
        with ThreadPoolExecutor(way.threads) as pool:
            parts = range(0, self.nbytes, way.request_bytes)
            for _ in pool.map(lambda at: work(at, self.memory[at : at + way.request_bytes]), parts):
                pass


def _whole(call: Callable[[int, Any, int], int], fd: int, part: Bytes, at: int) -> None:
    done = 0
    while done < part.nbytes:
        moved = call(fd, part[done:], at + done)
        if not moved:
            raise OSError(f"the file ends at {at + done}")
        done += moved


def _pread_into(fd: int, part: Bytes, at: int) -> int:
    return os.preadv(fd, [part.data], at)


def forget_page_cache(*folders: Path) -> None:
    """Drop what the kernel holds of all files, or, without root, of the files in these folders."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        forget_files(*folders)


def forget_files(*folders: Path) -> None:
    """Drop what the kernel holds of the files in these folders, as far as it is on the drive."""
    for path in (p for folder in folders for p in folder.rglob("*") if p.is_file()):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def device_read_bytes() -> int:
    """What this process has had read from block devices so far: the proof that a read was cold."""
    return _io("read_bytes")


def written_bytes() -> int:
    """What this process has written so far, and what it will, of what lies in the page cache."""
    return _io("write_bytes")


def _io(name: str) -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields[name])
