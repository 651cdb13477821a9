"""Eviction by worth: a tier's runs in order of what they are worth for their room, cut from their ends.

A heap holds the runs that have a leaf in the tier, by the worth that they had when they were looked at last.
Worth changes as time passes: a run is looked at again whenever its wait enters the next class of age, and
when it comes up. What comes up and is worth more than it was thought goes back into the heap. Blocks of one
run go one after the other without another look: deciding costs O(log runs) for a run and O(1) for a block.
What waits for nobody is worth nothing, and among that the one used longest ago goes first.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Final

from kvtier.policy.prices import Money
from kvtier.policy.returns import class_of
from kvtier.policy.usage import TierName
from kvtier.policy.worth import pays
from kvtier.policy.worth_runs import TIER_NAMES, Book, Run

# Below this many entries the heap is never swept: the saving would not pay.
_SWEEP_FROM: Final = 1024
# What takes a write has to be worth so much more than what it pushes out.
_FOR_A_WRITE: Final = 1.25


class WorthOrder:
    """See EvictionPolicy. One tier's blocks, in the order of the book that it shares with the other tier."""

    def __init__(self, book: Book, tier: TierName) -> None:
        self._book = book
        self._tier: TierName = tier
        # The book's own table: it is asked for every block.
        self._owners = book.owners
        self._index = TIER_NAMES.index(tier)
        self._parents: dict[bytes, bytes] = {}
        self._children: dict[bytes, int] = {}
        # (worth, last use, mark, run): marks are never equal, so runs are never compared.
        self._heap: list[tuple[float, float, int, Run]] = []
        self._marks = 0
        # Runs that have an entry which counts.
        self._entered = 0
        self._walking: Run | None = None
        book.orders.append(self)
        book.held.append(self._parents)

    def __len__(self) -> int:
        return len(self._parents)

    # --- what is held -----------------------------------------------------------------------------------

    def added(self, key: bytes, parent: bytes, nbytes: int, now_s: float) -> None:
        """See EvictionPolicy."""
        if key in self._parents:
            self.used(key, now_s)
            return
        self._parents[key] = parent
        children, nobody = self._children, self._book.nobody
        siblings = children.get(parent, 0)
        children[parent] = siblings + 1
        if not siblings and parent in self._parents:
            self._owners.get(parent, nobody).leaves[self._index].pop(parent, None)
        if key not in children:
            self._leaf(key, self._owners.get(key, nobody))

    def used(self, key: bytes, now_s: float) -> None:
        """See EvictionPolicy."""
        run = self._owners.get(key, self._book.nobody)
        if run.used_s < now_s:
            run.used_s = now_s
        leaves = run.leaves[self._index]
        if key in leaves:
            # Among a run's leaves, too, the one that was used longest ago goes first.
            leaves[key] = leaves.pop(key)

    def removed(self, key: bytes) -> None:
        """See EvictionPolicy."""
        parent = self._parents.pop(key, None)
        if parent is None:
            return
        if key not in self._children:
            run = self._owners.get(key, self._book.nobody)
            run.leaves[self._index].pop(key, None)
            if run.waiting and not self._index:
                self._book.note_away(run)
        left = self._children.pop(parent) - 1
        if left:
            self._children[parent] = left
        elif parent in self._parents:
            self._leaf(parent, self._owners.get(parent, self._book.nobody))
        self._book.left(key)

    def moved(self, key: bytes, before: Run, after: Run) -> bool:
        """See Order."""
        if key not in self._parents:
            return False
        if key not in self._children:
            before.leaves[self._index].pop(key, None)
            self._leaf(key, after)
        return True

    def ranked(self, run: Run, worth: float) -> None:
        """See Order."""
        if run.leaves[self._index]:
            self._push(run, worth)
        elif run.mark[self._index]:
            # A leaf may come later: its entry would be one of what the run was worth once.
            run.mark[self._index] = 0
            self._entered -= 1

    # --- who goes ---------------------------------------------------------------------------------------

    def victims(self, now_s: float) -> Iterator[bytes]:
        """See EvictionPolicy."""
        self._book.now_s = max(self._book.now_s, now_s)
        seen: dict[bytes, None] = {}
        looked_at: dict[Run, None] = {}
        try:
            while (run := self._least()) is not None:
                looked_at[run] = None
                self._walking = run
                yield from self._leaves_of(run, seen)
        finally:
            self._walking = None
            for run in looked_at:
                if run.leaves[self._index] and not run.mark[self._index]:
                    self._push(run)

    def _leaves_of(self, run: Run, seen: dict[bytes, None]) -> Iterator[bytes]:
        """The run's leaves; when one is removed, the block that it stood on, if that is the run's too."""
        leaves = run.leaves[self._index]
        while fresh := [key for key in leaves if key not in seen]:
            for key in fresh:
                if key in leaves:
                    seen[key] = None
                    yield key

    def least_worth(self) -> float:
        """Of what would go first; 0 where nothing is held."""
        run = self._least()
        if run is None:
            return 0.0
        self._push(run)
        return self._book.worth(run, self._tier)

    def rank(self, key: bytes) -> tuple[int, int]:
        """(Runs that would go before the block's, runs in all): a look at every run."""
        runs = [run for run in dict.fromkeys(map(self._book.owner, self._parents)) if run.leaves[self._index]]
        own = self._book.owner(key)
        place = (self._book.worth(own, self._tier), own.used_s)
        before = sum((self._book.worth(run, self._tier), run.used_s) < place for run in runs)
        return before, len(runs)

    # --- the heap ---------------------------------------------------------------------------------------

    def _least(self) -> Run | None:
        """Take out the run that is worth least now."""
        index = self._index
        while self._heap:
            worth, used_s, mark, run = heapq.heappop(self._heap)
            if run.mark[index] != mark:
                continue
            run.mark[index] = 0
            self._entered -= 1
            if not run.leaves[index]:
                continue
            now = (self._book.worth(run, self._tier), run.used_s)
            if now > (worth, used_s) and self._heap and now > self._heap[0][:2]:
                self._push(run)
                continue
            return run
        return None

    def _leaf(self, key: bytes, run: Run) -> None:
        index = self._index
        run.leaves[index][key] = None
        if not run.mark[index] and run is not self._walking:
            self._push(run)

    def _push(self, run: Run, worth: float | None = None) -> None:
        """worth: now, where it is known."""
        worth = self._book.worth(run, self._tier) if worth is None else worth
        self._marks += 1
        self._entered += not run.mark[self._index]
        run.mark[self._index] = self._marks
        heapq.heappush(self._heap, (worth, run.used_s, self._marks, run))
        if len(self._heap) > max(_SWEEP_FROM, 3 * self._entered):
            self._sweep()

    def _sweep(self) -> None:
        """Drop entries that are out of date, and those of runs that have no leaf any more."""
        index, kept = self._index, []
        for entry in self._heap:
            run = entry[3]
            if run.mark[index] != entry[2]:
                continue
            if run.leaves[index]:
                kept.append(entry)
            else:
                run.mark[index] = 0
                self._entered -= 1
        heapq.heapify(kept)
        self._heap = kept


