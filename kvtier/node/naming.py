"""How parks change what conversations name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvtier.geometry import Geometry
from kvtier.node.blocks import Block
from kvtier.node.conversations import Conversation, Head
from kvtier.node.lookup import Query, begins_with
from kvtier.node.state import NodeState
from kvtier.objects import ObjectId, Root
from kvtier.states import State


def extended_tails(
    state: NodeState, root: Root, query: Query, private: tuple[int, bytes] | None, chain: Sequence[Block]
) -> list[Block]:
    """Recorded tails that a full block of `chain` contains: its KV has all of theirs."""
    return [
        tail
        for block in chain
        if not block.is_tail and block.start >= query.after_tokens
        for tail in state.tree.tails(block.parent)
        if begins_with(tail, root, query, private)
    ]


def droppable(state: NodeState, tail: Block, by: Block) -> bool:
    """Whether `by`, which contains the tail, is as durable, and no conversation ends at the tail."""
    for name in tail.names:
        conversation = state.conversations.get(name)
        if conversation is not None and any(h.key == tail.key for h in conversation.heads):
            return False
    for part, stored in tail.parts.items():
        better = by.parts.get(part)
        if better is None or stored.writing or stored.pins or (stored.durable and not better.durable):
            return False
        slot = state.host.find(stored.meta.object_id)
        if slot is not None and state.host.state(slot) is State.LEASED:
            return False
    return True


def unname(state: NodeState, conversation: Conversation, dropped: Iterable[Head]) -> None:
    """Branches were dropped: their blocks are no longer the conversation's, unless another runs there."""
    gone = [block for head in dropped for block in state.tree.chain(head.key)]
    if not gone:
        return
    kept = {block.key for head in conversation.heads for block in state.tree.chain(head.key)}
    for block in gone:
        if block.key not in kept:
            block.names.discard(conversation.id)


def behind_window(
    state: NodeState, chain: Sequence[Block], geometry: Geometry, shard: str, tokens: int
) -> list[ObjectId]:
    """Objects of sliding and state groups that a restore to `tokens` does not need, in token order.

    Those of a block where some conversation ends are left out: that one needs them.
    """
    found: list[ObjectId] = []
    for group, shape in enumerate(geometry.groups):
        if shape.kind == "full":
            continue
        first = shape.needed_from(tokens) if shape.kind == "sliding" else chain[-1].start
        found += [
            ObjectId(block.key, group, shard)
            for block in chain
            if block.end <= first and (group, shard) in block.parts and not _ends_here(state, block)
        ]
    return found


def _ends_here(state: NodeState, block: Block) -> bool:
    conversations = (state.conversations.get(name) for name in block.names)
    return any(c is not None and any(h.key == block.key for h in c.heads) for c in conversations)
