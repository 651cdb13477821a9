"""The bound on what a drive is written in a day: for all threads of the disk service, and across restarts."""

from __future__ import annotations

import logging
import threading
import time

from kvtier.disk.tier import DiskTier
from kvtier.disk.wear import WearBudget
from kvtier.errors import TierError

log = logging.getLogger(__name__)
STATE = "disk.wear"


class WearMeter:
    """Takes bytes for writes before they begin. bytes_per_day: 0 for no bound.

    carried: `state` of the meter of a store that was here before this one, which has none of its own.

    Counted is what goes to the segments, headers and padding included; the index's own few hundred bytes an
    object are not.  Whatever was taken is in the index before `reserve` returns, so that no crash gives it
    back.  Raises TierUnavailable when what the index has of it cannot be understood or kept.
    """

    def __init__(self, tier: DiskTier, bytes_per_day: int, carried: bytes = b"") -> None:
        self.bytes_per_day = bytes_per_day
        self._tier = tier
        # The first is held while the index is written, the second for moments only; in this order.
        self._saving = threading.Lock()
        self._lock = threading.Lock()
        # The machine's clock may be set while this runs; the time that passes is another matter.
        self._start_s = time.time() - time.monotonic()
        self._seen_bytes = 0
        self._budget: WearBudget | None = None
        if bytes_per_day:
            saved = tier.state(STATE) or carried
            try:
                self._budget = WearBudget(bytes_per_day, self._now_s(), saved)
            except ValueError:
                # Nobody knows what was written: as if it had been all of it.
                log.exception("the count of the drive's bytes is lost: nothing is written for a day")
                self._budget = WearBudget(bytes_per_day, self._now_s())
                self._budget.reserve(bytes_per_day, self._now_s())
                self._budget.settle(bytes_per_day, bytes_per_day, self._now_s())

    def reserve(self, nbytes: int) -> float:
        """0.0 when nbytes may be written now, else seconds until it is worth asking again; inf: never."""
        budget = self._budget
        if budget is None or not nbytes:
            return 0.0
        with self._saving:
            with self._lock:
                wait_s = budget.reserve(nbytes, self._now_s())
                state = budget.to_bytes(self._now_s()) if wait_s == 0.0 and budget.must_save else b""
            if state:
                self._save(state, nbytes)
        return wait_s

    def _save(self, state: bytes, reserved: int) -> None:
        assert self._budget is not None
        try:
            self._tier.commit_with_records([], [], {STATE: state})
        except TierError:
            with self._lock:
                self._budget.settle(reserved, 0, self._now_s())
            raise
        with self._lock:
            self._budget.saved()

    def settle(self, reserved: int, *, whole: bool = False) -> None:
        """The write has ended. whole: count all that was reserved, since it failed somewhere on the way.

        Else what the drive was given since the last call, at most: a codec may have made it smaller.
        """
        budget = self._budget
        if budget is None or not reserved:
            return
        with self._lock:
            new_bytes = max(0, self._tier.stats().device_bytes - self._seen_bytes)
            written = reserved if whole else min(reserved, new_bytes)
            self._seen_bytes += min(written, new_bytes)
            budget.settle(reserved, written, self._now_s())

    def left_bytes(self) -> int:
        """What may be written now; 0 without a bound."""
        with self._lock:
            return 0 if self._budget is None else self._budget.left_bytes(self._now_s())

    def state(self) -> bytes:
        """The exact count, to carry on with; b'' without a bound."""
        with self._lock:
            return b"" if self._budget is None else self._budget.to_bytes(self._now_s(), closing=True)

    def close(self) -> None:
        """Keep the exact count. No write is under way."""
        state = self.state()
        if not state:
            return
        try:
            self._tier.commit_with_records([], [], {STATE: state})
        except TierError as error:
            log.warning("the count of the drive's bytes stays at what was taken ahead: %s", error)

    def _now_s(self) -> float:
        return self._start_s + time.monotonic()
