"""Finds an object's row by its name: open addressing, sixteen bytes an object.

A cell holds a row's number and 31 bits of its name, so a row is read only when those are the ones looked for.
Linear probing without wrap: a row stands in its home cell or in one of the next, with no empty cell in
between.  What goes leaves no mark; those behind it move up.  Made anew, twice as large, when it is seventy
per cent full, and at an opening, with all rows at once: in order of their homes, each takes its home or the
cell behind the one before it.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from kvtier.disk.rows import LISTED, Column, Name, Numbers, Rows
from kvtier.objects import KEY_BYTES, ObjectId

_EMPTY = -1
_LEAST_BITS = 6
# Cells behind the last home, for what does not find room before them; the last one is always empty.
_TAIL = 64
_FULL = 0.7
_ALL = (1 << 64) - 1
_TAG_BITS, _TAG_SHIFT = 31, 32
_NUMBER = (1 << _TAG_SHIFT) - 1
_WORDS = struct.Struct(f"<{KEY_BYTES // 8}Q")
# Odd, so that each word alone decides: keys are hashes, but nothing here depends on it.
_OF_WORDS = (1, 3, 5, 7)
_OF_GROUP, _OF_SHARD = 0xD6E8FEB86659FD93, 0xA0761D6478BD642F
_GOLDEN = 0x9E3779B97F4A7C15


class NameTable:
    """The listed rows of `rows`, by name. Its owner has a lock."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self.count = 0
        self._fill(rows.numbers(LISTED))

    def find(self, object_id: ObjectId) -> int:
        """The number of the object's row; -1 when there is none."""
        key, group, shard = object_id
        name = key, group, self._rows.shards.known(shard)
        if name[2] < 0 or len(key) != KEY_BYTES:
            return _EMPTY
        cells, tag = self._cells, self._tag(name)
        at = tag >> self._shift
        while (cell := cells[at]) != _EMPTY:
            if cell >> _TAG_SHIFT == tag and self._rows.name(cell & _NUMBER) == name:
                return cell & _NUMBER
            at += 1
        return _EMPTY

    def add(self, number: int) -> None:
        """Enter a row that is listed, and whose name is not in the table."""
        self.count += 1
        if self.count > _FULL * (1 << self._bits):
            self._fill(self._rows.numbers(LISTED))
            return
        cells, tag = self._cells, self._tag(self._rows.name(number))
        at = tag >> self._shift
        while cells[at] != _EMPTY:
            at += 1
        cells[at] = tag << _TAG_SHIFT | number
        if at == len(cells) - 1:
            self._fill(self._rows.numbers(LISTED))

    def remove(self, number: int) -> None:
        """Take a row out that is in the table."""
        cells, tag = self._cells, self._tag(self._rows.name(number))
        hole, cell = tag >> self._shift, tag << _TAG_SHIFT | number
        while cells[hole] != cell:
            hole += 1
        at = hole + 1
        while (behind := cells[at]) != _EMPTY:
            if behind >> _TAG_SHIFT + self._shift <= hole:
                cells[hole] = behind
                hole = at
            at += 1
        cells[hole] = _EMPTY
        self.count -= 1

    def _tag(self, name: Name) -> int:
        """The highest bits of what `mixed_names` says; the highest of these are the name's home."""
        key, group, shard = name
        one, two, three, four = _WORDS.unpack(key)
        mixed: int = one + 3 * two + 5 * three + 7 * four + _OF_GROUP * group + _OF_SHARD * shard
        return (mixed * _GOLDEN & _ALL) >> 64 - _TAG_BITS

    def _fill(self, numbers: Numbers) -> None:
        """Make the table of these rows, and large enough for some more."""
        self.count = len(numbers)
        self._bits = max(_LEAST_BITS, int(np.ceil(np.log2(max(1, self.count) / _FULL + 1))))
        self._shift = _TAG_BITS - self._bits
        tags = (mixed_names(self._rows, numbers) >> np.uint64(64 - _TAG_BITS)).astype(np.int64)
        order = np.argsort(tags, kind="stable")
        tags = tags[order]
        places = tags >> self._shift
        places -= np.arange(len(order))
        np.maximum.accumulate(places, out=places)
        places += np.arange(len(order))
        last = int(places[-1]) if len(places) else 0
        cells = np.full(max(1 << self._bits, last + 1) + _TAIL, _EMPTY, dtype=np.int64)
        cells[places] = tags << _TAG_SHIFT | numbers[order]
        self._cells = cells.data


def mixed_names(rows: Rows, numbers: Numbers) -> npt.NDArray[np.uint64]:
    """64 bits of each row's name, of which the highest are its home; equal for equal names."""
    parts = [_mixed(chunk) for _, chunk in rows.chunks()]
    mixed = np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64)
    return mixed[numbers]


def _mixed(rows: Column) -> npt.NDArray[np.uint64]:
    mixed: npt.NDArray[np.uint64] = rows["block_key"] @ np.array(_OF_WORDS, dtype=np.uint64)
    mixed += rows["group"].astype(np.uint64) * np.uint64(_OF_GROUP)
    mixed += rows["shard"].astype(np.uint64) * np.uint64(_OF_SHARD)
    mixed *= np.uint64(_GOLDEN)
    return mixed
