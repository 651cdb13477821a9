"""The tree of blocks that this node holds anything of, in any tier."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from kvtier.objects import ObjectId, ObjectMeta, Root

ConversationId: TypeAlias = tuple[str, str]  # tenant, conversation
Part: TypeAlias = tuple[int, str]  # layer group, shard name
Private: TypeAlias = tuple[int, bytes]  # from which token on nothing is shared, salt


@dataclass(slots=True)
class Stored:
    """One object that some tier holds.

    meta: of the copy in host memory, or else of the one on disk.  on_disk: of the copy on disk; another
    park of the same tokens may have other bytes, or more rows of a sliding window.  writing: the disk job
    that writes it, or ''.  pins: plans, restores and parks that count on it.  holds: plans that
    count on its copy in host memory; for these nobody copies yet, so they need no lease.  dirty_bytes: room
    of a host copy that the disk lacks, as the node's sum has it.
    """

    meta: ObjectMeta
    on_disk: ObjectMeta | None = None
    writing: str = ""
    pins: int = 0
    holds: int = 0
    dirty_bytes: int = 0

    @property
    def durable(self) -> bool:
        """Whether the disk has all of its rows."""
        return self.on_disk is not None and self.on_disk.first_valid <= self.meta.first_valid


@dataclass(slots=True)
class Block:
    """The KV of some tokens. names: the conversations whose chain runs through it.

    private: how its chain was keyed, where it is shared with no other conversation.
    """

    key: bytes
    parent: bytes
    root: Root
    start: int
    tokens: int
    parts: dict[Part, Stored] = field(default_factory=dict)
    names: set[ConversationId] = field(default_factory=set)
    private: Private | None = None

    @property
    def end(self) -> int:
        """Position after the block's last token."""
        return self.start + self.tokens

    def belongs_to(self, name: ConversationId, private: Private | None) -> None:
        """The conversation's chain, keyed like this, runs through the block."""
        self.names.add(name)
        if private is not None and self.end > private[0]:
            self.private = private

    @property
    def is_tail(self) -> bool:
        """Whether it is shorter than a full block."""
        return self.tokens < self.root.block_tokens


class BlockTree:
    """Blocks by key, each linked to its parent by the parent's key.

    A block stays while it has a stored part or a child; so a chain has no gap in the tree even when a
    part of a middle block was lost.
    """

    def __init__(self) -> None:
        self._blocks: dict[bytes, Block] = {}
        self._children: dict[bytes, set[bytes]] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[Block]:
        return iter(list(self._blocks.values()))

    def get(self, key: bytes) -> Block | None:
        """The block, or None."""
        return self._blocks.get(key)

    def stored(self, object_id: ObjectId) -> Stored | None:
        """The object's entry, or None."""
        block = self._blocks.get(object_id.block_key)
        return block.parts.get((object_id.group, object_id.shard)) if block else None

    def add(self, meta: ObjectMeta) -> Stored:
        """The entry of an object; made, with its block, where there was none."""
        key = meta.object_id.block_key
        block = self._blocks.get(key)
        if block is None:
            block = Block(key, meta.parent_key, meta.root, meta.start, meta.tokens)
            self._blocks[key] = block
            self._children.setdefault(meta.parent_key, set()).add(key)
        part = (meta.object_id.group, meta.object_id.shard)
        stored = block.parts.get(part)
        if stored is None:
            stored = block.parts[part] = Stored(meta)
        return stored

    def drop(self, object_id: ObjectId) -> list[Block]:
        """Remove an object's entry; answers the blocks that left the tree with it, deepest first."""
        block = self._blocks.get(object_id.block_key)
        if block is None:
            return []
        block.parts.pop((object_id.group, object_id.shard), None)
        gone: list[Block] = []
        while block is not None and not block.parts and block.key not in self._children:
            del self._blocks[block.key]
            gone.append(block)
            siblings = self._children[block.parent]
            siblings.discard(block.key)
            if not siblings:
                del self._children[block.parent]
            block = self._blocks.get(block.parent)
        return gone

    def tails(self, parent: bytes) -> list[Block]:
        """The short last blocks that stand on `parent`, longest first."""
        children = (self._blocks[key] for key in self._children.get(parent, ()))
        return sorted((b for b in children if b.is_tail), key=lambda b: (-b.tokens, b.key))

    def chain(self, key: bytes) -> list[Block]:
        """The blocks from the first to `key`; empty when one of them is not in the tree."""
        found: list[Block] = []
        block = self._blocks.get(key)
        while block is not None:
            found.append(block)
            if block.parent == block.root.key:
                return found[::-1]
            block = self._blocks.get(block.parent)
        return []
