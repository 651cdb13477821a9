"""Eviction by worth: a tier's runs in order of what they are worth for their room, cut from their ends.

A heap holds the runs that have a leaf in the tier, by the worth that they had when they were looked at last.
Worth changes as time passes: a run is looked at again whenever its wait enters the next class of age, and
when it comes up. What comes up and is worth more than it was thought goes back into the heap. Blocks of one
run go one after the other without another look: deciding costs O(log runs) for a run and O(1) for a block.
What waits for nobody is worth nothing, and among that the one used longest ago goes first. While worth has
fallen behind LRU (worth_guard.py), runs go by their last use.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Final

from kvtier.policy.prices import Money
from kvtier.policy.returns import class_of
from kvtier.policy.usage import TierName
from kvtier.policy.worth import pays
from kvtier.policy.worth_guard import ByUse
from kvtier.policy.worth_runs import TIER_BITS, TIER_NAMES, Block, Book, Run

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
        self._blocks = book.blocks
        self._index = TIER_NAMES.index(tier)
        self._bit = TIER_BITS[self._index]
        self._held = 0
        # (worth, last use, mark, run): marks are never equal, so runs are never compared.
        self._heap: list[tuple[float, float, int, Run]] = []
        self._marks = 0
        # Runs that have an entry which counts.
        self._entered = 0
        self._walking: Run | None = None
        self._by_use = ByUse(self._index)
        book.orders.append(self)

    def __len__(self) -> int:
        return self._held

    def __iter__(self) -> Iterator[bytes]:
        return (key for key, block in self._blocks.items() if block.held & self._bit)

    # --- what is held -----------------------------------------------------------------------------------

    def added(self, key: bytes, parent: bytes, nbytes: int, now_s: float) -> None:
        """See EvictionPolicy."""
        block = self._blocks.get(key)
        if block is None:
            block = self._book.block(key)
        elif block.held & self._bit:
            self.used(key, now_s)
            return
        before = block.parent
        if before is None:
            before = block.parent = self._book.block(parent)
        if not block.held:
            book = self._book
            block.nbytes, block.came = nbytes, book.request
            book.held_bytes += nbytes
        block.held |= self._bit
        self._held += 1
        index = self._index
        siblings = before.children[index]
        before.children[index] = siblings + 1
        if not siblings and before.held & self._bit:
            before.run.leaves[index].pop(before, None)
        if not block.children[index]:
            self._leaf(block, block.run)

    def used(self, key: bytes, now_s: float) -> None:
        """See EvictionPolicy."""
        block = self._blocks.get(key)
        run = self._book.nobody if block is None else block.run
        if run.used_s < now_s:
            run.used_s = now_s
        leaves = run.leaves[self._index]
        if block is not None and block in leaves:
            # Among a run's leaves, too, the one that was used longest ago goes first.
            leaves[block] = leaves.pop(block)

    def removed(self, key: bytes) -> None:
        """See EvictionPolicy."""
        block, index = self._blocks.get(key), self._index
        before = None if block is None else block.parent
        if block is None or before is None or not block.held & self._bit:
            return
        block.held &= ~self._bit
        self._held -= 1
        if not block.children[index]:
            run = block.run
            run.leaves[index].pop(block, None)
            if run.waiting and not index:
                self._book.note_away(run)
        if not block.held:
            self._gone(block)
        before.children[index] -= 1
        if not before.children[index]:
            if before.held & self._bit:
                self._leaf(before, before.run)
            elif not before.held and before.run is self._book.nobody:
                self._book.let_go(before)

    def _gone(self, block: Block) -> None:
        book = self._book
        book.held_bytes -= block.nbytes
        if book.shadow is not None and self._walking is None:
            # Nobody looked for a victim: it was forgotten, found damaged, or lies behind every window.
            if any(block.children):
                book.shadow.hollow(block.key)
            else:
                book.shadow.forget(block.key)
        book.let_go(block)

    def moved(self, block: Block, before: Run, after: Run) -> None:
        """See Order."""
        before.leaves[self._index].pop(block, None)
        self._leaf(block, after)

    def ranked(self, run: Run, worth: float) -> None:
        """See Order."""
        if run.leaves[self._index]:
            self._push(run, worth)
        elif run.mark[self._index]:
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
                leaves, fresh = run.leaves[self._index], True
                # When a leaf is removed, the block that it stood on comes up, if that is the run's too.
                while fresh:
                    fresh = False
                    for block in list(leaves):
                        if block in leaves and block.key not in seen:
                            seen[block.key], fresh = None, True
                            yield block.key
        finally:
            self._walking = None
            for run in looked_at:
                self._enter(run)

    def least_worth(self) -> float:
        """Of what would go first; 0 where nothing is held."""
        run = self._worth_least()
        if run is None:
            return 0.0
        self._push(run)
        return self._book.worth(run, self._tier)

    def ranks(self, keys: Sequence[bytes], now_s: float) -> list[tuple[int, int]]:
        """See EvictionPolicy: runs, by worth."""
        book, index = self._book, self._index
        book.now_s = max(book.now_s, now_s)
        runs = [entry[3] for entry in self._heap if entry[3].mark[index] == entry[2]]
        order = sorted((book.worth(run, self._tier), run.used_s) for run in runs if run.leaves[index])
        own = {run: (book.worth(run, self._tier), run.used_s) for run in map(book.owner, keys)}
        return [(bisect_left(order, own[book.owner(key)]), len(order)) for key in keys]

    # --- the heap ---------------------------------------------------------------------------------------

    def _least(self) -> Run | None:
        """Take out the run that goes first."""
        return self._by_use.take() if self._book.lru_leads else self._worth_least()

    def _worth_least(self) -> Run | None:
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

    def _leaf(self, block: Block, run: Run) -> None:
        index = self._index
        run.leaves[index][block] = None
        if run is not self._walking and not (run.mark[index] and run.queued[index]):
            self._enter(run)

    def _enter(self, run: Run) -> None:
        """A run that has a leaf is in both orders."""
        if run.leaves[self._index]:
            if not run.mark[self._index]:
                self._push(run)
            self._by_use.add(run)

    def _push(self, run: Run, worth: float | None = None) -> None:
        """worth: now, where it is known."""
        worth = self._book.worth(run, self._tier) if worth is None else worth
        self._marks += 1
        self._entered += not run.mark[self._index]
        run.mark[self._index] = self._marks
        heapq.heappush(self._heap, (worth, run.used_s, self._marks, run))
        if len(self._heap) > _SWEEP_FROM and len(self._heap) > 3 * self._entered:
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
        if nbytes <= book.disk_free_bytes or book.lru_leads:
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
