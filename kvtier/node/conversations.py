"""Names for chains of blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from kvtier.errors import CorruptObject
from kvtier.node.blocks import ConversationId, Private
from kvtier.records import frame, unframe


class Head(NamedTuple):
    """The end of one branch. private: (from which token on nothing is shared, salt), or None."""

    key: bytes
    tokens: int
    root_key: bytes
    fingerprint: bytes
    private: Private | None
    parked_at_s: float


@dataclass(slots=True)
class Conversation:
    """One parked conversation. heads: branches, the newest last. Times are Unix seconds.

    codec: the one that was asked for on disk, or ''.  durable: keys of ends that the disk has all of.
    earlier: such ends that were continued, by turns which the disk does not have yet; after power loss the
    conversation ends there.  recorded: the disk has, or may have, a record of it that this node wrote or
    read.  after: ids of the tombstones of its name that this node had carried out when it began.
    """

    tenant: str
    name: str
    version: int = 0
    heads: list[Head] = field(default_factory=list)
    earlier: list[Head] = field(default_factory=list)
    durable: set[bytes] = field(default_factory=set)
    returns_at_s: float | None = None
    keep_until_s: float | None = None
    codec: str = ""
    recorded: bool = False
    after: tuple[str, ...] = ()

    @property
    def id(self) -> ConversationId:
        """(tenant, name)."""
        return (self.tenant, self.name)

    @property
    def ends(self) -> list[Head]:
        """Where a restore after power loss or now may end, the newest last."""
        return [*self.earlier, *self.heads]

    def set_head(self, head: Head, replaces: set[bytes], at_most: int) -> None:
        """Make `head` the newest; branches that end in a block of `replaces` are continued by it.

        The oldest branches above `at_most` lose their name, but are still the conversation's to forget.
        """
        continued = [h for h in self.heads if h.key in replaces and h.key in self.durable]
        self.earlier = [*self.earlier, *continued][-at_most:]
        self.heads = [h for h in self.heads if h.key not in replaces and h.key != head.key]
        self.heads = [*self.heads, head][-at_most:]
        self.version += 1

    def keep_end(self, head: Head) -> None:
        """Have the end at `head` in the record, also when it was continued meanwhile."""
        if all(h.key != head.key for h in self.ends):
            self.earlier.append(head)

    def reached_disk(self, head: Head, replaces: set[bytes]) -> None:
        """The end at `head` is on disk, and so is the record that says so."""
        self.keep_end(head)
        self.earlier = [h for h in self.earlier if h.key not in replaces]
        self.durable = {h.key for h in self.ends if h.key in self.durable or h.key == head.key}

    def left_disk(self, end: Head, before: Head | None) -> None:
        """What lies behind `before` of this end is not on disk any more; None: there is nothing of it."""
        self.durable.discard(end.key)
        self.earlier = [h for h in self.earlier if h.key != end.key]
        if before is not None and all(h.key != before.key for h in self.ends):
            self.earlier.append(before)
        if before is not None:
            self.durable.add(before.key)
        self.version += 1

    def lost(self, key: bytes, before: Head | None) -> None:
        """The block at `key` is nowhere any more: branches that ended there end at `before`.

        When nothing is left of the last branch, the newest end that was continued is the head again.
        """
        self.heads = _moved(self.heads, key, before)
        self.earlier = [h for h in _moved(self.earlier, key, before) if h not in self.heads]
        if self.earlier and not self.heads:
            self.heads.append(self.earlier.pop())
        self.durable.discard(key)
        self.version += 1

    def continues(self, record: Conversation, at_most: int) -> None:
        """This conversation was parked before its record from an earlier time was read: both count."""
        keys = {head.key for head in self.heads}
        self.heads = [*(h for h in record.heads if h.key not in keys), *self.heads][-at_most:]
        self.durable |= record.durable
        self.version = max(self.version, record.version) + 1
        self.codec = self.codec or record.codec
        self.recorded = True

    def privates(self) -> list[Private | None]:
        """The distinct ways in which branches of this conversation were keyed, newest first."""
        found: list[Private | None] = []
        for head in reversed(self.ends):
            if head.private not in found:
                found.append(head.private)
        return found

    def to_bytes(self) -> bytes:
        """As the disk index keeps it."""
        body = msgspec.msgpack.encode(
            _Body(self.ends, self.returns_at_s, self.keep_until_s, self.codec, self.after)
        )
        return frame(self.tenant, self.name, self.version, body)


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    """What a record says."""

    heads: list[Head]
    returns_at_s: float | None
    keep_until_s: float | None
    codec: str
    after: tuple[str, ...] = ()


_decode = msgspec.msgpack.Decoder(_Body).decode


def from_bytes(tenant: str, name: str, version: int, data: bytes) -> Conversation:
    """The reverse of `Conversation.to_bytes`. Raises CorruptObject for anything else."""
    body = unframe(tenant, name, version, data)
    try:
        said = _decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as problem:
        raise CorruptObject(f"the record of a conversation makes no sense: {problem}") from problem
    return Conversation(
        tenant,
        name,
        version,
        said.heads,
        durable={head.key for head in said.heads},
        returns_at_s=said.returns_at_s,
        keep_until_s=said.keep_until_s,
        codec=said.codec,
        recorded=True,
        after=said.after,
    )


def _moved(heads: list[Head], key: bytes, before: Head | None) -> list[Head]:
    """The heads with `before` in the place of the one at `key`."""
    if before is None or any(h.key == before.key for h in heads):
        return [h for h in heads if h.key != key]
    return [before if h.key == key else h for h in heads]
