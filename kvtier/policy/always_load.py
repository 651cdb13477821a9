"""Load whatever is stored, write whatever is pushed out: the policy to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from kvtier.policy.interfaces import LoadChoice, RestoreWish, Segment

# First guesses, replaced by the first loads that are observed: a copy in memory, a read from NVMe.
_PRIOR_BYTES_PER_S = {"host": 8e9, "disk": 1.5e9}
_PRIOR_START_S = {"host": 0.0005, "disk": 0.002}
# Weight of a new observation in the moving averages; about the last ten count.
_WEIGHT = 0.2
_ANY_WISH = RestoreWish()


class AlwaysLoad:
    """Loads the whole stored front. The ETA comes from the speeds that were seen, with their spread."""

    def __init__(self) -> None:
        self._rate = dict(_PRIOR_BYTES_PER_S)
        self._error = {"host": 0.5, "disk": 0.5}

    def choose(self, segments: Sequence[Segment], tokens: int, wish: RestoreWish = _ANY_WISH) -> LoadChoice:
        """See RestorePolicy. No wish changes what is loaded."""
        low = high = 0.0
        for source in ("host", "disk"):
            nbytes = sum(s.nbytes for s in segments if s.source == source)
            if not nbytes:
                continue
            expected = _PRIOR_START_S[source] + nbytes / self._rate[source]
            low += expected / (1 + self._error[source])
            high += expected * (1 + self._error[source])
        end = max((s.end for s in segments), default=0)
        return LoadChoice(min(end, tokens), low, high)

    def observed(
        self, source: Literal["host", "disk"], nbytes: int, seconds: float, queue_bytes: int = 0
    ) -> None:
        """See RestorePolicy. A load of nothing, or in no time, teaches nothing."""
        if nbytes <= 0 or seconds <= 0:
            return
        seen = nbytes / seconds
        off = abs(seen - self._rate[source]) / self._rate[source]
        self._rate[source] += _WEIGHT * (seen - self._rate[source])
        self._error[source] += _WEIGHT * (min(off, 2.0) - self._error[source])

    def restored(self, choice: LoadChoice, seconds: float) -> None:
        """See RestorePolicy. The loads it consists of were seen one by one."""


class AlwaysStore:
    """Every block that host memory pushes out is written to disk."""

    def demote(self, key: bytes, nbytes: int, now_s: float) -> bool:
        """See AdmissionPolicy."""
        return True
