"""What this machine's memory can do: the limits that copies are held against."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from kvtier.checksum import PIECE_BYTES, piece_sum
from kvtier.host.sysmem import shared_huge_pages, want_huge

Bytes = npt.NDArray[np.uint8]
_THREADS = (1, 2, 4)
_LARGE = 32 << 20
_POPULATE_WRITE = 23


def faulted(nbytes: int, *, huge: bool = False) -> Bytes:
    """Shared memory with all its pages there: the first touch of a page costs ten copies.

    huge: whether to ask for huge pages, as host memory does; see `pages_kind` for what comes of it.
    """
    fd = os.memfd_create("kvtier-bench")
    os.ftruncate(fd, nbytes)
    mapped = mmap.mmap(fd, nbytes)
    os.close(fd)
    array = np.frombuffer(mapped, np.uint8)
    if huge:
        want_huge(array)
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.c_void_p(array.ctypes.data)
    if libc.madvise(address, ctypes.c_size_t(nbytes), _POPULATE_WRITE) != 0:
        array[:: mmap.PAGESIZE] = 0
    return array


def pages_kind() -> str:
    """What pages memory of `faulted` with `huge` has, by the kernel's setting."""
    return "4 KiB pages" if shared_huge_pages() in ("never", "deny") else "huge pages"


class CopyLimits:
    """Ways to copy one array to another, and to copy and hash; the quickest of a round is the limit."""

    def __init__(self, source: Bytes, target: Bytes) -> None:
        self._source, self._target = source, target
        self._pools = {n: ThreadPoolExecutor(n) for n in _THREADS}

    def copies(self) -> list[Callable[[], object]]:
        """Plain copies in chunks of 32 MiB, by 1, 2 and 4 threads."""
        return [self._by_threads(n, self._copy, _LARGE) for n in _THREADS]

    def copies_and_hashes(self) -> list[Callable[[], object]]:
        """Copies that are hashed: each piece while it is in a cache, or all of it afterwards."""
        near = [self._by_threads(n, self._copy_and_hash, PIECE_BYTES) for n in _THREADS]
        after = [self._one_after_the_other(n) for n in _THREADS]
        return near + after

    def close(self) -> None:
        """End the threads."""
        for pool in self._pools.values():
            pool.shutdown()

    def _copy(self, at: int, nbytes: int) -> None:
        np.copyto(self._target[at : at + nbytes], self._source[at : at + nbytes])

    def _hash(self, at: int, nbytes: int) -> None:
        piece_sum(self._target[at : at + nbytes], 0, nbytes)

    def _copy_and_hash(self, at: int, nbytes: int) -> None:
        self._copy(at, nbytes)
        self._hash(at, nbytes)

    def _one_after_the_other(self, threads: int) -> Callable[[], object]:
        copy = self._by_threads(threads, self._copy, _LARGE)
        hash_all = self._by_threads(threads, self._hash, _LARGE)
        return lambda: (copy(), hash_all())

    def _by_threads(self, threads: int, work: Callable[[int, int], None], step: int) -> Callable[[], object]:
        size = self._source.nbytes
        pool = self._pools[threads]

        def part(first: int) -> None:
            for at in range(first * step, size, threads * step):
                work(at, min(step, size - at))

        return lambda: list(pool.map(part, range(threads)))
