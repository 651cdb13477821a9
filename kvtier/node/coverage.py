"""How far a chain of blocks can be restored, and from where. Pure.

Restorable to n tokens: every `full` object of [0, n), the `sliding` objects that cover the window before
n, the `state` object of the block that ends at n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

from kvtier.geometry import Geometry
from kvtier.node.blocks import Block, Stored

Source: TypeAlias = Literal["host", "disk"]
SourceOf: TypeAlias = Callable[[Stored], Source | None]


class Piece(NamedTuple):
    """One object that a restore needs, and the tier that has it."""

    stored: Stored
    source: Source
    block_index: int


def longest(
    blocks: Sequence[Block], geometry: Geometry, shard: str, source_of: SourceOf, at_most: int
) -> list[Piece]:
    """The pieces to restore the longest front of at most `at_most` tokens; empty when there is none."""
    front = _full_front(blocks, geometry, shard, source_of, at_most)
    for count in range(len(front), 0, -1):
        rest = _pieces_at(blocks[:count], geometry, shard, source_of)
        if rest is not None:
            full = [piece for pieces in front[:count] for piece in pieces]
            return sorted(full + rest, key=lambda p: (p.block_index, p.stored.meta.object_id.group))
    return []


def restored_end(pieces: Sequence[Piece]) -> int:
    """Position after the last token of the pieces."""
    return max((p.stored.meta.start + p.stored.meta.tokens for p in pieces), default=0)


def _full_front(
    blocks: Sequence[Block], geometry: Geometry, shard: str, source_of: SourceOf, at_most: int
) -> list[list[Piece]]:
    groups = [g for g, group in enumerate(geometry.groups) if group.kind == "full" and not group.empty]
    front: list[list[Piece]] = []
    for index, block in enumerate(blocks):
        if block.end > at_most:
            break
        pieces = [_piece(block, index, group, shard, source_of) for group in groups]
        if None in pieces:
            break
        front.append([piece for piece in pieces if piece is not None])
    return front


def _pieces_at(
    blocks: Sequence[Block], geometry: Geometry, shard: str, source_of: SourceOf
) -> list[Piece] | None:
    """Sliding and state pieces to restore to the end of `blocks`; None when one is missing."""
    last = len(blocks) - 1
    tokens = blocks[last].end
    found: list[Piece] = []
    for group, shape in enumerate(geometry.groups):
        if shape.kind == "full" or shape.empty:
            continue
        if shape.kind == "state":
            piece = _piece(blocks[last], last, group, shard, source_of)
            if piece is None:
                return None
            found.append(piece)
            continue
        first = shape.needed_from(tokens)
        index = last
        while index >= 0 and blocks[index].end > first:
            piece = _piece(blocks[index], index, group, shard, source_of)
            if piece is None or piece.stored.meta.first_valid > max(0, first - blocks[index].start):
                return None
            found.append(piece)
            index -= 1
    return found


def _piece(block: Block, index: int, group: int, shard: str, source_of: SourceOf) -> Piece | None:
    stored = block.parts.get((group, shard))
    source = source_of(stored) if stored is not None else None
    return Piece(stored, source, index) if stored is not None and source is not None else None
