"""Encoded KV on a connection: in chunks, each encoded while the one before it is on its way.

    for each chunk of 1 MiB of the object, the last one shorter:
        4 bytes   length of what follows, little-endian; the highest bit is set when it is encoded
        ...       the chunk, or its encoding

The sum is of the decoded bytes, like that of any object.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kvtier.checksum import PIECE_BYTES, combine, piece_sum
from kvtier.errors import CorruptObject, MalformedMessage
from kvtier.peers.choice import Figures
from kvtier.peers.stream import Wire

Bytes: TypeAlias = npt.NDArray[np.uint8]

CHUNK_BYTES = 4 * PIECE_BYTES
# Of the numbers in KV that an encoder may be told.
WIDTHS = (1, 2, 4)
_WORD = struct.Struct("<I")
_ENCODED = 1 << 31
# A chunk that becomes smaller by less goes as it is.
_LEAST_SAVING = 32
_SAMPLE_BYTES = 2 * PIECE_BYTES


class WireCodec(Protocol):
    """Makes a payload smaller, and gives exactly its bytes back. Safe from any thread."""

    def encode(self, payload: Bytes, item_bytes: int, into: Bytes) -> int | None:
        """Write the encoding to the front of `into`; its length, or None when it does not fit.

        item_bytes: width of the numbers in the payload; of influence on the length alone.
        """

    def decode(self, stored: Bytes, into: Bytes) -> None:
        """Fill `into` from what `encode` wrote. Raises CorruptObject, whatever `stored` holds."""


@dataclass(frozen=True, slots=True)
class Coding:
    """A codec, and what one thread here does with it."""

    codec: WireCodec
    figures: Figures

    def of_all(self, streams: int) -> Figures:
        """What as many connections do at once: half of the processors are left to others."""
        one, workers = self.figures, min(streams, max(1, (os.cpu_count() or 1) // 2))
        return Figures(one.ratio, one.encode_bytes_per_s * workers, one.decode_bytes_per_s * workers)


Codings: TypeAlias = Mapping[str, Coding]


def measured(codec: WireCodec) -> Coding:
    """With figures of this moment, by processor time, of numbers like KV in bfloat16. Takes some 20 ms."""
    noise = np.random.default_rng(1).standard_normal(_SAMPLE_BYTES // 2, np.float32)
    sample: Bytes = (noise.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    into, back = np.empty(_SAMPLE_BYTES, np.uint8), np.empty(_SAMPLE_BYTES, np.uint8)
    # The first time it loads its library.
    length = codec.encode(sample, 2, into)
    if length is None:
        return Coding(codec, Figures(1.0, 0.0, 0.0))
    encode_s = _seconds(lambda: codec.encode(sample, 2, into))
    decode_s = _seconds(lambda: codec.decode(into[:length], back))
    return Coding(codec, Figures(_SAMPLE_BYTES / length, _SAMPLE_BYTES / encode_s, _SAMPLE_BYTES / decode_s))


def encoded(codec: WireCodec, item_bytes: int, data: Bytes) -> Iterator[memoryview]:
    """An object as it travels; each part is good until the next one is asked for."""
    room = np.empty(_WORD.size + min(CHUNK_BYTES, len(data)), np.uint8)
    for at in range(0, len(data), CHUNK_BYTES):
        chunk = data[at : at + CHUNK_BYTES]
        most = len(chunk) - len(chunk) // _LEAST_SAVING
        length = codec.encode(chunk, item_bytes, room[_WORD.size : _WORD.size + most])
        word = len(chunk) if length is None else length | _ENCODED
        room[: _WORD.size] = np.frombuffer(_WORD.pack(word), np.uint8)
        if length is None:
            yield room.data[: _WORD.size]
            yield chunk.data
        else:
            yield room.data[: _WORD.size + length]


def receive_encoded(
    stream: Wire, codec: WireCodec, into: Bytes, until_s: float, came: Callable[[int, int], None]
) -> int | None:
    """Fill `into` with an object that comes encoded; its checksum, or None when a chunk cannot be decoded.

    came: told of each chunk, (bytes of KV, bytes of the connection).  Raises StreamLost, MalformedMessage.
    """
    sums: list[int] = []
    sound = True
    word = bytearray(_WORD.size)
    room = np.empty(min(CHUNK_BYTES, len(into)), np.uint8)
    for at in range(0, len(into), CHUNK_BYTES):
        chunk = into[at : at + CHUNK_BYTES]
        stream.fill(memoryview(word), until_s)
        (said,) = _WORD.unpack(word)
        length = said & ~_ENCODED
        if length > len(chunk) or (not said & _ENCODED and length < len(chunk)):
            raise MalformedMessage(f"{length} bytes come for a chunk of {len(chunk)}")
        if said & _ENCODED:
            stream.fill(room.data[:length], until_s)
            try:
                codec.decode(room[:length], chunk)
            except CorruptObject:
                # What follows is another object's: all of this one is taken first.
                sound = False
        else:
            stream.fill(chunk.data, until_s)
        sums.append(piece_sum(chunk, at // PIECE_BYTES, len(chunk)))
        came(len(chunk), _WORD.size + length)
    return combine(sums, len(into)) if sound else None


def _seconds(work: Callable[[], object]) -> float:
    """Of this thread's processor time; the shortest of three."""
    times = []
    for _ in range(3):
        begun = time.thread_time()
        work()
        times.append(time.thread_time() - begun)
    return max(min(times), 1e-6)
