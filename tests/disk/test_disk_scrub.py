"""The scrub: reads everything at its pace, behind those in a hurry, and goes on where it stopped."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from kvtier.disk.entry import Entry
from kvtier.disk.header import HEADER_BYTES
from kvtier.disk.pacing import Pace
from kvtier.disk.scrub import POSITION, Scrubber
from kvtier.errors import CorruptObject
from kvtier.testing.tier_kit import content, default_meta, found, get

if TYPE_CHECKING:
    from tests.disk.conftest import Bench

NBYTES = 70_001
COUNT = 20
RATE = 1 << 20


class Rig:
    """A scrubber of a bench's tier on a clock of its own."""

    def __init__(self, bench: Bench, *, busy: bool = False) -> None:
        self.busy = busy
        self.now_s = 0.0
        self.bad: list[Entry] = []
        self.scrubber = Scrubber(bench.tier._store, RATE, lambda: self.busy, self._on_bad)
        self.tier = bench.tier

    def _on_bad(self, entry: Entry, problem: CorruptObject) -> None:
        self.bad.append(entry)
        self.tier._mover.quarantine(entry, problem)

    def run(self, *, passes: int = 1, steps: int = 100_000) -> None:
        for _ in range(steps):
            if self.scrubber.stats.passes >= passes:
                return
            self.now_s += self.scrubber.step(self.now_s)


# -- the pace


@pytest.mark.parametrize("piece", [1, 4096, 1 << 20])
def test_the_pace_holds_on_the_long_run(piece: int) -> None:
    pace, now_s = Pace(1 << 20), 100.0
    for _ in range(500):
        now_s += pace.wait_s(now_s, others_wait=False)
        assert pace.wait_s(now_s, others_wait=False) == 0.0
        pace.begin(now_s, piece)
    assert now_s - 100.0 == pytest.approx(499 * piece / (1 << 20))


def test_idle_time_is_not_saved_up() -> None:
    pace = Pace(100)
    pace.begin(0.0, 100)
    pace.begin(50.0, 100)
    assert pace.wait_s(50.0, others_wait=False) == 1.0


def test_others_go_first_but_not_for_ever() -> None:
    pace, now_s, begun = Pace(1 << 40), 0.0, []
    pace.begin(now_s, 1)
    while now_s < 10.0:
        wait_s = pace.wait_s(now_s, others_wait=True)
        if wait_s == 0.0:
            begun.append(now_s)
            pace.begin(now_s, 1)
        now_s += wait_s
    assert 8 <= len(begun) <= 10


def test_a_pace_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="pace"):
        Pace(0)


# -- the scrub


def test_everything_is_read_once_a_pass_and_at_the_pace(bench: Bench) -> None:
    for n in range(COUNT):
        bench.put(n)
    bench.put(COUNT, 900_000)
    rig = Rig(bench)
    rig.run()
    stats = rig.scrubber.stats
    assert stats.read_bytes == bench.tier.usage().used_bytes
    assert (stats.found_bad, stats.passes) == (0, 1)
    assert rig.now_s >= (stats.read_bytes - (1 << 20)) / RATE
    assert rig.now_s == 3600, "a pass is followed by rest"
    rig.run(passes=2)
    assert rig.now_s == 7200


def test_what_is_damaged_is_quarantined_before_anybody_asks(bench: Bench) -> None:
    slots = [bench.put(n) for n in range(COUNT)]
    bench.flip(slots[3].address[0], (slots[3].address[1] + HEADER_BYTES + NBYTES - 1) * 8)
    bench.flip(slots[15].address[0], (slots[15].address[1] + 70) * 8)
    rig = Rig(bench)
    rig.run()
    assert [entry.meta.object_id for entry in rig.bad] == [
        default_meta(n, NBYTES).object_id for n in (3, 15)
    ]  # fmt: skip
    assert rig.scrubber.stats.found_bad == 2
    assert [n for n in range(COUNT) if bench.find(n) is None] == [3, 15]
    assert bench.reopen().usage().quarantined == 2
    assert get(bench.tier, bench.put(3)) == content(3, NBYTES)


