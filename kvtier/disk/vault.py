"""The key store of encryption at rest: a data key for every stored block, wrapped by its tenant's key.

The vault is small and lies apart from the data: who has a copy of the data alone, or of the data and an old
vault without the master key, can read nothing; and a key that is destroyed here takes its block with it,
wherever copies of the block are.

Order.  A block: `keep` has returned before the index says that the block is there.  Forgetting: the names
are gone from the index, then `destroy` has returned, then the receipt.  A crash between leaves keys without
a block, which the owner finds with `generations` and destroys.

An old copy of the vault still has the keys that were destroyed since: keep it out of backups, or let the
backups expire by the time in which forgetting must be true.  What is lost with the vault is lost as misses.

What it cannot do: a drive may keep old copies of sectors it has replaced, a file system that copies on
write or takes snapshots keeps old pages, and Python does not wipe memory.
"""

from __future__ import annotations

import hmac
import logging
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from kvtier.disk.fileops import FileOps, OsFileOps
from kvtier.disk.grouping import Group
from kvtier.disk.sealing import KEY_BYTES, DataKey
from kvtier.disk.vault_folder import VaultFolder, holds_vault
from kvtier.disk.vault_keys import MasterKey, TenantKey
from kvtier.disk.vault_rows import FORMAT_VERSION, KeyRow, TenantRow, VaultRows, create_database
from kvtier.errors import ConfigError, CorruptObject, ObjectExists, TierUnavailable

__all__ = ["DataKey", "Vault"]

_LOG = logging.getLogger(__name__)
_STORE_ID, _CHECK = "store_id", "check"
_LISTED_AT_ONCE = 4096
_TENANTS_IN_MEMORY = 4096


