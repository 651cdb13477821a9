"""The vault's SQLite file, and the proof that a destroyed key is no longer in it.

`secure_delete` alone is not enough: when SQLite moves rows to balance its tree it leaves their old copies in
the unused part of a page, and deleting the row later zeroes the last copy only.  So wrapped keys lie in
slots, rows of equal length that are appended, overwritten in place and never deleted, and therefore never
move; what may move holds numbers and names only.  To erase is to overwrite a slot with zeros, commit, copy
the WAL into the file, and truncate the WAL, all of it flushed.

The file does not shrink: free slots are used again.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kvtier.disk.fileops import FileOps
from kvtier.disk.lock import sync_directory
from kvtier.disk.vault_folder import NEW_DATABASE
from kvtier.disk.vault_keys import WRAPPED_BYTES

FORMAT_VERSION = 1
_APPLICATION_ID = 0x4B565456
# Longer than any of our own reads lasts; a foreign one may hold up the truncation of the WAL.
_BUSY_S = 5.0
_SCHEMA = (
    "CREATE TABLE state (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID",
    "CREATE TABLE slots (slot INTEGER PRIMARY KEY, wrapped BLOB NOT NULL)",
    "CREATE TABLE free_slots (slot INTEGER PRIMARY KEY)",
    "CREATE TABLE tenants (tenant INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE,"
    " slot INTEGER NOT NULL)",
    "CREATE TABLE keys (generation INTEGER PRIMARY KEY, tenant INTEGER NOT NULL, slot INTEGER NOT NULL)",
)
_TENANT = "SELECT tenant, name, wrapped FROM tenants JOIN slots USING (slot)"
_HAS_TENANT = "SELECT 1 FROM tenants WHERE tenant = ?"
_KEY = "SELECT tenant, wrapped FROM keys JOIN slots USING (slot) WHERE generation = ?"
_PAGE_OF = "SELECT generation FROM keys WHERE generation > ? ORDER BY generation LIMIT ?"
_ZEROS = bytes(WRAPPED_BYTES)


@dataclass(frozen=True, slots=True)
class TenantRow:
    """A tenant's wrapped key. `number` is never used for another key."""

    number: int
    name: str
    wrapped: bytes


class KeyRow(NamedTuple):
    """A wrapped data key, and the number of the tenant's key that wraps it."""

    generation: int
    tenant: int
    wrapped: bytes


