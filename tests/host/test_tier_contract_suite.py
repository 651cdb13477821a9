"""The conformance suite is itself tested: an honest tier passes, each way of breaking it is caught."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from kvtier.checksum import Buffer, checksum
from kvtier.errors import CorruptObject, ObjectExists, SlotLeased, StaleSlot, TierError, TierFull
from kvtier.objects import ObjectId, ObjectMeta
from kvtier.testing.tier_contract import TierContract
from kvtier.testing.tier_kit import TierKit
from kvtier.testing.tier_machine import bare_machine, tier_machine
from kvtier.tier import Slot, Tier, TierUsage

UNIT_BYTES = 300_000
UNITS = 12


@dataclass
class Record:
    slot: Slot
    meta: ObjectMeta
    writer: str
    data: bytes = b""
    phase: str = "filling"
    active: dict[str, float] = field(default_factory=dict)
    limbo: set[str] = field(default_factory=set)


def raw(data: Buffer) -> memoryview:
    view: memoryview = np.frombuffer(data, dtype=np.uint8).data
    return view


class DictTier(Tier):
    """Twelve rooms of one size; the simplest tier that keeps the contract."""

    name = "dict"
    durable = False

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.records: dict[int, Record] = {}
        self.generations = [0] * UNITS
        self.quarantined = 0

    def _record(self, slot: Slot, *phases: str) -> Record:
        record = self.records.get(slot.slot_id)
        if record is None or record.slot.generation != slot.generation or record.phase not in phases:
            raise StaleSlot("stale")
        return record

    def _of(self, object_id: ObjectId, *phases: str) -> Record | None:
        found = (r for r in self.records.values() if r.meta.object_id == object_id and r.phase in phases)
        return next(found, None)

    def _settle(self, record: Record) -> None:
        if record.phase == "gone" and not record.active and not record.limbo:
            del self.records[record.slot.slot_id]

    def reserve(self, meta: ObjectMeta, *, holder: str) -> Slot:
        with self.lock:
            if self._of(meta.object_id, "filling", "present"):
                raise ObjectExists("exists")
            free = [i for i in range(UNITS) if i not in self.records]
            if not free:
                raise TierFull("full", needed_bytes=meta.nbytes)
            self.generations[free[0]] += 1
            slot = Slot(free[0], self.generations[free[0]], (0, free[0] * UNIT_BYTES), meta.nbytes)
            self.records[free[0]] = Record(slot, meta, holder)
            return slot

    def write(self, slot: Slot, data: Buffer) -> None:
        with self.lock:
            record = self._record(slot, "filling")
            if len(data) != slot.nbytes:
                raise ValueError("length")
            record.data = bytes(data)

    def commit(self, slots: Sequence[tuple[Slot, int]]) -> None:
        with self.lock:
            records = [self._record(slot, "filling") for slot, _ in slots]
            for record, (_, sum_) in zip(records, slots, strict=True):
                record.meta = replace(record.meta, checksum=sum_)
                record.phase = "present"
                record.active.clear()

    def abort(self, slot: Slot, *, quiet: bool) -> None:
        with self.lock:
            record = self._record(slot, "filling")
            record.phase = "gone"
            record.active.clear()
            if not quiet:
                record.limbo.add(record.writer)
            self._settle(record)

    def find(self, object_id: ObjectId) -> Slot | None:
        with self.lock:
            record = self._of(object_id, "present")
            return None if record is None else record.slot

    def meta(self, object_id: ObjectId) -> ObjectMeta | None:
        with self.lock:
            record = self._of(object_id, "present")
            return None if record is None else record.meta

    def lease(self, slot: Slot, holder: str, until_s: float) -> None:
        with self.lock:
            record = self._record(slot, "present", "filling")
            record.active[holder] = max(until_s, record.active.get(holder, 0.0))
            record.limbo.discard(holder)

    def release(self, slot: Slot, holder: str) -> None:
        with self.lock:
            record = self.records.get(slot.slot_id)
            if record is None or record.slot.generation != slot.generation:
                return
            record.active.pop(holder, None)
            record.limbo.discard(holder)
            self._settle(record)

    def expire(self, now_s: float) -> list[tuple[Slot, str]]:
        with self.lock:
            ended = []
            for record in list(self.records.values()):
                for holder, until_s in list(record.active.items()):
                    if until_s < now_s:
                        del record.active[holder]
                        record.limbo.add(holder)
                        ended.append((record.slot, holder))
                        record.phase = "gone" if record.phase == "filling" else record.phase
            return ended

    def holder_ended(self, holder: str) -> None:
        with self.lock:
            for record in list(self.records.values()):
                if record.phase == "filling" and record.writer == holder:
                    record.phase = "gone"
                self.release(record.slot, holder)

    def read(self, slot: Slot, into: Buffer) -> None:
        with self.lock:
            record = self._record(slot, "present")
            if len(into) != slot.nbytes:
                raise ValueError("length")
            raw(into)[:] = record.data
            if checksum(record.data) != record.meta.checksum:
                self.quarantined += 1
                record.phase = "gone"
                record.limbo.update(record.active)
                record.active.clear()
                self._settle(record)
                raise CorruptObject("corrupt")

    def remove(self, object_id: ObjectId) -> int:
        with self.lock:
            record = self._of(object_id, "present")
            if record is None:
                return 0
            if record.active:
                raise SlotLeased("leased")
            record.phase = "gone"
            self._settle(record)
            return 0 if record.limbo else UNIT_BYTES

    def objects(self) -> Iterator[ObjectMeta]:
        with self.lock:
            return iter([r.meta for r in self.records.values() if r.phase == "present"])

    def usage(self) -> TierUsage:
        with self.lock:
            phases = [r.phase for r in self.records.values()]
            return TierUsage(
                capacity_bytes=UNITS * UNIT_BYTES,
                used_bytes=len(phases) * UNIT_BYTES,
                limbo_bytes=phases.count("gone") * UNIT_BYTES,
                filling_bytes=phases.count("filling") * UNIT_BYTES,
                objects=phases.count("present"),
                quarantined=self.quarantined,
            )

    def close(self) -> None:
        self.records.clear()


class ShowsBeforeCommit(DictTier):
    def find(self, object_id: ObjectId) -> Slot | None:
        record = self._of(object_id, "present", "filling")
        return None if record is None else record.slot


class CommitsSome(DictTier):
    def commit(self, slots: Sequence[tuple[Slot, int]]) -> None:
        for pair in slots:
            super().commit([pair])


class ReadsWrongBytes(DictTier):
    def read(self, slot: Slot, into: Buffer) -> None:
        super().read(slot, into)
        raw(into)[0] ^= 1


class SkipsTheChecksum(DictTier):
    def read(self, slot: Slot, into: Buffer) -> None:
        raw(into)[:] = self._record(slot, "present").data


class ReadsShort(DictTier):
    def read(self, slot: Slot, into: Buffer) -> None:
        if len(into) < slot.nbytes:
            return
        super().read(slot, raw(into)[: slot.nbytes])


class ReusesLeasedRoom(DictTier):
    def remove(self, object_id: ObjectId) -> int:
        record = self._of(object_id, "present")
        if record is not None:
            record.active.clear()
        return super().remove(object_id)


class ReusesLimboRoom(DictTier):
    def remove(self, object_id: ObjectId) -> int:
        record = self._of(object_id, "present")
        if record is not None and not record.active:
            record.limbo.clear()
        return super().remove(object_id)


class AbortsAreAlwaysQuiet(DictTier):
    def abort(self, slot: Slot, *, quiet: bool) -> None:
        super().abort(slot, quiet=True)


class TakesStaleSlots(DictTier):
    def _record(self, slot: Slot, *phases: str) -> Record:
        record = self.records.get(slot.slot_id)
        return super()._record(record.slot if record else slot, *phases)


class ReleasesByStaleSlot(DictTier):
    def release(self, slot: Slot, holder: str) -> None:
        record = self.records.get(slot.slot_id)
        super().release(record.slot if record else slot, holder)


class ReusesGenerations(DictTier):
    def reserve(self, meta: ObjectMeta, *, holder: str) -> Slot:
        self.generations = [0] * UNITS
        return super().reserve(meta, holder=holder)


class LeaksOnAbort(DictTier):
    leaked = 0

    def abort(self, slot: Slot, *, quiet: bool) -> None:
        super().abort(slot, quiet=quiet)
        self.leaked += quiet

    def usage(self) -> TierUsage:
        usage = super().usage()
        return replace(usage, used_bytes=usage.used_bytes + self.leaked)


class ExpiryFreesMemory(DictTier):
    def expire(self, now_s: float) -> list[tuple[Slot, str]]:
        ended = super().expire(now_s)
        for slot, holder in ended:
            self.release(slot, holder)
        return ended


class LateWritersCommit(DictTier):
    def expire(self, now_s: float) -> list[tuple[Slot, str]]:
        filling = [r for r in self.records.values() if r.phase == "filling"]
        ended = super().expire(now_s)
        for record in filling:
            record.phase = "filling"
        return ended


class HolderStaysAfterDeath(DictTier):
    def holder_ended(self, holder: str) -> None:
        return


class OverlapsRooms(DictTier):
    def reserve(self, meta: ObjectMeta, *, holder: str) -> Slot:
        slot = super().reserve(meta, holder=holder)
        slot = replace(slot, address=(0, slot.slot_id // 2 * UNIT_BYTES))
        self.records[slot.slot_id].slot = slot
        return slot


class HasNoBound(DictTier):
    def usage(self) -> TierUsage:
        return replace(super().usage(), capacity_bytes=UNIT_BYTES)


BROKEN: list[tuple[type[DictTier], str, bool]] = [
    # what is broken, a test that must fail, whether the state machine must find it too
    (ShowsBeforeCommit, "test_nothing_is_seen_before_commit", True),
    (CommitsSome, "test_commit_is_all_or_none", True),
    (ReadsWrongBytes, "test_what_is_put_is_read_at_every_length", True),
    (SkipsTheChecksum, "test_bytes_that_do_not_match_their_checksum_are_a_miss", False),
    (ReadsShort, "test_wrong_lengths_are_refused", False),
    (ReusesLeasedRoom, "test_a_lease_keeps_the_object", True),
    (ReusesLimboRoom, "test_expiry_withdraws_the_right_and_not_the_memory", True),
    (AbortsAreAlwaysQuiet, "test_an_unproven_abort_keeps_the_room_in_limbo", True),
    (TakesStaleSlots, "test_an_old_slot_opens_nothing_new", True),
    (ReleasesByStaleSlot, "test_an_old_slot_opens_nothing_new", True),
    (ReusesGenerations, "test_slot_and_generation_are_never_reused", True),
    (LeaksOnAbort, "test_a_quiet_abort_gives_the_room_back", True),
    (ExpiryFreesMemory, "test_expiry_withdraws_the_right_and_not_the_memory", True),
    (LateWritersCommit, "test_a_writer_past_its_lease_cannot_commit", True),
    (HolderStaysAfterDeath, "test_a_holders_end_frees_leases_and_limbo", True),
    (OverlapsRooms, "test_full_is_refused_and_room_comes_back", True),
    (HasNoBound, "test_full_is_refused_and_room_comes_back", True),
]
IDS = [broken.__name__ for broken, _, _ in BROKEN]


def failing(make: Callable[[], Tier]) -> set[str]:
    """Names of the suite's tests that fail on tiers from `make`."""
    kit, names = TierKit(make=make), set()
    for name, test in inspect.getmembers(TierContract, inspect.isfunction):
        if not name.startswith("test_"):
            continue
        given: dict[str, Any] = {"kit": kit, "tier": make(), "off_by": -1}
        wanted = [p for p in inspect.signature(test).parameters if p != "self"]
        try:
            test(TierContract(), **{p: given[p] for p in wanted})
        except pytest.skip.Exception:
            continue
        except (AssertionError, pytest.fail.Exception, TierError, KeyError, IndexError, ValueError):
            names.add(name)
    return names


def test_an_honest_tier_passes() -> None:
    assert failing(DictTier) == set()


@pytest.mark.parametrize(("broken", "test", "_machine"), BROKEN, ids=IDS)
def test_every_broken_tier_is_caught(broken: type[DictTier], test: str, _machine: bool) -> None:
    assert test in failing(broken)


@pytest.mark.parametrize("broken", [b for b, _, machine in BROKEN if machine])
def test_the_machine_catches_it_too(broken: type[DictTier]) -> None:
    # Each takes some ten to a hundred examples, as measured with many seeds: none comes near this bound.
    machine = bare_machine(TierKit(make=broken, sizes=(64, 100)), max_examples=5000, steps=40)
    quick = settings(machine.TestCase.settings, phases=[Phase.generate], report_multiple_bugs=False)
    with pytest.raises((AssertionError, pytest.fail.Exception, TierError, KeyError, ValueError)):
        run_state_machine_as_test(machine, settings=quick)


TestDictTierMachine = tier_machine(TierKit(make=DictTier))
