"""Opening a directory: from the index to the books, with whatever no longer fits left out."""

from __future__ import annotations

import gc
import logging
import resource
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from kvtier.disk.buffers import PAGE
from kvtier.disk.codecs import CODECS, RAW, CodecMissing
from kvtier.disk.graves import Known
from kvtier.disk.index import ObjectRow
from kvtier.disk.ledger import Ledger, room_for
from kvtier.errors import ConfigError
from kvtier.objects import ObjectId

_LOG = logging.getLogger(__name__)
_SPARE_FILES = 64


@dataclass(slots=True)
class Recovered:
    """What of the index can be used, and the sequence numbers of what cannot."""

    rows: list[ObjectRow] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)


def split_dead(rows: Sequence[ObjectRow], known: Known | None) -> tuple[list[ObjectRow], list[int]]:
    """Part the rows of living writes from the sequences of ended ones.

    Both are there when an older index was put in place of the right one, or when the power failed between
    noting that a write ended and telling the index.
    """
    if known is None:
        return list(rows), []
    dead = known.dead(np.fromiter((row.sequence for row in rows), dtype=np.uint64, count=len(rows))).tolist()
    living = [row for row, gone in zip(rows, dead, strict=True) if not gone]
    return living, [row.sequence for row, gone in zip(rows, dead, strict=True) if gone]


def sift(rows: Iterable[ObjectRow], found_bytes: dict[int, int]) -> Recovered:
    """Part usable rows from those that cannot be right.

    found_bytes: length at which each segment's file was found.  Lost is what lies outside of its segment
    or beyond where its file ended, what has a codec that is not known here or lengths that cannot be, an
    older write of an object that is there twice, and of two that overlap the older one.
    """
    recovered = Recovered()
    longest = max(found_bytes.values(), default=0)
    newest: dict[tuple[ObjectId, bool], ObjectRow] = {}
    for row in rows:
        end = row.at + room_for(row.stored_bytes)
        inside = row.at >= 0 and row.at % PAGE == 0 and end <= found_bytes.get(row.segment, 0)
        if not inside or not lengths_can_be(row.codec, row.stored_bytes, row.meta.nbytes, longest):
            recovered.lost.append(row.sequence)
            continue
        name = (row.meta.object_id, row.quarantined)
        older = newest.get(name)
        if older is not None:
            recovered.lost.append(min(older.sequence, row.sequence))
        if older is None or older.sequence < row.sequence:
            newest[name] = row
    _drop_overlaps(sorted(newest.values(), key=lambda row: (row.segment, row.at)), recovered)
    return recovered


def lengths_can_be(codec: str, stored_bytes: int, nbytes: int, longest: int) -> bool:
    """Whether a write can have had these lengths.

    Room is taken for the whole payload before it is encoded, so none is longer than a segment, and
    `longest`, the length of the longest, bounds what reading takes of memory.
    """
    if codec == RAW:
        return stored_bytes == nbytes
    return codec in CODECS and 0 <= stored_bytes < nbytes and room_for(nbytes) <= longest


def _drop_overlaps(rows: list[ObjectRow], recovered: Recovered) -> None:
    kept = recovered.rows
    for row in rows:
        while kept and _overlap(kept[-1], row) and kept[-1].sequence < row.sequence:
            recovered.lost.append(kept.pop().sequence)
        if kept and _overlap(kept[-1], row):
            recovered.lost.append(row.sequence)
        else:
            kept.append(row)


def _overlap(before: ObjectRow, after: ObjectRow) -> bool:
    return before.segment == after.segment and before.at + room_for(before.stored_bytes) > after.at


def warn_of_missing_codecs(rows: Iterable[ObjectRow]) -> None:
    """Say once which blocks cannot be read here, though nothing is wrong with them."""
    for name, count in Counter(row.codec for row in rows).items():
        try:
            CODECS[name].check_installed()
        except CodecMissing as problem:
            _LOG.warning("%d blocks of the codec %s cannot be read: %s", count, name, problem)


@contextmanager
def without_collector() -> Iterator[None]:
    """Keep the garbage collector off a heap that only grows: it took half of the time of an opening."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def fill_ledger(ledger: Ledger, rows: list[ObjectRow], segments: dict[int, int]) -> None:
    """Enter the rows, in order of place, and make everything between them free."""
    used: dict[int, list[tuple[int, int]]] = {segment: [] for segment in segments}
    for row in rows:
        ledger.adopt(row)
        used[row.segment].append((row.at, room_for(row.stored_bytes)))
    for segment, nbytes in segments.items():
        ledger.extents.add_segment(segment, nbytes, used[segment])


def check_sizes(capacity_bytes: int, segment_bytes: int) -> None:
    """Raise ConfigError when a tier of these sizes cannot work."""
    if capacity_bytes < 2 * PAGE:
        raise ConfigError("disk.capacity_bytes", f"{capacity_bytes} bytes hold no object", fix="raise it")
    if segment_bytes < 2 * PAGE or segment_bytes % PAGE:
        raise ConfigError("disk.segment_bytes", f"{segment_bytes} is not a multiple of {PAGE} above {PAGE}")
    files = -(-capacity_bytes // segment_bytes)
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if allowed != resource.RLIM_INFINITY and files + _SPARE_FILES > allowed:
        raise ConfigError(
            "disk.segment_bytes",
            f"{files} segments would be open at once, and the process may open {allowed} files",
            fix="make segments larger, or raise the limit of open files",
        )
