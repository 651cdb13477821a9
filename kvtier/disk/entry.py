"""One slot of the disk tier while something happens to it, and what the index does not know of it yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvtier.disk.buffers import padded
from kvtier.disk.codecs import RAW
from kvtier.disk.header import HEADER_BYTES
from kvtier.disk.rows import ObjectRow
from kvtier.objects import ObjectMeta
from kvtier.states import State, check_move
from kvtier.tier import Slot

if TYPE_CHECKING:
    from kvtier.disk.sealing import DataKey


def room_for(stored_bytes: int) -> int:
    """Bytes on disk of an object stored in `stored_bytes`: a header page and whole pages of payload."""
    return HEADER_BYTES + padded(stored_bytes)


@dataclass(slots=True, eq=False)
class Entry:
    """One slot in use.

    pins: I/O calls of this process that touch its room now.  codec, stored_bytes, sealed: how its payload
    stands on disk, once it is written.  key: what it was sealed with, until it is committed.
    """

    slot_id: int
    generation: int
    meta: ObjectMeta
    segment: int
    at: int
    room: int
    state: State
    stored_bytes: int
    codec: str = RAW
    sealed: bool = False
    key: DataKey | None = None
    writer: str = ""
    pins: int = 0
    written: bool = False
    failed: bool = False
    committing: bool = False
    in_index: bool = False
    in_limbo: bool = False
    settled: bool = False

    @property
    def slot(self) -> Slot:
        """The slot as its owner knows it."""
        return Slot(self.slot_id, self.generation, (self.segment, self.at), self.meta.nbytes)

    @property
    def row(self) -> ObjectRow:
        """What the books keep of a committed entry."""
        place = (self.generation, self.segment, self.at, self.stored_bytes)
        return ObjectRow(self.meta, *place, self.codec, sealed=self.sealed)

    def move(self, state: State) -> None:
        """Change the state along the table."""
        check_move(self.state, state)
        self.state = state


def entry_of(slot_id: int, row: ObjectRow) -> Entry:
    """An entry of what the index lists."""
    state = State.QUARANTINED if row.quarantined else State.DURABLE
    place = (row.segment, row.at, room_for(row.stored_bytes))
    entry = Entry(slot_id, row.sequence, row.meta, *place, state, row.stored_bytes, row.codec, row.sealed)
    entry.in_index = True
    return entry


@dataclass(slots=True)
class Changes:
    """What the index does not know yet, and generations whose writes were given up before it knew them."""

    drop: list[Entry] = field(default_factory=list)
    quarantine: list[Entry] = field(default_factory=list)
    given_up: list[int] = field(default_factory=list)
