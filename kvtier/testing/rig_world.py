"""The world around a node's core, with content instead of bytes: pools, slots and a disk.

A row is what the KV of one token is: a name of the model, tenant, shard, layer group and of all tokens up to
it.  So a slot that was reused too early, a block under a wrong key or a copy that came too late shows as a
row that is not the right one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple, TypeAlias

from kvtier.geometry import Geometry
from kvtier.host.allocator import ALIGN_BYTES, room_bytes
from kvtier.messages.tiers import WireItem, WireMeta, WireRecord, WireRoot


class Row(NamedTuple):
    """The KV of one token. origin: the conversation that shares it with no other, or ''."""

    fingerprint: bytes
    tenant: str
    shard: str
    group: int
    prefix: bytes
    origin: str


Content: TypeAlias = tuple[object, ...]
Address: TypeAlias = tuple[int, int]
Key: TypeAlias = tuple[bytes, int, str]
TORN: Content = ("torn",)
FLIPPED = "flipped"


@lru_cache(maxsize=1 << 16)
def content_sum(content: Content) -> int:
    """A checksum of content, the same in each process."""
    return int.from_bytes(hashlib.blake2b(repr(content).encode(), digest_size=8).digest(), "little")


def flipped(content: Content) -> Content:
    """The content with a bit of it flipped."""
    return (FLIPPED, *content)


@dataclass(frozen=True)
class Text:
    """Tokens as one conversation of one model and shard computes them.

    private_from: from which token on its KV is like no other's; None when it is like everybody's.
    """

    fingerprint: bytes
    tenant: str
    shard: str
    conversation: str
    tokens: tuple[int, ...]
    private_from: int | None = None

    @cached_property
    def prefixes(self) -> list[bytes]:
        """For each position a name of all tokens up to it."""
        names, before = [], b""
        for token in self.tokens:
            before = hashlib.blake2b(before + token.to_bytes(4, "little"), digest_size=8).digest()
            names.append(before)
        return names

    def row(self, group: int, position: int) -> Row:
        """The KV of the token at `position`."""
        private = self.private_from is not None and position >= self.private_from
        origin = self.conversation if private else ""
        return Row(self.fingerprint, self.tenant, self.shard, group, self.prefixes[position], origin)

    def accepts(self, row: object, group: int, position: int) -> bool:
        """Whether the row is the right one here: of this text, and nobody else's private one."""
        right = self.row(group, position)
        return (
            isinstance(row, Row)
            and row._replace(origin="") == right._replace(origin="")
            and (row.origin in ("", self.conversation))
        )


@dataclass
class Pages:
    """A worker's pages of one request: rows by (group, position)."""

    text: Text
    geometry: Geometry
    rows: dict[tuple[int, int], object] = field(default_factory=dict)

    def fill(self, held_from: Sequence[int]) -> None:
        """As the engine computed them; of each group from a position on."""
        for group in range(len(self.geometry.groups)):
            first = held_from[group] if held_from else 0
            for position in range(first, len(self.text.tokens)):
                self.rows[group, position] = self.text.row(group, position)

    def gather(self, item: WireItem) -> Content:
        """What a gather of this object reads."""
        return tuple(self.rows.get((item.group, at), "not held") for at in self._positions(item))

    def scatter(self, item: WireItem, content: Content) -> None:
        """Write an object's rows."""
        positions = self._positions(item)
        for index, at in enumerate(positions):
            self.rows[item.group, at] = content[index] if len(content) == len(positions) else TORN

    def wrong_rows(self, tokens: int) -> list[tuple[int, int]]:
        """(group, position) of what is needed to go on after `tokens` and is not right."""
        wrong = []
        for group, shape in enumerate(self.geometry.groups):
            if shape.empty:
                continue
            first = tokens - 1 if shape.kind == "state" else shape.needed_from(tokens)
            for at in range(first, tokens):
                if not self.text.accepts(self.rows.get((group, at)), group, at):
                    wrong.append((group, at))
        return wrong

    def _positions(self, item: WireItem) -> range:
        end = item.start + item.tokens
        if self.geometry.groups[item.group].kind == "state":
            return range(end - 1, end)
        return range(item.start + item.first_valid, end)


class Memory:
    """What lies in the arena, by units of ALIGN_BYTES: an object that was partly overwritten is torn."""

    def __init__(self) -> None:
        self._units: dict[Address, tuple[Content, int]] = {}

    def write(self, item: WireItem, content: Content) -> None:
        """Put content where the item's slot is."""
        for index, unit in enumerate(_units(item)):
            self._units[unit] = (content, index)

    def read(self, item: WireItem) -> Content:
        """What lies where the item's slot is."""
        found = [self._units.get(unit) for unit in _units(item)]
        first = found[0]
        if first is None or any(f is None or f[0] is not first[0] or f[1] != i for i, f in enumerate(found)):
            return TORN
        return first[0]


def _units(item: WireItem) -> list[Address]:
    end = item.offset + room_bytes(item.nbytes)
    return [(item.arena, at) for at in range(item.offset, end, ALIGN_BYTES)]


class OnDisk(NamedTuple):
    """One durable object."""

    meta: WireMeta
    root: WireRoot
    content: Content

    @property
    def corrupt(self) -> bool:
        """Whether a check finds it to be wrong."""
        return content_sum(self.content) != self.meta.checksum


@dataclass
class DiskStore:
    """What survives everything: objects and records. capacity_bytes: as the real one counts them."""

    capacity_bytes: int
    objects: dict[Key, OnDisk] = field(default_factory=dict)
    records: dict[tuple[str, str], WireRecord] = field(default_factory=dict)
    models: dict[bytes, str] = field(default_factory=dict)
    quarantined: int = 0
    broken: bool = False

    @property
    def used_bytes(self) -> int:
        """Payloads in whole units, each with a unit for its header."""
        return sum(room_bytes(o.meta.nbytes) + ALIGN_BYTES for o in self.objects.values())

    def put(self, objects: Iterable[OnDisk], records: Iterable[WireRecord]) -> str:
        """Make all of it durable or nothing; answers why not, or ''.

        What has more rows than the one that is there is written beside it, and takes its place at the end.
        """
        if self.broken:
            return "disk_error"
        new = {_key(o.meta): o for o in objects if not self._has_all_of(o.meta)}
        needed = sum(room_bytes(o.meta.nbytes) + ALIGN_BYTES for o in new.values())
        if self.used_bytes + needed > self.capacity_bytes:
            return "disk_full"
        self.objects.update(new)
        for record in records:
            self._put_record(record)
        return ""

    def _has_all_of(self, meta: WireMeta) -> bool:
        known = self.objects.get(_key(meta))
        return known is not None and known.meta.first_valid <= meta.first_valid

    def _put_record(self, record: WireRecord) -> None:
        name = (record.tenant, record.conversation)
        before = self.records.get(name)
        if not record.data:
            if before is not None and before.version <= record.version:
                del self.records[name]
        elif before is None or before.version <= record.version:
            self.records[name] = record

    def remove(self, keys: Iterable[Key], records: Iterable[WireRecord]) -> None:
        """Objects and records that are there no longer."""
        for key in keys:
            self.objects.pop(key, None)
        for record in records:
            self._put_record(record)

    def copy(self) -> DiskStore:
        """The same things, independent of this."""
        return DiskStore(
            self.capacity_bytes, dict(self.objects), dict(self.records), dict(self.models), self.quarantined
        )


def _key(meta: WireMeta) -> Key:
    return (meta.block_key, meta.group, meta.shard)
