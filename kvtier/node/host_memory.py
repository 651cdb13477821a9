"""What the core asks of host memory: the Tier contract, and what only memory can answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from kvtier.objects import ObjectId, ObjectMeta
from kvtier.states import State
from kvtier.tier import Slot, TierUsage


class HostMemory(Protocol):
    """Both the host tier and its slots without memory are one. See `kvtier.tier.Tier` for the calls."""

    def reserve(self, meta: ObjectMeta, *, holder: str) -> Slot: ...
    def commit(self, slots: Sequence[tuple[Slot, int]]) -> None: ...
    def abort(self, slot: Slot, *, quiet: bool) -> None: ...
    def find(self, object_id: ObjectId) -> Slot | None: ...
    def meta(self, object_id: ObjectId) -> ObjectMeta | None: ...
    def lease(self, slot: Slot, holder: str, until_s: float) -> None: ...
    def release(self, slot: Slot, holder: str) -> None: ...
    def expire(self, now_s: float) -> list[tuple[Slot, str]]: ...
    def holder_ended(self, holder: str) -> None: ...
    def remove(self, object_id: ObjectId) -> int: ...
    def usage(self) -> TierUsage: ...

    def withdraw(self, slot: Slot) -> bool:
        """Forget a committed object, leased or not; answers whether it was there still."""

    def quarantine(self, slot: Slot) -> None:
        """Forget a committed object whose bytes are wrong, leased or not, and count it."""

    def state(self, slot: Slot) -> State:
        """Where the slot stands."""

    def next_end_s(self) -> float | None:
        """A time before which `expire` has nothing to do."""

    def victims_window(
        self, nbytes: int, cost_of: Callable[[ObjectId], float | None]
    ) -> list[ObjectId] | None:
        """The cheapest neighbouring objects whose removal makes room for nbytes."""

    def grow(self, sub_arena: int, ready_bytes: int) -> None:
        """Let the first `ready_bytes` of a sub-arena be given out."""
