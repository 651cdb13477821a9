"""The objects of a store in memory: 160 bytes each, in arrays.

A store has millions of objects, and a Python object for each would take a kilobyte and seconds to make.  So
each is one row of fixed length.  A single row is read and written with `struct`, many at once as columns of
numpy arrays over the same memory.  Roots, shards and codecs, of which there are few, are kept once and
numbered.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from kvtier.objects import KEY_BYTES, ObjectId, ObjectMeta, Root
from kvtier.tier import Slot

Value = TypeVar("Value", bound=Hashable)
Numbers: TypeAlias = npt.NDArray[np.int64]
Column: TypeAlias = npt.NDArray[Any]
# A name as the table knows it: block key, group, number of the shard.
Name: TypeAlias = tuple[bytes, int, int]

# What a row is: nothing, or a write that was given up; an object; one whose check failed.
FREE, LISTED, QUARANTINED = 0, 1, 2
_WORDS = KEY_BYTES // 8
_ROW = np.dtype(
    [
        ("block_key", "<u8", _WORDS),
        ("group", "<i8"),
        ("shard", "<u4"),
        ("root", "<u4"),
        ("parent_key", "<u8", _WORDS),
        ("sequence", "<i8"),
        ("segment", "<i8"),
        ("at", "<i8"),
        ("nbytes", "<i8"),
        ("stored_bytes", "<i8"),
        ("checksum", "<u8"),
        ("start", "<i8"),
        ("tokens", "<i8"),
        ("first_valid", "<i8"),
        ("codec", "<u2"),
        ("sealed", "u1"),
        ("state", "u1"),
        ("", "<u4"),
    ]
)
ROW_BYTES = _ROW.itemsize
_WHOLE = struct.Struct(f"<{KEY_BYTES}sqII{KEY_BYTES}sqqqqqQqqqHBB4x")
_NAME = struct.Struct(f"<{KEY_BYTES}sqI")
_PLACE, _PLACE_AT = struct.Struct("<qqqq"), struct.calcsize(f"<{KEY_BYTES}sqII{KEY_BYTES}s")
_STATE_AT = _WHOLE.size - 5
_CHUNK_SHIFT = 15
_CHUNK_ROWS = 1 << _CHUNK_SHIFT
_IN_CHUNK = _CHUNK_ROWS - 1
_MOST = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class ObjectRow:
    """An object and where it is: byte `at` of a segment, where its header starts.

    The checksum of a sealed object is masked in the index, as in its header.
    """

    meta: ObjectMeta
    sequence: int
    segment: int
    at: int
    stored_bytes: int
    codec: str
    quarantined: bool = False
    sealed: bool = False


class Numbered(Generic[Value]):
    """A few values, each with a number that stands for it in rows."""

    def __init__(self) -> None:
        self.values: list[Value] = []
        self._numbers: dict[Value, int] = {}

    def number(self, value: Value) -> int:
        """The value's number, a new one when it was not seen yet."""
        number = self._numbers.setdefault(value, len(self.values))
        if number == len(self.values):
            self.values.append(value)
        return number

    def known(self, value: Value) -> int:
        """The value's number; -1 when it was not seen yet."""
        return self._numbers.get(value, -1)

    def numbers(self, values: Sequence[Value]) -> list[int]:
        """The number of each."""
        for value in set(values).difference(self._numbers):
            self.number(value)
        return list(map(self._numbers.__getitem__, values))


