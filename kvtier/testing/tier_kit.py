"""What a tier's test module hands to the conformance suite, and the objects that the suite stores."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass

from kvtier.checksum import checksum
from kvtier.objects import ObjectId, ObjectMeta, Root
from kvtier.tier import Slot, Tier

ROOT = Root(key=b"r" * 32, tenant="acme", fingerprint=b"f" * 32, fidelity="exact", block_tokens=256)
WRITER = "writer"


def default_meta(index: int, nbytes: int) -> ObjectMeta:
    """Description of test object `index`, nbytes long; equal indexes name the same object."""
    key = hashlib.blake2b(index.to_bytes(8, "little"), digest_size=32).digest()
    return ObjectMeta(
        object_id=ObjectId(key, 0, "L0+1.H0+1"),
        root=ROOT,
        parent_key=ROOT.key,
        start=0,
        tokens=ROOT.block_tokens,
        first_valid=0,
        nbytes=nbytes,
    )


def content(seed: int, nbytes: int) -> bytes:
    """nbytes of noise, the same for the same seed."""
    return hashlib.shake_128(seed.to_bytes(8, "little")).digest(nbytes)


def byte_extent(slot: Slot) -> tuple[int, int, int] | None:
    """(space, start, end) of a slot whose address is (space, byte offset)."""
    space, start = slot.address
    return space, start, start + slot.nbytes


def _close(tier: Tier) -> None:
    tier.close()


@dataclass(frozen=True, slots=True)
class TierKit:
    """How the suite gets its tiers, and what they can do beyond the contract.

    make: a new, empty, small tier; room for at least four objects of max(sizes), few enough that filling it
    up is quick.  sizes: object lengths in bytes that the tier takes; the first is the usual one.
    dispose: closes a tier and deletes what it left.  reopen: closes a durable tier and opens its data
    again; None where the tier is not durable.  corrupt: changes a byte of a committed object behind the
    tier's back; None where that cannot be done.  meta: describes object `index` of a length; equal
    indexes name the same object.  extent: (space, start, end) that a slot occupies, in any unit, or None
    where slots are not contiguous.  writer_expires: lease() on a slot that is being filled, by its writer,
    puts an end to the writer's hold.
    """

    make: Callable[[], Tier]
    sizes: tuple[int, ...] = (4096, 1, 10_000, 65_536, 266_241)
    dispose: Callable[[Tier], None] = _close
    reopen: Callable[[Tier], Tier] | None = None
    corrupt: Callable[[Tier, Slot], None] | None = None
    meta: Callable[[int, int], ObjectMeta] = default_meta
    extent: Callable[[Slot], tuple[int, int, int] | None] = byte_extent
    writer_expires: bool = True

    def object_id(self, index: int) -> ObjectId:
        """The name of test object `index`, whatever its length."""
        return self.meta(index, self.sizes[0]).object_id


def put(kit: TierKit, tier: Tier, index: int, nbytes: int | None = None, *, seed: int | None = None) -> Slot:
    """Store object `index` the way an owner does; answers its committed slot."""
    meta = kit.meta(index, kit.sizes[0] if nbytes is None else nbytes)
    data = content(index if seed is None else seed, meta.nbytes)
    slot = tier.reserve(meta, holder=WRITER)
    tier.write(slot, data)
    tier.commit([(slot, checksum(data))])
    return found(tier, meta.object_id)


def found(tier: Tier, object_id: ObjectId) -> Slot:
    """The committed slot of an object that has to be there."""
    slot = tier.find(object_id)
    assert slot is not None, f"{object_id} was committed and is not found"
    return slot


def get(tier: Tier, slot: Slot) -> bytes:
    """The object's bytes through read()."""
    into = bytearray(slot.nbytes)
    tier.read(slot, into)
    return bytes(into)


def check_disjoint(kit: TierKit, slots: list[Slot]) -> None:
    """Fail when two of the slots, all in use, share room."""
    extents = sorted(extent for extent in map(kit.extent, slots) if extent is not None)
    for (space, _, end), (next_space, start, _) in itertools.pairwise(extents):
        assert space != next_space or end <= start, f"two slots share room at {start} of space {space}"
