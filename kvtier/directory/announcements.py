"""What nodes tell the directory, and what it answers.

A node sends each shard of the directory one stream: (node, epoch, number), in turn, each message answered
before the next.  A stream begins with a snapshot, from `begin` to `end`, and goes on with changes.  What a
message says of a block is its whole state at that node, and not a difference: saying it twice does no harm.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

# What the directory keeps of a block's key: hints need no more (see docs/cluster.md).
HINT_BYTES = 16
# Most parts of a layout: they are bits of one number.
MOST_PARTS = 64
# With these bounds a message stays under 100 KB.
MOST_BLOCKS, MOST_RECORDS = 4096, 128

Phase: TypeAlias = Literal["change", "begin", "more", "end", "whole"]


class Part(msgspec.Struct, frozen=True, array_like=True):
    """One layer group in one shard. bytes of a token; of the whole for kind 'state'.

    kind, window_tokens: as in `geometry.GroupGeometry`.
    """

    group: int
    kind: Literal["full", "sliding", "state"]
    shard: str
    nbytes: int
    window_tokens: int = 0


class Layout(msgspec.Struct, frozen=True, array_like=True):
    """What a whole block consists of. Groups that a shard has nothing of are left out."""

    block_tokens: int
    parts: tuple[Part, ...]


class Run(msgspec.Struct, frozen=True, array_like=True):
    """Blocks of which the node has the same. keys: the first HINT_BYTES of each key, one after the other.

    layout: index into the message's layouts.  host, disk: bit n is set where part n of the layout is whole
    in that tier; both 0: the node has nothing of them any more.
    """

    tenant: str
    layout: int
    tokens: int
    host: int
    disk: int
    keys: bytes


class End(msgspec.Struct, frozen=True, array_like=True):
    """Where a branch of a conversation ends.

    key: the first HINT_BYTES of its last block's.  private: from which token on nothing is shared, and
    the salt, or None.  model: the first bytes of its fingerprint, for people.
    """

    key: bytes
    tokens: int
    parked_at_s: float
    private: tuple[int, bytes] | None = None
    model: bytes = b""


class Record(msgspec.Struct, frozen=True, array_like=True):
    """A conversation at a node. ends: newest last; none: the node has it no longer.

    after: the tombstones of this name that the node had carried out when it was parked.
    """

    tenant: str
    conversation: str
    version: int
    ends: tuple[End, ...]
    after: tuple[str, ...] = ()
    returns_at_s: float | None = None
    keep_until_s: float | None = None


class Tombstone(msgspec.Struct, frozen=True, array_like=True):
    """A conversation was forgotten. id: unique in the cluster. nodes: that the forgetting node knew of then.

    It kills every record that does not name it in `after`.
    """

    id: str
    tenant: str
    conversation: str
    at_s: float
    nodes: tuple[str, ...]


class Announcement(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="dir_announce"):
    """One message of a stream. shard, shards: which part of the directory it is for, of how many.

    number: grows by one with each message of (node, epoch); a `begin` or `whole` may have any higher one.
    tombstones: that the node has carried out, its own among them.
    """

    node: str
    epoch: int
    number: int
    shard: int
    shards: int
    phase: Phase = "change"
    layouts: tuple[Layout, ...] = ()
    runs: tuple[Run, ...] = ()
    records: tuple[Record, ...] = ()
    tombstones: tuple[Tombstone, ...] = ()


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="dir_answer"):
    """Answer to an announcement. number: of the last one that counts.

    snapshot: a new one is needed.  fenced: a later epoch of the node was there; nothing of this one counts.
    forget: what the node has to forget and then to send back.  over: tombstones that all nodes have carried
    out, which need not be kept.
    """

    number: int
    snapshot: bool = False
    fenced: bool = False
    forget: tuple[Tombstone, ...] = ()
    over: tuple[str, ...] = ()
