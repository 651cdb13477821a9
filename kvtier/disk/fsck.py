"""Check a directory that no daemon uses, and repair it: what the index says against what the segments hold.

With a sound index a repair takes out what is not there and quarantines what is damaged.  Without one, or
with one that is older than the store, it makes an index from the segments: every intact object that no
`graves` file calls dead, of two writes of one object the later.  Conversations are not in the segments, so
their names are lost then; their blocks are found by their tokens.  When the graves are lost too, nobody
can say what was forgotten, and nothing is taken over.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from kvtier.disk.fileops import FileOps, OsFileOps
from kvtier.disk.graves import Known
from kvtier.disk.graves import read as read_graves
from kvtier.disk.header import BlockHeader
from kvtier.disk.index import Batch, Index, ObjectRow
from kvtier.disk.ledger import room_for
from kvtier.disk.lock import FORMAT, DirectoryLock, sync_directory
from kvtier.disk.recovery import sift, split_dead
from kvtier.disk.scan import Found, SegmentReader, scan
from kvtier.disk.segments import path_of, segment_numbers
from kvtier.disk.store import EPOCH_SHIFT, INDEX, SEGMENTS
from kvtier.errors import ConfigError, TierUnavailable
from kvtier.objects import ObjectId

_ROWS_AT_ONCE = 4096
_REBUILT = "index.rebuilt.sqlite"
_WAL, _SHM = "-wal", "-shm"

# Told (bytes checked, bytes there are).
OnProgress = Callable[[int, int], None]
IndexState = Literal["sound", "missing", "damaged", "older than the store"]


@dataclass(slots=True)
class Report:
    """What a check found, and what a repair did.

    objects, object_bytes: listed (or, without an index, to be listed) and intact.  damaged_headers,
    damaged_payloads: listed, and their bytes are wrong.  entries_without_object: listed where no such object
    is.  overlaps: listed twice, or over another.  lost_bytes: payload of all these.  quarantined: known to
    be bad before.  orphans: intact, and not listed though nothing says that they ended: a crash cut their
    park off, or the index does not know of them.  forgotten: intact, and not to be served any more; their
    room is free.  foreign: pages that begin like a header of this store and are none.
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
    orphans: int = 0
    orphan_bytes: int = 0
    forgotten: int = 0
    foreign: int = 0
    conversations: int = 0
    repaired: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether everything that was promised is there."""
        bad = self.damaged_headers + self.damaged_payloads + self.entries_without_object + self.overlaps
        return self.index == "sound" and not bad + self.quarantined


@dataclass(slots=True)
class _Seen:
    """What the segments hold. file_bytes: length of each; headers: by place, with whether it is intact."""

    file_bytes: dict[int, int] = field(default_factory=dict)
    headers: dict[tuple[int, int], tuple[BlockHeader, bool]] = field(default_factory=dict)
    not_ours: set[tuple[int, int]] = field(default_factory=set)


def fsck(
    directory: Path,
    *,
    repair: bool = False,
    on_progress: OnProgress | None = None,
    ops: FileOps | None = None,
) -> Report:
    """Check the directory and answer what was found; with `repair` also mend it.

    Raises ConfigError when the directory is none of kvtier's, TierUnavailable when a process uses it or it
    cannot be read.
    """
    if not (directory / FORMAT).exists():
        raise ConfigError(
            "directory", f"{directory} is not a kvtier directory", fix="name the disk.directory of a daemon"
        )
    held = DirectoryLock(directory)
    try:
        return _Check(directory, held.store_id, ops or OsFileOps(), on_progress or _silent).run(repair)
    except (OSError, sqlite3.Error) as problem:
        raise TierUnavailable(f"{directory} cannot be checked: {problem}") from problem
    finally:
        held.release()


def _silent(_done: int, _total: int) -> None:
    """Progress that nobody wants to hear."""


class _Check:
    """One run over one directory, whose lock is held."""

    def __init__(self, directory: Path, store_id: bytes, ops: FileOps, on_progress: OnProgress) -> None:
        self._directory = directory
        self._store_id = store_id
        self._ops = ops
        self._on_progress = on_progress
        self._known: Known | None = None
        self._report = Report(str(directory))

    def run(self, repair: bool) -> Report:
        report = self._report
        self._known = read_graves(str(self._directory), self._ops, self._store_id)
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
        report.orphans = len(orphans)
        report.orphan_bytes = sum(row.stored_bytes for row in orphans)
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
        except sqlite3.Error as problem:
            report.index, report.index_problems = "damaged", [str(problem)]
            return None
        try:
            report.index_problems = index.problems()
            report.conversations = sum(len(part) for part in index.records(_ROWS_AT_ONCE))
            older = self._known is not None and index.epoch() < self._known.next_sequence >> EPOCH_SHIFT
        except sqlite3.Error as problem:
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
        for found in scan(reader, self._store_id, lambda done: self._on_progress(before + done, total)):
            if isinstance(found, Found):
                seen.headers[number, found.at] = (found.header, found.intact)
            else:
                seen.not_ours.add((number, found.at))
        self._report.foreign = len(seen.not_ours)

    def _living(self, seen: _Seen) -> list[ObjectRow]:
        """Intact objects that nothing calls dead, the latest write of each."""
        intact = [(place, header) for place, (header, whole) in seen.headers.items() if whole]
        if self._known is None:
            self._report.forgotten += len(intact)
            return []
        sequences = np.array([header.sequence for _, header in intact], dtype=np.uint64)
        newest: dict[ObjectId, ObjectRow] = {}
        for (place, header), gone in zip(intact, self._known.dead(sequences).tolist(), strict=True):
            row = _row(header, *place)
            older = newest.get(header.meta.object_id)
            self._report.forgotten += gone
            if not gone and (older is None or older.sequence < row.sequence):
                newest[header.meta.object_id] = row
        return list(newest.values())

    # -- comparing with a sound index

    def _compare(self, index: Index, seen: _Seen) -> tuple[Batch, list[ObjectRow]]:
        """What a repair would tell the index, and the intact objects that it does not list."""
        report = self._report
        rows, remove = split_dead(list(index.objects()), self._known)
        recovered = sift(rows, seen.file_bytes)
        misplaced = set(recovered.lost)
        quarantine: list[int] = []
        for row in rows:
            if row.sequence in misplaced:
                remove.append(row.sequence)
                outside = row.at + room_for(row.meta.nbytes) > seen.file_bytes.get(row.segment, 0)
                report.entries_without_object += outside
                report.overlaps += not outside
                report.lost_bytes += row.meta.nbytes
            elif row.quarantined:
                report.quarantined += 1
            else:
                self._compare_row(row, seen, remove, quarantine)
        listed = {row.sequence for row in rows}
        orphans = [row for row in self._living(seen) if row.sequence not in listed]
        return Batch(remove=remove, quarantine=quarantine), orphans

    def _compare_row(self, row: ObjectRow, seen: _Seen, remove: list[int], quarantine: list[int]) -> None:
        report, place = self._report, (row.segment, row.at)
        header, intact = seen.headers.get(place, (None, False))
        expected = BlockHeader(row.meta, row.sequence, self._store_id, row.stored_bytes, row.codec)
        if header == expected and intact:
            report.objects += 1
            report.object_bytes += row.meta.nbytes
            return
        report.lost_bytes += row.meta.nbytes
        if header == expected:
            report.damaged_payloads += 1
            quarantine.append(row.sequence)
        elif place in seen.not_ours:
            report.damaged_headers += 1
            quarantine.append(row.sequence)
        else:
            report.entries_without_object += 1
            remove.append(row.sequence)

    # -- repairing

    def _mend(self, index: Index, batch: Batch) -> None:
        try:
            if batch.remove or batch.quarantine:
                index.apply(batch)
        finally:
            index.close()
        if batch.remove:
            self._report.repaired.append(f"{len(batch.remove)} objects removed from the index")
        if batch.quarantine:
            self._report.repaired.append(f"{len(batch.quarantine)} objects quarantined")

    def _rebuild(self, rows: list[ObjectRow], seen: _Seen) -> None:
        """Make an index beside the old one and put it in its place; until then nothing has changed."""
        path, fresh = self._directory / INDEX, self._directory / _REBUILT
        _delete(fresh)
        index = Index(fresh)
        try:
            index.apply(Batch(add_segments=sorted(seen.file_bytes.items())))
            for part in _parts(sorted(rows, key=lambda row: row.sequence)):
                index.apply(Batch(add=part))
            latest = max((header.sequence for header, _ in seen.headers.values()), default=0)
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


def _row(header: BlockHeader, segment: int, at: int) -> ObjectRow:
    return ObjectRow(header.meta, header.sequence, segment, at, header.stored_bytes, header.codec)


def _parts(rows: list[ObjectRow]) -> Iterator[list[ObjectRow]]:
    rest = iter(rows)
    while part := list(islice(rest, _ROWS_AT_ONCE)):
        yield part


def _delete(database: Path) -> None:
    for suffix in ("", _WAL, _SHM):
        Path(f"{database}{suffix}").unlink(missing_ok=True)
