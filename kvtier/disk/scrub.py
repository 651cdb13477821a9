"""Reads everything again in the background, so that damage is found while it can still be healed.

One read of at most a MiB at a time, in order of place, at a given pace, and behind every read that
somebody waits for.  Where it stands is kept in the index, so that a restart goes on from there.  What
fails its check is quarantined like by any other read.  A block that is encoded or sealed is gathered as a
whole, in memory of its length and its payload's, and unpacked to be checked.
"""

from __future__ import annotations

import logging
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvtier.background import step_back
from kvtier.checksum import PIECE_BYTES, combine, piece_sum
from kvtier.disk.buffers import BOUNCE_BYTES, PAGE, Scratch, padded
from kvtier.disk.codecs import RAW, CodecMissing
from kvtier.disk.entry import Entry
from kvtier.disk.faults import is_unreadable
from kvtier.disk.fileops import Bytes
from kvtier.disk.header import HEADER_BYTES
from kvtier.disk.pacing import Pace
from kvtier.disk.store import Commit, Store
from kvtier.errors import CorruptObject, TierError, TierUnavailable
from kvtier.states import State
from kvtier.tier import Slot

_LOG = logging.getLogger(__name__)
POSITION = "disk.scrub"
_POSITION = struct.Struct("<QQ")
_SAVE_EVERY_S = 60.0
# From the beginning of one pass to the next: a small store is not read all day.
_PASS_S = 3600.0
_SICK_DEVICE_S = 60.0
_PIECE_BYTES = BOUNCE_BYTES // PIECE_BYTES * PIECE_BYTES


@dataclass(slots=True)
class ScrubStats:
    """Bytes read, objects found bad, passes over everything that were completed."""

    read_bytes: int = 0
    found_bad: int = 0
    passes: int = 0


@dataclass(slots=True)
class _Current:
    """The object that is being read; its room is pinned.

    done: stored bytes that are through.  total: sum of their pieces' hashes.  gathered: the stored bytes of
    an object that has to be unpacked.
    """

    entry: Entry
    page: bytes = b""
    done: int = 0
    total: int = 0
    gathered: Bytes | None = None


