"""What is under the tier's calls: the directory, its segments, its index and the books, kept in step.

Locks: `lock` guards the books and counters and is held for moments only; `_index_lock` makes index
transactions one at a time, `_making` new segments, and both may be held across I/O.  They are taken in the
order `_making`, `_index_lock`, `lock`.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from kvtier.disk.buffers import PAGE
from kvtier.disk.coder import Coder
from kvtier.disk.entry import Changes, Entry
from kvtier.disk.faults import BLOCK_WRITE, FLUSH, GRAVES_WRITE, INDEX_WRITE, SEGMENT_MAKING, Faults
from kvtier.disk.fileops import FileOps
from kvtier.disk.graves import Graves, Known
from kvtier.disk.graves import read as read_graves
from kvtier.disk.header import BlockHeader, decode
from kvtier.disk.index import Batch, ConversationRecord, Index
from kvtier.disk.keys import EPOCH_SHIFT, Keys
from kvtier.disk.lock import DirectoryLock, place_of, sync_directory
from kvtier.disk.recovery import dead, make_ledger, sift, unmask, warn_of_missing_codecs
from kvtier.disk.rows import ObjectRow, Rows
from kvtier.disk.segments import Segments
from kvtier.errors import CorruptObject, StaleSlot, TierError, TierUnavailable

if TYPE_CHECKING:
    from kvtier.disk.vault import Vault

_LOG = logging.getLogger(__name__)
# More than this is kept free and ready while the limit allows it: a large conversation does not wait for
# the file system to find room.
_AHEAD_BYTES = 1 << 30
# A header and a page.
_LEAST_SEGMENT_BYTES = 2 * PAGE
INDEX = "index.sqlite"
SEGMENTS = "segments"

# Opens the key store that belongs to the store with this id.
OpenVault: TypeAlias = "Callable[[bytes], Vault]"


@dataclass(frozen=True, slots=True)
class Commit:
    """What one caller wants durable together. forget: what was removed stays so, also without the index."""

    entries: Sequence[Entry] = ()
    records: Sequence[ConversationRecord] = ()
    state: Mapping[str, bytes] = field(default_factory=dict)
    forget: bool = False


class Store:
    """One open directory. Raises TierUnavailable, TierFull, ConfigError.

    lock: for the ledger and `closed`.  flushes: of segments.  lost_at_open: objects that the index listed
    and that cannot be there.
    """

    def __init__(
        self,
        directory: Path,
        capacity_bytes: int,
        segment_bytes: int,
        ops: FileOps,
        *,
        scratch: int,
        direct: bool,
        open_vault: OpenVault | None,
        staging_bytes: int,
        new_id: bytes,
    ) -> None:
        self.lock = threading.Lock()
        self.faults = Faults()
        self.flushes = 0
        self.closed = False
        self._segment_bytes = segment_bytes
        self._ops = ops
        self._index_lock = threading.Lock()
        self._making = threading.Lock()
        # Segments made since the index was last told, and their lengths.
        self._unlisted: dict[int, int] = {}
        # When the names of segments changed that `is_there` has looked at.
        self._names_seen = -1
        self._held = DirectoryLock(directory, new_id)
        self.store_id = self._held.store_id
        try:
            self._keys = self._open_keys(directory, open_vault)
        except BaseException:
            self._held.release()
            raise
        self.coder = Coder(self._held.store_id, self._keys.vault, staging_bytes)
        self.segments = Segments(str(directory / SEGMENTS), ops, scratch=scratch, direct=direct)
        self._graves = Graves(str(directory), ops, self._held.store_id)
        try:
            self._recover(directory, capacity_bytes - capacity_bytes % PAGE)
        except BaseException:
            self.segments.close()
            self._graves.close()
            self._keys.close()
            self._held.release()
            raise

    def _open_keys(self, directory: Path, open_vault: OpenVault | None) -> Keys:
        vault = None if open_vault is None else open_vault(self._held.store_id)
        try:
            return Keys(vault, directory, sealed=self._held.sealed)
        except BaseException:
            if vault is not None:
                vault.close()
            raise

    def is_there(self) -> bool:
        """Whether the directory still has what was opened: not once its index or a segment was deleted.

        A look that fails, for want of descriptors for example, tells of nothing deleted.
        """
        directory = self._held.directory
        try:
            names_changed = os.stat(directory / SEGMENTS).st_mtime_ns
            if not (self._held.still_held() and place_of(directory / INDEX) == self._index_place):
                return False
            if names_changed != self._names_seen:
                if self._lacks_segments():
                    return False
                self._names_seen = names_changed
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as problem:
            _LOG.warning("whether %s is still there cannot be seen: %s", directory, problem)
        return True

    def _lacks_segments(self) -> bool:
        with self.lock:
            due = set(self.ledger.extents.segments)
        missing = due.difference(self.segments.numbers_on_disk())
        with self.lock:
            # Some may have been given back meanwhile.
            return not missing.isdisjoint(self.ledger.extents.segments)

    def was_moved(self) -> bool:
        """Whether what `is_there` misses was moved away as it is, and may come back."""
        return self._held.was_moved()

    def check_header(self, entry: Entry, page: bytes) -> BlockHeader:
        """The header, when it is that of just this write of this object; else raise CorruptObject."""
        header = decode(page)
        expected = self.coder.header(
            entry.meta,
            entry.generation,
            codec=entry.codec,
            stored_bytes=entry.stored_bytes,
            sealed=entry.sealed,
        )
        if (header.seal is not None) != entry.sealed or replace(header, seal=None) != expected:
            raise CorruptObject(
                f"{header.meta.object_id}, write {header.sequence}, is where {entry.meta.object_id},"
                f" write {entry.generation}, should be"
            )
        return header

    def check_open(self) -> None:
        """Raise TierUnavailable after `close`. Call it with `lock` held."""
        if self.closed:
            raise TierUnavailable("the disk tier is closed")

    # -- opening and closing

    def _recover(self, directory: Path, capacity_bytes: int) -> None:
        path = directory / INDEX
        try:
            (directory / SEGMENTS).mkdir(exist_ok=True)
            on_disk = self.segments.numbers_on_disk()
            if on_disk and not path.exists():
                raise TierUnavailable(
                    f"{path} is missing while segments are there",
                    fix=f"run kvtier fsck {directory} --repair, or move the directory away to start empty",
                )
            known = read_graves(str(directory), self._ops, self._held.store_id)
            with self.faults.of_index():
                self.index = Index(path)
                self._index_place = place_of(path)
                try:
                    sync_directory(directory)
                    rows = self.index.objects()
                    self._keys.check(rows)
                    due, found = self._open_segments(on_disk)
                    self._adopt(capacity_bytes, rows, (due, found), known)
                except BaseException:
                    self.index.close()
                    raise
        except OSError as problem:
            raise TierUnavailable(f"{directory} cannot be opened: {problem}") from problem

    def _open_segments(self, on_disk: Sequence[int]) -> tuple[dict[int, int], dict[int, int]]:
        """Open what the index lists; answers the segments' lengths, due and found.

        A file that the index does not list was being made at a crash: it is taken over as free room.
        """
        due = self.index.segments()
        orphans = []
        for segment in on_disk:
            if segment in due:
                continue
            nbytes = self.segments.file_bytes(segment) // PAGE * PAGE
            if nbytes:
                due[segment] = nbytes
                orphans.append((segment, nbytes))
            else:
                self.segments.delete(segment)
        found = {segment: self.segments.open(segment, nbytes) for segment, nbytes in due.items()}
        self.index.apply(Batch(add_segments=orphans))
        return due, found

    def _adopt(
        self,
        capacity_bytes: int,
        rows: Rows,
        segments: tuple[dict[int, int], dict[int, int]],
        known: Known | None,
    ) -> None:
        """Fill the books. segments: their lengths, due and found."""
        due, found = segments
        latest = max(known.next_sequence >> EPOCH_SHIFT if known else 0, self._keys.latest_epoch)
        if self.index.epoch() < latest:
            # Which of its conversations were forgotten since, nobody can say.
            dropped = self.index.drop_records()
            _LOG.error("the index is older than the store: %d conversations dropped", dropped)
        epoch = self.index.next_epoch(latest)
        self._keys.begin(epoch)
        if self._keys.vault is not None:
            self._held.note_sealed()
        gone = [*rows.drop(dead(rows, known)), *rows.drop(self._keys.keyless(rows))]
        lost = rows.drop(sift(rows, found))
        self.lost_at_open = len(lost)
        if lost:
            _LOG.warning("%d objects of the index are not in its segments", self.lost_at_open)
        if lost or gone:
            self.index.apply(Batch(remove=[*lost, *gone]))
        warn_of_missing_codecs(rows)
        if self._keys.vault is not None:
            unmask(rows, self._keys.vault.mask)
        self._keys.reconcile(rows)
        # The first number of an opening is its mark's in the key store.
        self.ledger = make_ledger(capacity_bytes, (epoch << EPOCH_SHIFT) + 1, rows, due)
        # No number is used twice: a file that could not be deleted is in nobody's way.
        self._numbers = count(max(due, default=-1) + 1)
        self._graves.start(self.ledger.living(), self.ledger.next_generation)
        self._delete_empty_segments()

    def close(self, state: Mapping[str, bytes]) -> None:
        """Make removals and state durable, let go of files and the directory. No other call is running."""
        try:
            if self._held.still_held():
                self.list_in_index(Commit(state=state))
        except TierError as problem:
            _LOG.warning("removals since the last commit may come back: %s", problem)
        finally:
            with self.lock:
                self.closed = True
            self.index.close()
            self.segments.close()
            self._graves.close()
            try:
                self._keys.close()
            finally:
                self._held.release()

    # -- durability

    def flush(self, entries: Sequence[Entry]) -> None:
        """Make the payloads of these entries survive power loss."""
        self.flush_segments({entry.segment for entry in entries})
        for what in (BLOCK_WRITE, FLUSH):
            self.faults.worked(what)

    def flush_segments(self, touched: set[int]) -> None:
        """Make what these segments hold survive power loss."""
        if not self._held.still_held():
            raise self.faults.unavailable("the disk tier's directory was deleted, moved or unmounted")
        try:
            self.segments.flush(sorted(touched))
        except OSError as problem:
            # A failed flush may have dropped any write of the segment, and the next would not say so.
            with self.lock:
                self.ledger.fail_writers(touched)
            raise self.faults.of_device(FLUSH, problem, 0) from problem
        with self.lock:
            self.flushes += len(touched)

    def list_all(self, commits: Sequence[Commit]) -> list[TierError | None]:
        """Keep the keys of several commits and list them, each in one transaction; answers what went wrong.

        When the one transaction of the index fails, each commit has its own, so that one that cannot be
        listed takes no other with it.
        """
        keyless = self._keys.keep(entry for commit in commits for entry in commit.entries)
        if keyless:
            return [self._list_unless(keyless, commit) for commit in commits]
        try:
            self.list_in_index(_together(commits))
        except TierError as problem:
            return [problem] if len(commits) == 1 else [self._list_alone(commit) for commit in commits]
        return [None] * len(commits)

    def _list_unless(self, keyless: frozenset[int], commit: Commit) -> TierError | None:
        if any(entry.generation in keyless for entry in commit.entries):
            return StaleSlot("the tenant's keys were destroyed while its blocks were being written")
        return self._list_alone(commit)

    def _list_alone(self, commit: Commit) -> TierError | None:
        try:
            self.list_in_index(commit)
        except TierError as problem:
            return problem
        return None

    def list_in_index(self, commit: Commit) -> None:
        """One transaction: the commit, and every change the index does not know.

        The entries are visible when it returns, and flushed before it is called.
        """
        entries = commit.entries
        rows = [self._row(entry) for entry in entries]
        with self._index_lock:
            with self.lock:
                for entry in entries:
                    bad = self.ledger.quarantined(entry.meta.object_id)
                    if bad is not None:
                        self.ledger.discard(bad)
                changes = self.ledger.take_changes()
                replaced = self.ledger.replaced_by(entries)
                segments = [each for each in self._unlisted.items() if not self.segments.is_new(each[0])]
            batch = Batch(
                add=rows,
                # Their graves come with the next transaction: a grave before this one would take the old
                # object away while the new one is not listed yet.
                remove=[entry.generation for entry in (*changes.drop, *replaced)],
                quarantine=[entry.generation for entry in changes.quarantine],
                records=commit.records,
                state=commit.state,
                add_segments=segments,
            )
            done = False
            try:
                self._bury(changes, forget=commit.forget)
                with self.faults.of_index():
                    self.index.apply(batch)
                for what in (GRAVES_WRITE, INDEX_WRITE):
                    self.faults.worked(what)
                done = True
            finally:
                with self.lock:
                    if done:
                        self.ledger.changes_done(changes)
                        self.ledger.publish(entries)
                    else:
                        self.ledger.changes_failed(changes)
            with self.lock:
                for number, _ in segments:
                    del self._unlisted[number]
            ended = [*(entry.generation for entry in changes.drop), *changes.given_up]
            self._keys.ended(ended, now=commit.forget)
            if changes.drop:
                self._delete_empty_segments()

    def _row(self, entry: Entry) -> ObjectRow:
        meta = self.coder.masked(entry.meta, entry.generation) if entry.sealed else entry.meta
        return replace(entry.row, meta=meta)

    def _bury(self, changes: Changes, *, forget: bool) -> None:
        """Note which writes ended. Before the index is told: what it drops is then known to be dead."""
        try:
            self._graves.append([*(entry.generation for entry in changes.drop), *changes.given_up])
            if forget:
                self._graves.sync()
            if self._graves.is_long:
                with self.lock:
                    living, upto = self.ledger.living(), self.ledger.next_generation
                self._graves.start(living, upto)
        except OSError as problem:
            raise self.faults.of_device(GRAVES_WRITE, problem, 0) from problem

    # -- room

    def is_over(self) -> bool:
        """Whether the segments exceed the limit, which was lowered since. Call it with `lock` held."""
        return self.ledger.extents.total_bytes > self.ledger.capacity_bytes

    def make_room(self, room: int) -> bool:
        """Try to get a free extent of `room` bytes; answers whether reserving may work now."""
        with self._making:
            # A transaction under way may be about to give room back.
            with self._index_lock, self.lock:
                if not self.is_over() and self.ledger.extents.largest >= room:
                    return True
                waits = self.ledger.has_drops
                nbytes = self._next_segment_bytes()
            if not waits:
                if nbytes >= room:
                    self._add_segment(nbytes, durable=False)
                return nbytes >= room
        self.list_in_index(Commit())
        return True

    def is_low(self) -> bool:
        """Whether little room is free, and another segment is allowed. Call it with `lock` held."""
        allowed = self._next_segment_bytes() >= _LEAST_SEGMENT_BYTES
        return allowed and self.ledger.extents.free_bytes <= _AHEAD_BYTES

    def make_ahead(self) -> bool:
        """Make a segment before it is needed, durable already; answers whether one was made."""
        with self._making:
            # Not beside a transaction, which may be deleting files that exceed the limit.
            with self._index_lock, self.lock:
                wanted, nbytes = not self.closed and self.is_low(), self._next_segment_bytes()
            if wanted and self._held.still_held():
                self._add_segment(nbytes, durable=True)
                return True
        self.faults.worked(SEGMENT_MAKING)
        return False

    def _next_segment_bytes(self) -> int:
        """How long another segment may be; less than nothing when the limit was lowered since."""
        return min(self._segment_bytes, self.ledger.capacity_bytes - self.ledger.extents.total_bytes)

    def _add_segment(self, nbytes: int, *, durable: bool) -> None:
        """One more segment. Call it with `_making` held, which keeps the length allowed."""
        number = next(self._numbers)
        try:
            self.segments.create(number, nbytes, durable=durable)
        except OSError as problem:
            raise self.faults.of_device(SEGMENT_MAKING, problem, nbytes) from problem
        self.faults.worked(SEGMENT_MAKING)
        with self.lock:
            # The index hears of it with the first object in it.  A file that it does not list is free room.
            self._unlisted[number] = nbytes
            self.ledger.extents.add_segment(number, nbytes)

    def _delete_empty_segments(self) -> None:
        """Give empty segments back to the file system while there are more than the limit allows."""
        extents = self.ledger.extents
        for segment in sorted(extents.segments, reverse=True):
            with self.lock:
                if not self.is_over():
                    return
                if not extents.is_empty(segment):
                    continue
                extents.remove_segment(segment)
                self._unlisted.pop(segment, None)
            with self.faults.of_index():
                self.index.apply(Batch(remove_segments=[segment]))
            try:
                self.segments.remove(segment)
            except OSError as problem:
                raise self.faults.of_device("deleting a segment", problem, 0) from problem


def _together(commits: Sequence[Commit]) -> Commit:
    state: dict[str, bytes] = {}
    for commit in commits:
        state.update(commit.state)
    return Commit(
        entries=[entry for commit in commits for entry in commit.entries],
        records=[record for commit in commits for record in commit.records],
        state=state,
        forget=any(commit.forget for commit in commits),
    )
