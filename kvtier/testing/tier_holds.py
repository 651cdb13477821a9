"""The half of the Tier contract about who holds what: writers that end, leases, limbo, generations."""

from __future__ import annotations

import pytest

from kvtier.checksum import checksum
from kvtier.errors import SlotLeased, StaleSlot, TierError
from kvtier.objects import ObjectMeta
from kvtier.testing.tier_kit import WRITER, TierKit, check_disjoint, content, found, get, put
from kvtier.tier import Slot, Tier

OTHER = "other"


def meta_of(kit: TierKit, index: int, nbytes: int | None = None) -> ObjectMeta:
    """Description of test object `index`, of the kit's usual length unless another is given."""
    return kit.meta(index, kit.sizes[0] if nbytes is None else nbytes)


def stale_everywhere(tier: Tier, slot: Slot) -> None:
    """The slot is nobody's by now: nothing may be done through it."""
    with pytest.raises(StaleSlot):
        tier.read(slot, bytearray(slot.nbytes))
    with pytest.raises(StaleSlot):
        tier.write(slot, bytes(slot.nbytes))
    with pytest.raises(StaleSlot):
        tier.commit([(slot, checksum(bytes(slot.nbytes)))])
    with pytest.raises(StaleSlot):
        tier.lease(slot, OTHER, 1e9)


