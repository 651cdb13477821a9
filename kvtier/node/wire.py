"""Between the core's values and the forms that travel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from kvtier.errors import MalformedMessage
from kvtier.geometry import EXACT
from kvtier.messages.tiers import WireItem, WireMeta, WireRoot
from kvtier.objects import ObjectId, ObjectMeta, Root
from kvtier.tier import Slot


def item(meta: ObjectMeta, slot: Slot) -> WireItem:
    """An object in its slot."""
    return WireItem(
        meta.object_id.group,
        meta.start,
        meta.tokens,
        meta.first_valid,
        slot.slot_id,
        slot.generation,
        slot.address[0],
        slot.address[1],
        meta.nbytes,
        meta.checksum,
    )


def key_of(object_id: ObjectId) -> tuple[bytes, int, str]:
    """An ObjectId as a plain tuple."""
    return (object_id.block_key, object_id.group, object_id.shard)


def item_bytes(root: Root | WireRoot, widths: Mapping[bytes, int]) -> int:
    """Width of the numbers in its objects; 0 where none of `widths`, by fingerprint, says it."""
    return 1 if root.fidelity != EXACT else widths.get(root.fingerprint, 0)


def pack_metas(metas: Iterable[ObjectMeta]) -> tuple[list[WireRoot], list[WireMeta]]:
    """The distinct roots, and the metas with their root's index among them."""
    roots: dict[bytes, int] = {}
    wire_roots: list[WireRoot] = []
    wire_metas: list[WireMeta] = []
    for meta in metas:
        root = meta.root
        if root.key not in roots:
            roots[root.key] = len(wire_roots)
            wire_roots.append(
                WireRoot(root.key, root.tenant, root.fingerprint, root.fidelity, root.block_tokens)
            )
        wire_metas.append(
            WireMeta(
                meta.object_id.block_key,
                meta.object_id.group,
                meta.object_id.shard,
                roots[root.key],
                meta.parent_key,
                meta.start,
                meta.tokens,
                meta.first_valid,
                meta.nbytes,
                meta.checksum,
            )
        )
    return wire_roots, wire_metas


def unpack_metas(wire_roots: Sequence[WireRoot], wire_metas: Iterable[WireMeta]) -> list[ObjectMeta]:
    """The reverse of `pack_metas`; what is equal is one object, since many are kept.

    Raises MalformedMessage for a root that is not among them.
    """
    wire_metas = list(wire_metas)
    keys: dict[bytes, bytes] = {}
    shards: dict[str, str] = {}
    if not all(0 <= m.root < len(wire_roots) for m in wire_metas):
        raise MalformedMessage("an object names a root that its message lacks")
    roots = [Root(r.key, r.tenant, r.fingerprint, r.fidelity, r.block_tokens) for r in wire_roots]
    return [
        ObjectMeta(
            ObjectId(keys.setdefault(m.block_key, m.block_key), m.group, shards.setdefault(m.shard, m.shard)),
            roots[m.root],
            keys.setdefault(m.parent_key, m.parent_key),
            m.start,
            m.tokens,
            m.first_valid,
            m.nbytes,
            m.checksum,
        )
        for m in wire_metas
    ]
