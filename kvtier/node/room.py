"""Making room in host memory: evict what is safe elsewhere, spill what is not, wait, or say no."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Literal, TypeAlias

from kvtier.errors import SlotLeased, TierFull
from kvtier.geometry import GroupGeometry
from kvtier.node import naming
from kvtier.node.blocks import Block, Stored
from kvtier.node.disk_side import DiskSide
from kvtier.node.spills import Spills
from kvtier.node.state import NodeState, room_bytes
from kvtier.objects import ObjectId, ObjectMeta
from kvtier.states import State
from kvtier.tier import Slot

# 'wait': something is on its way out; 'full': nothing can go, everything is in use.
NoRoom: TypeAlias = Literal["wait", "full"]

# In search of a clean victim, those that have to be written first are passed over up to this share of host
# memory: what was used last should not go for what was used long ago, only because it is on disk too.  And
# up to so many blocks of them: looking for longer costs more than the write that is asked for instead.
_PASS_OVER, _PASS_OVER_BLOCKS = 0.5, 1024
# A search in vain is repeated when a write has ended, or after this time: a hold may have ended.
_SEARCH_AGAIN_S = 0.01
# Below this many entries the list of objects behind their window is never swept.
_SWEEP_FROM = 1024


class Room:
    """Reserves host slots, and decides who goes for them."""

    def __init__(self, state: NodeState, disk: DiskSide, spills: Spills) -> None:
        self._state = state
        self._disk = disk
        self._spills = spills
        self._behind_window: dict[ObjectId, GroupGeometry] = {}
        self._sweep_at = _SWEEP_FROM
        # Of the last search that found nothing: when, how many writes had ended by then, and the room wanted.
        self._in_vain: tuple[float, int, int] | None = None

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
        if slot is None and not self._is_in_vain(meta.nbytes):
            possible = self._spills.possible()
            slot = self._evict_for(meta, holder)
            if slot is None and possible and not self._spills.possible():
                # What the disk refused at once goes without it: the room is needed.
                slot = self._evict_for(meta, holder)
        if slot is not None:
            return slot
        return "wait" if self._disk.writes_running() else "full"

    def spare(self, meta: ObjectMeta, holder: str, may_go: Callable[[bytes], bool]) -> Slot | None:
        """A slot for what nobody waits for: evicting only blocks that may go, and that the disk has too.

        Raises ObjectExists.
        """
        state = self._state
        slot = self._try(meta, holder)
        if slot is not None:
            return slot
        for key in islice(state.policies.host.victims(state.now_s), _PASS_OVER_BLOCKS):
            block = state.tree.get(key)
            if block is None:
                continue
            if not may_go(key):
                return None
            if any(stored.dirty_bytes for stored in block.parts.values()):
                # Also what is worth no write, or may not be written now.
                continue
            evicted = state.counters.evicted_objects
            self._evict_clean(block)
            slot = self._try(meta, holder) if state.counters.evicted_objects > evicted else None
            if slot is not None:
                return slot
        return None

    def is_written_first(self, block: Block, stored: Stored) -> bool:
        """Whether other nodes count on an object that the disk lacks; then it is on its way there."""
        first = block.kept and self._spills.wanted(block, stored)
        if first:
            self._spills.for_room([block], room_bytes(stored.meta))
        return first

    def _is_in_vain(self, nbytes: int) -> bool:
        """Whether the end of a write is to be waited for, before another look at who could go for so much."""
        if self._in_vain is None or not self._disk.writes_running():
            return False
        searched_s, ended, wanted_bytes = self._in_vain
        new = ended != self._disk.writes_ended or self._state.now_s >= searched_s + _SEARCH_AGAIN_S
        return not new and nbytes >= wanted_bytes

    def _try(self, meta: ObjectMeta, holder: str) -> Slot | None:
        try:
            return self._state.host.reserve(meta, holder=holder)
        except TierFull:
            return None

    def _evict_for(self, meta: ObjectMeta, holder: str) -> Slot | None:
        """Evict what is clean, in the policy's order; where nothing is, have what is dirty written."""
        state = self._state
        dirty: list[Block] = []
        passed_over: set[bytes] = set()
        may_pass_bytes = _PASS_OVER * sum(state.arena_bytes)
        try_from = 0
        for key in state.policies.host.victims(state.now_s):
            block = state.tree.get(key)
            if block is None:
                continue
            evicted = state.counters.evicted_objects
            if self._evict_clean(block):
                dirty.append(block)
            slot = self._try(meta, holder) if state.counters.evicted_objects > evicted else None
            if slot is not None:
                return slot
            may_pass_bytes -= self._dirty_room(block, passed_over)
            enough = may_pass_bytes < 0 or len(passed_over) >= _PASS_OVER_BLOCKS or not self._has_clean()
            if dirty and enough and len(passed_over) >= try_from:
                if self._spills.for_room(dirty, meta.nbytes):
                    break
                # Parks hold all of these, or there is no disk: what follows goes, or is written, for them.
                dirty, try_from = [], 2 * len(passed_over)
        else:
            self._spills.for_room(dirty, meta.nbytes)
        self._in_vain = (state.now_s, self._disk.writes_ended, meta.nbytes)
        return None

    def _dirty_room(self, victim: Block, seen: set[bytes]) -> int:
        """Room of the dirty end of a victim's chain; nothing for a clean victim. seen: counted already."""
        room = 0
        block: Block | None = victim
        while block is not None and block.key not in seen:
            nbytes = sum(stored.dirty_bytes for stored in block.parts.values())
            if not nbytes:
                break
            seen.add(block.key)
            room += nbytes
            block = self._state.tree.get(block.parent)
        return room

    def _has_clean(self) -> bool:
        """Whether host memory holds anything that could go without a write, were it not in use."""
        usage = self._state.host.usage()
        return usage.used_bytes - usage.limbo_bytes - usage.filling_bytes > self._state.dirty_bytes

    def _evict_clean(self, block: Block) -> bool:
        """Drop the block's host copies that need no write; answers whether there are others."""
        state = self._state
        dirty = False
        for stored in list(block.parts.values()):
            slot = stored.slot
            if slot is None or stored.writing or stored.holds or state.host.state(slot) is State.LEASED:
                continue
            if self._spills.wanted(block, stored):
                dirty = True
            else:
                self._drop(block, stored)
        return dirty

    def _drop(self, block: Block, stored: Stored) -> bool:
        if stored.writing or stored.slot is None:
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
