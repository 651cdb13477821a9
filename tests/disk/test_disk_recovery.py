"""From the index to the books: what is left out, against the same rules said one row at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.checksum import checksum
from kvtier.disk import recovery
from kvtier.disk.entry import room_for
from kvtier.disk.recovery import lengths_can_be, make_ledger, sift
from kvtier.disk.rows import ObjectRow, Rows
from kvtier.disk.sweep import Sweep
from kvtier.objects import ObjectId, ObjectMeta, Root
from kvtier.testing.tier_kit import content, default_meta, found, get

if TYPE_CHECKING:
    from tests.disk.conftest import Bench

NBYTES = 70_001
PAGE = 4096
FOUND = {0: 12 * PAGE, 3: 6 * PAGE, 1 << 40: 2 * PAGE}
ROOT = Root(b"r" * 32, "t", b"f" * 32, "exact", 256)
HUGE = (1 << 63) - 1


def filled(listed: Iterable[ObjectRow]) -> Rows:
    rows = Rows()
    for row in listed:
        rows.put(rows.add(), row)
    return rows


def by_the_rules(rows: list[ObjectRow]) -> set[int]:
    """Sequences that `sift` must name."""
    lost: list[int] = []
    newest: dict[tuple[ObjectId, bool], ObjectRow] = {}
    longest = max(FOUND.values())
    for row in rows:
        end = row.at + room_for(row.stored_bytes)
        inside = row.at >= 0 and row.at % PAGE == 0 and end <= FOUND.get(row.segment, 0)
        sane = row.stored_bytes >= 0
        fits = lengths_can_be(row.codec, row.stored_bytes, row.meta.nbytes, longest)
        if not inside or not sane or not fits:
            lost.append(row.sequence)
            continue
        name = (row.meta.object_id, row.quarantined)
        older = newest.get(name)
        if older is not None:
            lost.append(min(older.sequence, row.sequence))
        if older is None or older.sequence < row.sequence:
            newest[name] = row
    kept: list[ObjectRow] = []
    for row in sorted(newest.values(), key=lambda row: (row.segment, row.at)):
        while kept and over(kept[-1], row) and kept[-1].sequence < row.sequence:
            lost.append(kept.pop().sequence)
        if kept and over(kept[-1], row):
            lost.append(row.sequence)
        else:
            kept.append(row)
    return set(lost)


def over(before: ObjectRow, after: ObjectRow) -> bool:
    return before.segment == after.segment and before.at + room_for(before.stored_bytes) > after.at


@st.composite
def listings(draw: st.DrawFn) -> list[ObjectRow]:
    """Rows among which are some that cannot be, twice the same, and one over another."""
    lengths = st.one_of(st.integers(0, 3 * PAGE), st.sampled_from([-1, HUGE, -HUGE, 1 << 40]))
    rows = []
    for sequence in draw(st.lists(st.integers(0, 10_000), unique=True, max_size=24)):
        nbytes = draw(lengths)
        stored = draw(st.one_of(st.just(nbytes), lengths)) if draw(st.booleans()) else nbytes
        key = draw(st.integers(0, 3)).to_bytes(32, "big")
        object_id = ObjectId(key, draw(st.integers(0, 1)), draw(st.sampled_from(["a", "b"])))
        places = st.one_of(st.integers(0, 12).map(lambda n: n * PAGE), st.sampled_from([-PAGE, 1, HUGE]))
        meta = ObjectMeta(object_id, ROOT, b"p" * 32, 0, 256, 0, nbytes, 5)
        segment = draw(st.sampled_from([*FOUND, *FOUND, -1, 2, HUGE]))
        codec = draw(st.sampled_from(["raw", "raw", "lz4", "lz9"]))
        quarantined = draw(st.booleans()) and draw(st.booleans())
        rows.append(ObjectRow(meta, sequence, segment, draw(places), stored, codec, quarantined))
    return rows


def check(listed: list[ObjectRow]) -> None:
    rows = filled(listed)
    lost = sift(rows, FOUND)
    assert len(set(lost.tolist())) == len(lost)
    assert {listed[number].sequence for number in lost.tolist()} == by_the_rules(listed)
    rows.drop(lost)
    kept = list(rows)
    ledger = make_ledger(1 << 20, 1 << 20, rows, FOUND)
    usage = ledger.usage()
    room = sum(room_for(row.stored_bytes) for row in kept)
    assert (usage.used_bytes, usage.used_bytes + ledger.extents.free_bytes) == (room, sum(FOUND.values()))
    assert (usage.objects, usage.quarantined) == tuple(
        sum(row.quarantined is bad for row in kept) for bad in (False, True)
    )
    for row in kept:
        entry = (ledger.quarantined if row.quarantined else ledger.find)(row.meta.object_id)
        assert entry is not None
        assert entry.row == row if not row.quarantined else entry.generation == row.sequence
    assert sorted(ledger.living().tolist()) == sorted(row.sequence for row in kept)


@given(listings())
def test_what_is_left_out_is_what_the_rules_say(listed: list[ObjectRow]) -> None:
    check(listed)


@pytest.mark.parametrize(("rule", "places"), [("_superseded", (0, 4)), ("_overlapped", (0, 1))])
def test_without_a_rule_the_difference_shows(
    monkeypatch: pytest.MonkeyPatch, rule: str, places: tuple[int, int]
) -> None:
    name = default_meta(1, PAGE).object_id
    names = [name, name if rule == "_superseded" else name._replace(group=7)]
    metas = [ObjectMeta(object_id, ROOT, b"p" * 32, 0, 256, 0, PAGE, 5) for object_id in names]
    listed = [
        ObjectRow(meta, n, 0, at * PAGE, PAGE, "raw")
        for n, (meta, at) in enumerate(zip(metas, places, strict=True))
    ]
    check(listed)
    monkeypatch.setattr(recovery, rule, lambda _rows, _numbers: np.zeros(0, dtype=np.int64))
    with pytest.raises((AssertionError, ValueError)):
        check(listed)


def test_an_object_at_rest_is_nothing_but_a_row(bench: Bench) -> None:
    """An entry for each would make an index of a million blocks a gigabyte."""
    ledger = bench.tier._ledger
    for n in range(5):
        bench.put(n)
        slot = found(bench.tier, default_meta(n, NBYTES).object_id)
        assert get(bench.tier, slot) == content(n, NBYTES)
        bench.tier.lease(slot, "w", 10.0)
        bench.tier.expire(11.0)
        bench.tier.release(slot, "w")
    bench.tier.remove(default_meta(4, NBYTES).object_id)
    assert ledger._awake == {}
    assert ledger._writing == {}
    held = bench.tier.reserve(default_meta(9, NBYTES), holder="w")
    assert list(ledger._awake) == [held.slot_id] == [4]
    bench.tier.abort(held, quiet=True)
    assert ledger._awake == {}
    tier = bench.reopen()
    assert tier._ledger._awake == {}
    assert len(list(tier.objects())) == 4


def replace_one(bench: Bench, index: int) -> None:
    slot = bench.tier.reserve(default_meta(index, NBYTES), holder="w", replacing=True)
    bench.tier.write(slot, content(index, NBYTES))
    bench.tier.commit([(slot, checksum(content(index, NBYTES)))])


@pytest.mark.parametrize("told_of_it", [True, False], ids=["told", "not told"])
def test_what_is_replaced_while_all_are_listed_is_listed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, told_of_it: bool
) -> None:
    """The other one stands in a row that the listing is past; untold, it would be missing."""
    if not told_of_it:
        monkeypatch.setattr(Sweep, "replaced", lambda *_: None)
    for n in range(8):
        bench.put(n)
    bench.tier.remove(default_meta(0, NBYTES).object_id)
    batches = bench.tier.object_batches(3)
    told = [meta.object_id for meta in next(batches)]
    replace_one(bench, 6)
    told += [meta.object_id for batch in batches for meta in batch]
    all_of_them = [default_meta(n, NBYTES).object_id for n in range(1, 8)]
    missing = set(all_of_them) - set(told)
    assert missing == (set() if told_of_it else {default_meta(6, NBYTES).object_id})
    assert bench.tier._ledger.sweep() is bench.tier._ledger._sweeps[0], "the first one is over"
