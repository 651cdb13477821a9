"""Moves blocks between the caller's memory and the segments, in parts, and checks what was read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from kvtier.checksum import PIECE_BYTES, Buffer, checksum, combine, piece_sum
from kvtier.disk.buffers import byte_array
from kvtier.disk.codecs import CODECS, RAW
from kvtier.disk.entry import Entry
from kvtier.disk.faults import BLOCK_WRITE, is_unreadable
from kvtier.disk.fileops import Bytes
from kvtier.disk.header import HEADER_BYTES
from kvtier.disk.store import Store
from kvtier.disk.transfers import Check, Lane, Transfer, failed
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
        self, slot: Slot, data: Buffer, codec: str, item_bytes: int, on_each: OnEach | None = None
    ) -> Transfer:
        """Begin to write a slot; a raw block as it lies, in parts."""
        if codec not in CODECS:
            raise ValueError(f"there is no codec {codec!r}")
        payload = byte_array(data)
        if payload.nbytes != slot.nbytes:
            raise ValueError(f"{payload.nbytes} bytes for a slot of {slot.nbytes}")
        with self._store.lock:
            self._store.check_open()
            entry = self._store.ledger.writing(slot)
            self._store.ledger.pin(entry)
        return Transfer(
            payload.nbytes,
            partial(self._write_part, entry, payload, codec, item_bytes),
            partial(self._written, entry, payload.nbytes, on_each),
            whole=codec != RAW or self._store.coder.vault is not None,
        )

    def _write_part(
        self, entry: Entry, payload: Bytes, codec: str, item_bytes: int, at: int, end: int
    ) -> None:
        if at:
            self._store.segments.write_part(entry.segment, entry.at + HEADER_BYTES + at, payload[at:end])
        else:
            first = None if end == payload.nbytes else end
            self._write_first(entry, payload, first, codec, item_bytes)

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
            error = self._store.faults.of_device(BLOCK_WRITE, problem, room)
            error.__cause__ = problem
            problem = error
        return told(slot, problem, on_each)

    def reading(self, slot: Slot, into: Buffer, on_each: OnEach | None = None) -> Transfer:
        """Begin to read a slot; a raw block to where it belongs, in parts."""
        target = byte_array(into)
        if target.nbytes != slot.nbytes or not target.flags.writeable:
            raise ValueError(f"a writable buffer of {slot.nbytes} bytes is needed")
        with self._store.lock:
            self._store.check_open()
            entry = self._store.ledger.readable(slot)
            self._store.ledger.pin(entry)
            self.reads_wanted += 1
        packed = entry.codec != RAW or entry.sealed
        read = self._read_packed if packed else self._read_part
        sums: list[int] = []
        return Transfer(
            target.nbytes,
            partial(read, entry, target, sums),
            partial(self._was_read, entry, sums, on_each),
            whole=packed,
        )

    def _read_part(self, entry: Entry, target: Bytes, sums: list[int], at: int, end: int) -> Check | None:
        part, page = target[at:end], b""
        with self._reads_of(entry):
            if at:
                self._store.segments.read_part(entry.segment, entry.at + HEADER_BYTES + at, part)
            else:
                page = self._store.segments.read_block(entry.segment, entry.at, part)
        return partial(self._check_part, entry, page, part, at, sums) if self._check else None

    def _check_part(self, entry: Entry, page: bytes, part: Bytes, at: int, sums: list[int]) -> None:
        if not at:
            self._store.check_header(entry, page)
        sums.append(piece_sum(part, at // PIECE_BYTES, part.nbytes))

    def _read_packed(self, entry: Entry, target: Bytes, sums: list[int], at: int, end: int) -> None:
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


def begun_in(
    lane: Lane,
    begin: Callable[[Slot, Buffer], Transfer],
    items: Sequence[tuple[Slot, Buffer]],
    on_each: OnEach | None,
) -> list[Future[None]]:
    """Have a lane carry out blocks, begun some at a time: the drive waits only for the first to begin.

    When it raises, nothing of them is under way.
    """
    futures: list[Future[None]] = []
    try:
        for at in range(0, len(items), lane.threads):
            some = items[at : at + lane.threads]
            futures += lane.submit([_begun(begin, slot, data, on_each) for slot, data in some])
    except BaseException:
        wait(futures)
        raise
    return futures


def _begun(
    begin: Callable[[Slot, Buffer], Transfer], slot: Slot, data: Buffer, on_each: OnEach | None
) -> Transfer:
    """The transfer, or one that fails with what spoke against it."""
    try:
        return begin(slot, data)
    except (TierError, ValueError) as problem:
        return Transfer(0, failed(problem), lambda said: told(slot, said, on_each))


def told(slot: Slot, problem: BaseException | None, on_each: OnEach | None) -> BaseException | None:
    """Tell how a block ended, and answer it. What is not of the tier is not told."""
    if on_each is not None and (problem is None or isinstance(problem, TierError)):
        on_each(slot, problem)
    return problem
