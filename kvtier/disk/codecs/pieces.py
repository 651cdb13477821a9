"""Codecs that cut a payload into pieces, each piece into planes, and compress the planes that pay.

    4 bytes           format (1), width of the numbers, two zeros
    for each piece of 256 KiB, the last one shorter, and each of its planes, the lowest bytes first:
        4 bytes       stored length; the highest bit is set when the plane is compressed
        ...           the plane
    0 to 3 bytes      what is left of the payload when it is no whole number of numbers

All numbers are little-endian.  A piece and its planes stay in a core's cache.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kvtier.disk.codecs.codec import Bytes
from kvtier.disk.codecs.planes import WIDTHS, Planes
from kvtier.errors import CorruptObject

PIECE_BYTES = 256 * 1024
_HEAD = struct.Struct("<BBH")
_WORD = struct.Struct("<I")
_FORMAT = 1
_COMPRESSED = 1 << 31
# A plane that becomes smaller by less costs more time than its bytes are worth.
_LEAST_SAVING = 16
_LONGEST_PAUSE = 16


class Compressor(Protocol):
    """Compresses one plane at a time. Safe from any thread; releases the GIL."""

    def check_installed(self) -> None:
        """Raise CodecMissing unless the package can be loaded."""
        ...

    def compress(self, plane: Bytes) -> bytes:
        """The compressed plane, of whatever length."""
        ...

    def decompress(self, packed: Bytes, nbytes: int) -> bytes:
        """A plane of at most `nbytes`, in no more memory than that. Raises CorruptObject."""
        ...


@dataclass(slots=True)
class _Patience:
    """Whether compressing a plane is worth a try: after each failure in a row it waits for longer."""

    pause: int = 0
    left: int = 0

    def tries(self) -> bool:
        self.left -= 1
        return self.left < 0

    def tell(self, *, paid: bool) -> None:
        self.pause = 0 if paid else min(_LONGEST_PAUSE, 2 * self.pause + 1)
        self.left = self.pause


class PieceCodec:
    """See Codec. by_planes: whether numbers are taken apart; else the bytes are compressed as they stand."""

    def __init__(self, name: str, compressor: Compressor, *, by_planes: bool) -> None:
        self.name = name
        self._compressor = compressor
        self._by_planes = by_planes

    def check_installed(self) -> None:
        """See Codec."""
        self._compressor.check_installed()

    def encode(self, payload: Bytes, item_bytes: int, into: Bytes) -> int | None:
        """See Codec."""
        self._compressor.check_installed()
        width = item_bytes if self._by_planes else 1
        if width not in WIDTHS:
            raise ValueError(f"numbers of {width} bytes: {WIDTHS} are known")
        if into.nbytes < _HEAD.size:
            return None
        into[: _HEAD.size] = np.frombuffer(_HEAD.pack(_FORMAT, width, 0), dtype=np.uint8)
        writer = _Writer(into, _HEAD.size)
        planes = Planes(width, _most_numbers(payload.nbytes, width))
        plane_room: Bytes = np.empty(_most_numbers(payload.nbytes, width), dtype=np.uint8)
        patience = [_Patience() for _ in range(width)]
        for start, end in _pieces(payload.nbytes, width):
            numbers, plane = payload[start:end], plane_room[: (end - start) // width]
            for number in range(width):
                packed = None
                if patience[number].tries():
                    planes.split(numbers, number, plane)
                    packed = self._packed(plane)
                    patience[number].tell(paid=packed is not None)
                room = writer.room(plane.nbytes if packed is None else len(packed), packed=packed is not None)
                if room is None:
                    return None
                if packed is None:
                    planes.split(numbers, number, room)
                else:
                    room[:] = np.frombuffer(packed, dtype=np.uint8)
        rest = payload.nbytes % width
        return writer.finish(payload[payload.nbytes - rest :])

    def _packed(self, plane: Bytes) -> bytes | None:
        """The compressed plane when that pays."""
        packed = self._compressor.compress(plane)
        pays = len(packed) <= plane.nbytes - plane.nbytes // _LEAST_SAVING and len(packed) < plane.nbytes
        return packed if pays else None

    def decode(self, stored: Bytes, into: Bytes) -> None:
        """See Codec."""
        self._compressor.check_installed()
        reader = _Reader(stored)
        form, width, zero = _HEAD.unpack(reader.take(_HEAD.size).data)
        if form != _FORMAT or zero or width not in (WIDTHS if self._by_planes else (1,)):
            raise CorruptObject(f"not an encoding of {self.name}")
        planes = Planes(width, _most_numbers(into.nbytes, width))
        for start, end in _pieces(into.nbytes, width):
            parts = [self._plane(reader, (end - start) // width) for _ in range(width)]
            planes.merge(parts, into[start:end])
        rest = into.nbytes % width
        into[into.nbytes - rest :] = reader.take(rest)
        reader.check_end()

    def _plane(self, reader: _Reader, nbytes: int) -> Bytes:
        (word,) = _WORD.unpack(reader.take(_WORD.size).data)
        packed = reader.take(word & ~_COMPRESSED)
        if not word & _COMPRESSED:
            plane = packed
        else:
            plane = np.frombuffer(self._compressor.decompress(packed, nbytes), dtype=np.uint8)
        if plane.nbytes != nbytes:
            raise CorruptObject(f"a plane of {plane.nbytes} bytes where {nbytes} should be")
        return plane


class _Writer:
    """Fills `into` from `at` on, until something does not fit."""

    def __init__(self, into: Bytes, at: int) -> None:
        self._into = into
        self._at = at

    def room(self, nbytes: int, *, packed: bool) -> Bytes | None:
        """Where the next plane's bytes go, its length written before them; None when they do not fit."""
        start = self._at + _WORD.size
        if start + nbytes > self._into.nbytes:
            return None
        word = _WORD.pack(nbytes | (_COMPRESSED if packed else 0))
        self._into[self._at : start] = np.frombuffer(word, dtype=np.uint8)
        self._at = start + nbytes
        return self._into[start : self._at]

    def finish(self, rest: Bytes) -> int | None:
        """Write the last bytes; answers the length of everything."""
        end = self._at + rest.nbytes
        if end > self._into.nbytes:
            return None
        self._into[self._at : end] = rest
        return end


class _Reader:
    """Takes what is stored apart, and nothing beyond it."""

    def __init__(self, stored: Bytes) -> None:
        self._stored = stored
        self._at = 0

    def take(self, nbytes: int) -> Bytes:
        """The next bytes, where they are. Raises CorruptObject when there are fewer."""
        end = self._at + nbytes
        if end > self._stored.nbytes:
            raise CorruptObject(f"an encoding ends after {self._stored.nbytes} bytes, {end} are needed")
        part = self._stored[self._at : end]
        self._at = end
        return part

    def check_end(self) -> None:
        """Raise CorruptObject unless everything was taken."""
        if self._at != self._stored.nbytes:
            raise CorruptObject(f"{self._stored.nbytes - self._at} bytes behind the end of an encoding")


def _pieces(nbytes: int, width: int) -> Iterator[tuple[int, int]]:
    """Start and end of each piece; the last may leave less than a number over."""
    whole = nbytes - nbytes % width
    for start in range(0, whole, PIECE_BYTES):
        yield start, min(start + PIECE_BYTES, whole)


def _most_numbers(nbytes: int, width: int) -> int:
    return min(nbytes, PIECE_BYTES) // width