class Scrubber:
    """The work itself, a piece for each `step`; one thread calls it.

    others_wait: whether a read that somebody asked for is under way.  on_bad: told of each object whose
    check failed, while its room is pinned.
    """

    def __init__(
        self,
        store: Store,
        bytes_per_s: int,
        others_wait: Callable[[], bool],
        on_bad: Callable[[Entry, CorruptObject], None],
    ) -> None:
        self.stats = ScrubStats()
        self._store = store
        self._pace = Pace(bytes_per_s)
        self._others_wait = others_wait
        self._on_bad = on_bad
        self._scratch = Scratch()
        self._queue: list[Slot] = []
        self._current: _Current | None = None
        self._saved_s = self._pass_s = float("-inf")
        said = store.index.state(POSITION) or b""
        self._place = _POSITION.unpack(said) if len(said) == _POSITION.size else (0, 0)

    def step(self, now_s: float) -> float:
        """Do at most one piece of work; answers the seconds until the next call."""
        wait_s = self._pace.wait_s(now_s, others_wait=self._others_wait())
        if wait_s > 0:
            return wait_s
        self._save(now_s)
        current = self._current or self._take_next(now_s)
        if current is None:
            return max(0.0, self._pass_s + _PASS_S - now_s)
        try:
            self._read_piece(current, now_s)
        except CorruptObject as problem:
            self.stats.found_bad += 1
            self._on_bad(current.entry, problem)
            self._end(current)
        except CodecMissing as problem:
            # Said once at the opening, and to whoever reads such a block.
            _LOG.debug("%s is not checked: %s", current.entry.meta.object_id, problem)
            self._end(current)
        except (OSError, TierUnavailable) as problem:
            _LOG.warning("the scrub pauses: %s", problem)
            self._end(current)
            return _SICK_DEVICE_S
        return 0.0

    def stop(self) -> dict[str, bytes]:
        """Let go of the object at hand; answers what to keep in the index."""
        if self._current is not None:
            place = self._place
            self._end(self._current)
            self._place = place
        return {POSITION: _POSITION.pack(*self._place)}

    def _save(self, now_s: float) -> None:
        if now_s - self._saved_s < _SAVE_EVERY_S:
            return
        self._saved_s = now_s
        try:
            self._store.list_in_index(Commit(state={POSITION: _POSITION.pack(*self._place)}))
        except TierError as problem:
            _LOG.warning("where the scrub stands could not be noted: %s", problem)

    def _take_next(self, now_s: float) -> _Current | None:
        """The next object in order of place; None between two passes."""
        while True:
            if not self._queue and not self._fill_queue(now_s):
                return None
            slot = self._queue.pop()
            with self._store.lock:
                if self._store.closed or not self._store.ledger.rows.holds(slot.slot_id, slot.generation):
                    continue
                entry = self._store.ledger.readable(slot)
                self._store.ledger.pin(entry)
            self._place = (entry.segment, entry.at)
            self._current = _Current(entry)
            return self._current

    def _fill_queue(self, now_s: float) -> bool:
        """The rest of the segment where it stands, or the next one that holds anything."""
        if self._place == (0, 0):
            if now_s - self._pass_s < _PASS_S:
                return False
            self._pass_s = now_s
        self._queue = self._store.ledger.rows.slots_from(*self._place)[::-1]
        if not self._queue:
            self.stats.passes += self._place != (0, 0)
            self._place = (0, 0)
        return bool(self._queue)

    def _read_piece(self, current: _Current, now_s: float) -> None:
        entry, store = current.entry, self._store
        if entry.state is not State.DURABLE:
            self._end(current)
            return
        if current.done == 0:
            current.page = self._read(entry, 0, PAGE, now_s).tobytes()
            store.check_header(entry, current.page)
            if entry.codec != RAW or entry.sealed:
                room_bytes = store.coder.unpack_bytes(entry.codec, entry.stored_bytes)
                current.gathered = np.empty(room_bytes, dtype=np.uint8)
        nbytes = min(_PIECE_BYTES, entry.stored_bytes - current.done)
        if nbytes:
            piece = self._read(entry, HEADER_BYTES + current.done, padded(nbytes), now_s)[:nbytes]
            if current.gathered is None:
                current.total += piece_sum(piece, current.done // PIECE_BYTES, nbytes)
            else:
                current.gathered[current.done : current.done + nbytes] = piece
            current.done += nbytes
        if current.done == entry.stored_bytes:
            self._check(current)
            self._end(current)

    def _check(self, current: _Current) -> None:
        """Raise CorruptObject unless what was read is the payload that it should be."""
        entry, coder = current.entry, self._store.coder
        if current.gathered is None:
            fits = combine([current.total], entry.meta.nbytes) == entry.meta.checksum
        else:
            payload: Bytes = np.empty(entry.meta.nbytes, dtype=np.uint8)
            header = self._store.check_header(entry, current.page)
            coder.unpack(header, current.page, current.gathered, payload)
            fits = coder.fits(header, payload)
        if not fits:
            raise CorruptObject(f"the bytes of {entry.meta.object_id} do not match their checksum")

    def _read(self, entry: Entry, offset: int, nbytes: int, now_s: float) -> Bytes:
        into = self._scratch.bounce[:nbytes]
        self._pace.begin(now_s, nbytes)
        self.stats.read_bytes += nbytes
        try:
            self._store.segments.read_pages(entry.segment, entry.at + offset, into)
        except OSError as problem:
            if is_unreadable(problem):
                raise CorruptObject(f"{entry.meta.object_id} cannot be read: {problem}") from problem
            raise
        return into

    def _end(self, current: _Current) -> None:
        self._current = None
        self._place = (current.entry.segment, current.entry.at + current.entry.room)
        with self._store.lock:
            self._store.ledger.unpin(current.entry)


class ScrubThread:
    """Runs a scrubber until `stop`."""

    def __init__(self, scrubber: Scrubber) -> None:
        self._scrubber = scrubber
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvtier-disk-scrub", daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, bytes]:
        """End the thread; answers what to keep in the index."""
        self._stopping.set()
        self._thread.join()
        return self._scrubber.stop()

    def _run(self) -> None:
        step_back()
        wait_s = 0.0
        while not self._stopping.wait(wait_s):
            wait_s = self._scrubber.step(time.monotonic())
