"""The tree of blocks that this node holds anything of, in any tier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Final, TypeAlias, TypeVar

from kvtier.objects import ObjectId, ObjectMeta, Root
from kvtier.tier import Slot

ConversationId: TypeAlias = tuple[str, str]  # tenant, conversation
Part: TypeAlias = tuple[int, str]  # layer group, shard name
Private: TypeAlias = tuple[int, bytes]  # from which token on nothing is shared, salt

_Key = TypeVar("_Key", bytes, int)
_NOBODY: Final[frozenset[ConversationId]] = frozenset()


def is_private(private: Private | None) -> bool:
    """Whether a chain can be keyed like this; what others say need not be so."""
    return private is None or (private[0] >= 0 and bool(private[1]))


@dataclass(slots=True, eq=False)
class Stored:
    """One object that some tier holds.

    meta: of the copy in host memory, or else of the one on disk.  slot: where host memory has it, or None.
    on_disk: of the copy on disk; another park of the same tokens may have other bytes, or more rows of a
    sliding window.  writing: the disk job that writes it, or ''.  pins: plans, restores and parks that count
    on it.  holds: plans that count on its copy in host memory; for these nobody copies yet, so they need no
    lease.  dirty_bytes: room of a host copy that the disk lacks, as the node's sum has it.
    """

    meta: ObjectMeta
    slot: Slot | None = None
    on_disk: ObjectMeta | None = None
    writing: str = ""
    pins: int = 0
    holds: int = 0
    dirty_bytes: int = 0

    @property
    def durable(self) -> bool:
        """Whether the disk has all of its rows."""
        return self.on_disk is not None and self.on_disk.first_valid <= self.meta.first_valid


@dataclass(slots=True, eq=False)
class Block:
    """The KV of some tokens. names: the conversations whose chain runs through it.

    private: how its chain was keyed, where it is shared with no other conversation.  kept: it was promised
    that several nodes have it, so memory does not drop it as long as the disk takes it.
    """

    key: bytes
    parent: bytes
    root: Root
    start: int
    tokens: int
    parts: dict[Part, Stored] = field(default_factory=dict)
    names: AbstractSet[ConversationId] = _NOBODY
    private: Private | None = None
    kept: bool = False

    @property
    def hosted(self) -> bool:
        """Whether host memory has any of it."""
        return any(stored.slot is not None for stored in self.parts.values())

    @property
    def recorded(self) -> bool:
        """Whether the disk has any of it."""
        return any(stored.on_disk is not None for stored in self.parts.values())

    @property
    def end(self) -> int:
        """Position after the block's last token."""
        return self.start + self.tokens

    @property
    def is_tail(self) -> bool:
        """Whether it is shorter than a full block."""
        return self.tokens < self.root.block_tokens


@dataclass(slots=True)
class _Named:
    """A conversation's blocks. alone: the names of those that are its own; one set for all of them.

    tips: where its chains end: every block with its name is a tip or stands before one.  A dict keeps the
    order, so that a replay repeats it.
    """

    alone: frozenset[ConversationId]
    tips: dict[bytes, None] = field(default_factory=dict)


