"""The index and the directory's lock and format."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from kvtier.disk.index import Batch, ConversationRecord, Index
from kvtier.disk.lock import DirectoryLock
from kvtier.disk.rows import ObjectRow
from kvtier.errors import ConfigError, TierUnavailable
from kvtier.objects import ObjectId, ObjectMeta, Root

ROOTS = [Root(bytes([n]) * 32, f"tenant{n}", b"f" * 32, "exact", 256) for n in range(3)]


def row(n: int, *, root: Root = ROOTS[0]) -> ObjectRow:
    object_id = ObjectId(n.to_bytes(32, "big"), n % 3, "L0+4.H0+2")
    meta = ObjectMeta(object_id, root, b"p" * 32, n * 256, 256, 0, 1000 + n, (1 << 64) - 1 - n)
    return ObjectRow(meta, n, n // 10, n % 10 * 8192, 1000 + n, "raw")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index.sqlite"


def test_objects_and_roots_come_back(path: Path) -> None:
    index = Index(path)
    rows = [row(n, root=ROOTS[n % 3]) for n in range(30)]
    index.apply(Batch(add=rows, add_segments=[(0, 1 << 20), (1, 4096)]))
    index.apply(Batch(remove=[3, 4], quarantine=[5], remove_segments=[1]))
    index.close()
    index = Index(path)
    back = {r.sequence: r for r in index.objects()}
    assert set(back) == set(range(30)) - {3, 4}
    assert [n for n, r in back.items() if r.quarantined] == [5]
    assert all(r == rows[n] for n, r in back.items() if n != 5)
    assert index.segments() == {0: 1 << 20}
    index.apply(Batch(add=[row(100, root=ROOTS[2])]))
    assert [r.meta.root for r in index.objects()][-1] == ROOTS[2]
    index.close()


def test_a_failed_transaction_changes_nothing_not_even_its_roots(path: Path) -> None:
    index = Index(path)
    index.apply(Batch(add=[row(1)]))
    record = ConversationRecord("t", "c", 1, b"x")
    with pytest.raises(sqlite3.IntegrityError):
        index.apply(Batch(add=[row(2, root=ROOTS[1]), row(1)], records=[record], state={"s": b"1"}))
    assert [r.sequence for r in index.objects()] == [1]
    assert index.record("t", "c") is None
    assert index.state("s") is None
    index.apply(Batch(add=[row(2, root=ROOTS[2])]))
    index.close()
    index = Index(path)
    assert [r.meta.root for r in index.objects()] == [ROOTS[0], ROOTS[2]]
    index.close()


def test_commits_are_synced_in_full(path: Path) -> None:
    index = Index(path)
    assert index._db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert index._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    index.close()


def test_records_have_versions(path: Path) -> None:
    index = Index(path)

    def put(version: int, data: bytes) -> ConversationRecord | None:
        index.apply(Batch(records=[ConversationRecord("t", "c", version, data)]))
        return index.record("t", "c")

    assert put(2, b"two") == ConversationRecord("t", "c", 2, b"two")
    assert put(1, b"one") == ConversationRecord("t", "c", 2, b"two")
    assert put(1, b"") == ConversationRecord("t", "c", 2, b"two")
    assert put(3, b"three") == ConversationRecord("t", "c", 3, b"three")
    assert put(3, b"") is None
    index.close()


def test_records_are_told_in_batches(path: Path) -> None:
    index = Index(path)
    records = [ConversationRecord(f"t{n % 3}", f"c{n}", n, b"x") for n in range(25)]
    index.apply(Batch(records=records))
    parts = list(index.records(10))
    assert [len(part) for part in parts] == [10, 10, 5]
    told = [record for part in parts for record in part]
    assert sorted(told, key=lambda r: r.version) == records
    index.close()


def test_epochs_grow_over_restarts(path: Path) -> None:
    seen = []
    for _ in range(3):
        index = Index(path)
        seen.append(index.next_epoch(0))
        index.close()
    assert seen == [1, 2, 3]
    index = Index(path)
    assert (index.epoch(), index.next_epoch(7), index.epoch()) == (3, 8, 8)
    index.close()


# -- the directory


def test_a_second_holder_is_refused_with_the_first_ones_pid(tmp_path: Path) -> None:
    held = DirectoryLock(tmp_path / "d")
    with pytest.raises(TierUnavailable, match=str(os.getpid())) as refusal:
        DirectoryLock(tmp_path / "d")
    assert refusal.value.fix
    held.release()
    DirectoryLock(tmp_path / "d").release()


def test_another_process_holds_the_lock_until_it_ends(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from kvtier.disk.lock import DirectoryLock;"
        "held = DirectoryLock(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "d")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(TierUnavailable, match=str(other.pid)):
            DirectoryLock(tmp_path / "d")
    finally:
        other.kill()
        other.communicate()
    DirectoryLock(tmp_path / "d").release()


def test_the_store_id_stays(tmp_path: Path) -> None:
    ids = []
    for _ in range(2):
        held = DirectoryLock(tmp_path)
        ids.append(held.store_id)
        held.release()
    assert ids[0] == ids[1]
    assert len(ids[0]) == 16


def test_a_crash_before_the_format_file_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "LOCK").write_text("99\n")
    (tmp_path / "FORMAT.new").write_text("{")
    (tmp_path / "lost+found").mkdir()
    DirectoryLock(tmp_path).release()


def test_a_foreign_directory_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        DirectoryLock(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    DirectoryLock(tmp_path).release()
    said = json.loads((tmp_path / "FORMAT").read_text())
    (tmp_path / "FORMAT").write_text(json.dumps({**said, "version": 3}))
    with pytest.raises(TierUnavailable, match="format version 3"):
        DirectoryLock(tmp_path)
    with pytest.raises(TierUnavailable, match="format version 3"):
        DirectoryLock(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"version": 2, "store_id": "zz"}'])
def test_a_broken_format_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "FORMAT").write_text(text)
    with pytest.raises(TierUnavailable, match="cannot be understood"):
        DirectoryLock(tmp_path)


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TierUnavailable, match="cannot be used"):
        DirectoryLock(tmp_path / "file")
