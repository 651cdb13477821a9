"""Making room in host memory: evict what is safe elsewhere, spill what is not, wait, or say no."""

from __future__ import annotations

from collections import deque
from typing import Literal, TypeAlias

from kvtier.errors import SlotLeased, TierFull
from kvtier.node.blocks import Block, Stored
from kvtier.node.disk_side import DiskSide
from kvtier.node.state import NodeState
from kvtier.objects import ObjectId, ObjectMeta
from kvtier.tier import Slot

# 'wait': something is on its way out; 'full': nothing can go, everything is in use.
NoRoom: TypeAlias = Literal["wait", "full"]


class Room:
    """Reserves host slots, and decides who goes for them."""

    def __init__(self, state: NodeState, disk: DiskSide) -> None:
        self._state = state
        self._disk = disk
        self._behind_window: deque[ObjectId] = deque()

    def passed_by(self, object_id: ObjectId) -> None:
        """A sliding layer's object that its conversation has left behind: the first to go."""
        self._behind_window.append(object_id)

    def reserve(self, meta: ObjectMeta, holder: str) -> Slot | NoRoom:
        """A slot for the object, evicting if need be. Raises ObjectExists."""
        slot = self._try(meta, holder)
        if slot is not None:
            return slot
        self._drop_behind_window()
        spill: list[Stored] = []
        spill_bytes = 0
        for key in self._state.policies.host.victims(self._state.now_s):
            block = self._state.tree.get(key)
            if block is None:
                continue
            dirty = self._evict_clean(block)
            if dirty:
                spill += dirty
                spill_bytes += sum(s.meta.nbytes for s in dirty)
                if spill_bytes >= meta.nbytes:
                    break
                continue
            slot = self._try(meta, holder)
            if slot is not None:
                break
        if slot is None:
            slot = self._try(meta, holder)
        if slot is not None:
            return slot
        if spill:
            self._disk.spill(spill)
        return "wait" if self._disk.writes_running() else "full"

    def _try(self, meta: ObjectMeta, holder: str) -> Slot | None:
        try:
            return self._state.host.reserve(meta, holder=holder)
        except TierFull:
            return None

    def _evict_clean(self, block: Block) -> list[Stored]:
        """Drop the block's host copies that need no write; answers those that do."""
        state = self._state
        dirty: list[Stored] = []
        for stored in list(block.parts.values()):
            if not state.in_host(stored.meta.object_id) or stored.writing:
                continue
            if not stored.durable and self._disk.usable():
                nbytes = stored.meta.nbytes
                if state.policies.admission.demote(block.key, nbytes, state.now_s):
                    dirty.append(stored)
                    continue
            try:
                state.remove_from_host(block, stored)
            except SlotLeased:
                continue
            state.counters.evicted_objects += 1
        return dirty

    def _drop_behind_window(self) -> None:
        while self._behind_window:
            object_id = self._behind_window.popleft()
            block = self._state.tree.get(object_id.block_key)
            stored = self._state.tree.stored(object_id)
            if block is None or stored is None or stored.writing or not self._state.in_host(object_id):
                continue
            try:
                self._state.remove_from_host(block, stored)
            except SlotLeased:
                continue
            self._state.counters.evicted_objects += 1