class VaultRows:
    """The open file. Raises sqlite3.Error and OSError; safe from any thread.

    Reads go over a connection of their own, so that none waits for a flush.
    """

    def __init__(self, path: Path, ops: FileOps) -> None:
        self._ops = ops
        self._wal = f"{path}-wal"
        self._writing = threading.Lock()
        self._reading = threading.Lock()
        self._db = _connected(path)
        try:
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA secure_delete=ON")
            # What a statement can undo is kept in a temporary file otherwise, outside the vault.
            self._db.execute("PRAGMA temp_store=MEMORY")
            self._reader = _connected(path)
        except sqlite3.Error:
            self._db.close()
            raise

    def version(self) -> int:
        """The format's version; -1 when the file is no vault."""
        ours = self._one("PRAGMA application_id")[0] == _APPLICATION_ID
        return int(self._one("PRAGMA user_version")[0]) if ours else -1

    def state(self, name: str) -> bytes:
        """The value stored under a name; b'' when there is none."""
        row = self._one("SELECT value FROM state WHERE name = ?", name)
        return b"" if row is None else bytes(row[0])

    def tenant(self, name: str) -> TenantRow | None:
        """The tenant's key by its name."""
        row = self._one(f"{_TENANT} WHERE name = ?", name)
        return None if row is None else TenantRow(*row)

    def tenant_numbered(self, number: int) -> TenantRow | None:
        """The tenant's key by its number."""
        row = self._one(f"{_TENANT} WHERE tenant = ?", number)
        return None if row is None else TenantRow(*row)

    def key(self, generation: int) -> KeyRow | None:
        """A generation's key."""
        row = self._one(_KEY, generation)
        return None if row is None else KeyRow(generation, *row)

    def generations(self, batch: int) -> Iterator[int]:
        """Generations with a key, ascending; what changes meanwhile may be seen or not."""
        after = -1
        while True:
            with self._reading:
                rows = self._reader.execute(_PAGE_OF, (after, batch)).fetchall()
            if not rows:
                return
            yield from (row[0] for row in rows)
            after = rows[-1][0]

    def next_tenant_number(self) -> int:
        """The number that the next tenant's key gets, as long as `writing` is held."""
        row = self._one("SELECT seq FROM sqlite_sequence WHERE name = 'tenants'")
        return 1 if row is None else int(row[0]) + 1

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One transaction: all or nothing, and on the device when the block ends."""
        with self._writing:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def add_tenant(self, row: TenantRow) -> None:
        """Within `writing`."""
        (slot,) = self._fill([row.wrapped])
        self._db.execute("INSERT INTO tenants VALUES (?,?,?)", (row.number, row.name, slot))

    def add_keys(self, rows: Sequence[KeyRow]) -> list[KeyRow]:
        """Within `writing`; answers those whose tenant's key is gone, which are left out."""
        wanted = {row.tenant for row in rows}
        there = {n for n in wanted if self._db.execute(_HAS_TENANT, (n,)).fetchone()}
        fit = [row for row in rows if row.tenant in there]
        slots = self._fill([row.wrapped for row in fit])
        self._db.executemany(
            "INSERT INTO keys VALUES (?,?,?)",
            [(row.generation, row.tenant, slot) for row, slot in zip(fit, slots, strict=True)],
        )
        return [row for row in rows if row.tenant not in there]

    def remove_keys(self, generations: Iterable[int]) -> int:
        """Within `writing`; answers how many there were. Their bytes are gone after `settle`."""
        slots = []
        for generation in generations:
            row = self._db.execute("SELECT slot FROM keys WHERE generation = ?", (generation,)).fetchone()
            if row is not None:
                self._db.execute("DELETE FROM keys WHERE generation = ?", (generation,))
                slots.append(row[0])
        self._erase(slots)
        return len(slots)

    def remove_tenant(self, name: str) -> int:
        """Within `writing`; the tenant's key and its data keys. Answers how many data keys there were."""
        found = self._db.execute("SELECT tenant, slot FROM tenants WHERE name = ?", (name,)).fetchone()
        if found is None:
            return 0
        number, slot = found
        slots = [row[0] for row in self._db.execute("SELECT slot FROM keys WHERE tenant = ?", (number,))]
        self._db.execute("DELETE FROM keys WHERE tenant = ?", (number,))
        self._db.execute("DELETE FROM tenants WHERE tenant = ?", (number,))
        self._erase([slot, *slots])
        return len(slots)

    def rewrap_tenants(self, rewrap: Callable[[TenantRow], bytes]) -> None:
        """Within `writing`; give each tenant's key the bytes that `rewrap` answers for it."""
        rows = [TenantRow(*row) for row in self._db.execute(_TENANT)]
        self._db.executemany(
            "UPDATE slots SET wrapped = ? WHERE slot = (SELECT slot FROM tenants WHERE tenant = ?)",
            [(rewrap(row), row.number) for row in rows],
        )

    def put_state(self, name: str, value: bytes) -> None:
        """Within `writing`."""
        self._db.execute("UPDATE state SET value = ? WHERE name = ?", (value, name))

    def settle(self) -> None:
        """Let nothing that was erased or replaced be in any of the files, durably."""
        with self._writing:
            # Copies and flushes while reads go on; they wait for the truncation alone.
            self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            with self._reading:
                (busy, _, _) = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if busy:
                raise sqlite3.OperationalError("another process has the file open and holds up its WAL")
            # After a power loss an unflushed truncation might show the old WAL again.
            fd = self._ops.open(self._wal, os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._ops.fsync(fd)
            finally:
                self._ops.close(fd)

    def close(self) -> None:
        """Close both connections; the last one folds the WAL into the file."""
        with self._writing, self._reading:
            self._reader.close()
            self._db.close()

    def _one(self, statement: str, *values: object) -> Any:
        with self._reading:
            return self._reader.execute(statement, values).fetchone()

    def _fill(self, wrapped: Sequence[bytes]) -> list[int]:
        """Put wrapped keys into slots, free ones first."""
        if any(len(one) != WRAPPED_BYTES for one in wrapped):
            raise ValueError(f"a slot holds {WRAPPED_BYTES} bytes")
        free = self._db.execute("SELECT slot FROM free_slots LIMIT ?", (len(wrapped),)).fetchall()
        self._db.executemany("DELETE FROM free_slots WHERE slot = ?", free)
        slots = [row[0] for row in free]
        self._overwrite(slots, wrapped[: len(slots)])
        last = self._db.execute("SELECT max(slot) FROM slots").fetchone()[0] or 0
        new = range(last + 1, last + 1 + len(wrapped) - len(slots))
        self._db.executemany("INSERT INTO slots VALUES (?,?)", zip(new, wrapped[len(slots) :], strict=True))
        return [*slots, *new]

    def _erase(self, slots: Sequence[int]) -> None:
        self._overwrite(slots, [_ZEROS] * len(slots))
        self._db.executemany("INSERT INTO free_slots VALUES (?)", [(slot,) for slot in slots])

    def _overwrite(self, slots: Sequence[int], wrapped: Sequence[bytes]) -> None:
        done = self._db.executemany(
            "UPDATE slots SET wrapped = ? WHERE slot = ?", zip(wrapped, slots, strict=True)
        ).rowcount
        if slots and done != len(slots):
            raise sqlite3.DatabaseError(f"{len(slots) - done} slots are missing")


def create_database(path: Path, state: Mapping[str, bytes], ops: FileOps) -> None:
    """Make an empty vault; it is there as a whole, or not at all."""
    new = path.with_name(NEW_DATABASE)
    for left_over in (new, Path(f"{new}-journal")):
        left_over.unlink(missing_ok=True)
    os.close(os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    db = sqlite3.connect(new, isolation_level=None)
    try:
        # Some builds of SQLite move pages by default.
        db.execute("PRAGMA auto_vacuum=NONE")
        db.execute("BEGIN")
        for statement in _SCHEMA:
            db.execute(statement)
        db.executemany("INSERT INTO state VALUES (?,?)", list(state.items()))
        db.execute(f"PRAGMA application_id={_APPLICATION_ID}")
        db.execute(f"PRAGMA user_version={FORMAT_VERSION}")
        db.execute("COMMIT")
        db.execute("PRAGMA journal_mode=WAL")
    finally:
        db.close()
    fd = ops.open(str(new), os.O_RDONLY | os.O_CLOEXEC)
    try:
        ops.fsync(fd)
    finally:
        ops.close(fd)
    os.rename(new, path)
    sync_directory(path.parent)


def _connected(path: Path) -> sqlite3.Connection:
    # Not made when it is missing: an empty vault in the place of a lost one would be a quiet loss.
    address = f"{path.absolute().as_uri()}?mode=rw"
    return sqlite3.connect(address, uri=True, isolation_level=None, check_same_thread=False, timeout=_BUSY_S)
