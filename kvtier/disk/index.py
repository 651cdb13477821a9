"""What the directory holds, in SQLite: objects and where they are, conversations, and small state.

Every change is one transaction that is on the device when `apply` returns (WAL, synchronous=FULL).  The
caller has flushed the segments before, so an object in the index is an object on disk.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kvtier.disk.faults import INDEX_ERRORS
from kvtier.disk.rows import LISTED, QUARANTINED, Column, ObjectRow, Rows
from kvtier.objects import KEY_BYTES, Root

_SCHEMA = """
CREATE TABLE IF NOT EXISTS segments (segment INTEGER PRIMARY KEY, nbytes INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS roots (
    root INTEGER PRIMARY KEY, key BLOB NOT NULL, tenant TEXT NOT NULL, fingerprint BLOB NOT NULL,
    fidelity TEXT NOT NULL, block_tokens INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS objects (
    sequence INTEGER PRIMARY KEY, block_key BLOB NOT NULL, layer_group INTEGER NOT NULL,
    shard TEXT NOT NULL, root INTEGER NOT NULL, parent_key BLOB NOT NULL, start INTEGER NOT NULL,
    tokens INTEGER NOT NULL, first_valid INTEGER NOT NULL, nbytes INTEGER NOT NULL,
    checksum INTEGER NOT NULL, codec TEXT NOT NULL, stored_bytes INTEGER NOT NULL,
    segment INTEGER NOT NULL, at INTEGER NOT NULL, quarantined INTEGER NOT NULL DEFAULT 0,
    sealed INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS conversations (
    tenant TEXT NOT NULL, conversation TEXT NOT NULL, version INTEGER NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (tenant, conversation)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
"""
_ADD_OBJECT = "INSERT INTO objects VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,0,?)"
_PUT_RECORD = """INSERT INTO conversations VALUES (?,?,?,?) ON CONFLICT (tenant, conversation)
    DO UPDATE SET version = excluded.version, data = excluded.data WHERE excluded.version >= version"""
_DROP_RECORD = "DELETE FROM conversations WHERE tenant = ? AND conversation = ? AND version <= ?"
_PUT_STATE = "INSERT INTO state VALUES (?,?) ON CONFLICT (name) DO UPDATE SET value = excluded.value"
_EPOCH = "store.epoch"
# What SQLite stored may come back as something else when bits of its file have changed.
_OBJECT = (int, bytes, int, str, int, bytes, *(int,) * 5, str, *(int,) * 5)
_ALL_OBJECTS = """SELECT sequence, block_key, layer_group, shard, root, parent_key, start, tokens,
    first_valid, nbytes, checksum, codec, stored_bytes, segment, at, quarantined, sealed
    FROM objects ORDER BY sequence"""
_ROWS_AT_ONCE = 1 << 14
# Columns of the query that are taken over as they are.
_NUMBERS = {
    "sequence": 0,
    "group": 2,
    "start": 6,
    "tokens": 7,
    "first_valid": 8,
    "nbytes": 9,
    "checksum": 10,
    "stored_bytes": 12,
    "segment": 13,
    "at": 14,
    "quarantined": 15,
}
_ROOT = (int, bytes, str, bytes, str, int)
_RECORD = (str, str, int, bytes)


@dataclass(frozen=True, slots=True)
class ConversationRecord:
    """A conversation's bytes, opaque here. A higher version replaces a lower one; data b'' removes it.

    A removed name is not remembered: who writes it again, at whatever version, creates it.
    """

    tenant: str
    conversation: str
    version: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Batch:
    """Changes that become durable together. Objects to remove or quarantine are named by sequence."""

    add: Sequence[ObjectRow] = ()
    remove: Sequence[int] = ()
    quarantine: Sequence[int] = ()
    records: Sequence[ConversationRecord] = ()
    state: Mapping[str, bytes] = field(default_factory=dict)
    add_segments: Sequence[tuple[int, int]] = ()
    remove_segments: Sequence[int] = ()


class Index:
    """The open index of one directory. Raises sqlite3.Error; safe from any thread."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            # One process owns the directory, so SQLite need not share its own index of the WAL.
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
            _check_schema(self._db)
            self._roots = {root: number for number, root in self._read_roots()}
        except INDEX_ERRORS:
            self._db.close()
            raise

    def apply(self, batch: Batch) -> None:
        """Make the changes, all or none, and return when they survive power loss."""
        with self._lock:
            known = dict(self._roots)
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._write(batch)
                self._db.execute("COMMIT")
            except BaseException:
                self._roots = known
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def epoch(self) -> int:
        """The number of the latest opening; 0 before the first."""
        return int.from_bytes(self.state(_EPOCH) or b"", "little")

    def next_epoch(self, above: int) -> int:
        """A number that no earlier opening got, and greater than `above`; durable before it is answered."""
        epoch = max(self.epoch(), above) + 1
        self.apply(Batch(state={_EPOCH: epoch.to_bytes(8, "little")}))
        return epoch

    def drop_records(self) -> int:
        """Remove every conversation's record, durably; answers how many there were."""
        with self._lock:
            return self._db.execute("DELETE FROM conversations").rowcount

    def problems(self) -> list[str]:
        """What SQLite finds wrong with the file; empty when it is sound."""
        with self._lock:
            said = [str(row[0]) for row in self._db.execute("PRAGMA integrity_check(10)")]
        return [] if said == ["ok"] else said

    def segments(self) -> dict[int, int]:
        """Length in bytes of each segment."""
        with self._lock:
            rows = self._db.execute("SELECT segment, nbytes FROM segments")
            return dict(_checked(row, (int, int)) for row in rows)

    def objects(self) -> Rows:
        """Every object in the order in which they were written. For recovery, before other threads run.

        Raises sqlite3.DatabaseError for a row that no kvtier wrote.
        """
        rows = Rows()
        number_of = {number: rows.roots.number(root) for root, number in self._roots.items()}
        told = self._db.execute(_ALL_OBJECTS)
        while part := told.fetchmany(_ROWS_AT_ONCE):
            rows.extend(_columns(part, number_of, rows))
        return rows

    def record(self, tenant: str, conversation: str) -> ConversationRecord | None:
        """One conversation's record."""
        with self._lock:
            row = self._db.execute(
                "SELECT * FROM conversations WHERE tenant = ? AND conversation = ?", (tenant, conversation)
            ).fetchone()
        return None if row is None else ConversationRecord(*_checked(row, _RECORD))

    def records(self, batch: int) -> Iterator[list[ConversationRecord]]:
        """Every conversation's record, in batches; what changes meanwhile may be seen or not."""
        tenant, conversation = "", ""
        while True:
            with self._lock:
                rows = self._db.execute(
                    "SELECT * FROM conversations WHERE (tenant, conversation) > (?, ?)"
                    " ORDER BY tenant, conversation LIMIT ?",
                    (tenant, conversation, batch),
                ).fetchall()
            if not rows:
                return
            yield [ConversationRecord(*_checked(row, _RECORD)) for row in rows]
            tenant, conversation = rows[-1][:2]

    def state(self, name: str) -> bytes | None:
        """The value stored under a name."""
        with self._lock:
            row = self._db.execute("SELECT value FROM state WHERE name = ?", (name,)).fetchone()
        return None if row is None else bytes(_checked(row, (bytes,))[0])

    def close(self) -> None:
        """Fold the WAL into the file and close it."""
        with self._lock:
            self._db.close()

    def _read_roots(self) -> Iterator[tuple[int, Root]]:
        for row in self._db.execute("SELECT * FROM roots"):
            number, key, tenant, fingerprint, fidelity, block_tokens = _checked(row, _ROOT)
            yield number, Root(key, tenant, fingerprint, fidelity, block_tokens)

    def _write(self, batch: Batch) -> None:
        run, many = self._db.execute, self._db.executemany
        many("INSERT OR REPLACE INTO segments VALUES (?,?)", batch.add_segments)
        many("DELETE FROM segments WHERE segment = ?", [(n,) for n in batch.remove_segments])
        many("DELETE FROM objects WHERE sequence = ?", [(n,) for n in batch.remove])
        many("UPDATE objects SET quarantined = 1 WHERE sequence = ?", [(n,) for n in batch.quarantine])
        many(_ADD_OBJECT, [self._object_values(row) for row in batch.add])
        for record in batch.records:
            name = (record.tenant, record.conversation, record.version)
            if record.data:
                run(_PUT_RECORD, (*name, record.data))
            else:
                run(_DROP_RECORD, name)
        many(_PUT_STATE, list(batch.state.items()))

    def _object_values(self, row: ObjectRow) -> tuple[object, ...]:
        meta = row.meta
        if meta.checksum is None:
            raise ValueError(f"{meta.object_id} has no checksum")
        return (
            row.sequence,
            *meta.object_id,
            self._root_number(meta.root),
            meta.parent_key,
            meta.start,
            meta.tokens,
            meta.first_valid,
            meta.nbytes,
            _signed(meta.checksum),
            row.codec,
            row.stored_bytes,
            row.segment,
            row.at,
            row.sealed,
        )

    def _root_number(self, root: Root) -> int:
        number = self._roots.get(root)
        if number is None:
            number = len(self._roots) + 1
            self._db.execute(
                "INSERT INTO roots VALUES (?,?,?,?,?,?)",
                (number, root.key, root.tenant, root.fingerprint, root.fidelity, root.block_tokens),
            )
            self._roots[root] = number
        return number


def _tables(db: sqlite3.Connection) -> dict[str, str]:
    return dict(db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'"))


def _check_schema(db: sqlite3.Connection) -> None:
    """Raise sqlite3.DatabaseError when the tables are not as they were made: bits of them have changed."""
    with contextlib.closing(sqlite3.connect(":memory:")) as fresh:
        fresh.executescript(_SCHEMA)
        if _tables(fresh) != _tables(db):
            raise sqlite3.DatabaseError("the schema is damaged")


def _checked(row: tuple[Any, ...], types: tuple[type, ...]) -> tuple[Any, ...]:
    if tuple(map(type, row)) != types:
        raise sqlite3.DatabaseError("a row is damaged: its values are of other types")
    return row


def _columns(part: list[tuple[Any, ...]], number_of: Mapping[int, int], rows: Rows) -> dict[str, Column]:
    """Rows of SQLite as columns of `rows`. number_of: of roots, by their number in the file."""
    columns = list(zip(*part, strict=True))
    for values, kind in zip(columns, _OBJECT, strict=True):
        if set(map(type, values)) != {kind}:
            raise sqlite3.DatabaseError("a row is damaged: its values are of other types")
    block_key, shard, root, parent_key, codec = (columns[n] for n in (1, 3, 4, 5, 11))
    if {*map(len, block_key), *map(len, parent_key)} != {KEY_BYTES}:
        raise sqlite3.DatabaseError(f"a row is damaged: its keys are not {KEY_BYTES} bytes long")
    if not number_of.keys() >= set(root):
        raise sqlite3.IntegrityError("an object names an unknown root")
    numbers = {name: np.array(columns[n], dtype=np.int64) for name, n in _NUMBERS.items()}
    checksum, quarantined = numbers.pop("checksum"), numbers.pop("quarantined")
    return numbers | {
        "block_key": _words(block_key),
        "parent_key": _words(parent_key),
        "shard": np.array(rows.shards.numbers(shard)),
        "root": np.array([number_of[number] for number in root]),
        "codec": np.array(rows.codecs.numbers(codec)),
        "checksum": checksum.view(np.uint64),
        "sealed": np.array(columns[16], dtype=np.int64) != 0,
        "state": np.where(quarantined != 0, QUARANTINED, LISTED),
    }


def _words(keys: Sequence[bytes]) -> Column:
    return np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, KEY_BYTES // 8)


def _signed(value: int) -> int:
    """SQLite's integers are signed, checksums are not."""
    return value - (1 << 64) if value >> 63 else value