class Vault:
    """Data keys of stored blocks, wrapped by their tenant's key, in an SQLite file in a folder of its own.

    directory: made when it is not there, mode 0700; belongs to this object until `close`.  store_id: of
    the store whose keys these are, 16 bytes.  master_key: 32 bytes.  ops: the system calls.

    Raises, before anything changed: ConfigError when the master key is another, the vault is of another
    store, the folder is open to other users or holds something else, or `cryptography` is missing;
    TierUnavailable when the folder is in use, unusable or of a newer version.

    Every method raises TierUnavailable when the vault's file fails; nothing is half done then, but what
    was to become durable may or may not be.  Safe from any thread.  Data keys are not kept in memory,
    and tenants' keys are, up to a bound.
    """

    def __init__(
        self, directory: Path, store_id: bytes, master_key: bytes, *, ops: FileOps | None = None
    ) -> None:
        self.directory = directory
        self._master = MasterKey(master_key, store_id)
        # Held while a tenant's key is loaded, made or dropped; taken before the rows' own locks.
        self._loading = threading.Lock()
        self._tenants: dict[int, TenantKey] = {}
        self._numbers: dict[str, int] = {}
        self._doomed: Group[Sequence[int]] = Group()
        self._open = True
        self._folder = VaultFolder(directory)
        try:
            with self._reported("opening"):
                self._rows = self._opened(store_id, ops or OsFileOps())
        except BaseException:
            self._folder.release()
            raise

    @staticmethod
    def exists(directory: Path) -> bool:
        """Whether a vault is there. Raises TierUnavailable when that cannot be seen."""
        return holds_vault(directory)

    def new_key(self, generation: int, tenant: str) -> DataKey:
        """A random key for a block that is to be written; not yet kept.

        The first one of a tenant makes the tenant's key, durably.
        """
        if not 0 <= generation < 1 << 63:
            raise ValueError(f"generation {generation} is out of bounds")
        known = self._known(tenant)
        if known is None:
            with self._changing("making a tenant's key"):
                known = self._loaded(tenant, create=True)
        return DataKey(generation, tenant, os.urandom(KEY_BYTES), known.number)

    def keep(self, keys: Sequence[DataKey]) -> tuple[int, ...]:
        """Store keys in one transaction, durable on return.

        Answers the generations left out since their tenant was destroyed after `new_key`; () as a rule.
        Raises ObjectExists, with nothing kept, when a generation has a key already.
        """
        with self._changing("keeping keys"):
            tenants = {key.tenant_key: self._numbered(key.tenant_key) for key in keys}
            rows = [
                KeyRow(key.generation, tenant.number, tenant.wrap(key.generation, key.key))
                for key in keys
                if (tenant := tenants[key.tenant_key]) is not None
            ]
            gone = [key.generation for key in keys if tenants[key.tenant_key] is None]
            if rows:
                try:
                    with self._rows.writing():
                        gone += [row.generation for row in self._rows.add_keys(rows)]
                except sqlite3.IntegrityError as problem:
                    raise ObjectExists(f"a generation has a key already: {problem}") from problem
        return tuple(gone)

    def key(self, generation: int) -> DataKey | None:
        """The key of a block; None when it was destroyed or never kept.

        Raises CorruptObject when it does not unwrap: moved from elsewhere, or damaged.
        """
        with self._reported("reading a key"):
            row = self._rows.key(generation)
            tenant = None if row is None else self._numbered(row.tenant)
        if row is None or tenant is None:
            return None
        return DataKey(generation, tenant.tenant, tenant.unwrap(generation, row.wrapped), tenant.number)

    def destroy(self, generations: Iterable[int]) -> None:
        """Destroy keys; those that are not there are passed over. All or none.

        On return no file of the vault holds their wrapped bytes, durably.  Callers that come while another
        one is under way share a transaction and its flushes.
        """
        self._doomed.submit(list(generations), self._destroy_all)

    def generations(self) -> Iterator[int]:
        """Generations with a key, ascending; what changes meanwhile may be seen or not."""
        with self._reported("listing keys"):
            yield from self._rows.generations(_LISTED_AT_ONCE)

    def destroy_tenant(self, tenant: str) -> int:
        """Destroy the tenant's key and all its data keys, as `destroy` does; answers how many data keys."""
        with self._changing("destroying a tenant's keys"):
            with self._rows.writing():
                count = self._rows.remove_tenant(tenant)
            with self._loading:
                self._tenants.pop(self._numbers.pop(tenant, 0), None)
            self._rows.settle()
        return count

    def mask(self, generation: int, tenant: str) -> int:
        """64 bits, the same for a tenant's key and generation, that hide a checksum of plain bytes on disk.

        Raises CorruptObject when the tenant has no key here: what it wrote cannot be read.
        """
        known = self._known(tenant)
        if known is None:
            with self._reported("reading a tenant's key"):
                known = self._loaded(tenant, create=False)
        return known.mask(generation)

    def rotate_master(self, new_master_key: bytes) -> None:
        """Wrap the tenants' keys with another master key, in one transaction.

        After a crash the vault opens with one of the two keys, so keep both until this returned.
        """
        with self._changing("rotating the master key"):
            with self._loading:
                new = MasterKey(new_master_key, self._rows.state(_STORE_ID))
                with self._rows.writing():
                    self._rows.rewrap_tenants(lambda row: self._rewrapped(row, new))
                    self._rows.put_state(_CHECK, new.check)
                self._master = new
            self._rows.settle()

    def close(self) -> None:
        """Close the files and let another process have the folder; a second call does nothing."""
        if self._open:
            self._open = False
            try:
                self._rows.close()
            finally:
                self._folder.release()

    def _destroy_all(self, calls: Sequence[Sequence[int]]) -> list[None]:
        with self._changing("destroying keys"):
            with self._rows.writing():
                self._rows.remove_keys(chain.from_iterable(calls))
            self._rows.settle()
        return [None] * len(calls)

    def _opened(self, store_id: bytes, ops: FileOps) -> VaultRows:
        path = self._folder.database
        if not holds_vault(self.directory):
            create_database(path, {_STORE_ID: store_id, _CHECK: self._master.check}, ops)
        rows = VaultRows(path, ops)
        try:
            self._refuse_unfit(rows, store_id)
            # A crash may have come between the commit of a destruction and its end.
            rows.settle()
        except BaseException:
            rows.close()
            raise
        return rows

    def _refuse_unfit(self, rows: VaultRows, store_id: bytes) -> None:
        version = rows.version()
        if version < 0:
            raise TierUnavailable(
                f"{self._folder.database} is not a key vault",
                fix="name the right folder; without its vault a store is lost, so empty both to begin anew",
            )
        if version > FORMAT_VERSION:
            raise TierUnavailable(
                f"the key vault {self.directory} has format version {version}; this kvtier knows up to"
                f" {FORMAT_VERSION}",
                fix="use the kvtier that wrote it, or a newer one",
            )
        if rows.state(_STORE_ID) != store_id:
            raise ConfigError(
                "disk.keys_directory",
                f"{self.directory} holds the keys of another store",
                fix="name the folder that belongs to this data directory",
            )
        if not hmac.compare_digest(rows.state(_CHECK), self._master.check):
            raise ConfigError(
                "disk.key_file",
                f"this is not the master key of the vault {self.directory}",
                fix="give the key that it was made with, or last rotated to",
            )

    def _known(self, tenant: str) -> TenantKey | None:
        return self._tenants.get(self._numbers.get(tenant, 0))

    def _loaded(self, tenant: str, *, create: bool) -> TenantKey:
        with self._loading:
            row = self._rows.tenant(tenant)
            if row is None and create:
                row = self._made(tenant)
            if row is None:
                raise CorruptObject(f"tenant {tenant!r} has no key: it was destroyed, or never had one")
            return self._remembered(row)

    def _numbered(self, number: int) -> TenantKey | None:
        known = self._tenants.get(number)
        if known is not None:
            return known
        with self._loading:
            row = self._rows.tenant_numbered(number)
            return None if row is None else self._remembered(row)

    def _made(self, tenant: str) -> TenantRow:
        with self._rows.writing():
            number = self._rows.next_tenant_number()
            row = TenantRow(number, tenant, self._master.wrap(number, tenant, os.urandom(KEY_BYTES)))
            self._rows.add_tenant(row)
        return row

    def _remembered(self, row: TenantRow) -> TenantKey:
        if len(self._tenants) >= _TENANTS_IN_MEMORY:
            self._numbers.clear()
            self._tenants.clear()
        key = self._tenants[row.number] = self._master.tenant(row.number, row.name, row.wrapped)
        self._numbers[row.name] = row.number
        return key

    def _rewrapped(self, row: TenantRow, new: MasterKey) -> bytes:
        return new.wrap(row.number, row.name, self._master.unwrap(row.number, row.name, row.wrapped))

    @contextmanager
    def _reported(self, doing: str) -> Iterator[None]:
        """Turn what SQLite and the system say into the tier's error."""
        try:
            yield
        except (sqlite3.Error, OSError) as problem:
            text = f"the key vault {self.directory}: {doing} failed: {problem}"
            _LOG.error("%s", text)
            raise TierUnavailable(
                text, fix="check its file system: room, mount, owner, kernel log"
            ) from problem

    @contextmanager
    def _changing(self, doing: str) -> Iterator[None]:
        """As `_reported`; at the end the files must still have their names."""
        with self._reported(doing):
            yield
            if not self._folder.still_there():
                raise FileNotFoundError("the folder was deleted or moved")
