"""A node's side of the streams: collects what changed and makes it into messages. Pure.

Several changes of one block between two messages become one.  A message is sent again, unchanged, until it is
answered; the directory takes it once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import NamedTuple, TypeVar

from kvtier.directory.announcements import (
    HINT_BYTES,
    MOST_BLOCKS,
    MOST_RECORDS,
    Announcement,
    Answer,
    Layout,
    Phase,
    Record,
    Run,
    Tombstone,
)
from kvtier.directory.routing import shard_of_conversation, shards_of

# Changes that wait for a directory that is away; of more, the whole is said instead.
_MOST_CHANGES = 1 << 18
Key = TypeVar("Key")
Value = TypeVar("Value")


class Holding(NamedTuple):
    """What a node has of a block. host, disk: bits of the layout's whole parts; both 0: nothing any more."""

    tenant: str
    layout: Layout
    tokens: int
    host: int
    disk: int


class _Contents:
    """What is to be said: by hint, by conversation, by tombstone id; the latest of each."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, Holding] = {}
        self.records: dict[tuple[str, str], Record] = {}
        self.tombstones: dict[str, Tombstone] = {}

    def __bool__(self) -> bool:
        return bool(self.blocks or self.records or self.tombstones)


class Sender:
    """The stream to one shard of the directory.

    wants_snapshot: the next thing has to be `snapshot`; until then nothing is sent.  fenced: a later epoch
    of this node was there; nothing is ever sent again.
    """

    def __init__(self, node: str, epoch: int, shard: int, shards: int) -> None:
        self._who = (node, epoch, shard, shards)
        self._number = -1
        self._changes = _Contents()
        self._rest: _Contents | None = None
        self._is_first = False
        self._probes = False
        self._flight: Announcement | None = None
        self.wants_snapshot = True
        self.fenced = False

    def block(self, hint: bytes, holding: Holding) -> None:
        """The node has this of a block from now on."""
        self._changes.blocks[hint] = holding
        self._bound()

    def record(self, record: Record) -> None:
        """A conversation is like this from now on; without ends, and a version that is no lower: ended."""
        self._changes.records[record.tenant, record.conversation] = record
        self._bound()

    def tombstone(self, stone: Tombstone) -> None:
        """The node has carried this out."""
        self._changes.tombstones[stone.id] = stone

    def probe(self) -> None:
        """Have a message sent even if nothing changed: a directory that was lost asks for a snapshot then."""
        self._probes = True

    def snapshot(
        self, blocks: Mapping[bytes, Holding], records: Iterable[Record], tombstones: Iterable[Tombstone]
    ) -> None:
        """Begin anew with all that the node has for this shard; what waited to be said is a part of it."""
        rest = _Contents()
        rest.blocks.update(blocks)
        rest.records.update({(r.tenant, r.conversation): r for r in records})
        rest.tombstones.update({stone.id: stone for stone in tombstones})
        self.begin(rest)

    def begin(self, rest: _Contents) -> None:
        """The same with what was put together for this sender, which has it from now on."""
        # Of these others tell, from threads of their own: one may have come since `rest` was made.
        rest.tombstones.update(self._changes.tombstones)
        self._rest, self._is_first, self._flight = rest, True, None
        self._changes = _Contents()
        self.wants_snapshot = False

    def next(self) -> Announcement | None:
        """The message to send now: the one that is not answered yet, or a new one; None: nothing to say."""
        if self.fenced or self.wants_snapshot:
            return None
        if self._flight is None and (self._rest is not None or self._changes or self._probes):
            self._number += 1
            self._probes = False
            self._flight = self._make()
        return self._flight

    def answered(self, answer: Answer) -> None:
        """The directory answered the message of `next`."""
        if answer.fenced:
            self.fenced = True
        elif answer.snapshot:
            self.wants_snapshot = True
            self._flight = self._rest = None
        elif self._flight is not None and answer.number >= self._flight.number:
            self._flight = None

    def _bound(self) -> None:
        if len(self._changes.blocks) + len(self._changes.records) > _MOST_CHANGES:
            stones, self._changes = self._changes.tombstones, _Contents()
            self._changes.tombstones = stones
            self._flight = self._rest = None
            self.wants_snapshot = True

    def _make(self) -> Announcement:
        source = self._changes if self._rest is None else self._rest
        # What a conversation's record may rest on goes before it.
        stones = _take(source.tombstones, MOST_RECORDS)
        blocks = _take(source.blocks, MOST_BLOCKS)
        records = [] if source.blocks else _take(source.records, MOST_RECORDS)
        node, epoch, shard, shards = self._who
        layouts, runs = _runs(blocks)
        return Announcement(
            node=node,
            epoch=epoch,
            number=self._number,
            shard=shard,
            shards=shards,
            phase=self._phase(),
            layouts=layouts,
            runs=runs,
            records=tuple(record for _, record in records),
            tombstones=tuple(stone for _, stone in stones),
        )

    def _phase(self) -> Phase:
        if self._rest is None:
            return "change"
        first, self._is_first = self._is_first, False
        if self._rest:
            return "begin" if first else "more"
        self._rest = None
        return "whole" if first else "end"


class Announcer:
    """The streams of one incarnation of a node to all shards of the directory; senders by shard.

    A snapshot is put together in parts, so that none of them takes long: `begin`, `add` for each, `end`.
    What is said meanwhile by `block` and `record` is later than the parts before it, and counts.
    """

    def __init__(self, node: str, epoch: int, shards: int) -> None:
        self.senders = [Sender(node, epoch, shard, shards) for shard in range(shards)]
        # The snapshots that are being put together, by shard.
        self._parts: dict[int, _Contents] = {}

    def block(self, key: bytes, holding: Holding) -> None:
        """The node has this of a block from now on. key: 32 bytes, or their first HINT_BYTES."""
        hint = key[:HINT_BYTES]
        shard = int(shards_of(hint, len(self.senders))[0])
        self.senders[shard].block(hint, holding)
        if shard in self._parts:
            self._parts[shard].blocks[hint] = holding

    def record(self, record: Record) -> None:
        """See `Sender.record`."""
        self._of(record.tenant, record.conversation).record(record)
        self._add_record(record)

    def tombstone(self, stone: Tombstone) -> None:
        """See `Sender.tombstone`."""
        self._of(stone.tenant, stone.conversation).tombstone(stone)

    def snapshot(
        self,
        blocks: Mapping[bytes, Holding],
        records: Iterable[Record],
        tombstones: Iterable[Tombstone],
    ) -> None:
        """All at once, where there is little. blocks: by hint."""
        self.begin()
        self.add(blocks, records)
        self.end(tombstones)

    def begin(self) -> None:
        """Put together a snapshot for the senders that want one now; one that was begun is left."""
        self._parts = {shard: _Contents() for shard, one in enumerate(self.senders) if one.wants_snapshot}

    def add(self, blocks: Mapping[bytes, Holding], records: Iterable[Record]) -> None:
        """Some of what the node has now. blocks: by hint."""
        shard_of = shards_of(b"".join(blocks), len(self.senders)).tolist()
        for (hint, holding), shard in zip(blocks.items(), shard_of, strict=True):
            if shard in self._parts:
                self._parts[shard].blocks[hint] = holding
        for record in records:
            self._add_record(record)

    def end(self, tombstones: Iterable[Tombstone]) -> None:
        """That was all: the senders have their snapshots."""
        for stone in tombstones:
            shard = shard_of_conversation(stone.tenant, stone.conversation, len(self.senders))
            if shard in self._parts:
                self._parts[shard].tombstones[stone.id] = stone
        for shard, part in self._parts.items():
            if self.senders[shard].wants_snapshot:
                self.senders[shard].begin(part)
        self._parts = {}

    def _add_record(self, record: Record) -> None:
        shard = shard_of_conversation(record.tenant, record.conversation, len(self.senders))
        if shard in self._parts:
            self._parts[shard].records[record.tenant, record.conversation] = record

    def _of(self, tenant: str, conversation: str) -> Sender:
        return self.senders[shard_of_conversation(tenant, conversation, len(self.senders))]


def _take(source: dict[Key, Value], at_most: int) -> list[tuple[Key, Value]]:
    taken = list(islice(source.items(), at_most))
    for key, _ in taken:
        del source[key]
    return taken


def _runs(blocks: Iterable[tuple[bytes, Holding]]) -> tuple[tuple[Layout, ...], tuple[Run, ...]]:
    """Blocks put together that the node has the same of."""
    keys: dict[Holding, list[bytes]] = {}
    for hint, holding in blocks:
        keys.setdefault(holding, []).append(hint)
    layouts: dict[Layout, int] = {}
    runs = tuple(
        Run(h.tenant, layouts.setdefault(h.layout, len(layouts)), h.tokens, h.host, h.disk, b"".join(hints))
        for h, hints in keys.items()
    )
    return tuple(layouts), runs
