"""What was forgotten stays so: without the index, with an older one, after a crash at any step."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvtier.disk.fileops import OsFileOps
from kvtier.disk.fsck import fsck
from kvtier.disk.graves import Graves, Known, read
from kvtier.disk.index import ConversationRecord
from kvtier.disk.store import Store
from kvtier.errors import TierUnavailable
from kvtier.testing.tier_kit import content, default_meta, found, get

if TYPE_CHECKING:
    from tests.disk.conftest import Bench

NBYTES = 70_001
STORE_ID = b"s" * 16


class PowerCut(BaseException):
    """The power failed. Not an Exception, so that nothing can think that it handled it."""


class Recording(OsFileOps):
    """Knows how long each file is on the device: what was appended since its last sync is lost at a cut."""

    def __init__(self) -> None:
        self.fail: dict[str, int] = {}
        self.paths: dict[int, str] = {}
        self.synced_bytes: dict[str, int] = {}

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        fd = super().open(path, flags, mode)
        self.paths[fd] = path
        return fd

    def fdatasync(self, fd: int) -> None:
        super().fdatasync(fd)
        self.synced_bytes[self.paths[fd]] = os.fstat(fd).st_size

    def fsync(self, fd: int) -> None:
        super().fsync(fd)
        self.synced_bytes[self.paths[fd]] = os.fstat(fd).st_size

    def lose_unsynced_graves(self) -> None:
        for path, nbytes in self.synced_bytes.items():
            if path.endswith(".graves") and os.path.exists(path):
                os.truncate(path, nbytes)


def dead(known: Known | None, sequences: Sequence[int]) -> list[bool]:
    assert known is not None
    answer: list[bool] = known.dead(np.array(sequences, dtype=np.uint64)).tolist()
    return answer


def lose_index(bench: Bench) -> None:
    bench.tier.close()
    for name in os.listdir(bench.directory):
        if name.startswith("index.sqlite"):
            os.unlink(bench.directory / name)


def rebuilt(bench: Bench) -> set[int]:
    """Which of the first ten objects are there after the index was lost and made anew."""
    lose_index(bench)
    with pytest.raises(TierUnavailable, match="fsck"):
        bench.open()
    fsck(bench.directory, repair=True)
    tier = bench.open()
    there = {n for n in range(10) if bench.find(n) is not None}
    for n in there:
        assert get(tier, found(tier, default_meta(n, NBYTES).object_id)) == content(n, NBYTES)
    return there


def forget(bench: Bench, *indexes: int) -> None:
    for n in indexes:
        bench.tier.remove(default_meta(n, NBYTES).object_id)
    bench.tier.commit_with_records([], [], forget=True)


# -- the file


def test_a_file_says_who_lives_and_who_ended(tmp_path: Path) -> None:
    ops = OsFileOps()
    graves = Graves(str(tmp_path), ops, STORE_ID)
    graves.start([7, 3, 5], 10)
    assert dead(read(str(tmp_path), ops, STORE_ID), [1, 3, 5, 7, 9, 10, 11]) == [
        True, False, False, False, True, False, False,
    ]  # fmt: skip
    graves.append([5, 11])
    graves.sync()
    known = read(str(tmp_path), ops, STORE_ID)
    assert dead(known, [3, 5, 10, 11]) == [False, True, False, True]
    graves.start([3, 12], 13)
    assert len(os.listdir(tmp_path)) == 1, "the older file is gone"
    assert dead(read(str(tmp_path), ops, STORE_ID), [3, 10, 11, 12, 13]) == [False, True, True, False, False]
    graves.close()


def test_a_damaged_file_is_not_believed_and_a_torn_record_hides_no_other(tmp_path: Path) -> None:
    ops, draw = OsFileOps(), random.Random(7)
    graves = Graves(str(tmp_path), ops, STORE_ID)
    graves.start(range(20), 20)
    graves.append([21, 22, 23])
    graves.close()
    path = next(tmp_path.iterdir())
    whole = path.read_bytes()
    listed = len(whole) - 3 * 16
    for _ in range(200):
        spoiled = bytearray(whole)
        at = draw.randrange(len(whole))
        spoiled[at] ^= 1 << draw.randrange(8)
        path.write_bytes(spoiled)
        known = read(str(tmp_path), ops, STORE_ID)
        if at < listed:
            assert known is None
        else:
            assert sum(dead(known, [21, 22, 23])) == 2
    path.write_bytes(whole[:-5])
    assert dead(read(str(tmp_path), ops, STORE_ID), [21, 22, 23]) == [True, True, False]
    path.write_bytes(whole)
    assert read(str(tmp_path), ops, b"o" * 16) is None, "of another directory"


def test_a_long_file_is_written_anew_and_knows_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtier.disk.graves._SHORT_LOG", 8)
    for n in range(10):
        bench.put(n)
    waiting = bench.tier.reserve(default_meta(20, NBYTES), holder="w")
    bench.tier.write(waiting, content(20, NBYTES))
    for _ in range(3):
        forget(bench, 0, 1, 2, 3)
        for n in range(4):
            bench.put(n)
    forget(bench, 0, 1, 2, 3)
    known = read(str(bench.directory), OsFileOps(), bench.tier._store._held.store_id)
    assert known is not None
    assert len(known.ended) < 16
    bench.tier.commit([(waiting, 0)])
    assert dead(known, [waiting.generation]) == [False], "what may still be committed lives"
    assert rebuilt(bench) >= {4, 5, 6, 7, 8, 9}
    assert bench.find(0) is None


# -- forget, lose the index, rebuild


def test_forgotten_stays_forgotten_without_the_index(bench: Bench) -> None:
    for n in range(5):
        bench.put(n)
    forget(bench, 1, 3)
    assert rebuilt(bench) == {0, 2, 4}
    bench.put(1)
    assert rebuilt(bench) == {0, 1, 2, 4}, "parked again, it is there again"


def test_without_the_graves_it_would_come_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Graves, "append", lambda *_: None)
    bench.put(0)
    bench.put(1)
    forget(bench, 1)
    assert rebuilt(bench) == {0, 1}


def test_an_earlier_copy_of_a_forgotten_object_stays_gone_too(bench: Bench) -> None:
    """Evicted, without waiting for anything, and written again elsewhere; then forgotten."""
    bench.put(0)
    bench.put(1)
    bench.tier.remove(default_meta(1, NBYTES).object_id)
    bench.put(1)
    forget(bench, 1)
    assert rebuilt(bench) == {0}


def test_an_aborted_write_does_not_come_back(bench: Bench) -> None:
    bench.put(0)
    slot = bench.tier.reserve(default_meta(1, NBYTES), holder="w")
    bench.tier.write(slot, content(1, NBYTES))
    bench.tier.abort(slot, quiet=True)
    assert rebuilt(bench) == {0}


def test_a_write_that_a_crash_cut_off_is_dead_from_the_next_opening_on(bench: Bench) -> None:
    bench.put(0)
    slot = bench.tier.reserve(default_meta(1, NBYTES), holder="w")
    bench.tier.write(slot, content(1, NBYTES))
    bench.reopen()
    assert bench.find(1) is None
    assert rebuilt(bench) == {0}


def test_nothing_comes_back_when_the_graves_are_lost_with_the_index(bench: Bench) -> None:
    bench.put(0)
    bench.put(1)
    forget(bench, 1)
    lose_index(bench)
    for path in bench.directory.glob("*.graves"):
        path.unlink()
    report = fsck(bench.directory, repair=True)
    assert (report.graves, report.objects, report.forgotten) == ("missing", 0, 2)
    bench.open()
    assert bench.find(0) is None
    assert get(bench.tier, bench.put(0)) == content(0, NBYTES)


@pytest.mark.parametrize("step", ["graves appended", "graves synced", "index told"])
@pytest.mark.parametrize("index_lost", [True, False])
def test_a_crash_in_the_middle_of_forget(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, step: str, index_lost: bool
) -> None:
    """Whether or not the forget took place: asked again it does, and then nothing comes back."""
    ops = Recording()
    bench.tier.close()
    bench.ops = ops  # type: ignore[assignment]
    bench.open()
    for n in range(3):
        bench.put(n)
    place, name = {
        "graves appended": (Graves, "append"),
        "graves synced": (Graves, "sync"),
        "index told": (type(bench.tier._store.index), "apply"),
    }[step]
    real = getattr(place, name)

    def cut(self: object, *given: object) -> None:
        real(self, *given)
        raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(place, name, cut)
        with pytest.raises(PowerCut):
            forget(bench, 1)
        patch.setattr(Store, "list_in_index", lambda *_: None)
        bench.tier.close()
    ops.lose_unsynced_graves()
    if index_lost:
        there = rebuilt(bench)
    else:
        bench.open()
        there = {n for n in range(10) if bench.find(n) is not None}
    assert {0, 2} <= there
    if step == "graves synced":
        assert there == {0, 2}
    forget(bench, 1)
    bench.tier.close()
    ops.lose_unsynced_graves()
    assert rebuilt(bench) == {0, 2}


def test_a_forget_that_does_not_wait_for_its_graves_is_caught(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = Recording()
    bench.tier.close()
    bench.ops = ops  # type: ignore[assignment]
    bench.open()
    bench.put(0)
    bench.put(1)
    monkeypatch.setattr(Graves, "sync", lambda _: None)
    forget(bench, 1)
    bench.tier.close()
    ops.lose_unsynced_graves()
    assert rebuilt(bench) == {0, 1}


def test_an_older_index_brings_nothing_forgotten_back(bench: Bench) -> None:
    for n in range(3):
        bench.put(n)
    bench.tier.commit_with_records([], [ConversationRecord("t", "gone", 1, b"x")])
    bench.tier.close()
    older = bench.directory.parent / "older.sqlite"
    shutil.copy(bench.directory / "index.sqlite", older)
    bench.open()
    bench.tier.commit_with_records([], [ConversationRecord("t", "gone", 1, b"")])
    forget(bench, 1)
    bench.put(3)
    bench.tier.close()
    shutil.copy(older, bench.directory / "index.sqlite")
    report = fsck(bench.directory)
    assert (report.index, report.objects) == ("older than the store", 3)
    tier = bench.open()
    assert [n for n in range(5) if bench.find(n)] == [0, 2]
    assert tier.record("t", "gone") is None
    for n in (0, 2):
        assert get(tier, found(tier, default_meta(n, NBYTES).object_id)) == content(n, NBYTES)
    slot = bench.put(1)
    assert get(tier, slot) == content(1, NBYTES)
    assert rebuilt(bench) == {0, 1, 2}, "sequences of the two lives never meet"
