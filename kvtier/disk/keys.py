"""What a store owes its key store: which keys there are at an opening, and when they are kept and destroyed.

A key is kept before the index lists its block, and destroyed after the index forgot it: at once when the
block is to be forgotten, else in batches.  A crash leaves keys without a block; the next opening destroys
them.

Each opening leaves a mark, a key that belongs to no block, so that the latest opening is known here, too.  An
index of an earlier one is then seen to be old, whatever was restored beside it, and a key store that is older
than the blocks is refused, since opening would drop every block whose key it lacks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvtier.disk.rows import LISTED, QUARANTINED, Numbers, Rows
from kvtier.errors import TierError, TierUnavailable

if TYPE_CHECKING:
    from kvtier.disk.entry import Entry
    from kvtier.disk.vault import Vault

_LOG = logging.getLogger(__name__)
# A write's sequence number is the number of the opening, and in the lower bits a count.
EPOCH_SHIFT = 40
# No tenant is called that.
_MARK = "\0opening"
_DESTROYED_AT_ONCE = 1024


class Keys:
    """The keys of one open store; without a vault, nothing is sealed and every call does nothing.

    sealed: whether the store ever sealed a block.  Its owner makes the calls one at a time, but for `keep`.
    Raises TierUnavailable when the vault cannot be this store's, before anything changed.
    """

    def __init__(self, vault: Vault | None, directory: Path, *, sealed: bool) -> None:
        self.vault = vault
        self._directory = directory
        self._doomed: list[int] = []
        kept = () if vault is None else vault.generations()
        # Of keys that there were at the opening, until it is over.
        self._kept: Numbers = np.fromiter(kept, dtype=np.int64)
        if sealed and vault is None:
            raise TierUnavailable(
                f"directory {directory} holds sealed blocks, and no key store was given",
                fix="give the key store and the master key that it was sealed with",
            )
        if sealed and not len(self._kept):
            raise TierUnavailable(
                f"directory {directory} holds sealed blocks, and the key store has no key for it",
                fix="give the key store that it was sealed with, or its latest backup",
            )

    @property
    def latest_epoch(self) -> int:
        """The latest opening that the vault knows of; 0 before the first."""
        return int(self._kept.max(initial=0)) >> EPOCH_SHIFT

    def check(self, rows: Rows) -> None:
        """Raise TierUnavailable when the vault is older than a listed block."""
        latest = int(rows.column("sequence", _sealed(rows)).max(initial=0)) >> EPOCH_SHIFT
        if latest > self.latest_epoch:
            raise TierUnavailable(
                f"the key store is older than the blocks in {self._directory}",
                fix="give the latest key store; or empty the directory, and what it holds is lost",
            )

    def keyless(self, rows: Rows) -> Numbers:
        """The numbers of rows that cannot be read, since their key is gone."""
        numbers = _sealed(rows)
        if self.vault is None:
            return numbers[:0]
        return numbers[~np.isin(rows.column("sequence", numbers), self._kept)]

    def begin(self, epoch: int) -> None:
        """Leave the mark of this opening; before anything is sealed."""
        if self.vault is not None:
            mark = epoch << EPOCH_SHIFT
            self.vault.keep([self.vault.new_key(mark, _MARK)])

    def reconcile(self, rows: Rows) -> None:
        """Destroy every key from before this opening that belongs to none of the rows."""
        unlisted = np.setdiff1d(self._kept, rows.column("sequence", _sealed(rows)))
        if self.vault is not None and len(unlisted):
            self.vault.destroy(unlisted.tolist())
        self._kept = self._kept[:0]

    def keep(self, entries: Iterable[Entry]) -> frozenset[int]:
        """Make the keys of written blocks durable; answers generations whose tenant's key was destroyed."""
        if self.vault is None:
            return frozenset()
        return frozenset(self.vault.keep([entry.key for entry in entries if entry.key is not None]))

    def ended(self, generations: Iterable[int], *, now: bool) -> None:
        """The index lists these blocks no more: destroy their keys.

        now: durably before this returns, theirs and all that wait, or TierUnavailable is raised and they
        wait on; else when there are enough of them, and a failure is no one's concern yet.
        """
        if self.vault is None:
            return
        self._doomed += generations
        try:
            if self._doomed and (now or len(self._doomed) >= _DESTROYED_AT_ONCE):
                self.vault.destroy(self._doomed)
                self._doomed = []
        except TierError as problem:
            if now:
                raise
            _LOG.warning("keys of removed blocks wait to be destroyed: %s", problem)

    def close(self) -> None:
        """Destroy what waits, and let go of the vault."""
        if self.vault is None:
            return
        try:
            self.ended((), now=True)
        except TierError as problem:
            _LOG.warning("keys of removed blocks stay until the next opening: %s", problem)
        finally:
            self.vault.close()


def _sealed(rows: Rows) -> Numbers:
    numbers = rows.numbers(LISTED, QUARANTINED)
    sealed: Numbers = numbers[rows.column("sealed", numbers) != 0]
    return sealed
