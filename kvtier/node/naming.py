"""How parks change what conversations name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvtier.geometry import Geometry, GroupGeometry
from kvtier.node.blocks import Block, Private
from kvtier.node.disk_side import DiskSide
from kvtier.node.lookup import Query, tails_within
from kvtier.node.state import NodeState
from kvtier.objects import ObjectId, Root
from kvtier.states import State

# A block that so many conversations share counts as needed without a look at each of them.
_NAMES_MOST = 64


def extended_tails(
    state: NodeState, root: Root, query: Query, private: Private | None, chain: Sequence[Block]
) -> list[Block]:
    """Recorded tails that a full block of `chain` contains: its KV has all of theirs."""
    return [
        tail
        for block in chain
        if not block.is_tail and block.start >= query.after_tokens
        for tail in tails_within(state.tree, (block.parent, block.start), root, query, private)
    ]


def droppable(state: NodeState, tail: Block, by: Block) -> bool:
    """Whether `by`, which contains the tail, is as durable, and no conversation ends at the tail."""
    for name in tail.names:
        conversation = state.conversations.get(name)
        if conversation is not None and any(h.key == tail.key for h in conversation.ends):
            return False
    for part, stored in tail.parts.items():
        better = by.parts.get(part)
        if better is None or stored.writing or stored.pins or stored.holds:
            return False
        if stored.on_disk is not None and not better.durable:
            return False
        if stored.slot is not None and state.host.state(stored.slot) is State.LEASED:
            return False
    return True


def drop_tails(state: NodeState, disk: DiskSide, chain: Sequence[Block], tails: Iterable[Block]) -> None:
    """Drop those of the tails, which blocks of the chain contain, that nothing needs any more."""
    by_parent = {block.parent: block for block in chain if not block.is_tail}
    for tail in tails:
        by = by_parent.get(tail.parent)
        if by is None or not droppable(state, tail, by):
            continue
        by.kept = by.kept or tail.kept
        parts = list(tail.parts.values())
        for stored in parts:
            if stored.slot is not None:
                state.host.remove(stored.meta.object_id)
                state.vacated(stored)
        disk.remove(parts)
        for stored in parts:
            state.forget_object(stored.meta.object_id)


def behind_window(
    chain: Sequence[Block], geometry: Geometry, shard: str, tokens: int
) -> list[tuple[ObjectId, GroupGeometry]]:
    """Objects of sliding and state groups that a restore to `tokens` does not need, in token order."""
    found: list[tuple[ObjectId, GroupGeometry]] = []
    for group, shape in enumerate(geometry.groups):
        if shape.kind == "full":
            continue
        first = shape.needed_from(tokens) if shape.kind == "sliding" else chain[-1].start
        found += [
            (ObjectId(block.key, group, shard), shape)
            for block in chain
            if block.end <= first and (group, shard) in block.parts
        ]
    return found


def needed_at_an_end(state: NodeState, block: Block, shape: GroupGeometry) -> bool:
    """Whether some conversation may need the block's sliding or state object to go on from its end."""
    if len(block.names) > _NAMES_MOST:
        return True
    conversations = (state.conversations.get(name) for name in block.names)
    ends = {head.tokens for c in conversations if c is not None for head in c.ends}
    if shape.kind == "state":
        return block.end in ends
    return any(shape.needed_from(end) < block.end <= end for end in ends)