class BlockTree:
    """Blocks by key, each linked to its parent by the parent's key.

    A block stays while it has a stored part or a child; so a chain has no gap in the tree even when a
    part of a middle block was lost.

    For each conversation it keeps the blocks where its chains end, so all that have its name are found
    without a look at the blocks of others.  Children are only counted: all conversations begin at one root.
    """

    def __init__(self) -> None:
        self._blocks: dict[bytes, Block] = {}
        self._children: dict[bytes, int] = {}
        # Of the short blocks on each parent: how many of each length there are.
        self._tails: dict[bytes, dict[int, int]] = {}
        self._named: dict[ConversationId, _Named] = {}
        # Of each model, by fingerprint.
        self.objects: dict[bytes, int] = {}
        # All blocks share what their parts are called.
        self._parts: dict[Part, Part] = {}

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
            self._add_child(block)
        part = (meta.object_id.group, meta.object_id.shard)
        stored = block.parts.get(part)
        if stored is None:
            stored = block.parts[self._parts.setdefault(part, part)] = Stored(meta)
            _count(self.objects, meta.root.fingerprint, 1)
        return stored

    def drop(self, object_id: ObjectId) -> list[Block]:
        """Remove an object's entry; answers the blocks that left the tree with it, deepest first."""
        block = self._blocks.get(object_id.block_key)
        if block is None:
            return []
        if block.parts.pop((object_id.group, object_id.shard), None) is not None:
            _count(self.objects, block.root.fingerprint, -1)
        gone: list[Block] = []
        while block is not None and not block.parts and block.key not in self._children:
            del self._blocks[block.key]
            gone.append(block)
            self._drop_child(block)
            for name in block.names:
                self._move_tip(name, block)
            block = self._blocks.get(block.parent)
        return gone

    def name(self, chain: Sequence[Block], name: ConversationId, private: Private | None) -> None:
        """A conversation's chain, keyed like this, runs through blocks that follow one another."""
        if not chain:
            return
        named = self._named.get(name)
        if named is None:
            named = self._named[name] = _Named(frozenset((name,)))
        tips, last = named.tips, chain[-1]
        if name not in last.names:
            tips.pop(last.parent, None)
            tips[last.key] = None
        for block in chain:
            if block is not last:
                tips.pop(block.key, None)
            if name not in block.names:
                _add_name(block, name, named.alone)
            if private is not None and block.end > private[0]:
                block.private = private

    def named(self, name: ConversationId) -> list[Block]:
        """The blocks that have the conversation's name, each chain from its front."""
        found: list[Block] = []
        seen: set[bytes] = set()
        named = self._named.get(name)
        for tip in named.tips if named is not None else ():
            path: list[Block] = []
            block = self._blocks.get(tip)
            while block is not None and block.key not in seen:
                seen.add(block.key)
                path.append(block)
                block = self._blocks.get(block.parent)
            # A park that failed may have named no more than the end of a chain.
            found += (block for block in reversed(path) if name in block.names)
        return found

    def unname(self, name: ConversationId) -> list[Block]:
        """Take the conversation's name away; answers the blocks that had it."""
        found = self.named(name)
        for block in found:
            if isinstance(block.names, set):
                block.names.discard(name)
            else:
                block.names = _NOBODY
        self._named.pop(name, None)
        return found

    def _move_tip(self, name: ConversationId, gone: Block) -> None:
        """What stands before a tip that left the tree is found from the next block with the name."""
        tips = self._named[name].tips
        if gone.key in tips:
            del tips[gone.key]
            before = self._before(gone)
            while before is not None and name not in before.names:
                before = self._before(before)
            if before is not None:
                tips[before.key] = None
        if not tips:
            del self._named[name]

    def _add_child(self, block: Block) -> None:
        _count(self._children, block.parent, 1)
        if block.is_tail:
            _count(self._tails.setdefault(block.parent, {}), block.tokens, 1)

    def _drop_child(self, block: Block) -> None:
        _count(self._children, block.parent, -1)
        if block.is_tail:
            lengths = self._tails[block.parent]
            _count(lengths, block.tokens, -1)
            if not lengths:
                del self._tails[block.parent]

    def tail_lengths(self, parent: bytes) -> list[int]:
        """The distinct lengths in tokens of the short last blocks that stand on `parent`, longest first."""
        return sorted(self._tails.get(parent, ()), reverse=True)

    def chain(self, key: bytes) -> list[Block]:
        """The blocks from the first to `key`; empty when one of them is not in the tree.

        Each ends where the next one begins, so it comes to an end whatever other nodes said of them.
        """
        found: list[Block] = []
        block = self._blocks.get(key)
        while block is not None:
            found.append(block)
            if block.parent == block.root.key:
                return found[::-1]
            block = self._before(block)
        return []

    def _before(self, block: Block) -> Block | None:
        """The block that it stands on."""
        found = self._blocks.get(block.parent)
        return found if found is not None and found.start + found.tokens == block.start else None


def _count(counts: dict[_Key, int], key: _Key, by: int) -> None:
    now = counts.get(key, 0) + by
    if now:
        counts[key] = now
    else:
        del counts[key]


def _add_name(block: Block, name: ConversationId, alone: frozenset[ConversationId]) -> None:
    if isinstance(block.names, set):
        block.names.add(name)
    elif block.names:
        block.names = {*block.names, name}
    else:
        block.names = alone
