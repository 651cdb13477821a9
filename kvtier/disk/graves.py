"""What must stay forgotten when the index is lost: a small file beside it, which says which writes are dead.

A header in a segment outlives its object: an evicted or forgotten block's page lies in free room until
something else is written there, and a write that a crash cut off may be whole and was never committed.  An
index rebuilt from headers alone would bring all of them back.  So each opening of the directory starts a
file with the sequence numbers of everything that lives, and every sequence that ends later is appended to
it.  A header counts only when its sequence is listed as living, or is newer than the file; and never when
it was appended.  Forgetting flushes the file before it answers; evicting does not wait for it, since the
next opening lists what lives again.

    at    bytes  field
    0     8      magic
    8     4      version
    12    4      zero
    16    16     id of the store
    32    8      first sequence that the list does not know
    40    8      count of living sequences
    48    8      xxh3-64 of the list
    56    8      xxh3-64 of the 56 bytes before
    64    8 n    the list, ascending
    ...   16 m   ended sequences: 8 bytes, and their xxh3-64 under the store's id

All numbers are little-endian.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from kvtier.disk.fileops import Bytes, FileOps

_LOG = logging.getLogger(__name__)
_SUFFIX = ".graves"
_MAGIC = b"KVTGRV\r\n"
_VERSION = 1
_FIXED = struct.Struct("<8sII16sQQQ")
_SUM = struct.Struct("<Q")
_HEAD_BYTES = _FIXED.size + _SUM.size
_RECORD = struct.Struct("<QQ")
# A log that is short, or no longer than the list, is not worth writing anew.
_SHORT_LOG = 1 << 16

Sequences = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Known:
    """What a file says. next_sequence: writes from here on live unless they are among `ended`."""

    next_sequence: int
    living: Sequences
    ended: Sequences

    def dead(self, sequences: Sequences) -> npt.NDArray[np.bool_]:
        """Which of these writes must not be served any more."""
        unlisted = (sequences < np.uint64(self.next_sequence)) & ~np.isin(sequences, self.living)
        answer: npt.NDArray[np.bool_] = unlisted | np.isin(sequences, self.ended)
        return answer


def read(directory: str, ops: FileOps, store_id: bytes) -> Known | None:
    """What the newest usable file of the directory says; None when there is none. Raises OSError."""
    for number in reversed(_numbers(directory, ops)):
        known = _parse(_content(_path(directory, number), ops), store_id)
        if known is not None:
            return known
        _LOG.warning("%s is damaged", _path(directory, number))
    return None


class Graves:
    """The file of one opening of the directory. Its owner makes the calls one at a time. Raises OSError."""

    def __init__(self, directory: str, ops: FileOps, store_id: bytes) -> None:
        self._directory = directory
        self._ops = ops
        self._store_id = store_id
        self._fd: int | None = None
        self._at = self._living = self._ended = 0

    @property
    def is_long(self) -> bool:
        """Whether so much ended since `start` that a new list is shorter."""
        return self._ended > max(_SHORT_LOG, self._living)

    def start(self, living: Sequence[int] | npt.NDArray[np.int64], next_sequence: int) -> None:
        """Write a new file, durably, and delete the older ones.

        living: every sequence below `next_sequence` that is listed in the index or may still be committed.
        """
        older = _numbers(self._directory, self._ops)
        listed = np.sort(np.asarray(living, dtype="<u8"))
        path = _path(self._directory, max(older, default=0) + 1)
        fd = self._ops.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            at = _write(self._ops, fd, _head(self._store_id, next_sequence, listed) + listed.tobytes(), 0)
            self._ops.fsync(fd)
            self._ops.fsync_directory(self._directory)
        except OSError:
            self._ops.close(fd)
            self._ops.unlink(path)
            raise
        self.close()
        self._fd, self._at, self._living, self._ended = fd, at, len(listed), 0
        for number in older:
            self._ops.unlink(_path(self._directory, number))

    def append(self, sequences: Sequence[int]) -> None:
        """Note that these writes ended. Survives power loss from the next `sync` on."""
        if self._fd is None or not sequences:
            return
        records = b"".join(_RECORD.pack(n, _record_sum(n, self._store_id)) for n in sequences)
        self._at = _write(self._ops, self._fd, records, self._at)
        self._ended += len(sequences)

    def sync(self) -> None:
        """Make everything appended survive power loss."""
        if self._fd is not None:
            self._ops.fdatasync(self._fd)

    def close(self) -> None:
        """Close the file."""
        if self._fd is not None:
            self._ops.close(self._fd)
            self._fd = None


def _path(directory: str, number: int) -> str:
    return os.path.join(directory, f"{number:08d}{_SUFFIX}")


def _numbers(directory: str, ops: FileOps) -> list[int]:
    stems = (n.removesuffix(_SUFFIX) for n in ops.names(directory) if n.endswith(_SUFFIX))
    return sorted(int(stem) for stem in stems if stem.isdigit())


def _head(store_id: bytes, next_sequence: int, listed: Sequences) -> bytes:
    body_sum = xxhash.xxh3_64_intdigest(listed.tobytes())
    fixed = _FIXED.pack(_MAGIC, _VERSION, 0, store_id, next_sequence, len(listed), body_sum)
    return fixed + _SUM.pack(xxhash.xxh3_64_intdigest(fixed))


def _record_sum(sequence: int, store_id: bytes) -> int:
    return xxhash.xxh3_64_intdigest(store_id + _SUM.pack(sequence))


def _parse(data: bytes, store_id: bytes) -> Known | None:
    if len(data) < _HEAD_BYTES:
        return None
    magic, version, _, said_id, next_sequence, count, body_sum = _FIXED.unpack_from(data)
    end = _HEAD_BYTES + 8 * count
    usable = magic == _MAGIC and version == _VERSION and said_id == store_id and end <= len(data)
    if not usable or _SUM.unpack_from(data, _FIXED.size)[0] != xxhash.xxh3_64_intdigest(data[: _FIXED.size]):
        return None
    body = data[_HEAD_BYTES:end]
    if xxhash.xxh3_64_intdigest(body) != body_sum:
        return None
    whole = (len(data) - end) // _RECORD.size * _RECORD.size
    # A record that a crash tore was never promised to anybody; those behind it may be whole.
    records = _RECORD.iter_unpack(data[end : end + whole])
    ended = [sequence for sequence, said in records if said == _record_sum(sequence, store_id)]
    return Known(next_sequence, np.frombuffer(body, dtype="<u8"), np.array(ended, dtype="<u8"))


def _content(path: str, ops: FileOps) -> bytes:
    fd = ops.open(path, os.O_RDONLY)
    try:
        into = np.zeros(ops.size(fd), dtype=np.uint8)
        at = 0
        while at < into.nbytes:
            done = ops.preadv(fd, [into[at:]], at)
            if done == 0:
                break
            at += done
        return into[:at].tobytes()
    finally:
        ops.close(fd)


def _write(ops: FileOps, fd: int, data: bytes, at: int) -> int:
    rest: Bytes = np.frombuffer(data, dtype=np.uint8)
    while rest.nbytes:
        done = ops.pwritev(fd, [rest], at)
        at += done
        rest = rest[done:]
    return at
