"""Page-aligned scratch memory for direct I/O, from a pool of fixed size."""

from __future__ import annotations

import mmap
import threading
from collections import deque
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
        self._may_take = threading.Semaphore(count)
        self._free: deque[Scratch] = deque()

    def forget(self) -> None:
        """Give back the memory that is not in use, now and not when the collector finds the pool's owner."""
        self._free.clear()

    @contextmanager
    def take(self) -> Iterator[Scratch]:
        """A Scratch for the time of the block."""
        with self._may_take:
            try:
                scratch = self._free.pop()
            except IndexError:
                scratch = Scratch()
            try:
                yield scratch
            finally:
                self._free.append(scratch)


class StagingPool:
    """Page-aligned memory for blocks that are encoded or sealed, used again and again.

    No more than `limit_bytes` is out and kept together, but for one request that is longer than that.  A
    request beyond it waits for others to end, in order of arrival.  A thread takes one at a time, so the
    wait ends.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._free: list[Bytes] = []
        self._out_bytes = 0

    @property
    def held_bytes(self) -> int:
        """Bytes out and kept now."""
        return self._out_bytes + sum(buffer.nbytes for buffer in self._free)

    @contextmanager
    def take(self, nbytes: int) -> Iterator[Bytes]:
        """At least `nbytes` of aligned memory, with anything in it, for the time of the block."""
        room = self._wait_for(padded(max(nbytes, 1)))
        try:
            yield room
        finally:
            with self._changed:
                self._out_bytes -= room.nbytes
                if self.held_bytes + room.nbytes <= self._limit_bytes:
                    self._free.append(room)
                self._changed.notify_all()

    def _wait_for(self, nbytes: int) -> Bytes:
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is ticket and self._may_begin(nbytes))
                room = self._room(nbytes)
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
            self._out_bytes += room.nbytes
            return room

    def _may_begin(self, nbytes: int) -> bool:
        return self._out_bytes == 0 or self._out_bytes + nbytes <= self._limit_bytes

    def _room(self, nbytes: int) -> Bytes:
        """A kept buffer of about this size, or a new one in the place of kept ones."""
        fitting = [buffer for buffer in self._free if nbytes <= buffer.nbytes <= 2 * nbytes]
        best = min(fitting, key=lambda buffer: buffer.nbytes, default=None)
        if best is not None and self._out_bytes + best.nbytes <= max(self._limit_bytes, nbytes):
            self._free = [buffer for buffer in self._free if buffer is not best]
            return best
        while self._free and self.held_bytes + nbytes > self._limit_bytes:
            del self._free[0]
        return np.frombuffer(mmap.mmap(-1, nbytes), dtype=np.uint8)
