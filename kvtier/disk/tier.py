"""DiskTier: objects in segment files, found through an SQLite index, checked on every read.

Order of a commit: payloads written, segments flushed (fdatasync), then one index transaction with the
objects, the conversation records and the state given with them.  Whatever a commit returned for survives
power loss; what was being written at a crash is not in the index, so its room is free again.

Limits.  The sum of the segment files' lengths never exceeds `capacity_bytes` rounded down to whole pages
of 4096; an object takes a page more than its length rounded up to pages.  The index comes on top (some
hundred bytes an object, and a WAL of some MiB).  Free room is not moved together: an object needs one
free extent.  Opened with a smaller limit than before, nothing new is reserved until enough segments are
empty and have been deleted; until then used_bytes may exceed capacity_bytes.

Codecs and keys.  A write names a lossless codec; a block that it does not make smaller by a page is stored
raw.  With a key store every block is sealed, too.  What is neither goes straight from and to the caller's
memory; the rest through a bounded pool.

Wrong bytes.  A read checks the header (store, object, model, sequence, lengths) and the payload's
checksum, so neither a wrong index nor a lost write is served.  What fails the check is quarantined: not
found any more, its room kept out of use until the object is removed or written again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from kvtier.background import step_back
from kvtier.checksum import Buffer
from kvtier.disk.ahead import AheadThread
from kvtier.disk.codecs import CODECS, RAW
from kvtier.disk.entry import Entry, room_for
from kvtier.disk.fileops import FileOps, OsFileOps
from kvtier.disk.grouping import Group
from kvtier.disk.header import BlockHeader, encode
from kvtier.disk.index import ConversationRecord
from kvtier.disk.mover import Mover, OnEach, begun_in
from kvtier.disk.recovery import check_sizes
from kvtier.disk.scrub import Scrubber, ScrubStats, ScrubThread
from kvtier.disk.store import Commit, OpenVault, Store
from kvtier.disk.sweep import batches
from kvtier.disk.transfers import Lane
from kvtier.errors import StaleSlot, TierError, TierFull
from kvtier.objects import ObjectId, ObjectMeta
from kvtier.states import State
from kvtier.tier import Slot, Tier, TierUsage

_LOG = logging.getLogger(__name__)
_SPARE_SCRATCH = 4
# Threads for writes that nobody waits for: a park does not queue up behind them.
_SPILLERS = 2
# Each hashes ten gigabytes a second or more: as much as a drive reads.
_CHECKERS = 2
_ANNOUNCED_AT_ONCE = 1024
_LONGEST_CODEC = max(CODECS, key=len)


@dataclass(frozen=True, slots=True)
class DiskStats:
    """What the disk tier did since it was opened, and how it stands.

    direct_io: False when the file system refused O_DIRECT.  device_bytes: bytes written to segments,
    headers and padding included, of which user_bytes were payload.  flushes: of segments.  scrub_*: what
    the background check read, found bad, and how often it came to the end.
    lost_at_open: objects that the index listed and that cannot be there.  quarantined_total: failed
    checks.  no_room: what others leave no room for on the file system, or ''.  last_error: '' when there
    was none.
    """

    direct_io: bool
    segments: int
    segment_bytes: int
    user_bytes: int
    device_bytes: int
    flushes: int
    lost_at_open: int
    quarantined_total: int
    scrub_bytes: int
    scrub_bad: int
    scrub_passes: int
    no_room: str
    last_error: str


class DiskTier(Tier):
    """Objects in a directory. See the module's text.

    directory: made when it is not there; belongs to this object until `close`.  capacity_bytes: limit of
    the segment files together.  segment_bytes: length of one, a multiple of 4096; no object is longer.
    writers, readers: threads of write_many and read_many.  direct: whether to try O_DIRECT.  ops: the
    system calls.  check: False switches checks of read() off, for tests and benchmarks only.  open_vault:
    opens the key store for the id of this store; blocks written from then on are sealed, and the vault
    belongs to this object.  staging_bytes: memory for blocks that are encoded or sealed, or one such block
    if that is more.  new_id: of a directory that is made anew for the same key store, its earlier store_id.

    Raises TierUnavailable when the directory is in use, unusable or of another version, and when its blocks
    are sealed and the key store is missing or older; ConfigError for sizes that cannot work and for a
    directory that holds something else; whatever open_vault raises.
    """

    name = "disk"
    durable = True

    def __init__(
        self,
        directory: Path,
        capacity_bytes: int,
        *,
        segment_bytes: int = 1 << 30,
        writers: int = 8,
        readers: int = 8,
        direct: bool = True,
        ops: FileOps | None = None,
        check: bool = True,
        open_vault: OpenVault | None = None,
        staging_bytes: int = 256 << 20,
        new_id: bytes = b"",
    ) -> None:
        check_sizes(capacity_bytes, segment_bytes)
        self.directory = directory
        scratch = writers + readers + _SPILLERS + _SPARE_SCRATCH
        self._store = Store(
            directory,
            capacity_bytes,
            segment_bytes,
            ops or OsFileOps(),
            scratch=scratch,
            direct=direct,
            open_vault=open_vault,
            staging_bytes=staging_bytes,
            new_id=new_id,
        )
        self.store_id = self._store.store_id
        self._lock = self._store.lock
        self._ledger = self._store.ledger
        self._longest = min(segment_bytes, self._ledger.capacity_bytes)
        self._mover = Mover(self._store, check=check)
        self._commits: Group[Commit] = Group()
        self._scrub: ScrubThread | None = None
        self._ahead: AheadThread | None = None
        self._scrubbed = ScrubStats()
        self._checkers = ThreadPoolExecutor(_CHECKERS, thread_name_prefix="kvtier-disk-check")
        self._writes = Lane(writers, "kvtier-disk-write")
        self._reads = Lane(readers, "kvtier-disk-read", self._checkers)
        self._spills = Lane(_SPILLERS, "kvtier-disk-spill", prepare=step_back)

    # -- filling

    def reserve(self, meta: ObjectMeta, *, holder: str, replacing: bool = False) -> Slot:
        """See Tier.reserve. Raises ValueError when the object's names do not fit into a header.

        replacing: an object that is there already is no ObjectExists.  It stays, and is found, until the
        commit of the new one, which takes its name in the same transaction.
        """
        encode(BlockHeader(replace(meta, checksum=0), 0, bytes(16), meta.nbytes, _LONGEST_CODEC))
        room = room_for(meta.nbytes)
        if room > self._longest:
            raise TierFull(
                f"{meta.object_id} needs {room} bytes, more than a segment's {self._longest}",
                needed_bytes=room,
                fix="raise disk.segment_bytes or disk.capacity_bytes",
            )
        while True:
            with self._lock:
                self._store.check_open()
                entry = None
                if not self._store.is_over():
                    entry = self._ledger.reserve(meta, holder, replacing=replacing)
                low = self._store.is_low()
            if low and self._ahead is not None:
                self._ahead.wake()
            if entry is not None:
                return entry.slot
            if not self._store.make_room(room):
                raise TierFull(f"no free extent of {room} bytes on disk", needed_bytes=room)

    def write(self, slot: Slot, data: Buffer, codec: str = RAW, item_bytes: int = 2) -> None:
        """See Tier.write. On an I/O error the slot is given back: TierFull or TierUnavailable.

        codec: one of `CODECS`; item_bytes: width of the numbers in `data`, for codecs that look at them.
        Raises CodecMissing when the codec's package is not installed; `check_codec` tells that beforehand.
        """
        self._mover.writing(slot, data, codec, item_bytes).run()

    def commit(self, slots: Sequence[tuple[Slot, int]]) -> None:
        """See Tier.commit, and `commit_with_records`."""
        self.commit_with_records(slots)

    def commit_with_records(
        self,
        slots: Sequence[tuple[Slot, int]],
        records: Sequence[ConversationRecord] = (),
        state: Mapping[str, bytes] | None = None,
        *,
        forget: bool = False,
    ) -> None:
        """Make written slots, conversation records and state durable together, all or none.

        Those who call while another commit is under way share one flush and one transaction.  Removals
        since the last commit become durable with it, also when nothing is given; with `forget` they outlive
        even the loss of the index, and nothing removed comes back by a rebuild.

        Raises StaleSlot, or ValueError for a slot that was not written, before anything changed; TierFull or
        TierUnavailable when the device fails, and then all the slots are given back.
        """
        with self._lock:
            self._store.check_open()
            entries = [self._ready(slot) for slot, _ in slots]
            if len(set(entries)) != len(entries):
                raise ValueError("a slot is named twice in one commit")
            for entry, (_, said) in zip(entries, slots, strict=True):
                entry.committing = True
                entry.meta = replace(entry.meta, checksum=said)
                self._ledger.shrink(entry)
        try:
            commit = Commit(entries, records, state or {}, forget)
            if entries:
                self._commits.submit(commit, self._make_durable)
            else:
                # With nothing to flush, there is no reason to wait for the flush of others.
                self._store.list_in_index(commit)
        except BaseException:
            with self._lock:
                for entry in entries:
                    if entry.state is State.WRITING:
                        self._ledger.give_up(entry, quiet=True)
            raise

    def flush(self, slot: Slot) -> None:
        """Make what was written to a slot survive power loss, and list nothing. Raises as a commit does."""
        with self._lock:
            entry = self._ready(slot)
        self._store.flush([entry])

    def try_flush(self) -> None:
        """Flush a segment, whatever it holds, to see whether that works. Raises as a commit does."""
        with self._lock:
            first = min(self._ledger.extents.segments, default=None)
        self._store.flush_segments(set() if first is None else {first})

    def abort(self, slot: Slot, *, quiet: bool) -> None:
        """See Tier.abort. Raises StaleSlot."""
        with self._lock:
            self._ledger.give_up(self._ledger.writing(slot), quiet=quiet)

    # -- looking and holding

    def find(self, object_id: ObjectId) -> Slot | None:
        """See Tier.find."""
        with self._lock:
            return self._ledger.slot_of(object_id)

    def meta(self, object_id: ObjectId) -> ObjectMeta | None:
        """See Tier.meta."""
        with self._lock:
            entry = self._ledger.find(object_id)
            return None if entry is None else entry.meta

    def lease(self, slot: Slot, holder: str, until_s: float) -> None:
        """See Tier.lease."""
        with self._lock:
            self._ledger.lease(slot, holder, until_s)

    def release(self, slot: Slot, holder: str) -> None:
        """See Tier.release."""
        with self._lock:
            self._ledger.release(slot, holder)

    def expire(self, now_s: float) -> list[tuple[Slot, str]]:
        """See Tier.expire."""
        with self._lock:
            return self._ledger.expire(now_s)

    def holder_ended(self, holder: str) -> None:
        """See Tier.holder_ended."""
        with self._lock:
            self._ledger.holder_ended(holder)

    def read(self, slot: Slot, into: Buffer) -> None:
        """See Tier.read. What cannot be read for a bad sector is corrupt, too."""
        self._mover.reading(slot, into).run()

    def remove(self, object_id: ObjectId) -> int:
        """See Tier.remove. Survives power loss from the next commit on."""
        with self._lock:
            return self._ledger.remove(object_id)

    def objects(self) -> Iterator[ObjectMeta]:
        """See Tier.objects."""
        for batch in self.object_batches(_ANNOUNCED_AT_ONCE):
            yield from batch

    def usage(self) -> TierUsage:
        """See Tier.usage."""
        with self._lock:
            return self._ledger.usage()

    def close(self) -> None:
        """Make removals durable, and let go of threads, files and the directory."""
        with self._lock:
            if self._store.closed:
                return
        if self._ahead is not None:
            self._ahead.stop()
        for lane in (self._writes, self._spills, self._reads):
            lane.close()
        self._checkers.shutdown()
        self._store.close({} if self._scrub is None else self._scrub.stop())

    # -- several at once

    def write_many(
        self,
        items: Sequence[tuple[Slot, Buffer]],
        on_each: OnEach | None = None,
        *,
        codec: str = RAW,
        item_bytes: int = 2,
        spill: bool = False,
    ) -> list[Future[None]]:
        """Write several slots, large ones in parts, `writers` parts at a time.

        The futures raise what `write` does, and cannot be cancelled.  on_each is called by a thread
        of the tier with (slot, None or the TierError) as each ends.  The buffers must stay as they are until
        then.
        spill: nobody waits for it, so it goes by threads of its own that leave the processor to others.
        """
        lane = self._spills if spill else self._writes
        begin = partial(self._mover.writing, codec=codec, item_bytes=item_bytes, on_each=on_each)
        return begun_in(lane, begin, items, on_each)

    def read_many(
        self, items: Sequence[tuple[Slot, Buffer]], on_each: OnEach | None = None
    ) -> list[Future[None]]:
        """Read several slots into writable buffers, `readers` parts at a time; see `write_many`."""
        return begun_in(self._reads, partial(self._mover.reading, on_each=on_each), items, on_each)

    # -- beyond the contract

    def is_there(self) -> bool:
        """Whether its directory still holds it; where it was deleted, open files would take what is lost."""
        return self._store.is_there()

    def was_moved(self) -> bool:
        """Whether its directory, or all that is in it, was moved away and not deleted."""
        return self._store.was_moved()

    def make_room_ahead(self) -> None:
        """From now on keep more than a GiB of free room ready, as far as the limit allows, until `close`."""
        self._ahead = AheadThread(self._store.make_ahead)

    def start_scrub(self, bytes_per_s: int) -> None:
        """Read everything again in the background, again and again, until `close`; see `scrub`."""
        mover = self._mover
        scrubber = Scrubber(self._store, bytes_per_s, lambda: mover.reads_wanted > 0, mover.quarantine)
        self._scrubbed = scrubber.stats
        self._scrub = ScrubThread(scrubber)

    def object_batches(self, size: int) -> Iterator[list[ObjectMeta]]:
        """Every committed object, at most `size` at a time, without holding others up in between.

        What is there all the time is told; what is replaced meanwhile may be told twice.
        """
        with self._lock:
            sweep = self._ledger.sweep()
        yield from batches(sweep, self._lock, size)

    def record_batches(self, size: int) -> Iterator[list[ConversationRecord]]:
        """Every conversation's record, `size` at a time."""
        with self._store.faults.of_index():
            yield from self._store.index.records(size)

    def record(self, tenant: str, conversation: str) -> ConversationRecord | None:
        """One conversation's record."""
        with self._store.faults.of_index():
            return self._store.index.record(tenant, conversation)

    def state(self, name: str) -> bytes | None:
        """A value given to `commit_with_records`."""
        with self._store.faults.of_index():
            return self._store.index.state(name)

    def stats(self) -> DiskStats:
        """Counters and health."""
        with self._lock:
            extents = self._ledger.extents
            return DiskStats(
                direct_io=self._store.segments.direct_io,
                segments=len(extents.segments),
                segment_bytes=extents.total_bytes,
                user_bytes=self._mover.user_bytes,
                device_bytes=self._store.segments.device_bytes,
                flushes=self._store.flushes,
                lost_at_open=self._store.lost_at_open,
                quarantined_total=self._mover.quarantines,
                scrub_bytes=self._scrubbed.read_bytes,
                scrub_bad=self._scrubbed.found_bad,
                scrub_passes=self._scrubbed.passes,
                no_room=self._store.faults.no_room,
                last_error=self._store.faults.last_error,
            )

    # -- inside

    def _ready(self, slot: Slot) -> Entry:
        entry = self._ledger.writing(slot)
        if entry.failed:
            raise StaleSlot(f"{slot} was lost when its segment could not be flushed")
        if not entry.written or entry.pins:
            raise ValueError(f"{slot} was reserved, but its write has not ended")
        return entry

    def _make_durable(self, commits: Sequence[Commit]) -> Sequence[TierError | None]:
        """The order that everything rests on: the payloads survive before the index lists them."""
        self._store.flush([entry for commit in commits for entry in commit.entries])
        return self._store.list_all(commits)
