"""Messages between a node's core and the cluster around it: the directory, and other nodes.

    core -> 'directory'    FindBranches, FindHolders, FindConversations, FindNodes, Holdings, Bury
    'directory' -> core    Branches, Holders, Known, NodesThere, Buried, Erase, Over, Graves, Heard
    core -> 'peers'        AskHolder, AskKeep, PeerRead
    'peers' -> core        TheseAre, Kept, PeerReadDone
    'peer:N' -> core       WhatIs, Lend, GaveBack, Keep, Erase  (N: of the other node's question)
    core -> 'peer:N'       TheseAre, Lent, Kept, Erased

'directory' and 'peers' are the node's own service, which speaks to them; so the core knows no address, and a
log of its stimuli holds all that it was told.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from kvtier.geometry import Geometry
from kvtier.messages.calls import Message
from kvtier.messages.tiers import WireItem, WireMeta, WireRoot

DIRECTORY, PEERS, PEER = "directory", "peers", "peer:"
# The node's own service, where it wishes something by itself.
SERVICE = "service"
# Blocks that one question about a chain may name, and objects that an answer does: above, fronts are shorter.
MOST_KEYS, MOST_METAS = 16384, 16384
# Nobody waits longer for a Keep's answer.
KEEP_MOST_S = 600.0


class Stone(msgspec.Struct, frozen=True, array_like=True):
    """A conversation was forgotten; see directory.announcements.Tombstone, which has the same fields."""

    id: str
    tenant: str
    conversation: str
    at_s: float
    nodes: tuple[str, ...] = ()


class BranchEnd(msgspec.Struct, frozen=True, array_like=True):
    """Where a branch of a conversation ends at some node. hint: the first 16 bytes of its last key."""

    hint: bytes
    tokens: int
    private: tuple[int, bytes] | None = None


class Chain(msgspec.Struct, frozen=True, array_like=True):
    """Blocks from the first token on. keys: 32 bytes each, one after the other. ends: of each, in tokens."""

    keys: bytes
    ends: list[int]


class Held(msgspec.Struct, frozen=True, array_like=True):
    """What the node has of a block. parts: (layer group, shard, bytes of a token, in host, on disk)."""

    key: bytes
    tenant: str
    tokens: int
    parts: tuple[tuple[int, str, int, bool, bool], ...] = ()


class Named(msgspec.Struct, frozen=True, array_like=True):
    """A conversation at this node. version: larger than of all that was said before. ends: none: it is over.

    after: ids of the tombstones that it came after.
    """

    tenant: str
    conversation: str
    version: int
    ends: tuple[tuple[bytes, int, float, tuple[int, bytes] | None, bytes], ...] = ()
    after: tuple[str, ...] = ()
    returns_at_s: float | None = None
    keep_until_s: float | None = None


class Speed(msgspec.Struct, frozen=True, array_like=True):
    """start_s + bytes / bytes_per_s, with what is before it in its queue."""

    start_s: float
    bytes_per_s: float


class Load(msgspec.Struct, frozen=True, array_like=True):
    """What a node says of itself, for choosing among nodes.

    host, disk: of loads into its pool.  peer: of reads from other nodes.  wait_s: until a worker of it could
    begin to compute.  accepts: whether turns may go there; not where it goes out of service.  room_bytes: of
    host memory, without what only it holds.  domain: what may fail at once with it; '': the node alone.
    takes_bytes: of nodes that are full, so that nothing here goes for it.
    """

    host: Speed
    disk: Speed
    peer: Speed
    wait_s: float = 0.0
    accepts: bool = True
    room_bytes: int = 0
    domain: str = ""
    takes_bytes: int = 0


class Reach(NamedTuple):
    """How far a node could restore a slice of a chain. chain: its index.

    host_bytes, disk_bytes: to load there.  shard: of one of FindHolders.others; '': of the worker's own.
    """

    chain: int
    node: str
    epoch: int
    tokens: int
    host_bytes: int = 0
    disk_bytes: int = 0
    shard: str = ""


# --- core and directory -------------------------------------------------------------------------------


class FindBranches(Message, frozen=True, tag="find_branches"):
    """Where do branches of this conversation end that came after these tombstones?"""

    job: str
    tenant: str
    conversation: str
    after: tuple[str, ...] = ()


class Branches(Message, frozen=True, tag="branches"):
    """Answer to FindBranches, the last parked first; nothing where the directory does not answer."""

    job: str
    ends: tuple[BranchEnd, ...] = ()


class FindHolders(Message, frozen=True, tag="find_holders"):
    """How far could which node restore these chains, for a worker of this geometry and shard?

    others: the slices of its other ranks, each by itself.
    """

    job: str
    tenant: str
    chains: list[Chain]
    geometry: Geometry
    shard: str
    others: dict[str, Geometry] = msgspec.field(default_factory=dict)


class Holders(Message, frozen=True, tag="holders"):
    """Answer to FindHolders, of each chain the best first. loads: of these nodes, where it is known."""

    job: str
    fronts: tuple[Reach, ...] = ()
    loads: dict[str, Load] = msgspec.field(default_factory=dict)


class FindConversations(Message, frozen=True, tag="find_conversations"):
    """One conversation, or with '' a page of them in order of (tenant, name). tenant '': of all."""

    job: str
    tenant: str
    conversation: str = ""
    after: tuple[str, str] | None = None
    limit: int = 1


class KnownConversation(msgspec.Struct, frozen=True, array_like=True):
    """A conversation over all nodes. held: (node, tokens of its longest branch there)."""

    tenant: str
    conversation: str
    held: tuple[tuple[str, int], ...]
    branches: int
    parked_at_s: float


class Known(Message, frozen=True, tag="known"):
    """Answer to FindConversations. loads: of the nodes of one conversation, where it is known."""

    job: str
    conversations: tuple[KnownConversation, ...] = ()
    loads: dict[str, Load] = msgspec.field(default_factory=dict)


class FindNodes(Message, frozen=True, tag="find_nodes"):
    """Which other nodes are there?"""

    job: str


class NodeThere(msgspec.Struct, frozen=True, array_like=True):
    """A node that the directory heard of lately, and what it said of itself."""

    node: str
    epoch: int
    load: Load


class NodesThere(Message, frozen=True, tag="nodes_there"):
    """Answer to FindNodes; none where the directory does not answer."""

    job: str
    nodes: tuple[NodeThere, ...] = ()


class Heard(Message, frozen=True, tag="heard"):
    """The directory has taken this node in, and has said what it is to forget before it serves."""


class Holdings(Message, frozen=True, tag="holdings"):
    """What changed here, for the directory. load: None where it is as it was said last."""

    blocks: tuple[Held, ...] = ()
    named: tuple[Named, ...] = ()
    load: Load | None = None


class Bury(Message, frozen=True, tag="bury"):
    """This node forgot a conversation: note it for good, tell the directory and all nodes."""

    job: str
    stone: Stone


class Buried(Message, frozen=True, tag="buried"):
    """Answer to Bury. done: nodes that erased it. absent: that did not say so. kept: on the drive."""

    job: str
    done: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    kept: bool = True


class Graves(Message, frozen=True, tag="graves"):
    """At a start: tombstones that this node has to have carried out; its core tells of each that it has.

    wait_s: for Heard, at most, before it serves.  past: ids of those that are over.
    """

    stones: tuple[Stone, ...]
    wait_s: float = 0.0
    past: tuple[str, ...] = ()


class Over(Message, frozen=True, tag="over"):
    """Tombstones that all nodes have carried out: they need not be kept."""

    ids: tuple[str, ...]


# --- core and other nodes -----------------------------------------------------------------------------


class AskHolder(Message, frozen=True, tag="ask_holder"):
    """Have a node asked what it has of these blocks. keys: 32 bytes each."""

    job: str
    node: str
    epoch: int
    keys: bytes
    shard: str


class WhatIs(Message, frozen=True, tag="what_is"):
    """What do you have of these blocks? keys: 32 bytes each."""

    keys: bytes
    shard: str


class TheseAre(Message, frozen=True, tag="these_are"):
    """Answer to WhatIs and AskHolder: objects in the order of the keys; nothing where nobody answered.

    way: to AskHolder, how the node was reached.
    """

    job: str = ""
    roots: tuple[WireRoot, ...] = ()
    metas: tuple[WireMeta, ...] = ()
    way: str = ""


class Keep(Message, frozen=True, tag="keep"):
    """Read a conversation's objects from the node that asks, and keep them as if it had been parked here.

    owner, epoch: who asks.  tokens, private, parked_at_s: of the branch, which ends in the last block of
    metas.  replaces: keys of tails that it goes on from.  after: ids of the tombstones that it comes after;
    stones: those of them that are not over.  models: (fingerprint, name, width of its numbers).  timeout_s:
    for all.
    """

    owner: str
    epoch: int
    tenant: str
    conversation: str
    tokens: int
    roots: list[WireRoot]
    metas: list[WireMeta]
    timeout_s: float
    private: tuple[int, bytes] | None = None
    parked_at_s: float = 0.0
    replaces: tuple[bytes, ...] = ()
    after: tuple[str, ...] = ()
    stones: tuple[Stone, ...] = ()
    models: tuple[tuple[bytes, str, int], ...] = ()
    returns_at_s: float | None = None
    keep_until_s: float | None = None
    codec: str = ""


class AskKeep(Message, frozen=True, tag="ask_keep"):
    """Have a node keep a conversation of this one. epoch: the least of that node that counts."""

    job: str
    node: str
    epoch: int
    keep: Keep


class Kept(Message, frozen=True, tag="kept"):
    """Answer to Keep and AskKeep. tier: 'host' or 'disk', where all of it is; or '', and reason says why not.

    reason: 'busy' (now), 'too_large', 'draining', 'forgotten', 'incomplete', 'deadline', 'peer_lost'.
    bytes: that were read for it.  epoch: of the node that keeps it; 0 from one that does not say.
    """

    job: str = ""
    tier: str = ""
    reason: str = ""
    bytes: int = 0
    epoch: int = 0


class PeerRead(Message, frozen=True, tag="peer_read"):
    """Read objects of another node into host slots; what has not come after timeout_s is given up.

    behind: nobody waits for it with a request; those that somebody waits for go first.  item_bytes: width of
    the numbers in each object, by which it may be encoded on its way; 0 where it is not known.
    """

    job: str
    node: str
    epoch: int
    object_keys: list[tuple[bytes, int, str]]
    slots: list[WireItem]
    timeout_s: float
    behind: bool = False
    item_bytes: tuple[int, ...] = ()


class PeerReadDone(Message, frozen=True, tag="peer_read_done"):
    """Answer to PeerRead; nothing of it touches a slot any more. failed: (index, a peers.fetch.Outcome).

    busy: those of the failed whose slots may still be written to: the answer comes once more when none is.

    received_bytes: of KV over the network, what failed included; coded_bytes: of those, encoded on their way;
    wire_bytes: what all of them were on their way; relayed_bytes, lent_bytes: of KV, what no TCP brought, and
    what was read in the other node's memory.  node, way: how the node was reached last; '' where it was not.
    """

    job: str
    failed: tuple[tuple[int, str], ...] = ()
    busy: tuple[int, ...] = ()
    bytes: int = 0
    seconds: float = 0.0
    received_bytes: int = 0
    coded_bytes: int = 0
    wire_bytes: int = 0
    relayed_bytes: int = 0
    lent_bytes: int = 0
    node: str = ""
    way: str = ""


class Drain(Message, frozen=True, tag="drain"):
    """From the node's own service: go out of service. within_s: what is left for it; 0: not known."""

    within_s: float = 0.0


class Lend(Message, frozen=True, tag="lend"):
    """Have an object in host memory, and hold it there, to be sent."""

    block_key: bytes
    group: int
    shard: str


class Lent(Message, frozen=True, tag="lent"):
    """Answer to Lend: where it lies, until GaveBack; or reason: 'missing' or 'busy'."""

    loan: str = ""
    item: WireItem | None = None
    reason: str = ""


class GaveBack(Message, frozen=True, tag="gave_back"):
    """What was lent is not read any more."""

    loan: str


class Erase(Message, frozen=True, tag="erase"):
    """Another node forgot this conversation: do so too."""

    stone: Stone


class Erased(Message, frozen=True, tag="erased"):
    """Answer to Erase, when it is durable here. ok: whether it is."""

    stone: Stone
    ok: bool = True
