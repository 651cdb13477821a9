"""How much may still be written to a drive: a hard bound on the bytes of any 24 hours. Pure, no clock.

Time is counted in slices of ten minutes.  A slice counts until a day and one more slice after its end, so
that no window of 24 hours, wherever it begins, holds more than the bound; room comes back up to 20 minutes
later than it could.

A crash must not give back what was written since the state was last saved.  So the saved state runs ahead:
it counts an allowance as written, and whoever would go beyond that, or writes in a later slice, saves
first (`must_save`).  After a crash at most the allowance, a 256th of the bound, is counted for nothing.

Only time that passes forward frees anything.  When the clock goes back, time stands still until it goes
forward again, from wherever it is.
"""

from __future__ import annotations

import math
from collections import deque

import msgpack

DAY_S = 86400
SLICE_S = 600
_ALLOWANCE_SHARE = 256


class WearBudget:
    """Bytes that may be written in any 24 hours. Not thread-safe. now_s: Unix seconds.

    Every write is reserved before it begins and settled when it has ended:

        if budget.reserve(nbytes, now_s) == 0.0:      # else: seconds until it is worth asking again
            if budget.must_save: ... keep budget.to_bytes(now_s), durably; budget.saved() ...
            ... write ...
            budget.settle(nbytes, written, now_s)
    """

    def __init__(self, bytes_per_day: int, now_s: float, saved: bytes = b"") -> None:
        """saved: what `to_bytes` gave, under any bound. Raises ValueError for anything else."""
        if bytes_per_day <= 0:
            raise ValueError(f"a bound of {bytes_per_day} bytes a day")
        self.bytes_per_day = bytes_per_day
        self._reserved = 0
        self._slices: deque[list[int]] = deque()
        self._counted = 0
        self._shift_s = 0.0
        self._clock_s = now_s
        self._covered = 0
        self._saved_slice: int | None = None
        self._pending = (0, 0)
        if saved:
            self._load(saved, now_s)

    # --- asking and telling -----------------------------------------------------------------------------

    def reserve(self, nbytes: int, now_s: float) -> float:
        """Take nbytes for a write that is about to begin.

        Answers 0.0 when they are taken, else the seconds until it is worth asking again: inf when nbytes is
        more than a day's.
        """
        self._move_to(now_s)
        wait_s = self._wait_s(nbytes)
        if wait_s == 0.0:
            self._reserved += nbytes
            self._covered -= nbytes
        return wait_s

    def settle(self, reserved: int, written: int, now_s: float) -> None:
        """A write for which `reserved` was taken has ended; `written` bytes of it went to the drive."""
        if not 0 <= written <= reserved <= self._reserved:
            raise ValueError(f"{written} of {reserved} bytes, {self._reserved} are reserved")
        self._move_to(now_s)
        self._reserved -= reserved
        self._covered += reserved - written
        self._count(self._slice(), written)

    def left_bytes(self, now_s: float) -> int:
        """What may be reserved now."""
        self._move_to(now_s)
        return max(0, self.bytes_per_day - self._counted - self._reserved)

    def used_bytes(self, now_s: float) -> int:
        """What counts against the bound now: written, or reserved for it."""
        self._move_to(now_s)
        return self._counted + self._reserved

    # --- keeping it -------------------------------------------------------------------------------------

    @property
    def must_save(self) -> bool:
        """Whether a crash now would give back some of what was reserved."""
        return self._covered < 0 or self._saved_slice != self._slice()

    def to_bytes(self, now_s: float, *, closing: bool = False) -> bytes:
        """The state to keep, an allowance included; `saved` says that it is durable.

        closing: nothing will be reserved any more, so there is no allowance.
        """
        self._move_to(now_s)
        left = max(0, self.bytes_per_day - self._counted - self._reserved)
        allowance = 0 if closing else min(left, self.bytes_per_day // _ALLOWANCE_SHARE)
        now = self._slice()
        slices = [list(entry) for entry in self._slices]
        if slices and slices[-1][0] == now:
            slices[-1][1] += self._reserved + allowance
        else:
            slices.append([now, self._reserved + allowance])
        self._pending = (now, allowance)
        packed: bytes = msgpack.packb({"clock_s": self._clock_s, "shift_s": self._shift_s, "slices": slices})
        return packed

    def saved(self) -> None:
        """What `to_bytes` gave last is durable; nothing was reserved in between."""
        self._saved_slice, self._covered = self._pending

    def _load(self, saved: bytes, now_s: float) -> None:
        try:
            said = msgpack.unpackb(saved)
            self._shift_s, self._clock_s = float(said["shift_s"]), float(said["clock_s"])
            for number, nbytes in said["slices"]:
                self._count(int(number), int(nbytes))
        except (ValueError, KeyError, TypeError, msgpack.UnpackException) as problem:
            raise ValueError(f"this is no saved count of a drive's bytes: {problem}") from problem
        self._move_to(now_s)

    # --- inside -----------------------------------------------------------------------------------------

    def _slice(self) -> int:
        return int(self._clock_s // SLICE_S)

    def _move_to(self, now_s: float) -> None:
        clock_s = now_s + self._shift_s
        if clock_s < self._clock_s:
            self._shift_s = self._clock_s - now_s
            return
        self._clock_s = clock_s
        while self._slices and self._ends_s(self._slices[0][0]) <= clock_s:
            self._counted -= self._slices.popleft()[1]

    @staticmethod
    def _ends_s(number: int) -> float:
        """When a slice stops to count. A write may end one slice after the one that it was saved under."""
        return (number + 2) * SLICE_S + DAY_S

    def _count(self, number: int, nbytes: int) -> None:
        if self._slices and self._slices[-1][0] == number:
            self._slices[-1][1] += nbytes
        elif nbytes:
            self._slices.append([number, nbytes])
        self._counted += nbytes

    def _wait_s(self, nbytes: int) -> float:
        if nbytes > self.bytes_per_day:
            return math.inf
        over = self._counted + self._reserved + nbytes - self.bytes_per_day
        if over <= 0:
            return 0.0
        for number, counted in self._slices:
            over -= counted
            if over <= 0:
                return self._ends_s(number) - self._clock_s
        # What is being written will count in a slice that is not there yet.
        return self._ends_s(self._slice() + 1) - self._clock_s
