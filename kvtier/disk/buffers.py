"""Page-aligned scratch memory for direct I/O, from a pool of fixed size."""

from __future__ import annotations

import mmap
import queue
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from kvtier.checksum import Buffer
from kvtier.disk.fileops import Bytes

PAGE = 4096
BOUNCE_BYTES = 1 << 20


def padded(nbytes: int) -> int:
    """`nbytes` rounded up to whole pages."""
    return -(-nbytes // PAGE) * PAGE


def byte_array(data: Buffer) -> Bytes:
    """The same memory as a one-dimensional uint8 array; writable when `data` is."""
    if isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 1:
        return data
    return np.frombuffer(data, dtype=np.uint8)


def is_page_aligned(array: Bytes) -> bool:
    """Whether the array's memory starts on a page and has no gaps, as direct I/O wants it."""
    return bool(array.flags.c_contiguous) and array.ctypes.data % PAGE == 0


class Scratch:
    """One request's own aligned memory: a header page, a page for the last bytes, and a bounce area.

    The last page of a payload goes through `tail`, so that direct I/O neither writes a neighbour's
    bytes to disk nor overwrites them in memory.
    """

    def __init__(self) -> None:
        memory = np.frombuffer(mmap.mmap(-1, 2 * PAGE + BOUNCE_BYTES), dtype=np.uint8)
        self.header = memory[:PAGE]
        self.tail = memory[PAGE : 2 * PAGE]
        self.bounce = memory[2 * PAGE :]


class ScratchPool:
    """A bounded number of Scratch; a request beyond it waits for one that ends.

    A thread takes one at a time and does nothing but I/O while it holds it, so the wait ends.
    """

    def __init__(self, count: int) -> None:
        self._free: queue.SimpleQueue[Scratch] = queue.SimpleQueue()
        for _ in range(count):
            self._free.put(Scratch())

    @contextmanager
    def take(self) -> Iterator[Scratch]:
        """A Scratch for the time of the block."""
        scratch = self._free.get()
        try:
            yield scratch
        finally:
            self._free.put(scratch)