class WorthAdmission:
    """See AdmissionPolicy: what a block is worth on disk against what it would push out, and the write.

    With prices, what its return would save has to pay for the write and the room; that is looked at once for
    each run and class of age.
    """

    def __init__(self, book: Book, disk: WorthOrder, money: Money) -> None:
        self._book = book
        self._disk = disk
        self._money = money

    def demote(self, key: bytes, nbytes: int, now_s: float) -> bool:
        """See AdmissionPolicy."""
        book = self._book
        book.now_s = max(book.now_s, now_s)
        run = book.owner(key)
        if book.retired(run.model):
            return False
        if run.waiting and (book.reads_too_slowly(run) or not self._pays(run)):
            return False
        if nbytes <= book.disk_free_bytes:
            return True
        return book.worth(run, "disk") >= _FOR_A_WRITE * self._disk.least_worth()

    def _pays(self, run: Run) -> bool:
        """Whether a byte of the run is worth its write and its room, in money."""
        gpu_second, price = self._money.gpu_second(), self._money.tier("disk")
        if gpu_second is None or price is None or run.curve is None:
            return True
        idle_s = run.curve_age_s(self._book.now_s)
        age_class = class_of(idle_s)
        if run.paid is None or run.paid[0] != age_class:
            saving = self._book.saving_s(run, "disk") * gpu_second
            written = price.per_byte_written
            answer = pays(run.curve.whole, idle_s, saving, price.per_byte_second, written)
            run.paid = (age_class, answer)
        return run.paid[1]
