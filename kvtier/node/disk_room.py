"""Room on disk: what is worth least there goes for what comes."""

from __future__ import annotations

from collections.abc import Iterable

from kvtier.node.blocks import Stored
from kvtier.node.disk_requests import Purpose
from kvtier.node.state import NodeState, disk_bytes
from kvtier.objects import ObjectMeta


def evict(state: NodeState, nbytes: int, purpose: Purpose) -> list[ObjectMeta]:
    """Take the least worth out of the disk; nothing when that is not enough.

    For what is written ahead of need only what host memory does not hold too: else the disk's copies of
    both would take turns for ever.
    """
    usage = state.policies.usage
    going: list[Stored] = []
    runs: dict[bytes, object] = {}
    freed = 0
    for key in state.policies.disk.victims(state.now_s):
        block = state.tree.get(key)
        parts = [] if block is None else [s for s in block.parts.values() if s.on_disk is not None]
        if any(s.pins or s.writing or (purpose == "ahead" and s.slot is not None) for s in parts):
            continue
        freed += sum(disk_bytes(s.on_disk) for s in parts if s.on_disk is not None)
        going += parts
        # What no tier holds is nobody's.
        runs[key] = usage.run_of(key)
        state.policies.disk.removed(key)
        if freed >= nbytes:
            break
    if freed < nbytes:
        for meta in (s.on_disk for s in going if s.on_disk is not None):
            key = meta.object_id.block_key
            usage.stays(key, runs[key])
            state.policies.disk.added(key, meta.parent_key, meta.nbytes, state.now_s)
        return []
    state.counters.evicted_objects += len(going)
    return drop_copies(state, going)


def drop_copies(state: NodeState, objects: Iterable[Stored]) -> list[ObjectMeta]:
    """Count the objects' copies on disk as gone; answers those that are to be removed there."""
    metas: list[ObjectMeta] = []
    for stored in list(objects):
        block = state.tree.get(stored.meta.object_id.block_key)
        if block is not None and stored.on_disk is not None:
            metas.append(stored.on_disk)
            state.removed_from_disk(block, stored)
    return metas