class Rows:
    """Rows by number, from 0 to `count`. Not thread-safe: its owner has a lock."""

    def __init__(self) -> None:
        self.count = 0
        self.roots: Numbered[Root] = Numbered()
        self.shards: Numbered[str] = Numbered()
        self.codecs: Numbered[str] = Numbered()
        self._chunks: list[Column] = []
        self._bytes: list[memoryview] = []

    # -- single rows

    def add(self) -> int:
        """The number of a new row, which is free."""
        if self.count == len(self._chunks) << _CHUNK_SHIFT:
            self._append(np.zeros(_CHUNK_ROWS, dtype=_ROW))
        self.count += 1
        return self.count - 1

    def put(self, number: int, row: ObjectRow) -> None:
        """Write a row. Raises ValueError when it has no checksum, or a key of another length."""
        meta = row.meta
        if meta.checksum is None or {len(meta.object_id.block_key), len(meta.parent_key)} != {KEY_BYTES}:
            raise ValueError(f"{meta.object_id} has no checksum, or a key that is not {KEY_BYTES} bytes long")
        _WHOLE.pack_into(
            self._bytes[number >> _CHUNK_SHIFT],
            (number & _IN_CHUNK) * ROW_BYTES,
            meta.object_id.block_key,
            meta.object_id.group,
            self.shards.number(meta.object_id.shard),
            self.roots.number(meta.root),
            meta.parent_key,
            row.sequence,
            row.segment,
            row.at,
            meta.nbytes,
            row.stored_bytes,
            meta.checksum,
            meta.start,
            meta.tokens,
            meta.first_valid,
            self.codecs.number(row.codec),
            row.sealed,
            QUARANTINED if row.quarantined else LISTED,
        )

    def clear(self, number: int) -> None:
        """Make a row free."""
        self._bytes[number >> _CHUNK_SHIFT][(number & _IN_CHUNK) * ROW_BYTES + _STATE_AT] = FREE

    def get(self, number: int) -> ObjectRow:
        """A row that is not free."""
        values = _WHOLE.unpack_from(self._bytes[number >> _CHUNK_SHIFT], (number & _IN_CHUNK) * ROW_BYTES)
        sequence, segment, at, _, stored_bytes = values[5:10]
        codec, sealed, state = values[14:]
        how = (self.codecs.values[codec], state == QUARANTINED, bool(sealed))
        return ObjectRow(self._meta(values), sequence, segment, at, stored_bytes, *how)

    def name(self, number: int) -> Name:
        """The name of a row."""
        return _NAME.unpack_from(self._bytes[number >> _CHUNK_SHIFT], (number & _IN_CHUNK) * ROW_BYTES)

    def slot(self, number: int) -> Slot:
        """An object's slot: the number of its row, and as its generation the sequence of its write."""
        at = (number & _IN_CHUNK) * ROW_BYTES + _PLACE_AT
        sequence, segment, offset, nbytes = _PLACE.unpack_from(self._bytes[number >> _CHUNK_SHIFT], at)
        return Slot(number, sequence, (segment, offset), nbytes)

    def holds(self, number: int, sequence: int) -> bool:
        """Whether the row is an object, by this write."""
        if not 0 <= number < self.count:
            return False
        memory, at = self._bytes[number >> _CHUNK_SHIFT], (number & _IN_CHUNK) * ROW_BYTES
        said: int = _PLACE.unpack_from(memory, at + _PLACE_AT)[0]
        return memory[at + _STATE_AT] == LISTED and said == sequence

    def __iter__(self) -> Iterator[ObjectRow]:
        """Every row that is not free, in order of number."""
        return map(self.get, self.numbers(LISTED, QUARANTINED).tolist())

    # -- many at once

    def extend(self, columns: dict[str, Column]) -> None:
        """Append rows, by columns of equal length; codec, shard and root are numbers."""
        done, count = 0, len(columns["sequence"])
        while done < count:
            if self.count == len(self._chunks) << _CHUNK_SHIFT:
                self._append(np.zeros(_CHUNK_ROWS, dtype=_ROW))
            first = self.count & _IN_CHUNK
            step = min(count - done, _CHUNK_ROWS - first)
            part = self._chunks[-1][first : first + step]
            for name, values in columns.items():
                part[name] = values[done : done + step]
            self.count += step
            done += step

    def chunks(self) -> Iterator[tuple[int, Column]]:
        """All rows as arrays, and the number of the first row of each."""
        for index, chunk in enumerate(self._chunks):
            first = index << _CHUNK_SHIFT
            yield first, chunk[: self.count - first]

    def column(self, field: str, numbers: Numbers) -> Column:
        """One field of these rows."""
        parts = [chunk[field] for _, chunk in self.chunks()]
        whole = np.concatenate(parts) if parts else np.zeros(0, dtype=_ROW)[field]
        taken: Column = whole[numbers]
        return taken

    def numbers(self, *states: int) -> Numbers:
        """The numbers of rows in one of these states, ascending."""
        parts = [np.flatnonzero(np.isin(chunk["state"], states)) + first for first, chunk in self.chunks()]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def drop(self, numbers: Numbers) -> list[int]:
        """Make these rows free; answers their sequences."""
        sequences: list[int] = self.column("sequence", numbers).tolist()
        for number in numbers.tolist():
            self.clear(number)
        return sequences

    def put_checksums(self, numbers: Numbers, checksums: npt.NDArray[np.uint64]) -> None:
        """Write the checksums of these rows."""
        of_chunk = numbers >> _CHUNK_SHIFT
        for index in np.unique(of_chunk).tolist():
            here = of_chunk == index
            self._chunks[index]["checksum"][numbers[here] & _IN_CHUNK] = checksums[here]

    def copy_of(self, numbers: Sequence[int]) -> Column:
        """A copy of these rows, for `metas`."""
        rows = [self._chunks[number >> _CHUNK_SHIFT][number & _IN_CHUNK] for number in numbers]
        return np.array(rows, dtype=_ROW)

    def copy_from(self, first: int, most: int) -> Column:
        """A copy of rows from a number on, at least one and at most so many, for `metas`."""
        chunk, first = self._chunks[first >> _CHUNK_SHIFT], first & _IN_CHUNK
        return chunk[first : first + most].copy()

    def metas(self, rows: Column) -> list[ObjectMeta]:
        """The objects among copied rows. Needs no lock: what has a number keeps it."""
        return [self._meta(row) for row in _WHOLE.iter_unpack(rows.view(np.uint8).data) if row[-1] == LISTED]

    def slots_from(self, segment: int, at: int) -> list[Slot]:
        """Slots in the first segment with an object from byte `at` of `segment` on, in order of place.

        Needs no lock: what changes meanwhile may be there or not, and a slot may be of nobody.
        """
        ahead: list[tuple[int, int, int]] = []
        for first, chunk in self.chunks():
            segments, places = chunk["segment"], chunk["at"]
            later = (segments > segment) | ((segments == segment) & (places >= at))
            found = np.flatnonzero(later & (chunk["state"] == LISTED))
            found = found[segments[found] == segments[found].min(initial=_MOST)]
            columns = segments[found], places[found], found + first
            ahead += zip(*(column.tolist() for column in columns), strict=True)
        ahead.sort()
        return [self.slot(number) for of_segment, _, number in ahead if of_segment == ahead[0][0]]

    def _meta(self, values: tuple[Any, ...]) -> ObjectMeta:
        key, group, shard, root, parent = values[:5]
        nbytes, _, checksum, start, tokens, first_valid = values[8:14]
        object_id = ObjectId(key, group, self.shards.values[shard])
        place = (start, tokens, first_valid, nbytes, checksum)
        return ObjectMeta(object_id, self.roots.values[root], parent, *place)

    def _append(self, chunk: Column) -> None:
        self._chunks.append(chunk)
        self._bytes.append(chunk.view(np.uint8).data)
