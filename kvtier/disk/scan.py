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
from typing import Literal, TypeAlias

import numpy as np

from kvtier.checksum import NAME as CHECKSUM_NAME
from kvtier.checksum import PIECE_BYTES, combine, piece_sum
from kvtier.disk.buffers import PAGE
from kvtier.disk.codecs import CODECS, RAW, CodecMissing
from kvtier.disk.coder import Coder, KeyGone
from kvtier.disk.entry import room_for
from kvtier.disk.fileops import Bytes, FileOps
from kvtier.disk.header import HEADER_BYTES, MAGIC, BlockHeader, HeaderError, decode
from kvtier.disk.recovery import lengths_can_be
from kvtier.errors import CorruptObject
from kvtier.objects import Root

_WINDOW_BYTES = 4 << 20
_MAGIC_WORD = np.frombuffer(MAGIC, dtype="<u8")[0]

# Told how many bytes of the file are behind it.
OnBytes = Callable[[int], None]


NO_KEYS = "sealed, key store not given"
# Of a payload: as it was written; damaged; not to be looked at here; of a key that was destroyed.
PayloadState: TypeAlias = Literal["intact", "damaged", "unchecked", "keyless"]


@dataclass(frozen=True, slots=True)
class Found:
    """A header of this store at byte `at`, and the state of its payload. why: it could not be checked."""

    header: BlockHeader
    at: int
    payload: PayloadState
    why: str = ""


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

    def read(self, at: int, into: Bytes) -> bool:
        """Fill `into` from `at` on; False when the file ends before."""
        done = 0
        while done < into.nbytes:
            part = self._ops.preadv(self._fd, [into[done:]], at + done)
            if part == 0:
                return False
            done += part
        return True

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


def scan(reader: SegmentReader, coder: Coder, longest: int, on_bytes: OnBytes) -> Iterator[Found | NotOurs]:
    """Everything in the file that looks like a header, in order of place. Raises OSError, TierUnavailable.

    longest: length of the longest segment; no payload is longer.
    """
    roots: dict[Root, Root] = {}
    at = reader.next_header(0)
    while at + PAGE <= reader.nbytes:
        found = examine(reader, at, coder, longest)
        if isinstance(found, Found):
            found = replace(found, header=_with_shared_root(found.header, roots))
        yield found
        # Only where the payload is known to be whole can nothing else be in its place.
        whole = isinstance(found, Found) and found.payload == "intact"
        at += room_for(found.header.stored_bytes) if isinstance(found, Found) and whole else PAGE
        on_bytes(min(at, reader.nbytes))
        at = reader.next_header(at)
    on_bytes(reader.nbytes)


def examine(reader: SegmentReader, at: int, coder: Coder, longest: int) -> Found | NotOurs:
    """What the page at `at` is. Raises OSError, TierUnavailable."""
    page = reader.bytes_at(at, PAGE).tobytes()
    try:
        header = decode(page)
    except HeaderError as problem:
        return NotOurs(at, str(problem))
    if header.store_id != coder.store_id:
        return NotOurs(at, "of another store")
    if header.codec not in CODECS or header.checksum_name != CHECKSUM_NAME:
        return NotOurs(at, f"of the unknown codec {header.codec!r} or checksum {header.checksum_name!r}")
    if header.seal is not None and coder.vault is None:
        return Found(header, at, "unchecked", NO_KEYS)
    try:
        fits = _payload_fits(reader, at + HEADER_BYTES, header, page, coder, longest)
    except KeyGone:
        return Found(header, at, "keyless")
    except CodecMissing as problem:
        return Found(header, at, "unchecked", problem.message)
    except CorruptObject:
        fits = False
    return Found(header, at, "intact" if fits else "damaged")


def _payload_fits(
    reader: SegmentReader, at: int, header: BlockHeader, page: bytes, coder: Coder, longest: int
) -> bool:
    nbytes, stored_bytes = header.meta.nbytes, header.stored_bytes
    if not lengths_can_be(header.codec, stored_bytes, nbytes, longest):
        return False
    if header.codec == RAW and header.seal is None:
        return reader.payload_fits(at, nbytes, header.meta.checksum)
    if at + stored_bytes > reader.nbytes:
        return False
    with coder.room_to_unpack(header.codec, stored_bytes) as room:
        if not reader.read(at, room[:stored_bytes]):
            return False
        payload: Bytes = np.empty(nbytes, dtype=np.uint8)
        coder.unpack(header, page, room, payload)
    return coder.fits(header, payload)


def _with_shared_root(header: BlockHeader, roots: dict[Root, Root]) -> BlockHeader:
    """A million objects have few roots: keep each once."""
    root = roots.setdefault(header.meta.root, header.meta.root)
    return replace(header, meta=replace(header.meta, root=root))
