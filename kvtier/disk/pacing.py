"""How fast background work may go. Pure: time is an argument."""

from __future__ import annotations

# Reading yields to those who wait for theirs, but not for ever: one piece in this time goes through.
_LONGEST_YIELD_S = 1.0
_YIELD_S = 0.01


class Pace:
    """When the next piece may begin: bytes_per_s on the long run, and after those who are in a hurry.

    Time that was not used is not saved up, so there are no bursts.
    """

    def __init__(self, bytes_per_s: int) -> None:
        if bytes_per_s <= 0:
            raise ValueError(f"a pace of {bytes_per_s} bytes/s")
        self._bytes_per_s = bytes_per_s
        self._free_s = self._latest_s = float("-inf")

    def wait_s(self, now_s: float, *, others_wait: bool) -> float:
        """Seconds until it is worth asking again; 0.0 when a piece may begin now."""
        if now_s < self._free_s:
            return self._free_s - now_s
        if others_wait and now_s - self._latest_s < _LONGEST_YIELD_S:
            return _YIELD_S
        return 0.0

    def begin(self, now_s: float, nbytes: int) -> None:
        """A piece of `nbytes` begins now."""
        self._latest_s = now_s
        self._free_s = max(now_s, self._free_s) + nbytes / self._bytes_per_s
