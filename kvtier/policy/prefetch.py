"""Who is expected back soon enough that host memory should have what only the disk has of them.

Reading ahead gains what loading from host memory saves, should the return come while it is held; it costs the
read, and the room, which is worth what the first victim is worth. For the best time tau of holding it, tau no
longer than one looks ahead:

    P(T <= t + tau | T > t) * saving - read >= price * E[min(T - t, tau) | T > t]

The highest price at which that holds is what reading ahead is worth, for each byte and second.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np

from kvtier.policy.survival import EDGES_S, WIDTHS_S, FloatArray, SurvivalCurve
from kvtier.policy.usage import Name
from kvtier.policy.worth_runs import HOST_BIT, Book, Run

# A read that nobody waits for costs so much of one that somebody waits for.
_IDLE_READ: Final = 0.25
# Ages at which a wait is looked at: so many in each class of age.
_LOOKS_A_CLASS: Final = 8
_AGES_S: Final[FloatArray] = (
    EDGES_S[:-1, None] + WIDTHS_S[:, None] * (np.arange(_LOOKS_A_CLASS) / _LOOKS_A_CLASS)
).ravel()
_MOST_AT_ONCE: Final = 64
# Who was named is looked at again after this part of the time that one looks ahead, should they still wait.
_AGAIN: Final = 1 / 8
# What is pushed out has to be worth so much less.
_OVER_VICTIM: Final = 1.25
_SWEEP_FROM: Final = 1024


def worth_ahead(curve: SurvivalCurve, idle_s: float, saving: float, read: float, ahead_s: float) -> float:
    """The highest price of room, for each second, at which reading now pays; 0 where it never does.

    saving: of one use; read: what the read costs; in one unit.  ahead_s: the longest time of holding it.
    """
    edges = EDGES_S[int(np.searchsorted(EDGES_S, idle_s, side="right")) :] - idle_s
    horizons_s = np.append(edges[edges < ahead_s], ahead_s)
    gained = curve.returns_within(horizons_s, idle_s) * saving - read
    held_s = np.maximum(curve.expected_wait_s(horizons_s, idle_s), 1e-9)
    return max(float((gained / held_s).max()), 0.0)


def pays_from(
    curve: SurvivalCurve, idle_s: float, saving: float, read: float, ahead_s: float
) -> float | None:
    """The idle time from which on reading pays where room costs nothing; None: never. See worth_ahead."""
    ages_s = np.append(idle_s, _AGES_S[int(np.searchsorted(_AGES_S, idle_s, side="right")) :])
    alive = curve.alive(ages_s)
    returns = np.divide(
        alive - curve.alive(ages_s + ahead_s), alive, out=np.zeros_like(alive), where=alive > 0
    )
    pays = returns * saving > read
    return float(ages_s[int(pays.argmax())]) if pays.any() else None


@dataclass(frozen=True, slots=True)
class Ahead:
    """A conversation that is worth reading ahead. worth: for each byte and second; see worth_ahead."""

    name: Name
    worth: float
    run: Run


class WorthPrefetch:
    """See PrefetchPolicy. Runs that lost a block of host memory are looked at when a return comes near."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._heap: list[tuple[float, int, Run]] = []
        # By run, its entry that counts.
        self._marks: dict[Run, int] = {}
        self._serial = 0

    def due(self, now_s: float, ahead_s: float) -> Ahead | None:
        """See PrefetchPolicy."""
        book = self._book
        book.now_s = max(book.now_s, now_s)
        if not book.disk_usable:
            return None
        for run in list(islice(book.away, _MOST_AT_ONCE)):
            del book.away[run]
            self._look_at(run, ahead_s)
        for _ in range(_MOST_AT_ONCE):
            if not self._heap or self._heap[0][0] > book.now_s:
                return None
            _, mark, run = heapq.heappop(self._heap)
            if self._marks.get(run) != mark:
                continue
            del self._marks[run]
            if not self._may_be_read(run):
                continue
            saving, read = self._gain(run)
            assert run.curve is not None, "who may be read has one"
            worth = worth_ahead(run.curve.whole, run.curve_age_s(book.now_s), saving, read, ahead_s)
            if worth > 0.0:
                self._note(run, book.now_s + ahead_s * _AGAIN)
                return Ahead(run.name, worth, run)
            self._look_at(run, ahead_s)
        return None

    def displaces(self, ahead: Ahead, key: bytes) -> bool:
        """See PrefetchPolicy."""
        owner, run = self._book.owner(key), ahead.run
        if run.serving or not run.waiting or owner is run:
            return False
        return self._book.worth(owner, "host") * _OVER_VICTIM < ahead.worth

    def _may_be_read(self, run: Run) -> bool:
        """Whether it waits, and the disk has an end of it that host memory lacks."""
        waits = run.waiting and not run.serving and run.curve is not None and not run.uses
        kept = waits and self._book.now_s < run.keep_until_s and not self._book.retired(run.model)
        return kept and any(not block.held & HOST_BIT for block in run.leaves[1])

    def _gain(self, run: Run) -> tuple[float, float]:
        """For each byte: what a use saves, and what the read costs."""
        return self._book.saving_s(run, "host"), _IDLE_READ * self._book.load_s("disk")

    def _look_at(self, run: Run, ahead_s: float) -> None:
        """Note when it pays first from now on."""
        if not self._may_be_read(run) or run.curve is None:
            return
        now_s = self._book.now_s
        age_s = pays_from(run.curve.whole, run.curve_age_s(now_s), *self._gain(run), ahead_s)
        if age_s is not None:
            self._note(run, max(run.clock_s + run.curve_from_s + age_s, now_s))

    def _note(self, run: Run, due_s: float) -> None:
        self._serial += 1
        self._marks[run] = self._serial
        heapq.heappush(self._heap, (due_s, self._serial, run))
        if len(self._heap) > max(_SWEEP_FROM, 4 * len(self._marks)):
            self._marks = {run: mark for run, mark in self._marks.items() if run.waiting}
            self._heap = [entry for entry in self._heap if self._marks.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)
