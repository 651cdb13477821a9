"""The slices that the ranks of one model hold together, and how far all of them can be restored.

A worker that attached with its ranks speaks for all of them when it plans: a token counts only where every
slice of it is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from kvtier.errors import GeometryError
from kvtier.geometry import Geometry
from kvtier.messages.calls import Attach
from kvtier.node.blocks import Block
from kvtier.node.coverage import Piece, SourceOf, longest, restored_end
from kvtier.node.limits import MOST_WORKERS
from kvtier.node.state import NodeState, Worker

# By name of the shard; None where no worker has shown it.
Slices: TypeAlias = Mapping[str, Geometry | None]


def check_ranks(message: Attach) -> None:
    """Raise GeometryError for ranks that this worker is not one of."""
    if not message.ranks:
        return
    if message.shard not in message.ranks or len(message.ranks) > MOST_WORKERS or "" in message.ranks:
        raise GeometryError(
            f"shard {message.shard} is none of the {len(message.ranks)} slices of its ranks",
            fix="attach with shard=ranks[rank], ranks=ranks",
        )


def of_same_ranks(one: Worker, other: Worker) -> bool:
    """Whether both are ranks of one model's instances that are split alike."""
    return (
        bool(one.ranks)
        and one.ranks == other.ranks
        and one.fingerprint == other.fingerprint
        and one.geometry.block_tokens == other.geometry.block_tokens
    )


def slices_of(state: NodeState, worker: Worker, fidelity: str) -> Slices:
    """What a conversation consists of for this worker: its own slice, and those of its other ranks."""
    found: dict[str, Geometry | None] = dict.fromkeys(worker.ranks)
    found[worker.shard] = worker.geometry.at(fidelity)
    if len(found) > 1:
        for other in state.workers.values():
            if other.connected and found.get(other.shard, other) is None and of_same_ranks(worker, other):
                found[other.shard] = other.geometry.at(fidelity)
    return found


def absent(slices: Slices) -> str:
    """Names of the slices that no attached worker has; '' for none."""
    return ", ".join(shard for shard, geometry in slices.items() if geometry is None)


def present(slices: Slices) -> dict[str, Geometry]:
    """Those that an attached worker has."""
    return {shard: geometry for shard, geometry in slices.items() if geometry is not None}


def covered(blocks: Sequence[Block], slices: Slices, source_of: SourceOf, at_most: int) -> list[Piece]:
    """The pieces of all slices to restore the longest front that every one of them has.

    In the order of their blocks; empty when there is none.
    """
    if len(slices) == 1:
        ((shard, geometry),) = slices.items()
        return longest(blocks, geometry, shard, source_of, at_most) if geometry is not None else []
    found = together(blocks, slices, source_of, at_most)
    pieces = [piece for one in found.values() for piece in one]
    return sorted(pieces, key=lambda piece: (piece.stored.meta.start, piece.stored.meta.object_id.group))


def lacking(blocks: Sequence[Block], slices: Slices, source_of: SourceOf, at_most: int) -> list[str]:
    """Names of the slices that end before another one does."""
    if len(slices) == 1:
        return []
    ends = {
        shard: restored_end(longest(blocks, geometry, shard, source_of, at_most))
        for shard, geometry in present(slices).items()
    }
    return shortest(ends)


def shortest(ends: Mapping[str, int]) -> list[str]:
    """Names of the slices that end first; none where all end together. ends: of each."""
    least = min(ends.values(), default=0)
    return [shard for shard, end in ends.items() if end == least < max(ends.values())]


def together(
    blocks: Sequence[Block], slices: Slices, source_of: SourceOf, at_most: int
) -> dict[str, list[Piece]]:
    """By slice, the pieces to restore the longest front that every one of them has; {} for none.

    One that reaches further may have no end of its own where another one ends: a window that has passed, or
    a snapshot.  So what is asked for gets shorter until all agree.
    """
    while at_most > 0:
        found: dict[str, list[Piece]] = {}
        for shard, geometry in slices.items():
            if geometry is None:
                return {}
            found[shard] = longest(blocks, geometry, shard, source_of, at_most)
            at_most = min(at_most, restored_end(found[shard]))
            if not at_most:
                return {}
        if all(restored_end(pieces) == at_most for pieces in found.values()):
            return found
    return {}
