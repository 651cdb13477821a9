"""Making room in host memory: evict what is safe elsewhere, spill what is not, wait, or say no."""

from __future__ import annotations

from functools import partial
from typing import Literal, TypeAlias

from kvtier.errors import SlotLeased, TierFull
from kvtier.geometry import GroupGeometry
from kvtier.node import naming
from kvtier.node.blocks import Block, Stored
from kvtier.node.disk_side import DiskSide
from kvtier.node.state import NodeState
from kvtier.objects import ObjectId, ObjectMeta
from kvtier.states import State
from kvtier.tier import Slot

# 'wait': something is on its way out; 'full': nothing can go, everything is in use.
NoRoom: TypeAlias = Literal["wait", "full"]

# Below this many entries the list of objects behind their window is never swept.
_SWEEP_FROM = 1024


class Room:
    """Reserves host slots, and decides who goes for them."""

    def __init__(self, state: NodeState, disk: DiskSide) -> None:
        self._state = state
        self._disk = disk
        self._behind_window: dict[ObjectId, GroupGeometry] = {}
        self._sweep_at = _SWEEP_FROM

    def passed_by(self, object_id: ObjectId, shape: GroupGeometry) -> None:
        """A sliding layer's object that a conversation has left behind: the first to go."""
        self._behind_window[object_id] = shape
        if len(self._behind_window) > self._sweep_at:
            kept = {o: shape for o, shape in self._behind_window.items() if self._state.in_host(o)}
            self._behind_window, self._sweep_at = kept, max(_SWEEP_FROM, 2 * len(kept))

    def reserve(self, meta: ObjectMeta, holder: str) -> Slot | NoRoom:
        """A slot for the object, evicting if need be. Raises ObjectExists."""
        slot = self._try(meta, holder)
        if slot is None and self._drop_behind_window():
            slot = self._try(meta, holder)
        if slot is None:
            slot = self._evict_for(meta, holder)
        if slot is not None:
            return slot
        return "wait" if self._disk.writes_running() else "full"

    def _try(self, meta: ObjectMeta, holder: str) -> Slot | None:
        try:
            return self._state.host.reserve(meta, holder=holder)
        except TierFull:
            return None

    def _evict_for(self, meta: ObjectMeta, holder: str) -> Slot | None:
        """Evict in the policy's order until the object fits or what was met has to be written first."""
        dirty: list[Stored] = []
        dirty_bytes = self._disk.spilling_bytes()
        for key in self._state.policies.host.victims(self._state.now_s):
            if dirty_bytes >= meta.nbytes:
                break
            block = self._state.tree.get(key)
            if block is None:
                continue
            found = self._evict_clean(block)
            slot = self._try(meta, holder)
            if slot is not None:
                return slot
            dirty += found
            dirty_bytes += sum(s.meta.nbytes for s in found)
        if not dirty:
            return None
        self._disk.spill(dirty, partial(self._spilled, dirty))
        # What the disk refused at once was dropped.
        return self._try(meta, holder)

    def _spilled(self, objects: list[Stored], ok: bool, reason: str, detail: str) -> None:
        """What the disk does not take goes anyway: the room is needed."""
        for stored in () if ok else objects:
            block = self._state.tree.get(stored.meta.object_id.block_key)
            if block is not None and self._state.is_stored(stored):
                self._drop(block, stored)

    def _evict_clean(self, block: Block) -> list[Stored]:
        """Drop the block's host copies that need no write; answers those that do."""
        state = self._state
        dirty: list[Stored] = []
        for stored in list(block.parts.values()):
            slot = state.host.find(stored.meta.object_id)
            if slot is None or stored.writing or state.host.state(slot) is State.LEASED:
                continue
            if not stored.durable and self._disk.usable():
                nbytes = stored.meta.nbytes
                if state.policies.admission.demote(block.key, nbytes, state.now_s):
                    dirty.append(stored)
                    continue
            self._drop(block, stored)
        return dirty

    def _drop(self, block: Block, stored: Stored) -> bool:
        if stored.writing or not self._state.in_host(stored.meta.object_id):
            return False
        try:
            self._state.remove_from_host(block, stored)
        except SlotLeased:
            return False
        self._state.counters.evicted_objects += 1
        return True

    def _drop_behind_window(self) -> bool:
        """Drop what no conversation needs to go on from its end; answers whether anything went."""
        candidates, self._behind_window = self._behind_window, {}
        dropped = False
        for object_id, shape in candidates.items():
            block = self._state.tree.get(object_id.block_key)
            stored = self._state.tree.stored(object_id)
            if block is None or stored is None or naming.needed_at_an_end(self._state, block, shape):
                continue
            dropped |= self._drop(block, stored)
        return dropped
