"""How far a chain of blocks can be restored, and from where. Pure.

Restorable to n tokens: every `full` object of [0, n), the `sliding` objects that cover the window before
n, the `state` object of the block that ends at n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

from kvtier.geometry import Geometry, GroupGeometry
from kvtier.node.blocks import Block, Part, Stored

Source: TypeAlias = Literal["host", "disk", "peer"]
SourceOf: TypeAlias = Callable[[Stored], Source | None]


class Piece(NamedTuple):
    """One object that a restore needs, and the tier that has it."""

    stored: Stored
    source: Source


def longest(
    blocks: Sequence[Block], geometry: Geometry, shard: str, source_of: SourceOf, at_most: int
) -> list[Piece]:
    """The pieces to restore the longest front of at most `at_most` tokens, in the order of their blocks.

    Empty when there is none.
    """
    front, ends = _full_front(blocks, geometry, shard, source_of, at_most)
    for count in range(len(ends), 0, -1):
        rest = _pieces_at(blocks[:count], geometry, shard, source_of)
        if rest is not None:
            full = front[: ends[count - 1]]
            if not rest:
                return full
            return sorted(full + rest, key=lambda p: (p.stored.meta.start, p.stored.meta.object_id.group))
    return []


def restored_end(pieces: Sequence[Piece]) -> int:
    """Position after the last token of pieces in the order of `longest`."""
    if not pieces:
        return 0
    last = pieces[-1].stored.meta
    return last.start + last.tokens


def _full_front(
    blocks: Sequence[Block], geometry: Geometry, shard: str, source_of: SourceOf, at_most: int
) -> tuple[list[Piece], list[int]]:
    """The pieces of `full` groups, and how many of them there are up to the end of each block."""
    groups = [
        (shape, (group, shard))
        for group, shape in enumerate(geometry.groups)
        if shape.kind == "full" and not shape.empty
    ]
    front: list[Piece] = []
    ends: list[int] = []
    for block in blocks:
        if block.start + block.tokens > at_most:
            break
        for shape, part in groups:
            piece = _piece(block, shape, part, source_of)
            if piece is None:
                return front, ends
            front.append(piece)
        ends.append(len(front))
    return front, ends


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
            piece = _piece(blocks[last], shape, (group, shard), source_of)
            if piece is None:
                return None
            found.append(piece)
            continue
        first = shape.needed_from(tokens)
        index = last
        while index >= 0 and blocks[index].end > first:
            piece = _piece(blocks[index], shape, (group, shard), source_of)
            if piece is None or piece.stored.meta.first_valid > max(0, first - blocks[index].start):
                return None
            found.append(piece)
            index -= 1
    return found


def _piece(block: Block, shape: GroupGeometry, part: Part, source_of: SourceOf) -> Piece | None:
    """The object, unless it is not there, or is of another size than this geometry says."""
    stored = block.parts.get(part)
    if stored is None:
        return None
    meta = stored.meta
    if meta.nbytes != shape.object_bytes(block.tokens, meta.first_valid):
        return None
    source = source_of(stored)
    # As Piece(stored, source), in half the time: each lookup makes one for each object.
    return tuple.__new__(Piece, (stored, source)) if source is not None else None
