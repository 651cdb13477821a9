"""Load whatever is stored, write whatever is pushed out: the policy to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from kvtier.policy.cost_restore import CostRestore
from kvtier.policy.interfaces import LoadChoice, RestoreWish, Segment

_ANY_WISH: Final = RestoreWish()


class AlwaysLoad(CostRestore):
    """Loads the whole stored front, whatever computing it would cost. It learns how long that takes."""

    def choose(self, segments: Sequence[Segment], tokens: int, wish: RestoreWish = _ANY_WISH) -> LoadChoice:
        """See RestorePolicy. No wish changes what is loaded."""
        return super().choose(segments, tokens, RestoreWish(queued_bytes=wish.queued_bytes))


class AlwaysStore:
    """Every block that host memory pushes out is written to disk."""

    def demote(self, key: bytes, nbytes: int, now_s: float) -> bool:
        """See AdmissionPolicy."""
        return True
