"""fsck: finds what was spoiled and nothing else, and what it mends is served again."""

from __future__ import annotations

import json
import os
import random
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvtier.cli.main import run
from kvtier.disk.fsck import Report, fsck
from kvtier.disk.header import HEADER_BYTES
from kvtier.disk.index import ConversationRecord
from kvtier.errors import ConfigError, CorruptObject, TierUnavailable
from kvtier.records import frame
from kvtier.testing.tier_kit import content, default_meta, found, get

if TYPE_CHECKING:
    from tests.disk.conftest import Bench

NBYTES = 70_001
COUNT = 12


def filled(bench: Bench) -> None:
    for n in range(COUNT):
        bench.put(n)
    bench.tier.commit_with_records([], [ConversationRecord("t", "c", 1, frame("t", "c", 1, b"x"))])


def checked(bench: Bench, *, repair: bool = False) -> Report:
    bench.tier.close()
    return fsck(bench.directory, repair=repair)


def served(bench: Bench) -> set[int]:
    """Which objects are there, and right; an object that is there and cannot be read fails the test."""
    bench.open()
    there = {n for n in range(COUNT) if bench.find(n) is not None}
    for n in there:
        assert get(bench.tier, found(bench.tier, default_meta(n, NBYTES).object_id)) == content(n, NBYTES)
    return there


def all_files(directory: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file() and p.name != "LOCK"}


def test_a_sound_directory_is_clean_and_stays_as_it_was(bench: Bench) -> None:
    filled(bench)
    bench.tier.close()
    before = all_files(bench.directory)
    said: list[tuple[int, int]] = []
    report = fsck(bench.directory, repair=True, on_progress=lambda done, total: said.append((done, total)))
    assert report.is_clean
    assert (report.objects, report.object_bytes, report.conversations) == (COUNT, COUNT * NBYTES, 1)
    assert (report.orphans, report.forgotten, report.foreign, report.repaired) == (0, 0, 0, [])
    assert said == sorted(said)
    assert said[-1] == (report.segment_bytes, report.segment_bytes)
    assert all_files(bench.directory) == before


def test_each_kind_of_damage_is_found_and_mended(bench: Bench) -> None:
    filled(bench)
    slots = {n: found(bench.tier, default_meta(n, NBYTES).object_id) for n in range(4)}
    bench.flip(slots[0].address[0], (slots[0].address[1] + 100) * 8)
    bench.flip(slots[1].address[0], (slots[1].address[1] + HEADER_BYTES + 100) * 8)
    bench.sql(
        f"UPDATE objects SET at = 1 << 40 WHERE at = {slots[2].address[1]}",
        f"UPDATE objects SET at = {slots[3].address[1] + 8192} WHERE at = {slots[3].address[1]}",
    )
    report = checked(bench)
    assert not report.is_clean
    found_bad = (
        report.damaged_headers,
        report.damaged_payloads,
        report.entries_without_object,
        report.overlaps,
    )
    assert found_bad == (1, 1, 1, 1)
    assert (report.objects, report.lost_bytes) == (COUNT - 4, 4 * NBYTES)
    report = checked(bench, repair=True)
    assert len(report.repaired) == 2
    assert served(bench) == set(range(COUNT)) - {0, 1, 2, 3}
    for n in range(4):
        assert get(bench.tier, bench.put(n)) == content(n, NBYTES)
    assert checked(bench).is_clean


def test_a_damaged_record_is_found_and_removed(bench: Bench) -> None:
    filled(bench)
    damaged = frame("t", "d", 1, b"y")[:-1] + b"z"
    bench.tier.commit_with_records([], [ConversationRecord("t", "d", 1, damaged)])
    report = checked(bench)
    assert not report.is_clean
    assert (report.index, report.conversations, report.damaged_records) == ("sound", 2, 1)
    assert checked(bench, repair=True).repaired == ["1 records of conversations removed"]
    report = checked(bench)
    assert report.is_clean
    assert (report.conversations, report.objects) == (1, COUNT)


