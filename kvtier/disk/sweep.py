"""One look at every object of the books, in parts, while they change."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from kvtier.disk.name_table import NameTable
from kvtier.disk.rows import Column, Rows
from kvtier.objects import ObjectId, ObjectMeta


class Sweep:
    """Goes over the rows in order of number. Its calls are made with the books' lock held.

    Whatever is there from the first call to the last is seen; what is replaced meanwhile, once or twice.
    ended: set by who made it, when it needs no more.
    """

    def __init__(self, rows: Rows, names: NameTable) -> None:
        self.ended = False
        self.rows = rows
        self._names = names
        self._at = 0
        self._moved: list[ObjectId] = []

    def replaced(self, name: ObjectId, before: int, after: int) -> None:
        """An object's row is another one now."""
        if after < self._at <= before:
            self._moved.append(name)

    def next(self, most: int) -> Column | None:
        """The next rows, some of them free, for `Rows.metas`; None when there are no more."""
        if self._at < self.rows.count:
            part = self.rows.copy_from(self._at, most)
            self._at += len(part)
            return part
        moved, self._moved = self._moved[:most], self._moved[most:]
        if not moved:
            return None
        return self.rows.copy_of([number for name in moved if (number := self._names.find(name)) >= 0])


def batches(sweep: Sweep, lock: threading.Lock, most: int) -> Iterator[list[ObjectMeta]]:
    """Every object, at most so many at a time; `lock`, that of the books, is held for moments only."""
    try:
        while True:
            with lock:
                part = sweep.next(most)
            if part is None:
                return
            if metas := sweep.rows.metas(part):
                yield metas
    finally:
        sweep.ended = True
