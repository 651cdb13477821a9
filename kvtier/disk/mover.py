"""Moves blocks between the caller's memory and the segments, in parts, and checks what was read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from kvtier.checksum import PIECE_BYTES, Buffer, checksum, combine, piece_sum
from kvtier.disk.buffers import byte_array
from kvtier.disk.codecs import CODECS, RAW
from kvtier.disk.entry import Entry
from kvtier.disk.faults import is_unreadable
from kvtier.disk.fileops import Bytes
from kvtier.disk.header import HEADER_BYTES
from kvtier.disk.store import Store
from kvtier.disk.transfers import Transfer, cuts
from kvtier.errors import CorruptObject, TierError
from kvtier.states import State
from kvtier.tier import Slot

_LOG = logging.getLogger(__name__)

OnEach = Callable[[Slot, TierError | None], None]


class Mover:
    """Begins reads and writes of blocks of one store.

    check: False switches checks of reads off.  user_bytes: payload written.  quarantines: failed checks.
    reads_wanted: reads that have begun and not ended.
    """

    def __init__(self, store: Store, *, check: bool) -> None:
        self._store = store
        self._check = check
        self.user_bytes = self.quarantines = self.reads_wanted = 0

    def writing(
        self,
        slot: Slot,
        data: Buffer,
        codec: str,
        item_bytes: int,
        step: int | None = None,
        on_each: OnEach | None = None,
    ) -> Transfer:
        """Begin to write a slot, in parts of `step` bytes where that can be: a raw block as it lies."""
        if codec not in CODECS:
            raise ValueError(f"there is no codec {codec!r}")
        payload = byte_array(data)
        if payload.nbytes != slot.nbytes:
            raise ValueError(f"{payload.nbytes} bytes for a slot of {slot.nbytes}")
        with self._store.lock:
            self._store.check_open()
            entry = self._store.ledger.writing(slot)
            self._store.ledger.pin(entry)
        if step is None or codec != RAW or self._store.coder.vault is not None:
            step = payload.nbytes + 1
        whole = step > payload.nbytes
        (_, first), *rest = cuts(payload.nbytes, step)
        parts = [
            partial(self._write_first, entry, payload, None if whole else first, codec, item_bytes),
            *(partial(self._write_rest, entry, payload, at, end) for at, end in rest),
        ]
        return Transfer(parts, partial(self._written, entry, payload.nbytes, on_each))

    def _write_first(
        self, entry: Entry, payload: Bytes, first: int | None, codec: str, item_bytes: int
    ) -> None:
        """Write the header and the first bytes of what follows it; all of it when `first` is None."""
        meta = entry.meta
        if meta.checksum is None:
            meta = replace(meta, checksum=checksum(payload))
        store = self._store
        with store.coder.pack(meta, entry.generation, payload, codec, item_bytes) as packed:
            store.segments.write_block(entry.segment, entry.at, packed.page, packed.body[:first])
            with self._store.lock:
                entry.stored_bytes, entry.codec = packed.body.nbytes, packed.codec
                entry.key, entry.sealed = packed.key, packed.key is not None

    def _write_rest(self, entry: Entry, payload: Bytes, at: int, end: int) -> None:
        self._store.segments.write_part(entry.segment, entry.at + HEADER_BYTES + at, payload[at:end])

    def _written(
        self, entry: Entry, nbytes: int, on_each: OnEach | None, problem: BaseException | None
    ) -> BaseException | None:
        """Every part has ended: the slot may be committed, or is given up."""
        slot, room = entry.slot, entry.room
        with self._store.lock:
            if problem is None:
                entry.written = True
                self.user_bytes += nbytes
            elif isinstance(problem, OSError) and entry.state is State.WRITING:
                self._store.ledger.give_up(entry, quiet=True)
            self._store.ledger.unpin(entry)
        if isinstance(problem, OSError):
            error = self._store.faults.of_device("writing", problem, room)
            error.__cause__ = problem
            problem = error
        return told(slot, problem, on_each)

    def reading(
        self, slot: Slot, into: Buffer, step: int | None = None, on_each: OnEach | None = None
    ) -> Transfer:
        """Begin to read a slot, in parts of `step` bytes where that can be: a raw block to where it belongs.

        Each part is hashed while others are read.
        """
        target = byte_array(into)
        if target.nbytes != slot.nbytes or not target.flags.writeable:
            raise ValueError(f"a writable buffer of {slot.nbytes} bytes is needed")
        with self._store.lock:
            self._store.check_open()
            entry = self._store.ledger.readable(slot)
            self._store.ledger.pin(entry)
            self.reads_wanted += 1
        sums: list[int] = []
        if entry.codec == RAW and not entry.sealed:
            (_, first), *rest = cuts(target.nbytes, step or target.nbytes + 1)
            parts = [
                partial(self._read_first, entry, target[:first], sums),
                *(partial(self._read_rest, entry, target, at, end, sums) for at, end in rest),
            ]
        else:
            parts = [partial(self._read_packed, entry, target, sums)]
        return Transfer(parts, partial(self._was_read, entry, sums, on_each))

    def _read_first(self, entry: Entry, target: Bytes, sums: list[int]) -> None:
        with self._reads_of(entry):
            page = self._store.segments.read_block(entry.segment, entry.at, target)
        if self._check:
            self._store.check_header(entry, page)
            sums.append(piece_sum(target, 0, target.nbytes))

    def _read_rest(self, entry: Entry, target: Bytes, at: int, end: int, sums: list[int]) -> None:
        part = target[at:end]
        with self._reads_of(entry):
            self._store.segments.read_part(entry.segment, entry.at + HEADER_BYTES + at, part)
        if self._check:
            sums.append(piece_sum(part, at // PIECE_BYTES, part.nbytes))

    def _read_packed(self, entry: Entry, target: Bytes, sums: list[int]) -> None:
        store = self._store
        with store.coder.room_to_unpack(entry.codec, entry.stored_bytes) as room:
            with self._reads_of(entry):
                page = store.segments.read_block(entry.segment, entry.at, room[: entry.stored_bytes])
            store.coder.unpack(store.check_header(entry, page), page, room, target)
        if self._check:
            sums.append(piece_sum(target, 0, target.nbytes))

    def _was_read(
        self, entry: Entry, sums: list[int], on_each: OnEach | None, problem: BaseException | None
    ) -> BaseException | None:
        """Every part has ended: the sums of all parts are the block's, or it is quarantined."""
        if problem is None and self._check and combine(sums, entry.meta.nbytes) != entry.meta.checksum:
            problem = CorruptObject(f"the bytes of {entry.meta.object_id} do not match their checksum")
        if isinstance(problem, CorruptObject):
            self.quarantine(entry, problem)
        with self._store.lock:
            self._store.ledger.unpin(entry)
            self.reads_wanted -= 1
        return told(entry.slot, problem, on_each)

    @contextmanager
    def _reads_of(self, entry: Entry) -> Iterator[None]:
        """Turn the system's errors within the block into the tier's."""
        try:
            yield
        except OSError as problem:
            if is_unreadable(problem):
                raise CorruptObject(f"{entry.meta.object_id} cannot be read: {problem}") from problem
            raise self._store.faults.unavailable(f"reading failed: {problem}") from problem

    def quarantine(self, entry: Entry, problem: CorruptObject) -> None:
        """A check failed: the object is not found any more. Does nothing when it is gone already."""
        with self._store.lock:
            if not self._store.ledger.quarantine(entry):
                return
            self.quarantines += 1
        _LOG.warning("quarantined: %s", problem)


def told(slot: Slot, problem: BaseException | None, on_each: OnEach | None) -> BaseException | None:
    """Tell how a block ended, and answer it. What is not of the tier is not told."""
    if on_each is not None and (problem is None or isinstance(problem, TierError)):
        on_each(slot, problem)
    return problem
