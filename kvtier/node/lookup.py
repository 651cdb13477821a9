"""From tokens to the blocks that are stored of them."""

from __future__ import annotations

from dataclasses import dataclass

from kvtier import keys
from kvtier.errors import TokensError
from kvtier.messages.calls import MakePlan
from kvtier.node.blocks import Block, BlockTree, ConversationId, Private
from kvtier.objects import Root


@dataclass(frozen=True, slots=True)
class Query:
    """Packed uint32 tokens that follow the block `after_key` (b'' = from the start)."""

    tokens: bytes
    after_key: bytes
    after_tokens: int
    extras: tuple[tuple[int, bytes], ...]

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.after_tokens + len(self.tokens) // keys.TOKEN_BYTES


def wanted_end(message: MakePlan, query: Query) -> int:
    """Up to where a plan may load."""
    return query.end if message.most_tokens is None else min(query.end, message.most_tokens)


def prefix_blocks(tree: BlockTree, root: Root, query: Query, name: ConversationId) -> list[Block]:
    """The blocks up to query.after_key.

    Raises TokensError when they are not (any longer) known, or another conversation shares them with nobody.
    """
    if not query.after_key:
        return []
    blocks = tree.chain(query.after_key)
    if not blocks or blocks[-1].end != query.after_tokens or blocks[0].root.key != root.key:
        raise TokensError(
            f"no stored block with this key ends at token {query.after_tokens}",
            fix="send all tokens from the start, without after_key",
        )
    if blocks[-1].private is not None and name not in blocks[-1].names:
        raise TokensError(
            f"the block that ends at token {query.after_tokens} is shared with no other conversation",
            fix="send all tokens from the start, without after_key",
        )
    return blocks


def block_refs(root: Root, query: Query, private: Private | None) -> list[keys.BlockRef]:
    """The keys of all blocks of the query, the tail last. Raises TokensError."""
    return keys.chain(
        root,
        query.tokens,
        query.extras,
        parent=query.after_key or None,
        first_position=query.after_tokens,
        private=private,
    )


def match(
    tree: BlockTree, root: Root, query: Query, name: ConversationId, private: Private | None
) -> list[list[Block]]:
    """The stored chains that are a front of the query's tokens, the longest first.

    They differ in the recorded tail that ends them; the last one has none.
    """
    blocks = prefix_blocks(tree, root, query, name)
    found = keys.walk(
        root,
        query.tokens,
        query.extras,
        parent=query.after_key or None,
        first_position=query.after_tokens,
        private=private,
    )
    end = query.after_tokens
    # What follows the first block that is not here is not even keyed.
    for block in map(tree.get, found):
        # Another node may have named it as part of another chain.
        if block is None or block.start != end:
            break
        blocks.append(block)
        end += block.tokens
    if blocks and blocks[-1].is_tail:
        blocks.pop()
    last = blocks[-1] if blocks else None
    tails = tails_within(tree, (last.key, last.end) if last else (root.key, 0), root, query, private)
    return [*([*blocks, tail] for tail in tails), *([blocks] if blocks else [])]


def tails_within(
    tree: BlockTree, after: tuple[bytes, int], root: Root, query: Query, private: Private | None
) -> list[Block]:
    """The recorded tails that the query contains at the end of a chain, the longest first.

    after: key and end of the chain.  Of each length there is at most one: as many keys are made as there are
    lengths, whatever the number of conversations that end here.
    """
    parent, start = after
    first = (start - query.after_tokens) * keys.TOKEN_BYTES
    lengths = [n for n in tree.tail_lengths(parent) if first >= 0 and start + n <= query.end]
    found = (tree.get(_tail_key(after, n, root, query, private)) for n in lengths)
    return [tail for tail in found if tail is not None and tail.start == start]


def _tail_key(
    after: tuple[bytes, int], tokens: int, root: Root, query: Query, private: Private | None
) -> bytes:
    """Of a block of the query's next tokens."""
    parent, start = after
    first = (start - query.after_tokens) * keys.TOKEN_BYTES
    found = keys.walk(
        root,
        query.tokens[first : first + tokens * keys.TOKEN_BYTES],
        tuple(extra for extra in query.extras if extra[0] < start + tokens),
        parent=parent if start else None,
        first_position=start,
        private=private,
    )
    return next(found)