def test_damage_goes_unnoticed_by_a_check_that_reads_no_payload(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(bench)
    slot = found(bench.tier, default_meta(1, NBYTES).object_id)
    bench.flip(slot.address[0], (slot.address[1] + HEADER_BYTES + 100) * 8)
    monkeypatch.setattr("kvtier.disk.scan.SegmentReader.payload_fits", lambda *_: True)
    assert checked(bench).is_clean
    with pytest.raises(CorruptObject):
        served(bench)


@pytest.mark.parametrize("loss", ["missing", "damaged"])
def test_a_lost_index_is_made_anew(bench: Bench, loss: str) -> None:
    filled(bench)
    bench.put(3, seed=3) if bench.tier.remove(default_meta(3, NBYTES).object_id) else pytest.fail()
    bench.tier.close()
    path = bench.directory / "index.sqlite"
    path.unlink() if loss == "missing" else path.write_bytes(b"no database" * 1000)
    report = fsck(bench.directory)
    assert report.index == loss
    assert report.objects == report.orphans == COUNT
    assert path.exists() == (loss == "damaged"), "a check changes nothing"
    report = fsck(bench.directory, repair=True)
    assert report.repaired == [f"index rebuilt with {COUNT} objects"]
    assert served(bench) == set(range(COUNT))
    bench.put(COUNT)
    assert checked(bench).is_clean


def test_a_repair_that_was_cut_off_is_done_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(bench)
    bench.tier.close()
    (bench.directory / "index.sqlite").unlink()
    for step in ("os.unlink", "os.rename"):
        with monkeypatch.context() as patch:
            patch.setattr(step, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                fsck(bench.directory, repair=True)
        with pytest.raises(TierUnavailable, match="fsck"):
            bench.open()
    fsck(bench.directory, repair=True)
    assert served(bench) == set(range(COUNT))


def test_a_thousand_seeded_corruptions_lose_what_they_hit_and_nothing_else(bench: Bench) -> None:
    """Flips, zeroed and swapped sectors, cut files; then the index is lost, too."""
    filled(bench)
    places = {n: found(bench.tier, default_meta(n, NBYTES).object_id).address[1] for n in range(COUNT)}
    bench.tier.close()
    room = max(places.values()) + HEADER_BYTES + NBYTES
    pristine = bench.segment(0).read_bytes()
    beside = {path: path.read_bytes() for path in bench.directory.iterdir() if path.is_file()}
    draw = random.Random(99)
    for turn in range(250):
        spoiled, touched = bytearray(pristine), []
        for _ in range(4):
            at = draw.randrange(room // 512) * 512
            touched.append(at)
            match draw.choice(["flip", "zero", "noise", "swap"]):
                case "flip":
                    spoiled[at + 17] ^= 1
                case "zero":
                    spoiled[at : at + 512] = bytes(512)
                case "noise":
                    spoiled[at : at + 512] = draw.randbytes(512)
                case _:
                    other = draw.randrange(room // 512) * 512
                    touched.append(other)
                    spoiled[at : at + 512], spoiled[other : other + 512] = (
                        spoiled[other : other + 512],
                        spoiled[at : at + 512],
                    )
        bench.segment(0).write_bytes(spoiled)
        for path in bench.directory.glob("*.graves"):
            path.unlink()
        for path, data in beside.items():
            path.write_bytes(data)
        if turn % 2:
            (bench.directory / "index.sqlite").unlink()
        fsck(bench.directory, repair=True)
        hit = {n for n, p in places.items() if any(p <= t < p + HEADER_BYTES + NBYTES for t in touched)}
        there = served(bench)
        bench.tier.close()
        assert set(range(COUNT)) - hit <= there


def test_a_directory_in_use_is_refused_with_the_pid(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TierUnavailable, match=str(os.getpid())):
        fsck(bench.directory)
    assert run(["fsck", str(bench.directory)]) == 2
    assert str(os.getpid()) in capsys.readouterr().err


def test_what_is_no_store_is_refused_and_untouched(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a kvtier directory"):
        fsck(tmp_path)
    assert os.listdir(tmp_path) == []
    assert run(["fsck", str(tmp_path)]) == 2
    assert run(["fsck", str(tmp_path / "nothing")]) == 2


def test_the_command_says_by_its_exit_code_what_it_found(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(bench)
    slot = found(bench.tier, default_meta(1, NBYTES).object_id)
    bench.tier.close()
    where = str(bench.directory)
    assert run(["fsck", where]) == 0
    assert "clean" in capsys.readouterr().out
    bench.flip(slot.address[0], (slot.address[1] + HEADER_BYTES + 100) * 8)
    assert run(["fsck", where]) == 1
    assert "1 payloads" in capsys.readouterr().out
    assert run(["fsck", where, "--repair", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["repaired"] == ["1 objects quarantined"]
    assert run(["fsck", where]) == 1
    assert "heals" in capsys.readouterr().out
    db = sqlite3.connect(bench.directory / "index.sqlite")
    assert db.execute("SELECT COUNT(*) FROM objects WHERE quarantined").fetchone() == (1,)
    db.close()
