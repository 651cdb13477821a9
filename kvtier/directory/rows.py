"""An open-addressing table of 64-bit keys in numpy arrays, made for batches.

Slots stand in buckets of eight keys, one cache line.  A key lives in its home bucket, or in the first later
one that had room.  A bucket that has an empty slot was never full, so nothing was sent on from it and a
search ends there; what is deleted from such a bucket leaves an empty slot, and only full buckets keep
marks.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Keys: TypeAlias = npt.NDArray[np.uint64]
Places: TypeAlias = npt.NDArray[np.int64]

BUCKET = 8
EMPTY, DELETED = np.uint64(0), np.uint64(1)
# Keys below this one are marks.
FIRST_KEY = np.uint64(2)
SLOT_BYTES = 8 + 8 + 2
_HIGH = np.uint64(32)


class Rows:
    """Slots for rows of (key, word, count). Its owner keeps `used + marks` well below `size`.

    words: uint64 [size].  counts: uint16 [size], 0 where nothing was said.  used: rows.  marks: deleted
    slots that searches have to pass.
    """

    __slots__ = ("_buckets", "_keys", "counts", "marks", "size", "used", "words")

    def __init__(self, slots: int) -> None:
        self._buckets = max(1, -(-slots // BUCKET))
        self.size = self._buckets * BUCKET
        self._keys: Keys = np.zeros((self._buckets, BUCKET), np.uint64)
        self.words: Keys = np.zeros(self.size, np.uint64)
        self.counts: npt.NDArray[np.uint16] = np.zeros(self.size, np.uint16)
        self.used = 0
        self.marks = 0

    def keys(self, first: int, end: int) -> Keys:
        """The keys of slots [first, end), marks among them."""
        return self._keys.reshape(-1)[first:end]

    def find(self, keys: Keys) -> Places:
        """The slot of each key, -1 where it is absent."""
        found = np.full(len(keys), -1, np.int64)
        bucket = self._home(keys)
        open_ = np.arange(len(keys))
        for _ in range(self._buckets):
            if not len(open_):
                break
            lines = self._keys[bucket]
            hit = lines == keys[open_, None]
            at = hit.argmax(axis=1)
            is_hit = hit[np.arange(len(open_)), at]
            found[open_[is_hit]] = bucket[is_hit] * BUCKET + at[is_hit]
            on = ~(is_hit | (lines == EMPTY).any(axis=1))
            open_, bucket = open_[on], (bucket[on] + 1) % self._buckets
        return found

    def insert(self, keys: Keys, words: Keys) -> Places:
        """Put in rows whose keys are distinct and absent, with count 0; answers their slots.

        There must be room for all.
        """
        if self.used + len(keys) > self.size:
            raise AssertionError(f"{len(keys)} more rows do not fit {self.used} of {self.size}")
        places = np.empty(len(keys), np.int64)
        flat = self._keys.reshape(-1)
        bucket = self._home(keys)
        open_ = np.arange(len(keys))
        while len(open_):
            free = self._keys[bucket] < FIRST_KEY
            at = free.argmax(axis=1)
            fits = free[np.arange(len(open_)), at]
            place = bucket * BUCKET + at
            wanted, mine = place[fits], keys[open_[fits]]
            marked = flat[wanted] == DELETED
            # Several may want one slot: the last one written has it, the others try again.
            flat[wanted] = mine
            won = flat[wanted] == mine
            self.marks -= int(np.count_nonzero(marked & won))
            places[open_[fits][won]] = wanted[won]
            rest = np.ones(len(open_), np.bool_)
            rest[np.flatnonzero(fits)[won]] = False
            bucket = np.where(fits, bucket, (bucket + 1) % self._buckets)[rest]
            open_ = open_[rest]
        self.words[places] = words
        self.counts[places] = 0
        self.used += len(keys)
        return places

    def delete(self, places: Places) -> None:
        """Take out the rows of these distinct slots."""
        had_empty = (self._keys[places // BUCKET] == EMPTY).any(axis=1)
        self._keys.reshape(-1)[places] = np.where(had_empty, EMPTY, DELETED)
        self.counts[places] = 0
        self.used -= len(places)
        self.marks += int(np.count_nonzero(~had_empty))

    def _home(self, keys: Keys) -> Places:
        return (((keys >> _HIGH) * np.uint64(self._buckets)) >> _HIGH).astype(np.int64)
