"""The Tier contract: what a place that holds objects promises, and what its owner owes.

Life of an object in a tier:

    slot = tier.reserve(meta)                  room, invisible to find(); state filling or writing
    tier.write(slot, bytes)                    or the owner writes at slot.address by other means
    tier.commit([(slot, checksum), ...])       visible; on a durable tier also safe from power loss
    tier.find(object_id) -> slot               only what was committed
    tier.lease(slot, holder, until_s)          the bytes stay where they are while anybody holds it
    tier.read(slot, into)                      checked against the checksum
    tier.release(slot, holder)                 holder has proven that none of its copies runs
    tier.remove(object_id)                     gone for find(); memory is free when nobody holds it

Time is always an argument.  Every call is safe from any thread unless a tier says otherwise.  The suite
`kvtier.testing.tier_contract` runs this page against each tier.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvtier.checksum import Buffer
from kvtier.objects import ObjectId, ObjectMeta


@dataclass(frozen=True, slots=True)
class Slot:
    """Room for one object in a tier.

    slot_id: small integer, reused; generation: grows whenever the slot_id gets another owner, so
    (slot_id, generation) is never reused.  address: (sub-arena, byte offset) in host memory, (segment,
    byte offset) on disk, (pool, first page) on a GPU.  nbytes: the object's length, not the padded room.
    """

    slot_id: int
    generation: int
    address: tuple[int, int]
    nbytes: int


@dataclass(frozen=True, slots=True)
class TierUsage:
    """Bytes and counts at one instant. used + free = capacity; limbo and filling are parts of used."""

    capacity_bytes: int
    used_bytes: int
    limbo_bytes: int
    filling_bytes: int
    objects: int
    quarantined: int = 0

    @property
    def free_bytes(self) -> int:
        """Bytes that nobody uses; alignment and fragmentation may keep an object of that size out."""
        return self.capacity_bytes - self.used_bytes


class Tier(ABC):
    """A place that holds objects. See the module's text for the order of calls."""

    name: str
    durable: bool

    @abstractmethod
    def reserve(self, meta: ObjectMeta, *, holder: str) -> Slot:
        """Take room for `meta.nbytes`; `holder` is the one who will write.

        Raises TierFull when no room of that size is free (nothing is evicted here: that is the owner's
        decision), ObjectExists when the object is present or being filled, TierUnavailable.
        """

    @abstractmethod
    def write(self, slot: Slot, data: Buffer) -> None:
        """Put `data`, exactly slot.nbytes long, into a reserved slot. Raises StaleSlot, ValueError."""

    @abstractmethod
    def commit(self, slots: Sequence[tuple[Slot, int]]) -> None:
        """Make reserved slots visible, each with its checksum, all or none; ends the writer's hold.

        On a durable tier the call returns when all of them survive power loss: one flush for many.
        Raises StaleSlot when a slot is no longer the caller's (then nothing was committed).
        """

    @abstractmethod
    def abort(self, slot: Slot, *, quiet: bool) -> None:
        """Give a reserved slot back uncommitted.

        quiet: whether it is proven that no copy into it runs.  If not, its room stays in limbo until
        `release` or `holder_ended` of the writer.
        """

    @abstractmethod
    def find(self, object_id: ObjectId) -> Slot | None:
        """The committed slot of the object, or None."""

    @abstractmethod
    def meta(self, object_id: ObjectId) -> ObjectMeta | None:
        """The committed object's description with its checksum, or None."""

    @abstractmethod
    def lease(self, slot: Slot, holder: str, until_s: float) -> None:
        """Give `holder` the right to read the slot until `until_s`; again to extend. Raises StaleSlot."""

    @abstractmethod
    def release(self, slot: Slot, holder: str) -> None:
        """`holder` is done with the slot, proven; frees limbo room. Unknown holders are no error."""

    @abstractmethod
    def expire(self, now_s: float) -> list[tuple[Slot, str]]:
        """Withdraw every right that ended before `now_s`; answers the (slot, holder) now in limbo.

        A present object whose holders are all in limbo stays present and findable, but its room cannot
        be freed until they are released or ended.
        """

    @abstractmethod
    def holder_ended(self, holder: str) -> None:
        """The holder's process is gone: release everything that it held, limbo included."""

    @abstractmethod
    def read(self, slot: Slot, into: Buffer) -> None:
        """Copy the object into a writable buffer of slot.nbytes and check it.

        Raises StaleSlot; CorruptObject, and then the object is quarantined: find() answers None.
        """

    @abstractmethod
    def remove(self, object_id: ObjectId) -> int:
        """Forget a committed object; answers the bytes freed now (0 when limbo keeps them a while).

        Raises SlotLeased while an unexpired lease is held.  An absent object is no error: 0.
        """

    @abstractmethod
    def objects(self) -> Iterator[ObjectMeta]:
        """Every committed object, in no particular order, as of some moment during the call."""

    @abstractmethod
    def usage(self) -> TierUsage:
        """Bytes and counts now. Constant time."""

    @abstractmethod
    def close(self) -> None:
        """Give back memory, files and locks. A durable tier keeps its objects."""
