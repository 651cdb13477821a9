"""Bad bytes and a wrong index: a miss that heals, never wrong bytes."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvtier.disk.buffers import PAGE
from kvtier.disk.header import HEADER_BYTES
from kvtier.errors import (
    CorruptObject,
)
from kvtier.testing.tier_kit import content, default_meta, found, get

if TYPE_CHECKING:
    from tests.disk.conftest import Bench

SEGMENT_BYTES = 1 << 20
CAPACITY_BYTES = 4 << 20
NBYTES = 70_001


def is_miss_then_heals(bench: Bench, index: int) -> None:
    slot = bench.find(index)
    assert slot is not None
    with pytest.raises(CorruptObject):
        bench.tier.read(slot, bytearray(slot.nbytes))
    assert bench.find(index) is None
    assert bench.tier.usage().quarantined == 1
    healed = bench.put(index)
    assert get(bench.tier, healed) == content(index, NBYTES)
    assert bench.tier.usage().quarantined == 0


# -- bad bytes


def test_flips_anywhere_are_misses_that_heal_and_the_rest_is_served(bench: Bench) -> None:
    draw = random.Random(20240521)
    bench.put(1)
    bench.put(2)
    used = bench.tier.usage().used_bytes
    header_bits = [draw.randrange(HEADER_BYTES * 8) for _ in range(40)]
    payload_bits = [HEADER_BYTES * 8 + draw.randrange(NBYTES * 8) for _ in range(40)]
    for bit in [*header_bits, *payload_bits]:
        slot = found(bench.tier, default_meta(1, NBYTES).object_id)
        bench.flip(slot.address[0], slot.address[1] * 8 + bit)
        is_miss_then_heals(bench, 1)
        assert get(bench.tier, found(bench.tier, default_meta(2, NBYTES).object_id)) == content(2, NBYTES)
        assert bench.tier.usage().used_bytes == used, "a healed object's bad room comes back"
    assert bench.tier.stats().quarantined_total == 80


def test_a_flip_goes_unnoticed_without_the_check(bench: Bench) -> None:
    slot = bench.put(1)
    bench.flip(slot.address[0], (slot.address[1] + HEADER_BYTES + 5) * 8)
    tier = bench.reopen(check=False)
    wrong = get(tier, found(tier, default_meta(1, NBYTES).object_id))
    assert wrong != content(1, NBYTES)


def test_a_quarantine_outlives_a_restart_and_keeps_its_room(bench: Bench) -> None:
    slot = bench.put(1)
    bench.flip(slot.address[0], (slot.address[1] + HEADER_BYTES) * 8)
    with pytest.raises(CorruptObject):
        get(bench.tier, slot)
    used = bench.tier.usage().used_bytes
    tier = bench.reopen()
    assert bench.find(1) is None
    usage = tier.usage()
    assert (usage.quarantined, usage.objects, usage.used_bytes) == (1, 0, used)
    other = bench.put(2)
    assert other.address != slot.address
    assert tier.remove(default_meta(1, NBYTES).object_id) == used
    assert tier.usage().quarantined == 0
    assert bench.reopen().usage().quarantined == 0


def test_swapped_places_in_the_index_give_nobody_anothers_bytes(bench: Bench) -> None:
    bench.put(1)
    bench.put(2)
    swap = "UPDATE objects SET at = (SELECT SUM(at) FROM objects) - at"
    bench.sql(swap)
    tier = bench.open()
    for index in (1, 2):
        with pytest.raises(CorruptObject, match="should be"):
            get(tier, found(tier, default_meta(index, NBYTES).object_id))
    bench.sql("UPDATE objects SET quarantined = 0")
    tier = bench.open(check=False)
    assert get(tier, found(tier, default_meta(1, NBYTES).object_id)) == content(2, NBYTES), (
        "without the check the swap must show"
    )


@pytest.mark.parametrize(
    "lie",
    [
        "UPDATE objects SET sequence = sequence + 100",
        "UPDATE objects SET checksum = checksum + 1",
        "UPDATE objects SET nbytes = nbytes - 1, stored_bytes = stored_bytes - 1",
        "UPDATE objects SET tokens = tokens - 1",
        "UPDATE objects SET parent_key = zeroblob(32)",
        "UPDATE roots SET tenant = 'other'",
        "UPDATE roots SET fingerprint = zeroblob(32)",
        "UPDATE roots SET fidelity = 'fp8'",
        "UPDATE objects SET block_key = zeroblob(32)",
    ],
)
def test_whatever_the_index_says_wrong_is_a_miss(bench: Bench, lie: str) -> None:
    bench.put(1)
    bench.sql(lie)
    tier = bench.open()
    slots = [tier.find(meta.object_id) for meta in tier.objects()]
    assert slots
    for slot in slots:
        assert slot is not None
        with pytest.raises(CorruptObject):
            get(tier, slot)


@pytest.mark.parametrize(
    "lie",
    [
        "UPDATE objects SET at = at + 1000000",
        "UPDATE objects SET at = at + 1",
        "UPDATE objects SET at = -4096",
        "UPDATE objects SET segment = 9",
        "UPDATE objects SET nbytes = 1 << 40",
        "UPDATE objects SET codec = 'lz9'",
    ],
)
def test_what_cannot_be_is_left_out_at_open(bench: Bench, lie: str) -> None:
    bench.put(1)
    bench.sql(lie)
    tier = bench.open()
    assert list(tier.objects()) == []
    assert tier.stats().lost_at_open == 1
    assert tier.usage().used_bytes == 0
    assert get(tier, bench.put(1)) == content(1, NBYTES)
    assert bench.reopen().stats().lost_at_open == 0


def test_of_two_that_overlap_the_newer_is_kept(bench: Bench) -> None:
    bench.put(1)
    bench.put(2)
    bench.sql("UPDATE objects SET at = (SELECT MAX(at) FROM objects)")
    tier = bench.open()
    assert bench.find(1) is None
    assert get(tier, found(tier, default_meta(2, NBYTES).object_id)) == content(2, NBYTES)
    assert tier.stats().lost_at_open == 1


def test_an_object_listed_twice_is_read_from_the_newer_place(bench: Bench) -> None:
    bench.put(1)
    bench.put(2)
    bench.sql("UPDATE objects SET block_key = (SELECT block_key FROM objects ORDER BY sequence DESC LIMIT 1)")
    tier = bench.open()
    assert len(list(tier.objects())) == 1
    assert get(tier, found(tier, default_meta(2, NBYTES).object_id)) == content(2, NBYTES)


def test_segments_of_another_directory_are_not_believed(bench: Bench, tmp_path: Path) -> None:
    bench.put(1)
    other = type(bench)(tmp_path / "other")
    other.put(1)
    other.tier.close()
    bench.tier.close()
    shutil.copy(other.segment(0), bench.segment(0))
    bench.open()
    is_miss_then_heals(bench, 1)


def test_truncated_and_missing_segments_are_misses(bench: Bench) -> None:
    for index in range(30):
        bench.put(index)
    assert bench.tier.stats().segments >= 2
    bench.tier.close()
    os.truncate(bench.segment(0), 3 * (NBYTES + 2 * PAGE))
    os.unlink(bench.segment(1))
    tier = bench.open()
    kept = [index for index in range(30) if bench.find(index) is not None]
    assert 0 < len(kept) < 30
    assert tier.stats().lost_at_open == 30 - len(kept)
    for index in kept:
        assert get(tier, found(tier, default_meta(index, NBYTES).object_id)) == content(index, NBYTES)
    for index in set(range(30)) - set(kept):
        assert get(tier, bench.put(index)) == content(index, NBYTES)


def test_a_segment_cut_while_open_is_a_miss(bench: Bench) -> None:
    slot = bench.put(1)
    os.truncate(bench.segment(0), slot.address[1] + HEADER_BYTES + 100)
    with pytest.raises(CorruptObject, match="ends"):
        get(bench.tier, slot)
    assert bench.find(1) is None
