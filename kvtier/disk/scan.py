"""Find the objects in a segment file from its bytes alone.

Headers lie on page boundaries.  One counts when its own checksum and the store's id fit, and its object
when the payload's checksum fits too; then everything up to its end is its own, and the search goes on
behind it.  Where only the header fits, others may have been written over the payload since, so the search
goes on with the next page.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from kvtier.checksum import PIECE_BYTES, combine, piece_sum
from kvtier.disk.buffers import PAGE
from kvtier.disk.fileops import Bytes, FileOps
from kvtier.disk.header import HEADER_BYTES, MAGIC, RAW, BlockHeader, HeaderError, decode
from kvtier.disk.ledger import room_for
from kvtier.objects import Root

_WINDOW_BYTES = 4 << 20
_MAGIC_WORD = np.frombuffer(MAGIC, dtype="<u8")[0]

# Told how many bytes of the file are behind it.
OnBytes = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Found:
    """A header of this store at byte `at`; intact: its payload is there and right."""

    header: BlockHeader
    at: int
    intact: bool


@dataclass(frozen=True, slots=True)
class NotOurs:
    """A page at byte `at` that begins like a header: damaged, of another store, or of a newer version."""

    at: int
    reason: str


class SegmentReader:
    """One segment file, read through the page cache in large pieces. Raises OSError; close it."""

    def __init__(self, path: str, ops: FileOps) -> None:
        self._ops = ops
        self._fd = ops.open(path, os.O_RDONLY)
        self.nbytes = ops.size(self._fd)
        self._window: Bytes = np.zeros(_WINDOW_BYTES, dtype=np.uint8)
        self._start = self._end = 0

    def close(self) -> None:
        """Close the file."""
        self._ops.close(self._fd)

    def bytes_at(self, at: int, nbytes: int) -> Bytes:
        """`nbytes`, at most a window, from `at` on; fewer at the file's end. Valid until the next call."""
        if at < self._start or at + nbytes > self._end:
            self._fill(at)
        return self._window[at - self._start : min(at + nbytes, self._end) - self._start]

    def next_header(self, at: int) -> int:
        """The next page from `at` on that begins like a header, or the end of the file."""
        while at + PAGE <= self.nbytes:
            if not self._start <= at or at + PAGE > self._end:
                self._fill(at)
            part = self._window[at - self._start : self._end - self._start]
            if part.nbytes < PAGE:
                break
            words = part[: part.nbytes - part.nbytes % PAGE].view("<u8")[:: PAGE // 8]
            hits = np.flatnonzero(words == _MAGIC_WORD)
            if hits.size:
                return at + int(hits[0]) * PAGE
            at += words.size * PAGE
        return self.nbytes

    def payload_fits(self, at: int, nbytes: int, checksum: int | None) -> bool:
        """Whether the `nbytes` from `at` on are there and have this checksum."""
        if at + nbytes > self.nbytes:
            return False
        sums = []
        for offset in range(0, nbytes, PIECE_BYTES):
            part = self.bytes_at(at + offset, min(PIECE_BYTES, nbytes - offset))
            sums.append(piece_sum(part, offset // PIECE_BYTES, part.nbytes))
        return combine(sums, nbytes) == checksum

    def _fill(self, at: int) -> None:
        self._start = self._end = at
        while self._end < at + _WINDOW_BYTES:
            done = self._ops.preadv(self._fd, [self._window[self._end - at :]], self._end)
            if done == 0:
                break
            self._end += done


def scan(reader: SegmentReader, store_id: bytes, on_bytes: OnBytes) -> Iterator[Found | NotOurs]:
    """Everything in the file that looks like a header, in order of place. Raises OSError."""
    roots: dict[Root, Root] = {}
    at = reader.next_header(0)
    while at + PAGE <= reader.nbytes:
        found = examine(reader, at, store_id)
        if isinstance(found, Found):
            found = replace(found, header=_with_shared_root(found.header, roots))
        yield found
        whole = isinstance(found, Found) and found.intact
        at += room_for(found.header.meta.nbytes) if isinstance(found, Found) and whole else PAGE
        on_bytes(min(at, reader.nbytes))
        at = reader.next_header(at)
    on_bytes(reader.nbytes)


def examine(reader: SegmentReader, at: int, store_id: bytes) -> Found | NotOurs:
    """What the page at `at` is. Raises OSError."""
    try:
        header = decode(reader.bytes_at(at, PAGE))
    except HeaderError as problem:
        return NotOurs(at, str(problem))
    if header.store_id != store_id:
        return NotOurs(at, "of another store")
    if header.codec != RAW:
        return NotOurs(at, f"of the unknown codec {header.codec!r}")
    intact = reader.payload_fits(at + HEADER_BYTES, header.meta.nbytes, header.meta.checksum)
    return Found(header, at, intact)


def _with_shared_root(header: BlockHeader, roots: dict[Root, Root]) -> BlockHeader:
    """A million objects have few roots: keep each once."""
    root = roots.setdefault(header.meta.root, header.meta.root)
    return replace(header, meta=replace(header.meta, root=root))
