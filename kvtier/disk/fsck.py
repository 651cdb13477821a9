"""Check a directory that no daemon uses, and repair it: what the index says against what the segments hold.

With a sound index a repair takes out what is not there and quarantines what is damaged.  Without one, or
with one that is older than the store, it makes an index from the segments: every intact object that no
`graves` file calls dead, of two writes of one object the later.  Conversations are not in the segments, so
their names are lost then; their blocks are found by their tokens.  When the graves are lost too, nobody
can say what was forgotten, and nothing is taken over.

Sealed blocks are checked with the key store.  Without it only their headers are: they count as unchecked, not
as damaged, and a rebuilt index lists them.  A block whose key was destroyed is not to be served any more,
whatever else says that it is there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from kvtier.disk.coder import Coder
from kvtier.disk.entry import room_for
from kvtier.disk.faults import INDEX_ERRORS
from kvtier.disk.fileops import FileOps, OsFileOps
from kvtier.disk.graves import Known
from kvtier.disk.graves import read as read_graves
from kvtier.disk.index import Batch, ConversationRecord, Index
from kvtier.disk.keys import EPOCH_SHIFT
from kvtier.disk.lock import FORMAT, DirectoryLock, sync_directory
from kvtier.disk.recovery import dead, sift
from kvtier.disk.rows import ObjectRow
from kvtier.disk.scan import Found, SegmentReader, scan
from kvtier.disk.segments import path_of, segment_numbers
from kvtier.disk.store import INDEX, SEGMENTS, OpenVault
from kvtier.errors import ConfigError, CorruptObject, TierUnavailable
from kvtier.objects import ObjectId
from kvtier.records import unframe

_ROWS_AT_ONCE = 4096
REBUILT = "index.rebuilt.sqlite"
_WAL, _SHM = "-wal", "-shm"

# Told (bytes checked, bytes there are).
OnProgress = Callable[[int, int], None]
IndexState = Literal["sound", "missing", "damaged", "older than the store"]


@dataclass(slots=True)
class Report:
    """What a check found, and what a repair did.

    objects, object_bytes: listed (or, without an index, to be listed) and intact; of unchecked ones among
    them and among the orphans only the header was checked, for the reasons in unchecked_why.
    damaged_headers, damaged_payloads: listed, and their bytes are wrong.  entries_without_object: listed
    where no such object is.  overlaps: listed twice, or over another.  lost_bytes: payload of all these.
    quarantined: known to be bad before.  orphans: intact, and not listed though nothing says that they
    ended: a crash cut their park off, or the index does not know of them.  forgotten: intact, and not to be
    served any more; their room is free.  foreign: pages that begin like a header of this store and are none.
    conversations: records of them, damaged_records among them.
    """

    directory: str
    index: IndexState = "sound"
    index_problems: list[str] = field(default_factory=list)
    graves: Literal["sound", "missing"] = "sound"
    segments: int = 0
    segment_bytes: int = 0
    objects: int = 0
    object_bytes: int = 0
    damaged_headers: int = 0
    damaged_payloads: int = 0
    entries_without_object: int = 0
    overlaps: int = 0
    lost_bytes: int = 0
    quarantined: int = 0
    unchecked: int = 0
    unchecked_why: list[str] = field(default_factory=list)
    orphans: int = 0
    orphan_bytes: int = 0
    forgotten: int = 0
    foreign: int = 0
    conversations: int = 0
    damaged_records: int = 0
    repaired: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether everything that was promised is there."""
        bad = self.damaged_headers + self.damaged_payloads + self.entries_without_object + self.overlaps
        bad += self.damaged_records
        return self.index == "sound" and not bad + self.quarantined


@dataclass(slots=True)
class _Seen:
    """What the segments hold. file_bytes: length of each; headers: by place."""

    file_bytes: dict[int, int] = field(default_factory=dict)
    headers: dict[tuple[int, int], Found] = field(default_factory=dict)
    not_ours: set[tuple[int, int]] = field(default_factory=set)


def fsck(
    directory: Path,
    *,
    repair: bool = False,
    on_progress: OnProgress | None = None,
    ops: FileOps | None = None,
    open_vault: OpenVault | None = None,
) -> Report:
    """Check the directory and answer what was found; with `repair` also mend it.

    open_vault: opens the key store for the id of the store, which is closed again; none is needed for
    blocks that are not sealed.  Raises ConfigError when the directory is none of kvtier's, TierUnavailable
    when a process uses it or it cannot be read; whatever open_vault raises.
    """
    if not (directory / FORMAT).exists():
        raise ConfigError(
            "directory", f"{directory} is not a kvtier directory", fix="name the disk.directory of a daemon"
        )
    held = DirectoryLock(directory)
    vault = None
    try:
        vault = None if open_vault is None else open_vault(held.store_id)
        coder = Coder(held.store_id, vault, 0)
        return _Check(directory, coder, ops or OsFileOps(), on_progress or _silent).run(repair)
    except (OSError, *INDEX_ERRORS) as problem:
        raise TierUnavailable(f"{directory} cannot be checked: {problem}") from problem
    finally:
        if vault is not None:
            vault.close()
        held.release()


