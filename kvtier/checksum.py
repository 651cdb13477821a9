"""The checksum that every object carries from park on.

`xxh3sum/1`: the bytes are cut into pieces of 256 KiB, the last one shorter; piece i is hashed with
xxh3-64 under seed i, and the hashes are added modulo 2^64, together with the length.  Pieces may be
hashed in any order, by several threads, while they are still in a core's cache after the copy, or on a
GPU with one thread block a piece.  It detects accidents, not attackers: those are for encryption.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

NAME = "xxh3sum/1"
PIECE_BYTES = 256 * 1024
_MASK = (1 << 64) - 1

Buffer: TypeAlias = bytes | bytearray | memoryview | npt.NDArray[np.uint8]


def piece_sum(data: Buffer, first_piece: int, nbytes: int) -> int:
    """Sum of the piece hashes of `data`, which starts at piece `first_piece` of its object.

    nbytes: length of `data`; a multiple of PIECE_BYTES unless it ends the object.  Releases the GIL
    while it hashes.
    """
    view = memoryview(data)  # type: ignore[arg-type]  # typeshed does not know that arrays are buffers
    total = 0
    for i, at in enumerate(range(0, nbytes, PIECE_BYTES), first_piece):
        total += xxhash.xxh3_64_intdigest(view[at : min(at + PIECE_BYTES, nbytes)], i)
    return total & _MASK


def combine(partial_sums: Iterable[int], nbytes: int) -> int:
    """The object's checksum from the sums of its parts, in any order, and its whole length."""
    return (sum(partial_sums) + nbytes) & _MASK


def checksum(data: Buffer) -> int:
    """The checksum of a whole object, as an integer of 64 bits."""
    view = memoryview(data)  # type: ignore[arg-type]  # as above
    return combine([piece_sum(view, 0, view.nbytes)], view.nbytes)
