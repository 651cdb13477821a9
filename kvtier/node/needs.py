"""Which objects a park has to store. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from kvtier.errors import GeometryError
from kvtier.geometry import Geometry, GroupGeometry
from kvtier.keys import BlockRef
from kvtier.node.blocks import Block
from kvtier.objects import ObjectId, ObjectMeta, Root


def needed_objects(
    root: Root,
    refs: Sequence[BlockRef],
    prefix: Sequence[Block],
    geometry: Geometry,
    shard: str,
    held_from: Sequence[int],
) -> list[ObjectMeta]:
    """Everything that a restore to the end of `refs` needs, in token order.

    prefix: blocks before refs[0]: they are stored, but whoever counts on the whole chain has to hold them
    too, and at the same level; a sliding window may begin in them.  held_from: for each group the first
    position whose KV the pool still has; empty means 0 for all.  Raises GeometryError when the pool has
    less than a restore needs of what is new.
    """
    held = list(held_from) or [0] * len(geometry.groups)
    if len(held) != len(geometry.groups):
        raise GeometryError(
            f"held_from has {len(held)} positions for {len(geometry.groups)} layer groups",
            fix="give one for each group, or none",
        )
    places = [BlockRef(b.key, b.parent, b.start, b.tokens) for b in prefix] + list(refs)
    metas: list[ObjectMeta] = []
    for group, shape in enumerate(geometry.groups):
        if shape.empty:
            continue
        for ref, first_valid in _rows(shape, places, refs[0].start, held[group]):
            nbytes = shape.object_bytes(ref.tokens, first_valid)
            object_id = ObjectId(ref.key, group, shard)
            metas.append(ObjectMeta(object_id, root, ref.parent, ref.start, ref.tokens, first_valid, nbytes))
    return sorted(metas, key=lambda m: (m.start, m.object_id.group))


def _rows(
    shape: GroupGeometry, places: Sequence[BlockRef], first_new: int, held_from: int
) -> list[tuple[BlockRef, int]]:
    """The blocks to store of one group, each with its first stored row."""
    end = places[-1].start + places[-1].tokens
    if shape.kind == "state":
        return [(places[-1], 0)]
    needed_from = shape.needed_from(end)
    if held_from > max(needed_from, first_new if shape.kind == "full" else 0):
        raise GeometryError(
            f"the pool holds this layer group from token {held_from} on, a restore to {end} needs it "
            f"from {needed_from}",
            fix="park before the engine drops these tokens",
        )
    if shape.kind == "full":
        return [(ref, 0) for ref in places]
    return [(ref, max(0, held_from - ref.start)) for ref in places if ref.start + ref.tokens > needed_from]
