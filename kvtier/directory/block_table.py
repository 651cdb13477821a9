"""Which holders have which block: one row for each of a block's holders.

The first row of a block stands under the block's own 64-bit key and counts its rows; row n stands under a
key that is mixed from that key and n.  So a block with one holder takes one slot, one that 64 nodes hold
takes 64, and all of them are found in one step, without a list to walk.

The table never stops to grow: a larger one is filled beside it, some rows with each change, and a block is
moved before it is changed.  Holders that are gone for good are left out on the way, so they cost nothing
when they go.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from kvtier.directory.rows import BUCKET, FIRST_KEY, SLOT_BYTES, Keys, Places, Rows

Mask: TypeAlias = npt.NDArray[np.bool_]

HOLDERS = 1 << 16
_HOLDER_SHIFT = np.uint64(48)
_MOST_ROWS_OF_A_BLOCK = HOLDERS - 1
_FULL, _GROWTH, _LEAST_SLOTS = 0.8, 1.7, 1024
# Above this share of rows of dead holders, the table is rebuilt without them.
_DEAD_SHARE = 0.25
# Below this load a table that is not small is rebuilt smaller.
_SPARSE = 0.2
# Slots of the old table that are looked at for each changed block, and with each change.
_PACE, _STEP = 4, 512
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def holders_of(words: Keys) -> Places:
    """The holder of each row."""
    return (words >> _HOLDER_SHIFT).astype(np.int64)


def usable_keys(keys: Keys) -> Keys:
    """Keys that are no marks; the few that were are moved, which costs a wrong hint at worst."""
    usable: Keys = np.maximum(keys, FIRST_KEY)
    return usable


class Found(NamedTuple):
    """Rows of blocks. of: which of the asked keys a row belongs to, ascending. words: of the rows."""

    of: Places
    words: Keys


class _Block(NamedTuple):
    """All rows of blocks that are there. of: index of the block. number: of the row in its block.

    place: its slot, -1 when two keys met and the row went with the other one.
    """

    of: Places
    number: Places
    place: Places
    starts: Places


class BlockTable:
    """Words by block and holder; a word's highest 16 bits name the holder.

    alive: bool by holder; its owner clears one and calls `holder_died`.
    """

    def __init__(self) -> None:
        self.alive: Mask = np.zeros(HOLDERS, np.bool_)
        self.blocks = 0
        self.dead_rows = 0
        self.cleansed = 0
        self._rows = Rows(_LEAST_SLOTS)
        self._old: Rows | None = None
        self._cursor = 0

    @property
    def rows(self) -> int:
        """Rows, those of dead holders included."""
        return self._rows.used + (self._old.used if self._old else 0)

    @property
    def table_bytes(self) -> int:
        """Memory of all slots."""
        return SLOT_BYTES * (self._rows.size + (self._old.size if self._old else 0))

    @property
    def rebuilding(self) -> bool:
        """Whether rows are being moved to another table. `cleansed` counts the rebuilds that ended."""
        return self._old is not None

    def find(self, keys: Keys) -> Found:
        """The rows of living holders of these blocks."""
        keys = usable_keys(keys)
        of, words = self._find_in(self._rows, keys)
        if self._old is not None:
            old_of, old_words = self._find_in(self._old, keys)
            of, words = np.concatenate((of, old_of)), np.concatenate((words, old_words))
            order = np.argsort(of, kind="stable")
            of, words = of[order], words[order]
        lives = self.alive[holders_of(words)]
        return Found(of[lives], words[lives])

    def put(self, keys: Keys, words: Keys, former: int) -> Keys:
        """Say that the words' one holder has these distinct blocks so; answers the words that it had before.

        former: a holder whose rows are this one's as well; the holder itself when there is none.
        """
        keys = usable_keys(keys)
        self._make_room(len(keys))
        first = self._bring(keys)
        absent = first < 0
        placed = self._rows.insert(keys[absent], words[absent])
        self._rows.counts[placed] = 1
        self.blocks += len(placed)
        known = np.flatnonzero(~absent)
        if not len(known):
            return words[:0]
        return self._put_known(keys[known], words[known], first[known], former)

    def drop(self, keys: Keys, holder: int, former: int) -> Keys:
        """Say that the holder has these distinct blocks no longer; answers the words that it had."""
        keys = usable_keys(keys)
        self.step(_STEP + _PACE * len(keys))
        first = self._bring(keys)
        known = np.flatnonzero(first >= 0)
        if not len(known):
            return self._rows.words[:0].copy()
        keys, first = keys[known], first[known]
        rows, block = self._rows, self._expand(self._rows, keys, first)
        chosen = self._choose(block, holder, former, dead=False)
        mine = chosen >= 0
        at, first = block.place[chosen[mine]], first[mine]
        last = block.place[_ends(block)[mine]]
        sound = last >= 0
        at, first, last = at[sound], first[sound], last[sound]
        had = rows.words[at]
        rows.words[at] = rows.words[last]
        rows.counts[first] -= 1
        self.blocks -= int(np.count_nonzero(first == last))
        rows.delete(last)
        return had

    def holder_died(self, rows: int) -> None:
        """A holder that had so many rows is not alive any more."""
        self.dead_rows += rows

    def step(self, slots: int = _STEP) -> None:
        """Do a part of a rebuild, or begin one that is due."""
        if self._old is None:
            if self._is_wasteful():
                self._begin(0)
            return
        end = min(self._cursor + -(-slots // BUCKET) * BUCKET, self._old.size)
        self._move(np.flatnonzero(self._old.counts[self._cursor : end]) + self._cursor)
        self._cursor = end
        if end == self._old.size:
            self._old = None
            self.cleansed += 1

    def rebuild(self) -> None:
        """Begin to leave out the rows of dead holders, unless a rebuild runs."""
        if self._old is None:
            self._begin(0)

    def _is_wasteful(self) -> bool:
        rows = self._rows
        sparse = rows.used < _SPARSE * rows.size and rows.size > 2 * _LEAST_SLOTS
        return sparse or self.dead_rows > _DEAD_SHARE * max(rows.used, 1)

    # --- growth -----------------------------------------------------------------------------------------

    def _make_room(self, wanted: int) -> None:
        self.step(_STEP + _PACE * wanted)
        while self._is_full(wanted) and self._old is not None:
            self.step(self._old.size)
        if self._is_full(wanted):
            self._begin(wanted)

    def _is_full(self, wanted: int) -> bool:
        rows = self._rows
        # All that the old table still has will be moved.
        waiting = self._old.used if self._old else 0
        return rows.used + rows.marks + waiting + wanted > _FULL * rows.size

    def _begin(self, wanted: int) -> None:
        expected = max(self._rows.used - self.dead_rows, 0) + wanted
        self._old, self._cursor = self._rows, 0
        # Rows that were counted as dead may have been replaced: there is room for all of them at worst.
        slots = max(expected * _GROWTH, (self._rows.used + wanted) / _FULL, _LEAST_SLOTS)
        self._rows = Rows(int(slots) + BUCKET)

    def _bring(self, keys: Keys) -> Places:
        """The first rows of these blocks in the new table, to which they are moved; -1: there is none."""
        first = self._first(self._rows, keys)
        if self._old is not None:
            behind = np.flatnonzero(first < 0)
            old = self._first(self._old, keys[behind])
            there = old >= 0
            self._move(old[there])
            moved = behind[there]
            first[moved] = self._first(self._rows, keys[moved])
        return first

    def _move(self, first: Places) -> None:
        """Take blocks, by the slots of their first rows, from the old table to the new one."""
        old = self._old
        if old is None or not len(first):
            return
        keys = old.keys(0, old.size)[first]
        block = self._expand(old, keys, first)
        sound = block.place >= 0
        of, place = block.of[sound], block.place[sound]
        words = old.words[place]
        lives = self.alive[holders_of(words)]
        old.delete(place)
        self.dead_rows -= int(np.count_nonzero(~lives))
        of, words = of[lives], words[lives]
        left = np.bincount(of, minlength=len(first))
        self.blocks -= int(np.count_nonzero(left == 0))
        number = np.arange(len(of)) - (np.cumsum(left) - left)[of]
        places = self._rows.insert(_row_keys(keys[of], number), words)
        self._rows.counts[places[number == 0]] = left[left > 0]

    # --- rows of a block --------------------------------------------------------------------------------

    @staticmethod
    def _first(rows: Rows, keys: Keys) -> Places:
        first = rows.find(keys)
        return np.where((first >= 0) & (rows.counts[first] > 0), first, -1)

    def _find_in(self, rows: Rows, keys: Keys) -> tuple[Places, Keys]:
        first = self._first(rows, keys)
        known = np.flatnonzero(first >= 0)
        block = self._expand(rows, keys[known], first[known])
        sound = block.place >= 0
        return known[block.of[sound]], rows.words[block.place[sound]]

    @staticmethod
    def _expand(rows: Rows, keys: Keys, first: Places) -> _Block:
        """All rows of blocks that are there; first: slots of their first rows."""
        counts = rows.counts[first].astype(np.int64)
        starts = np.cumsum(counts) - counts
        of = np.repeat(np.arange(len(first)), counts)
        number = np.arange(len(of)) - starts[of]
        place = first[of]
        later = np.flatnonzero(number)
        if len(later):
            place[later] = rows.find(_row_keys(keys[of[later]], number[later]))
        return _Block(of, number, place, starts)

    def _choose(self, block: _Block, holder: int, former: int, *, dead: bool) -> Places:
        """For each block the index of the holder's row, or else of a dead holder's if wanted, or -1."""
        owners = holders_of(self._rows.words[block.place])
        sound = block.place >= 0
        own = ((owners == holder) | (owners == former)) & sound
        none = 2 * len(owners)
        rank = np.where(own, np.arange(len(owners)), none)
        if dead:
            lost = ~self.alive[owners] & sound & ~own
            rank = np.where(lost, np.arange(len(owners)) + len(owners), rank)
        best = np.minimum.reduceat(rank, block.starts)
        return np.where(best < none, best % max(len(owners), 1), -1)

    def _put_known(self, keys: Keys, words: Keys, first: Places, former: int) -> Keys:
        rows, block = self._rows, self._expand(self._rows, keys, first)
        holder = int(holders_of(words[:1])[0])
        chosen = self._choose(block, holder, former, dead=True)
        here = chosen >= 0
        at = block.place[chosen[here]]
        had = rows.words[at]
        rows.words[at] = words[here]
        owners = holders_of(had)
        own = (owners == holder) | (owners == former)
        self.dead_rows -= int(np.count_nonzero(~own))
        counts = rows.counts[first]
        more = ~here & (counts < _MOST_ROWS_OF_A_BLOCK)
        new = _row_keys(keys[more], counts[more].astype(np.int64))
        rows.insert(new, words[more])
        rows.counts[first[more]] += 1
        superseded: Keys = had[own]
        return superseded


def _ends(block: _Block) -> Places:
    """For each block the index of its last row."""
    return np.append(block.starts[1:], len(block.of)) - 1


def _row_keys(keys: Keys, number: Places) -> Keys:
    """Keys of rows: a block's own for row 0, else mixed with the number."""
    mixed = _mixed(keys + number.astype(np.uint64) * _GOLDEN)
    mixed[number == 0] = keys[number == 0]
    return usable_keys(mixed)


def _mixed(keys: Keys) -> Keys:
    """The finaliser of splitmix64; unsigned arrays wrap around."""
    keys = (keys ^ (keys >> np.uint64(30))) * _MIX_1
    keys = (keys ^ (keys >> np.uint64(27))) * _MIX_2
    mixed: Keys = keys ^ (keys >> np.uint64(31))
    return mixed