def _silent(_done: int, _total: int) -> None:
    """Progress that nobody wants to hear."""


class _Check:
    """One run over one directory, whose lock is held."""

    def __init__(self, directory: Path, coder: Coder, ops: FileOps, on_progress: OnProgress) -> None:
        self._directory = directory
        self._coder = coder
        self._ops = ops
        self._on_progress = on_progress
        self._known: Known | None = None
        self._damaged_records: list[ConversationRecord] = []
        self._report = Report(str(directory))

    def run(self, repair: bool) -> Report:
        report = self._report
        self._known = read_graves(str(self._directory), self._ops, self._coder.store_id)
        report.graves = "sound" if self._known is not None else "missing"
        index = self._open_index()
        try:
            seen = self._look()
            if index is not None:
                batch, orphans = self._compare(index, seen)
            else:
                orphans = self._living(seen)
        finally:
            if index is not None and not (repair and report.index == "sound"):
                index.close()
        self._count_unchecked(orphans, seen)
        report.orphans = len(orphans)
        report.orphan_bytes = sum(row.meta.nbytes for row in orphans)
        if report.index != "sound":
            report.objects, report.object_bytes = report.orphans, report.orphan_bytes
            if repair:
                self._rebuild(orphans, seen)
        elif repair and index is not None:
            self._mend(index, batch)
        return report

    # -- looking

    def _open_index(self) -> Index | None:
        """The index, if it can be believed; the report says why not."""
        report, path = self._report, self._directory / INDEX
        if not path.exists():
            report.index = "missing"
            return None
        try:
            index = Index(path)
        except INDEX_ERRORS as problem:
            report.index, report.index_problems = "damaged", [str(problem)]
            return None
        try:
            report.index_problems = index.problems()
            for part in index.records(_ROWS_AT_ONCE):
                report.conversations += len(part)
                self._damaged_records += filter(_is_damaged, part)
            report.damaged_records = len(self._damaged_records)
            index.segments()
            # SQLite's own check does not know what may be in a row.
            index.objects()
            older = self._known is not None and index.epoch() < self._known.next_sequence >> EPOCH_SHIFT
        except INDEX_ERRORS as problem:
            report.index_problems.append(str(problem))
            older = False
        if not report.index_problems and not older:
            return index
        report.index = "damaged" if report.index_problems else "older than the store"
        index.close()
        return None

    def _look(self) -> _Seen:
        """Read every segment."""
        folder, seen = str(self._directory / SEGMENTS), _Seen()
        numbers = segment_numbers(self._ops.names(folder)) if os.path.isdir(folder) else []
        readers: dict[int, SegmentReader] = {}
        try:
            for number in numbers:
                readers[number] = SegmentReader(path_of(folder, number), self._ops)
                seen.file_bytes[number] = readers[number].nbytes
            total, before = sum(seen.file_bytes.values()), 0
            for number, reader in readers.items():
                self._look_into(number, reader, seen, before, total)
                before += reader.nbytes
        finally:
            for reader in readers.values():
                reader.close()
        self._report.segments, self._report.segment_bytes = len(numbers), total
        return seen

    def _look_into(self, number: int, reader: SegmentReader, seen: _Seen, before: int, total: int) -> None:
        longest = max(seen.file_bytes.values())
        for found in scan(reader, self._coder, longest, lambda done: self._on_progress(before + done, total)):
            if isinstance(found, Found):
                seen.headers[number, found.at] = found
            else:
                seen.not_ours.add((number, found.at))
        self._report.foreign = len(seen.not_ours)

    def _living(self, seen: _Seen) -> list[ObjectRow]:
        """Intact and unchecked objects that nothing calls dead, the latest write of each."""
        keyless = sum(found.payload == "keyless" for found in seen.headers.values())
        usable = ("intact", "unchecked")
        there = [(at, found) for at, found in seen.headers.items() if found.payload in usable]
        self._report.forgotten += keyless
        if self._known is None:
            self._report.forgotten += len(there)
            return []
        sequences = np.array([found.header.sequence for _, found in there], dtype=np.uint64)
        newest: dict[ObjectId, ObjectRow] = {}
        for (place, found), gone in zip(there, self._known.dead(sequences).tolist(), strict=True):
            row = _row(found, *place)
            older = newest.get(row.meta.object_id)
            self._report.forgotten += gone
            if not gone and (older is None or older.sequence < row.sequence):
                newest[row.meta.object_id] = row
        return list(newest.values())

    # -- comparing with a sound index

    def _compare(self, index: Index, seen: _Seen) -> tuple[Batch, list[ObjectRow]]:
        """What a repair would tell the index, and the intact objects that it does not list."""
        report = self._report
        rows = index.objects()
        remove = rows.drop(dead(rows, self._known))
        misplaced = set(rows.column("sequence", sift(rows, seen.file_bytes)).tolist())
        quarantine: list[int] = []
        for row in rows:
            if row.sequence in misplaced:
                remove.append(row.sequence)
                outside = row.at + room_for(row.stored_bytes) > seen.file_bytes.get(row.segment, 0)
                report.entries_without_object += outside
                report.overlaps += not outside
                report.lost_bytes += row.meta.nbytes
            elif row.quarantined:
                report.quarantined += 1
            else:
                self._compare_row(row, seen, remove, quarantine)
        listed = {row.sequence for row in rows}
        orphans = [row for row in self._living(seen) if row.sequence not in listed]
        ended = [replace(record, data=b"") for record in self._damaged_records]
        return Batch(remove=remove, quarantine=quarantine, records=ended), orphans

    def _compare_row(self, row: ObjectRow, seen: _Seen, remove: list[int], quarantine: list[int]) -> None:
        report, place = self._report, (row.segment, row.at)
        found = seen.headers.get(place)
        expected = found is not None and _row(found, *place) == row
        payload = found.payload if found is not None and expected else "damaged"
        if payload in ("intact", "unchecked"):
            report.objects += 1
            report.object_bytes += row.meta.nbytes
            self._count_unchecked([row], seen)
            return
        if payload == "keyless":
            remove.append(row.sequence)
            return
        report.lost_bytes += row.meta.nbytes
        if expected:
            report.damaged_payloads += 1
            quarantine.append(row.sequence)
        elif place in seen.not_ours:
            report.damaged_headers += 1
            quarantine.append(row.sequence)
        else:
            report.entries_without_object += 1
            remove.append(row.sequence)

    def _count_unchecked(self, rows: list[ObjectRow], seen: _Seen) -> None:
        there = [seen.headers[row.segment, row.at] for row in rows]
        reasons = [found.why for found in there if found.payload == "unchecked"]
        self._report.unchecked += len(reasons)
        self._report.unchecked_why = sorted({*self._report.unchecked_why, *reasons})

    # -- repairing

    def _mend(self, index: Index, batch: Batch) -> None:
        try:
            if batch.remove or batch.quarantine or batch.records:
                index.apply(batch)
        finally:
            index.close()
        if batch.remove:
            self._report.repaired.append(f"{len(batch.remove)} objects removed from the index")
        if batch.quarantine:
            self._report.repaired.append(f"{len(batch.quarantine)} objects quarantined")
        if batch.records:
            self._report.repaired.append(f"{len(batch.records)} records of conversations removed")

    def _rebuild(self, rows: list[ObjectRow], seen: _Seen) -> None:
        """Make an index beside the old one and put it in its place; until then nothing has changed."""
        path, fresh = self._directory / INDEX, self._directory / REBUILT
        _delete(fresh)
        index = Index(fresh)
        try:
            index.apply(Batch(add_segments=sorted(seen.file_bytes.items())))
            for part in _parts(sorted(rows, key=lambda row: row.sequence)):
                index.apply(Batch(add=part))
            latest = max((found.header.sequence for found in seen.headers.values()), default=0)
            known = self._known.next_sequence if self._known is not None else 0
            index.next_epoch(max(latest, known) >> EPOCH_SHIFT)
        finally:
            index.close()
        self._replace(path, fresh)
        self._report.repaired.append(f"index rebuilt with {len(rows)} objects")

    def _replace(self, path: Path, fresh: Path) -> None:
        """A log of the old index must not be found beside the new one."""
        for suffix in (_WAL, _SHM):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        sync_directory(self._directory)
        os.rename(fresh, path)
        sync_directory(self._directory)


def _row(found: Found, segment: int, at: int) -> ObjectRow:
    header, sealed = found.header, found.header.seal is not None
    stored = (header.stored_bytes, header.codec)
    return ObjectRow(header.meta, header.sequence, segment, at, *stored, sealed=sealed)


def _is_damaged(record: ConversationRecord) -> bool:
    try:
        unframe(record.tenant, record.conversation, record.version, record.data)
    except CorruptObject:
        return True
    return False


def _parts(rows: list[ObjectRow]) -> Iterator[list[ObjectRow]]:
    rest = iter(rows)
    while part := list(islice(rest, _ROWS_AT_ONCE)):
        yield part


def _delete(database: Path) -> None:
    for suffix in ("", _WAL, _SHM):
        Path(f"{database}{suffix}").unlink(missing_ok=True)