def test_damage_is_not_found_without_the_check(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    slot = bench.put(1)
    bench.flip(slot.address[0], (slot.address[1] + HEADER_BYTES) * 8)
    monkeypatch.setattr("kvtier.disk.scrub.combine", lambda *_: bench.tier.meta(slot_id).checksum)
    slot_id = default_meta(1, NBYTES).object_id
    rig = Rig(bench)
    rig.run()
    assert rig.bad == []


def test_it_goes_on_where_it_stopped(bench: Bench) -> None:
    for n in range(COUNT):
        bench.put(n)
    rig = Rig(bench)
    rig.run(steps=15)
    read = rig.scrubber.stats.read_bytes
    assert 0 < read < bench.tier.usage().used_bytes
    kept = rig.scrubber.stop()
    bench.tier.commit_with_records([], [], kept)
    bench.reopen()
    rig = Rig(bench)
    rig.run()
    total = read + rig.scrubber.stats.read_bytes
    used = bench.tier.usage().used_bytes
    assert used <= total <= used + HEADER_BYTES + 73_728, "at most the object at hand is read twice"


def test_its_place_is_noted_now_and_then(bench: Bench) -> None:
    for n in range(COUNT):
        bench.put(n)
    rig = Rig(bench)
    rig.run(steps=4)
    first = bench.tier.state(POSITION)
    rig.now_s += 61.0
    rig.run(steps=2)
    assert first is not None
    assert bench.tier.state(POSITION) != first


def test_while_others_read_it_makes_a_piece_a_second(bench: Bench) -> None:
    for n in range(COUNT):
        bench.put(n)
    rig = Rig(bench, busy=True)
    while rig.now_s < 5.0:
        rig.now_s += rig.scrubber.step(rig.now_s)
    assert 0 < rig.scrubber.stats.read_bytes <= 6 * (HEADER_BYTES + 73_728)


def test_what_is_removed_meanwhile_gives_its_room_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtier.disk.scrub._PIECE_BYTES", 1 << 18)
    bench.put(0, 900_000)
    bench.put(1, 3_000 * 300)
    rig = Rig(bench)
    rig.run(steps=1)
    while rig.scrubber._current is None or rig.scrubber._current.done == 0:
        rig.run(steps=1)
        assert rig.now_s < 100
    for n in range(2):
        bench.tier.remove(default_meta(n, 1).object_id)
    rig.run(steps=5)
    assert bench.tier.usage().used_bytes == 0
    assert rig.bad == []


def test_a_sick_device_makes_it_pause_and_blames_no_object(bench: Bench) -> None:
    bench.put(1)
    rig = Rig(bench)
    bench.ops.fail["preadv"] = errno.ENODEV
    rig.now_s += rig.scrubber.step(0.0)
    assert rig.now_s == 60.0
    bench.ops.fail["preadv"] = errno.EIO
    assert bench.find(1) is not None
    bench.ops.fail.clear()
    rig.run(passes=1)
    assert rig.bad == []


def test_an_unreadable_sector_is_damage(bench: Bench) -> None:
    bench.put(1)
    bench.ops.fail["preadv"] = errno.EIO
    rig = Rig(bench)
    rig.run()
    assert len(rig.bad) == 1
    assert bench.find(1) is None


def test_the_tier_runs_it_and_keeps_its_place(bench: Bench) -> None:
    slots = [bench.put(n) for n in range(4)]
    bench.flip(slots[2].address[0], (slots[2].address[1] + HEADER_BYTES) * 8)
    bench.tier.start_scrub(1 << 30)
    thread = bench.tier._scrub
    assert thread is not None
    for _ in range(200):
        if bench.tier.stats().scrub_passes:
            break
        thread._stopping.wait(0.05)
    stats = bench.tier.stats()
    assert (stats.scrub_passes, stats.scrub_bad, stats.quarantined_total) == (1, 1, 1)
    assert stats.scrub_bytes == bench.tier.usage().used_bytes
    assert bench.find(2) is None
    bench.tier.close()
    assert not thread._thread.is_alive()
    tier = bench.open()
    assert tier.state(POSITION) is not None
    assert found(tier, default_meta(1, NBYTES).object_id)
