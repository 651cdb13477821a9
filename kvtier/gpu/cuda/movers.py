"""The three ways to move a load, behind one interface. Each queues its work and answers at once.

Not run on a GPU yet.

A lane has two streams: `copies`, whose work the copy engines do, and `kernels`.  With one stream the link
would stand still while a kernel collects the next load; with two, load n+1 is collected while load n is on
its way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvtier.checksum import PIECE_BYTES
from kvtier.gpu.cuda.device import Device, Event, Kernel, Stream, Words
from kvtier.gpu.cuda.events import EventPool
from kvtier.gpu.cuda.memory import StagingRing
from kvtier.gpu.cuda.shapes import pieces_of
from kvtier.gpu.cuda.ways import Way
from kvtier.gpu.cuda.work import SEGMENT, Live, Load
from kvtier.gpu.engine import Direction

# From here on a call of its own for each copy costs nothing beside the copy.
PLAIN_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Track:
    """What the loads of one direction share."""

    device: Device
    direction: Direction
    copies: Stream
    kernels: Stream
    ring: StagingRing
    events: EventPool

    @property
    def first(self) -> Stream:
        """The stream that a staged load goes through first."""
        return self.kernels if self.direction == "gather" else self.copies

    @property
    def last(self) -> Stream:
        """The stream that a staged load ends on."""
        return self.copies if self.direction == "gather" else self.kernels

    def join(self, used: list[Event]) -> None:
        """What comes next on `last` begins after all that is queued on `first`."""
        event = self.events.take()
        used.append(event)
        self.device.record(event, self.first)
        self.device.wait(self.last, event)


class Mover(Protocol):
    """One way. used: takes the events that are to be given back when the batch is done."""

    def move(
        self, track: Track, load: Load, items: Sequence[Live], segments: int, used: list[Event]
    ) -> Event:
        """Queue the load; the event after which it is in place. segments: address of its descriptors."""


class BatchMover:
    """Copies straight between pages and slots, many in one call."""

    def move(
        self, track: Track, load: Load, items: Sequence[Live], segments: int, used: list[Event]
    ) -> Event:
        """See Mover."""
        found = [pieces_of(items[p.live].shape, items[p.live].ids, p.lo, p.hi) for p in load.parts]
        hosts = [items[p.live].host + pieces.offset for p, pieces in zip(load.parts, found, strict=True)]
        pool = np.concatenate([pieces.address for pieces in found]).astype(np.uint64)
        host = np.concatenate(hosts).astype(np.uint64)
        sizes = np.concatenate([pieces.nbytes for pieces in found]).astype(np.uint64)
        targets, sources = (host, pool) if track.direction == "gather" else (pool, host)
        large = sizes >= PLAIN_BYTES
        for target, source, nbytes in zip(*_lists(targets, sources, sizes, large), strict=True):
            track.device.copy(target, source, nbytes, track.copies)
        if not large.all():
            small = ~large
            track.device.copy_batch(targets[small], sources[small], sizes[small], track.copies)
        return _end(track, track.copies, used)


class StagedMover:
    """A kernel between pages and staging, one copy for each slot between staging and host."""

    def move(
        self, track: Track, load: Load, items: Sequence[Live], segments: int, used: list[Event]
    ) -> Event:
        """See Mover."""
        slot = track.ring.take()
        if slot.used:
            track.device.wait(track.first, slot.free)
        if track.direction == "gather":
            self._kernel(track, load, segments, slot.address)
            track.join(used)
            self._copies(track, load, items, slot.address)
        else:
            self._copies(track, load, items, slot.address)
            track.join(used)
            self._kernel(track, load, segments, slot.address)
        track.device.record(slot.free, track.last)
        slot.used = True
        return _end(track, track.last, used)

    def _kernel(self, track: Track, load: Load, segments: int, staging: int) -> None:
        track.device.launch(track.direction, segments, len(load.parts), load.tiles, staging, track.kernels)

    def _copies(self, track: Track, load: Load, items: Sequence[Live], staging: int) -> None:
        for part in load.parts:
            host, there = items[part.live].host + part.lo, staging + part.linear
            target, source = (host, there) if track.direction == "gather" else (there, host)
            track.device.copy(target, source, part.hi - part.lo, track.copies)


class DirectMover:
    """A kernel that reaches over the link itself."""

    def move(
        self, track: Track, load: Load, items: Sequence[Live], segments: int, used: list[Event]
    ) -> Event:
        """See Mover."""
        track.device.launch(track.direction, segments, len(load.parts), load.tiles, 0, track.kernels)
        return _end(track, track.kernels, used)


@dataclass(frozen=True, slots=True)
class CodedMover:
    """Quantises between pages and staging; one large copy of the encoded bytes, which are hashed in staging.

    form: see work.form_of.  verify: whether to hash.  results, losses: where they go on the device.  scales:
    room there for each item's.
    """

    form: int
    verify: bool
    results: int
    losses: int
    scales: Sequence[int]

    def move(
        self, track: Track, load: Load, items: Sequence[Live], segments: int, used: list[Event]
    ) -> Event:
        """See Mover. The load is a part of one item."""
        slot, part = track.ring.take(), load.parts[0]
        device, there = track.device, slot.address
        if slot.used:
            device.wait(track.first, slot.free)
        host, nbytes = items[part.live].host + part.lo, part.hi - part.lo
        if track.direction == "gather":
            self._launch(track, "encode", load, segments, there, self.losses)
            self._hash(track, load, segments, there)
            track.join(used)
            device.copy(host, there, nbytes, track.copies)
        else:
            device.copy(there, host, nbytes, track.copies)
            track.join(used)
            kept = min(part.hi, items[part.live].scale_bytes) - part.lo
            if kept > 0:
                # They come first in an object; later loads need them when this staging is another's.
                device.copy(self.scales[part.live] + part.lo, there, kept, track.kernels)
            self._hash(track, load, segments, there)
            self._launch(track, "decode", load, segments, there, self.scales[part.live])
        device.record(slot.free, track.last)
        slot.used = True
        return _end(track, track.last, used)

    def _hash(self, track: Track, load: Load, segments: int, there: int) -> None:
        if self.verify:
            pieces = -(-load.nbytes // PIECE_BYTES)
            more = (self.form, self.results)
            track.device.launch("hash", segments, 1, pieces, there, track.kernels, more)

    def _launch(
        self, track: Track, kernel: Kernel, load: Load, segments: int, there: int, extra: int
    ) -> None:
        more = (self.form, extra)
        track.device.launch(kernel, segments, 1, load.tiles, there, track.kernels, more)


MOVERS: dict[Way, Mover] = {"batch": BatchMover(), "staged": StagedMover(), "direct": DirectMover()}


def segments_address(blob: int, moves: int, load: Load) -> int:
    """Where a load's first descriptor is on the device."""
    return blob + moves + load.first * SEGMENT.itemsize


def _end(track: Track, stream: Stream, used: list[Event]) -> Event:
    event = track.events.take()
    used.append(event)
    track.device.record(event, stream)
    return event


def _lists(targets: Words, sources: Words, sizes: Words, chosen: npt.NDArray[np.bool_]) -> list[list[int]]:

    return [column[chosen].tolist() for column in (targets, sources, sizes)]
