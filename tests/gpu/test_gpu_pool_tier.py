"""The parking area in a pool passes the tiers' suite and machine; pages, timeouts and control."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtier.checksum import checksum
from kvtier.errors import GeometryError, TierFull, TierUnavailable
from kvtier.gpu.cpu_engine import CpuCopyEngine
from kvtier.gpu.describe import cross_layer
from kvtier.gpu.engine import Direction
from kvtier.gpu.layout import LayerGroup
from kvtier.gpu.page_runs import PageRuns
from kvtier.gpu.pool import Pool
from kvtier.gpu.pool_slots import PoolSlots
from kvtier.gpu.tier import PoolTier
from kvtier.objects import ObjectMeta
from kvtier.testing.tier_contract import TierContract
from kvtier.testing.tier_kit import TierKit, content, default_meta, get, put
from kvtier.testing.tier_machine import tier_machine
from kvtier.tier import Slot, Tier

P, PAGES = 4, 48
TOKEN_BYTES = 2 * 2 * 2 * 8  # layers, K and V, bytes, dim: of the first group


def make() -> PoolTier:
    storage = np.zeros((PAGES, 3, 2, P, 1, 8), np.uint16)
    groups = (LayerGroup("full", (0, 2)), LayerGroup("sliding", (1,), window_tokens=8))
    layout = cross_layer(storage, "page layer kv token head dim", block_tokens=16, groups=groups)
    return PoolTier(Pool(layout, [storage]), make_engine=lambda slots: CpuCopyEngine(slots, threads=2))


def pool_meta(index: int, nbytes: int) -> ObjectMeta:
    return replace(default_meta(index, nbytes), tokens=nbytes // TOKEN_BYTES)


def extent(slot: Slot) -> tuple[int, int, int]:
    group, first = slot.address
    return group, first, first + -(-slot.nbytes // (TOKEN_BYTES * P))


def corrupt(tier: Tier, slot: Slot) -> None:
    assert isinstance(tier, PoolTier)
    tier._pool.views[0][0].rows[slot.address[1], 0, 0, 3] ^= 1


KIT = TierKit(
    make=make,
    sizes=tuple(TOKEN_BYTES * n for n in (16, 1, 5, 13)),
    meta=pool_meta,
    extent=extent,
    corrupt=corrupt,
)


class TestPoolTier(TierContract):
    @pytest.fixture
    def kit(self) -> TierKit:
        return KIT


TestPoolTierMachine = tier_machine(KIT)
TestPoolTierMachine.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


def test_objects_of_another_geometry_are_refused() -> None:
    tier = make()
    try:
        for wrong in (
            default_meta(1, TOKEN_BYTES),
            replace(pool_meta(1, TOKEN_BYTES), first_valid=1),
            replace(pool_meta(1, 17 * TOKEN_BYTES), tokens=17),
        ):
            with pytest.raises(GeometryError):
                tier.reserve(wrong, holder="w")
        assert tier.usage().used_bytes == 0
    finally:
        tier.close()


def test_groups_have_pages_of_their_own_and_windows_start_anywhere() -> None:
    tier = make()
    try:
        full = put(KIT, tier, 1)
        meta = pool_meta(2, TOKEN_BYTES)
        sliding = replace(
            meta,
            object_id=meta.object_id._replace(group=1),
            tokens=16,
            first_valid=6,
            nbytes=10 * TOKEN_BYTES // 2,
        )
        slot = tier.reserve(sliding, holder="w")
        assert slot.address == (1, 0) and full.address == (0, 0)
        data = content(7, sliding.nbytes)
        tier.write(slot, data)
        tier.commit([(slot, checksum(data))])
        assert get(tier, slot) == data
        assert get(tier, full) == content(1, full.nbytes)
        assert tier.usage().used_bytes == 4 * P * TOKEN_BYTES + 3 * P * TOKEN_BYTES // 2
    finally:
        tier.close()


class _HeldEngine(CpuCopyEngine):
    """Begins no batch before `go` is set."""

    go: threading.Event

    def _work(self, direction: Direction) -> None:
        self.go.wait()
        super()._work(direction)


def test_a_copy_that_takes_too_long_keeps_its_pages() -> None:
    go = threading.Event()
    held = type("Held", (_HeldEngine,), {"go": go, "cancel": lambda self, job: None})
    pool = make()._pool
    tier = PoolTier(pool, make_engine=lambda slots: held(slots, threads=1), copy_timeout_s=0.0)
    meta = pool_meta(1, TOKEN_BYTES)
    slot = tier.reserve(meta, holder="w")
    with pytest.raises(TierUnavailable):
        tier.write(slot, bytes(meta.nbytes))
    tier.abort(slot, quiet=True)
    assert tier.usage().used_bytes == P * TOKEN_BYTES
    go.set()
    assert tier._engine.wait_idle(10)
    assert tier.usage().used_bytes == 0
    tier.close()
    with pytest.raises(TierUnavailable):
        tier.reserve(meta, holder="w")


def test_control_a_tier_that_frees_held_pages_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def settle(self: PoolSlots, room: object) -> None:
        if not room.known and room.slot.slot_id in self._rooms:  # type: ignore[attr-defined]
            self._free(room)  # type: ignore[arg-type]

    monkeypatch.setattr(PoolSlots, "settle", settle)
    tier = make()
    suite = TierContract()
    try:
        with pytest.raises((AssertionError, TierFull)):
            suite.test_an_unproven_abort_keeps_the_room_in_limbo(KIT, tier)
    finally:
        tier.close()


class PageRunsMachine(RuleBasedStateMachine):
    """PageRuns against a plain set of pages."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = PageRuns(24)
        self.taken: list[range] = []

    @rule(count=st.integers(1, 8))
    def take(self, count: int) -> None:
        free = set(range(24)) - {page for run in self.taken for page in run}
        fits = any(set(range(i, i + count)) <= free for i in range(25 - count))
        first = self.runs.take(count)
        assert (first is not None) == fits
        if first is not None:
            assert set(range(first, first + count)) <= free
            self.taken.append(range(first, first + count))

    @precondition(lambda self: self.taken)
    @rule(pick=st.integers(0, 100))
    def give(self, pick: int) -> None:
        run = self.taken.pop(pick % len(self.taken))
        self.runs.give(run.start, len(run))
        with pytest.raises(ValueError):
            self.runs.give(run.start, len(run))

    @invariant()
    def counts(self) -> None:
        assert self.runs.used == sum(map(len, self.taken))


TestPageRuns = PageRunsMachine.TestCase