class HoldsContract:
    """A part of `kvtier.testing.tier_contract.TierContract`, which has the fixtures."""

    # -- abort and the writer's end

    def test_a_quiet_abort_gives_the_room_back(self, kit: TierKit, tier: Tier) -> None:
        before = tier.usage()
        slot = tier.reserve(meta_of(kit, 1), holder=WRITER)
        tier.abort(slot, quiet=True)
        assert tier.usage() == before
        assert tier.find(meta_of(kit, 1).object_id) is None
        stale_everywhere(tier, slot)

    def test_an_unproven_abort_keeps_the_room_in_limbo(self, kit: TierKit, tier: Tier) -> None:
        before = tier.usage()
        slot = tier.reserve(meta_of(kit, 1), holder=WRITER)
        tier.abort(slot, quiet=False)
        usage = tier.usage()
        assert usage.filling_bytes == 0
        assert slot.nbytes <= usage.limbo_bytes <= usage.used_bytes
        stale_everywhere(tier, slot)
        again = put(kit, tier, 1, seed=2)
        check_disjoint(kit, [slot, again])
        tier.release(slot, OTHER)
        assert tier.usage().limbo_bytes == usage.limbo_bytes
        tier.release(slot, WRITER)
        assert tier.usage().limbo_bytes == 0
        assert get(tier, again) == content(2, again.nbytes)
        tier.remove(meta_of(kit, 1).object_id)
        assert tier.usage() == before

    def test_the_writers_end_frees_its_limbo(self, kit: TierKit, tier: Tier) -> None:
        before = tier.usage()
        slot = tier.reserve(meta_of(kit, 1), holder=WRITER)
        tier.abort(slot, quiet=False)
        tier.holder_ended(OTHER)
        assert tier.usage().limbo_bytes >= slot.nbytes
        tier.holder_ended(WRITER)
        assert tier.usage() == before

    def test_the_writers_end_frees_what_it_was_filling(self, kit: TierKit, tier: Tier) -> None:
        before = tier.usage()
        slot = tier.reserve(meta_of(kit, 1), holder=WRITER)
        kept = tier.reserve(meta_of(kit, 2), holder=OTHER)
        tier.holder_ended(WRITER)
        stale_everywhere(tier, slot)
        tier.abort(kept, quiet=True)
        assert tier.usage() == before

    def test_a_writer_past_its_lease_cannot_commit(self, kit: TierKit, tier: Tier) -> None:
        if not kit.writer_expires:
            pytest.skip("writers of this tier have no end time")
        before = tier.usage()
        slot = tier.reserve(meta_of(kit, 1), holder=WRITER)
        tier.lease(slot, WRITER, 10.0)
        assert tier.expire(9.0) == []
        assert tier.expire(11.0) == [(slot, WRITER)]
        usage = tier.usage()
        assert (usage.filling_bytes, usage.objects) == (0, 0)
        assert usage.limbo_bytes >= slot.nbytes
        stale_everywhere(tier, slot)
        again = put(kit, tier, 1)
        check_disjoint(kit, [slot, again])
        tier.release(slot, WRITER)
        tier.remove(meta_of(kit, 1).object_id)
        assert tier.usage() == before

    # -- leases and limbo

    def test_a_lease_keeps_the_object(self, kit: TierKit, tier: Tier) -> None:
        slot = put(kit, tier, 1)
        object_id = meta_of(kit, 1).object_id
        tier.lease(slot, "a", 10.0)
        tier.lease(slot, "b", 10.0)
        tier.release(slot, "a")
        with pytest.raises(SlotLeased):
            tier.remove(object_id)
        assert get(tier, found(tier, object_id)) == content(1, slot.nbytes)
        tier.release(slot, "b")
        used = tier.usage().used_bytes
        freed = tier.remove(object_id)
        assert freed >= slot.nbytes
        assert tier.usage().used_bytes == used - freed

    def test_a_lease_is_extended(self, kit: TierKit, tier: Tier) -> None:
        slot = put(kit, tier, 1)
        tier.lease(slot, "a", 10.0)
        tier.lease(slot, "a", 20.0)
        assert tier.expire(15.0) == []
        with pytest.raises(SlotLeased):
            tier.remove(meta_of(kit, 1).object_id)
        assert [holder for _, holder in tier.expire(21.0)] == ["a"]
        assert tier.expire(22.0) == []

    def test_expiry_withdraws_the_right_and_not_the_memory(self, kit: TierKit, tier: Tier) -> None:
        before = tier.usage()
        slot = put(kit, tier, 1)
        object_id = meta_of(kit, 1).object_id
        tier.lease(slot, "a", 10.0)
        assert [(s.slot_id, s.generation, h) for s, h in tier.expire(11.0)] == [
            (slot.slot_id, slot.generation, "a")
        ]
        assert get(tier, found(tier, object_id)) == content(1, slot.nbytes)
        used = tier.usage().used_bytes
        assert tier.remove(object_id) == 0
        assert tier.find(object_id) is None
        assert list(tier.objects()) == []
        assert tier.usage().used_bytes == used
        assert tier.usage().limbo_bytes >= slot.nbytes
        stale_everywhere(tier, slot)
        again = put(kit, tier, 1, seed=2)
        check_disjoint(kit, [slot, again])
        tier.remove(object_id)
        tier.release(slot, "a")
        assert tier.usage() == before

    def test_a_holders_end_frees_leases_and_limbo(self, kit: TierKit, tier: Tier) -> None:
        before = tier.usage()
        leased, in_limbo = put(kit, tier, 1), put(kit, tier, 2)
        tier.lease(in_limbo, "a", 10.0)
        tier.expire(11.0)
        tier.lease(leased, "a", 100.0)
        tier.remove(meta_of(kit, 2).object_id)
        tier.holder_ended("a")
        tier.remove(meta_of(kit, 1).object_id)
        assert tier.usage() == before
        assert tier.expire(1e9) == []

    def test_a_released_object_does_not_expire(self, kit: TierKit, tier: Tier) -> None:
        slot = put(kit, tier, 1)
        tier.lease(slot, "a", 10.0)
        tier.release(slot, "a")
        assert tier.expire(11.0) == []
        assert tier.remove(meta_of(kit, 1).object_id) >= slot.nbytes

    def test_unknown_holders_are_no_error(self, kit: TierKit, tier: Tier) -> None:
        slot = put(kit, tier, 1)
        tier.lease(slot, "a", 10.0)
        tier.release(slot, "nobody")
        tier.holder_ended("nobody")
        with pytest.raises(SlotLeased):
            tier.remove(meta_of(kit, 1).object_id)

    # -- generations

    def test_an_old_slot_opens_nothing_new(self, kit: TierKit, tier: Tier) -> None:
        old = put(kit, tier, 1)
        tier.remove(meta_of(kit, 1).object_id)
        new = put(kit, tier, 2)
        stale_everywhere(tier, old)
        tier.lease(new, "a", 10.0)
        tier.release(old, "a")
        with pytest.raises(SlotLeased):
            tier.remove(meta_of(kit, 2).object_id)
        filling = tier.reserve(meta_of(kit, 3), holder=WRITER)
        try:
            tier.abort(old, quiet=True)
        except TierError as refusal:
            assert isinstance(refusal, StaleSlot)
        assert get(tier, new) == content(2, new.nbytes)
        tier.write(filling, content(3, filling.nbytes))

    def test_slot_and_generation_are_never_reused(self, kit: TierKit, tier: Tier) -> None:
        seen: set[tuple[int, int]] = set()
        for turn in range(20):
            slots = [tier.reserve(meta_of(kit, i), holder=WRITER) for i in range(3)]
            seen.update((slot.slot_id, slot.generation) for slot in slots)
            assert len(seen) == 3 * (turn + 1)
            for slot in slots:
                tier.abort(slot, quiet=turn % 2 == 0)
            tier.holder_ended(WRITER)
