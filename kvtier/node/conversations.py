"""Names for chains of blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgpack

from kvtier.node.blocks import ConversationId


class Head(NamedTuple):
    """The end of one branch. private: (from which token on nothing is shared, salt), or None."""

    key: bytes
    tokens: int
    root_key: bytes
    fingerprint: bytes
    private: tuple[int, bytes] | None
    parked_at_s: float


@dataclass(slots=True)
class Conversation:
    """One parked conversation. heads: branches, the newest last. Times are Unix seconds."""

    tenant: str
    name: str
    version: int = 0
    heads: list[Head] = field(default_factory=list)
    returns_at_s: float | None = None
    keep_until_s: float | None = None

    @property
    def id(self) -> ConversationId:
        """(tenant, name)."""
        return (self.tenant, self.name)

    def set_head(self, head: Head, replaces: set[bytes], at_most: int) -> list[Head]:
        """Make `head` the newest; branches that end in a block of `replaces` are continued by it.

        Answers the branches that were dropped because there are more than `at_most`.
        """
        self.heads = [h for h in self.heads if h.key not in replaces and h.key != head.key]
        self.heads.append(head)
        dropped, self.heads = self.heads[:-at_most], self.heads[-at_most:]
        self.version += 1
        return dropped

    def privates(self) -> list[tuple[int, bytes] | None]:
        """The distinct ways in which branches of this conversation were keyed, newest first."""
        found: list[tuple[int, bytes] | None] = []
        for head in reversed(self.heads):
            if head.private not in found:
                found.append(head.private)
        return found

    def to_bytes(self) -> bytes:
        """As the disk index keeps it."""
        packed: bytes = msgpack.packb(
            {
                "heads": [list(h) for h in self.heads],
                "returns_at_s": self.returns_at_s,
                "keep_until_s": self.keep_until_s,
            }
        )
        return packed


def from_bytes(tenant: str, name: str, version: int, data: bytes) -> Conversation:
    """The reverse of `Conversation.to_bytes`."""
    fields: dict[str, Any] = msgpack.unpackb(data)
    heads = [
        Head(key, tokens, root_key, fingerprint, tuple(private) if private else None, parked_at_s)
        for key, tokens, root_key, fingerprint, private, parked_at_s in fields["heads"]
    ]
    return Conversation(
        tenant, name, version, heads, fields.get("returns_at_s"), fields.get("keep_until_s")
    )
