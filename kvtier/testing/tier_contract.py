"""The conformance suite of the Tier contract (`kvtier.tier`), for every tier to run.

    class TestHostTier(TierContract):
        @pytest.fixture
        def kit(self) -> TierKit:
            return TierKit(make=lambda: HostTier(capacity_bytes=2 << 20))

    TestHostTierMachine = tier_machine(TierKit(make=...))       # from kvtier.testing.tier_machine

Time is a number that the tests choose; nothing here sleeps.  What the contract leaves open (an end time that
equals now, abort of a stale slot) is not tested.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvtier.checksum import checksum
from kvtier.errors import CorruptObject, ObjectExists, StaleSlot, TierFull
from kvtier.testing.tier_holds import OTHER, HoldsContract, meta_of
from kvtier.testing.tier_kit import WRITER, TierKit, check_disjoint, content, found, get, put
from kvtier.tier import Slot, Tier

__all__ = ["TierContract", "TierKit"]

THREADS = 4


def _fill_up(kit: TierKit, tier: Tier, nbytes: int) -> list[Slot]:
    """Reserve objects of nbytes until the tier is full; they are numbered from 1000."""
    slots: list[Slot] = []
    while True:
        assert len(slots) < 100_000, "the tier never gets full"
        try:
            slots.append(tier.reserve(meta_of(kit, 1000 + len(slots), nbytes), holder=WRITER))
        except TierFull as full:
            assert full.needed_bytes >= nbytes
            return slots


class TierContract(HoldsContract):
    """Subclass it, and override the fixture `kit`."""

    @pytest.fixture
    def kit(self) -> TierKit:
        """How to make the tier under test."""
        raise NotImplementedError("override the fixture `kit`")

    @pytest.fixture
    def tier(self, kit: TierKit) -> Iterator[Tier]:
        """A new, empty tier."""
        made = kit.make()
        yield made
        kit.dispose(made)

    # -- reserve, write, commit

    def test_an_empty_tier_has_nothing(self, kit: TierKit, tier: Tier) -> None:
        object_id = meta_of(kit, 1).object_id
        assert tier.find(object_id) is None
        assert tier.meta(object_id) is None
        assert list(tier.objects()) == []
        assert tier.remove(object_id) == 0
        usage = tier.usage()
        assert (usage.objects, usage.filling_bytes, usage.limbo_bytes, usage.quarantined) == (0, 0, 0, 0)
        assert 0 <= usage.used_bytes < usage.capacity_bytes
        assert usage.used_bytes + usage.free_bytes == usage.capacity_bytes

    def test_what_is_put_is_read_at_every_length(self, kit: TierKit, tier: Tier) -> None:
        slots = {i: put(kit, tier, i, nbytes) for i, nbytes in enumerate(kit.sizes)}
        for i, nbytes in enumerate(kit.sizes):
            assert slots[i].nbytes == nbytes
            assert get(tier, slots[i]) == content(i, nbytes)
        check_disjoint(kit, list(slots.values()))
        assert tier.usage().objects == len(kit.sizes)
        assert tier.usage().used_bytes >= sum(kit.sizes)

    def test_meta_and_objects_tell_all_but_the_bytes(self, kit: TierKit, tier: Tier) -> None:
        wanted = {}
        for i in range(3):
            put(kit, tier, i)
            given = meta_of(kit, i)
            kept = tier.meta(given.object_id)
            assert kept is not None
            assert kept.checksum == checksum(content(i, given.nbytes))
            for field in ("object_id", "root", "parent_key", "start", "tokens", "first_valid", "nbytes"):
                assert getattr(kept, field) == getattr(given, field)
            wanted[given.object_id] = kept
        assert {meta.object_id: meta for meta in tier.objects()} == wanted

    def test_nothing_is_seen_before_commit(self, kit: TierKit, tier: Tier) -> None:
        meta = meta_of(kit, 1)
        slot = tier.reserve(meta, holder=WRITER)
        tier.write(slot, content(1, meta.nbytes))
        assert tier.find(meta.object_id) is None
        assert tier.meta(meta.object_id) is None
        assert list(tier.objects()) == []
        with pytest.raises(StaleSlot):
            tier.read(slot, bytearray(slot.nbytes))
        usage = tier.usage()
        assert usage.objects == 0
        assert meta.nbytes <= usage.filling_bytes <= usage.used_bytes

    def test_commit_ends_filling(self, kit: TierKit, tier: Tier) -> None:
        put(kit, tier, 1)
        usage = tier.usage()
        assert (usage.objects, usage.filling_bytes, usage.limbo_bytes) == (1, 0, 0)

    def test_commit_ends_the_writers_hold(self, kit: TierKit, tier: Tier) -> None:
        before = tier.usage().used_bytes
        slot = put(kit, tier, 1)
        tier.holder_ended(WRITER)
        assert get(tier, slot) == content(1, slot.nbytes)
        tier.remove(meta_of(kit, 1).object_id)
        assert tier.usage().used_bytes == before

    def test_an_object_is_reserved_once(self, kit: TierKit, tier: Tier) -> None:
        slot = tier.reserve(meta_of(kit, 1), holder=WRITER)
        with pytest.raises(ObjectExists):
            tier.reserve(meta_of(kit, 1), holder=OTHER)
        tier.abort(slot, quiet=True)
        put(kit, tier, 1)
        with pytest.raises(ObjectExists):
            tier.reserve(meta_of(kit, 1), holder=WRITER)

    @pytest.mark.parametrize("off_by", [-1, 1])
    def test_wrong_lengths_are_refused(self, kit: TierKit, tier: Tier, off_by: int) -> None:
        meta = meta_of(kit, 1)
        data = content(1, meta.nbytes)
        slot = tier.reserve(meta, holder=WRITER)
        with pytest.raises(ValueError):
            tier.write(slot, bytes(meta.nbytes + off_by))
        tier.write(slot, data)
        tier.commit([(slot, checksum(data))])
        with pytest.raises(ValueError):
            tier.read(found(tier, meta.object_id), bytearray(meta.nbytes + off_by))
        assert get(tier, found(tier, meta.object_id)) == data

    def test_one_commit_shows_many(self, kit: TierKit, tier: Tier) -> None:
        ready = []
        for i in range(3):
            meta = meta_of(kit, i)
            slot = tier.reserve(meta, holder=WRITER)
            tier.write(slot, content(i, meta.nbytes))
            ready.append((slot, checksum(content(i, meta.nbytes))))
        tier.commit(ready)
        for i in range(3):
            slot = found(tier, meta_of(kit, i).object_id)
            assert get(tier, slot) == content(i, slot.nbytes)

    def test_commit_is_all_or_none(self, kit: TierKit, tier: Tier) -> None:
        meta = meta_of(kit, 1)
        data = content(1, meta.nbytes)
        good = tier.reserve(meta, holder=WRITER)
        tier.write(good, data)
        stale = tier.reserve(meta_of(kit, 2), holder=WRITER)
        tier.abort(stale, quiet=True)
        with pytest.raises(StaleSlot):
            tier.commit([(good, checksum(data)), (stale, 0)])
        assert tier.find(meta.object_id) is None
        assert tier.usage().objects == 0
        tier.commit([(good, checksum(data))])
        assert get(tier, found(tier, meta.object_id)) == data

    def test_a_committed_slot_is_no_longer_the_writers(self, kit: TierKit, tier: Tier) -> None:
        meta = meta_of(kit, 1)
        data = content(1, meta.nbytes)
        slot = tier.reserve(meta, holder=WRITER)
        tier.write(slot, data)
        tier.commit([(slot, checksum(data))])
        with pytest.raises(StaleSlot):
            tier.commit([(slot, checksum(data))])
        with pytest.raises(StaleSlot):
            tier.write(slot, bytes(meta.nbytes))
        assert get(tier, found(tier, meta.object_id)) == data

    # -- wrong bytes

    def test_bytes_that_do_not_match_their_checksum_are_a_miss(self, kit: TierKit, tier: Tier) -> None:
        meta = meta_of(kit, 1)
        data = content(1, meta.nbytes)
        slot = tier.reserve(meta, holder=WRITER)
        tier.write(slot, data)
        tier.commit([(slot, checksum(data) ^ 1)])
        self._is_quarantined_and_heals(kit, tier)

    def test_a_changed_byte_is_a_miss(self, kit: TierKit, tier: Tier) -> None:
        if kit.corrupt is None:
            pytest.skip("bytes of this tier cannot be changed behind its back")
        kit.corrupt(tier, put(kit, tier, 1))
        self._is_quarantined_and_heals(kit, tier)

    def _is_quarantined_and_heals(self, kit: TierKit, tier: Tier) -> None:
        object_id = meta_of(kit, 1).object_id
        bad = found(tier, object_id)
        with pytest.raises(CorruptObject):
            tier.read(bad, bytearray(bad.nbytes))
        assert tier.find(object_id) is None
        assert tier.meta(object_id) is None
        assert list(tier.objects()) == []
        assert tier.usage().quarantined == 1
        assert tier.usage().objects == 0
        healed = put(kit, tier, 1)
        assert get(tier, healed) == content(1, healed.nbytes)

    # -- bounds

    def test_full_is_refused_and_room_comes_back(self, kit: TierKit, tier: Tier) -> None:
        before = tier.usage()
        nbytes = max(kit.sizes)
        slots = _fill_up(kit, tier, nbytes)
        assert len(slots) >= 4
        check_disjoint(kit, slots)
        assert tier.usage().used_bytes <= tier.usage().capacity_bytes
        tier.abort(slots[1], quiet=True)
        slots[1] = tier.reserve(meta_of(kit, 1, nbytes), holder=WRITER)
        check_disjoint(kit, slots)
        for slot in slots:
            tier.abort(slot, quiet=True)
        assert tier.usage() == before

    def test_a_full_tier_does_not_reuse_what_is_held(self, kit: TierKit, tier: Tier) -> None:
        nbytes = max(kit.sizes)
        leased = put(kit, tier, 1, nbytes)
        tier.lease(leased, "a", 10.0)
        slots = _fill_up(kit, tier, nbytes)
        tier.abort(slots.pop(), quiet=False)
        with pytest.raises(TierFull):
            tier.reserve(meta_of(kit, 2, nbytes), holder=OTHER)
        tier.expire(11.0)
        tier.remove(meta_of(kit, 1, nbytes).object_id)
        with pytest.raises(TierFull):
            tier.reserve(meta_of(kit, 2, nbytes), holder=OTHER)
        tier.release(leased, "a")
        tier.reserve(meta_of(kit, 2, nbytes), holder=OTHER)
        tier.holder_ended(WRITER)
        tier.reserve(meta_of(kit, 3, nbytes), holder=OTHER)

    def test_remove_leaves_an_object_that_is_being_filled(self, kit: TierKit, tier: Tier) -> None:
        meta = meta_of(kit, 1)
        data = content(1, meta.nbytes)
        slot = tier.reserve(meta, holder=WRITER)
        assert tier.remove(meta.object_id) == 0
        tier.write(slot, data)
        tier.commit([(slot, checksum(data))])
        assert get(tier, found(tier, meta.object_id)) == data

    # -- threads and restarts

    def test_threads_do_not_disturb_each_other(self, kit: TierKit, tier: Tier) -> None:
        before = tier.usage()

        def turns(lane: int) -> int:
            wrong = 0
            for turn in range(10):
                index = lane * 100 + turn
                slot = put(kit, tier, index)
                tier.lease(slot, f"h{lane}", 10.0)
                wrong += get(tier, slot) != content(index, slot.nbytes)
                tier.release(slot, f"h{lane}")
                tier.remove(meta_of(kit, index).object_id)
            return wrong

        with ThreadPoolExecutor(THREADS) as pool:
            assert list(pool.map(turns, range(THREADS))) == [0] * THREADS
        assert tier.usage() == before

    def test_a_durable_tier_comes_back(self, kit: TierKit) -> None:
        tier = kit.make()
        assert tier.durable == (kit.reopen is not None)
        if kit.reopen is None:
            kit.dispose(tier)
            pytest.skip("not a durable tier")
        for i, nbytes in enumerate(kit.sizes):
            put(kit, tier, i, nbytes)
        tier.remove(meta_of(kit, 0).object_id)
        tier.reserve(meta_of(kit, 100), holder=WRITER)
        metas = {meta.object_id: meta for meta in tier.objects()}
        tier = kit.reopen(tier)
        try:
            assert {meta.object_id: meta for meta in tier.objects()} == metas
            assert tier.find(meta_of(kit, 0).object_id) is None
            assert tier.find(meta_of(kit, 100).object_id) is None
            assert tier.usage().filling_bytes == 0
            for i, nbytes in list(enumerate(kit.sizes))[1:]:
                slot = found(tier, meta_of(kit, i, nbytes).object_id)
                assert get(tier, slot) == content(i, nbytes)
            put(kit, tier, 0)
        finally:
            kit.dispose(tier)
