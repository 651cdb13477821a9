"""Opening a directory: from the index to the books, with whatever no longer fits left out."""

from __future__ import annotations

import logging
import resource
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from kvtier.disk.buffers import PAGE
from kvtier.disk.codecs import CODECS, RAW, CodecMissing
from kvtier.disk.entry import room_for
from kvtier.disk.graves import Known
from kvtier.disk.header import HEADER_BYTES
from kvtier.disk.ledger import Ledger
from kvtier.disk.name_table import mixed_names
from kvtier.disk.rows import LISTED, QUARANTINED, Numbers, Rows
from kvtier.errors import ConfigError

_LOG = logging.getLogger(__name__)
_SPARE_FILES = 64


def dead(rows: Rows, known: Known | None) -> Numbers:
    """The rows of ended writes.

    They are there when an older index was put in place of the right one, or when the power failed between
    noting that a write ended and telling the index.
    """
    numbers = rows.numbers(LISTED, QUARANTINED)
    if known is None:
        return numbers[:0]
    return numbers[known.dead(rows.column("sequence", numbers).astype(np.uint64))]


def sift(rows: Rows, found_bytes: Mapping[int, int]) -> Numbers:
    """The rows that cannot be right.

    found_bytes: length at which each segment's file was found.  Lost is what lies outside of its segment
    or beyond where its file ended, what has a codec that is not known here or lengths that cannot be, an
    older write of an object that is there twice, and of two that overlap the older one.
    """
    numbers = rows.numbers(LISTED, QUARANTINED)
    possible = _can_be(rows, numbers, found_bytes)
    lost = [numbers[~possible]]
    numbers = numbers[possible]
    for older in (_superseded, _overlapped):
        gone = older(rows, numbers)
        lost.append(gone)
        numbers = np.setdiff1d(numbers, gone, assume_unique=True)
    return np.concatenate(lost)


def lengths_can_be(codec: str, stored_bytes: int, nbytes: int, longest: int) -> bool:
    """Whether a write can have had these lengths.

    Room is taken for the whole payload before it is encoded, so none is longer than a segment, and
    `longest`, the length of the longest, bounds what reading takes of memory.
    """
    if codec == RAW:
        return stored_bytes == nbytes
    return codec in CODECS and 0 <= stored_bytes < nbytes and room_for(nbytes) <= longest


def _can_be(rows: Rows, numbers: Numbers, found_bytes: Mapping[int, int]) -> npt.NDArray[np.bool_]:
    """Whether each row lies within what was found, and its lengths can be."""
    longest = max(found_bytes.values(), default=0)
    segment, at, stored, nbytes, codec = (
        rows.column(field, numbers) for field in ("segment", "at", "stored_bytes", "nbytes", "codec")
    )
    # With one more that nothing is in, for segments behind the last.
    known = np.array([*sorted(found_bytes), np.iinfo(np.int64).max], dtype=np.int64)
    which = np.searchsorted(known, segment)
    end = np.array([found_bytes.get(n, 0) for n in known.tolist()], dtype=np.int64)[which]
    end[known[which] != segment] = 0
    fits: npt.NDArray[np.bool_] = (stored >= 0) & (stored <= longest) & (at >= 0) & (at % PAGE == 0)
    fits &= at <= end - _rooms(np.where(fits, stored, 0))
    raw = codec == rows.codecs.known(RAW)
    fits &= ~raw | (stored == nbytes)
    for each in np.flatnonzero(fits & ~raw).tolist():
        name = rows.codecs.values[codec[each]]
        fits[each] = lengths_can_be(name, int(stored[each]), int(nbytes[each]), longest)
    return fits


def _superseded(rows: Rows, numbers: Numbers) -> Numbers:
    """Of objects that are there twice, quarantined or not, the older writes."""
    mixed = mixed_names(rows, numbers)
    order = np.argsort(mixed, kind="stable")
    equal = np.flatnonzero(mixed[order][1:] == mixed[order][:-1])
    newest: dict[tuple[object, bool], tuple[int, int]] = {}
    older: list[int] = []
    for number in np.unique(numbers[order[np.concatenate([equal, equal + 1])]]).tolist():
        row = rows.get(number)
        name, this = (row.meta.object_id, row.quarantined), (row.sequence, number)
        if name in newest:
            older.append(min(newest[name], this)[1])
        newest[name] = max(newest.get(name, this), this)
    return np.array(older, dtype=np.int64)


def _overlapped(rows: Rows, numbers: Numbers) -> Numbers:
    """Of rows that overlap, the older writes; in order of place, so that each is looked at once."""
    order, segment, at, end = _by_place(rows, numbers)
    clash = (segment[1:] == segment[:-1]) & (end[:-1] > at[1:])
    hit = np.isin(segment, np.unique(segment[1:][clash]))
    places = [values[hit].tolist() for values in (segment, at, end)]
    sequences = rows.column("sequence", order[hit]).tolist()
    kept: list[tuple[int, int, int, int, int]] = []
    gone: list[int] = []
    for row in zip(*places, sequences, order[hit].tolist(), strict=True):
        while kept and _overlap(kept[-1], row) and kept[-1][3] < row[3]:
            gone.append(kept.pop()[4])
        if kept and _overlap(kept[-1], row):
            gone.append(row[4])
        else:
            kept.append(row)
    return np.array(gone, dtype=np.int64)


def _overlap(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    return before[0] == after[0] and before[2] > after[1]


def _by_place(rows: Rows, numbers: Numbers) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """The rows in order of place, and where each is: segment, from, to."""
    segment, at = rows.column("segment", numbers), rows.column("at", numbers)
    order = np.lexsort((at, segment))
    rooms = _rooms(rows.column("stored_bytes", numbers))
    return numbers[order], segment[order], at[order], (at + rooms)[order]


def _rooms(stored_bytes: Numbers) -> Numbers:
    """`room_for` of each."""
    rooms: Numbers = HEADER_BYTES + -(-stored_bytes // PAGE) * PAGE
    return rooms


def warn_of_missing_codecs(rows: Rows) -> None:
    """Say once which blocks cannot be read here, though nothing is wrong with them."""
    counts = np.bincount(rows.column("codec", rows.numbers(LISTED, QUARANTINED)))
    for name, count in zip(rows.codecs.values, counts.tolist(), strict=False):
        try:
            if count:
                CODECS[name].check_installed()
        except CodecMissing as problem:
            _LOG.warning("%d blocks of the codec %s cannot be read: %s", count, name, problem)


def unmask(rows: Rows, mask: Callable[[int, str], int]) -> None:
    """Give sealed rows the checksums of their payloads. mask: for a sequence and a tenant."""
    numbers = rows.numbers(LISTED, QUARANTINED)
    numbers = numbers[rows.column("sealed", numbers) != 0]
    tenants = [rows.roots.values[root].tenant for root in rows.column("root", numbers).tolist()]
    of_rows = zip(rows.column("sequence", numbers).tolist(), tenants, strict=True)
    masks = np.array([mask(sequence, tenant) for sequence, tenant in of_rows], dtype=np.uint64)
    rows.put_checksums(numbers, rows.column("checksum", numbers) ^ masks)


def make_ledger(
    capacity_bytes: int, first_generation: int, rows: Rows, segments: Mapping[int, int]
) -> Ledger:
    """Books of the rows, with everything between them free. segments: their lengths."""
    _, segment, at, end = _by_place(rows, rows.numbers(LISTED, QUARANTINED))
    ledger = Ledger(capacity_bytes, first_generation, rows)
    ledger.extents.take_over(segments, segment, at, end - at)
    return ledger


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
