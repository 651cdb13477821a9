"""Between what a node's core says and asks, and the directory's own words. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from kvtier.directory.announcements import HINT_BYTES, MOST_PARTS, End, Layout, Part, Record, Tombstone
from kvtier.directory.announcer import Announcer, Holding
from kvtier.directory.lookups import Hits, Question, as_asked, fronts
from kvtier.directory.merge import Conversation
from kvtier.geometry import Geometry
from kvtier.keys import BlockRef
from kvtier.messages.cluster import (
    BranchEnd,
    Chain,
    FindHolders,
    Held,
    Holdings,
    KnownConversation,
    Named,
    Reach,
    Stone,
)
from kvtier.objects import KEY_BYTES

_NOTHING = Layout(0, ())
# Most blocks of a node are alike but for their keys: they share one description.
_KINDS_MOST = 4096


def say(announcer: Announcer, changed: Holdings) -> None:
    """Have what changed announced."""
    for held in changed.blocks:
        announcer.block(held.key, holding(held))
    for named in changed.named:
        announcer.record(record(named))


def say_part(announcer: Announcer, part: Holdings) -> None:
    """A part of the snapshot that was begun."""
    announcer.add(
        {held.key[:HINT_BYTES]: holding(held) for held in part.blocks}, [record(one) for one in part.named]
    )


def holding(held: Held) -> Holding:
    """What a node has of a block.

    The node need not know what its layer groups are, since its models' workers may be away: who asks does
    (see `lookups.as_asked`).  So all are said to be of kind 'full', which counts their bytes rightly.
    """
    return _alike(held.tenant, held.tokens, held.parts)


@lru_cache(_KINDS_MOST)
def _alike(tenant: str, tokens: int, held: tuple[tuple[int, str, int, bool, bool], ...]) -> Holding:
    # Of what it has beyond that the directory does not know: fronts are shorter.
    held = held[:MOST_PARTS]
    parts = tuple(Part(group, "full", shard, nbytes) for group, shard, nbytes, _, _ in held)
    host = sum(1 << bit for bit, part in enumerate(held) if part[3])
    disk = sum(1 << bit for bit, part in enumerate(held) if part[4])
    return Holding(tenant, Layout(tokens, parts) if parts else _NOTHING, tokens, host, disk)


def record(named: Named) -> Record:
    """A conversation at a node."""
    return Record(
        named.tenant,
        named.conversation,
        named.version,
        tuple(End(*end) for end in named.ends),
        named.after,
        named.returns_at_s,
        named.keep_until_s,
    )


def tombstone(stone: Stone) -> Tombstone:
    """The same in the directory's words."""
    return Tombstone(stone.id, stone.tenant, stone.conversation, stone.at_s, stone.nodes)


def stone(tombstone: Tombstone) -> Stone:
    """The same in the node's words."""
    return Stone(
        tombstone.id, tombstone.tenant, tombstone.conversation, tombstone.at_s, tuple(tombstone.nodes)
    )


def branch_ends(found: Iterable[Conversation]) -> tuple[BranchEnd, ...]:
    """Where branches end, the last parked first."""
    return tuple(
        BranchEnd(branch.end.key, branch.end.tokens, branch.end.private)
        for conversation in found
        for branch in conversation.branches
    )


def known(conversation: Conversation) -> KnownConversation:
    """A conversation over all nodes, for people."""
    held: dict[str, int] = {}
    for branch in conversation.branches:
        for node in branch.nodes:
            held[node] = max(held.get(node, 0), branch.end.tokens)
    return KnownConversation(
        conversation.tenant,
        conversation.name,
        tuple(sorted(held.items())),
        len(conversation.branches),
        max(branch.end.parked_at_s for branch in conversation.branches),
    )


def refs_of(chain: Chain) -> list[BlockRef]:
    """The blocks of a chain; without their parents."""
    starts = [0, *chain.ends]
    return [
        BlockRef(chain.keys[at * KEY_BYTES :][:KEY_BYTES], b"", start, end - start)
        for at, (start, end) in enumerate(zip(starts, chain.ends, strict=False))
    ]


def reaches(
    asked: FindHolders, answers: Mapping[int, Sequence[tuple[Question, Hits]]], but: str
) -> list[Reach]:
    """How far which node reaches in each slice of the chains, by what the asker's model needs.

    answers: of the directory's shards, by chain.  but: the node that asks, which knows better.
    """
    slices = [("", asked_layout(asked.geometry, asked.shard))]
    slices += [(shard, asked_layout(geometry, shard)) for shard, geometry in asked.others.items()]
    return [
        Reach(at, front.node, front.epoch, front.tokens, front.host_bytes, front.disk_bytes, shard)
        for at, chain in enumerate(asked.chains)
        for shard, layout in slices
        for front in fronts(refs_of(chain), [(q, as_asked(hits, layout)) for q, hits in answers.get(at, ())])
        if front.node != but
    ]


def asked_layout(geometry: Geometry, shard: str) -> Layout:
    """What a worker of this geometry and shard needs of a block."""
    return Layout(
        geometry.block_tokens,
        tuple(
            Part(number, group.kind, shard, group.state_bytes or group.token_bytes, group.window_tokens)
            for number, group in enumerate(geometry.groups)
            if not group.empty
        ),
    )
