"""Answers that somebody waits for, with the time by which one comes whatever the disk does."""

from __future__ import annotations

from itertools import count

from kvtier.node import limits
from kvtier.node.disk_requests import RemoveDone


class Awaited:
    """Who waits for a removal is told its end, or that none came in time; only once."""

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._serials = count()
        self._waiting: dict[int, tuple[float, RemoveDone]] = {}

    def bounded(self, now_s: float, done: RemoveDone) -> RemoveDone:
        """What to call instead of `done`, which `tick` calls when the time is over.

        Where too many wait already, `done` is told so at once.
        """
        if len(self._waiting) >= limits.MOST_WAITING:
            done(False, f"{limits.MOST_WAITING} wait for the disk already; it may still carry it out")
            return lambda ok, detail: None
        serial = next(self._serials)
        self._waiting[serial] = (now_s + self._most_s, done)

        def once(ok: bool, detail: str) -> None:
            if self._waiting.pop(serial, None) is not None:
                done(ok, detail)

        return once

    def tick(self, now_s: float) -> None:
        """Time passed. Times only grow, so the first one that is not over ends the search."""
        while self._waiting:
            serial, (until_s, done) = next(iter(self._waiting.items()))
            if until_s > now_s:
                return
            del self._waiting[serial]
            done(False, f"the disk did not answer within {self._most_s:g} s; it may still carry it out")
