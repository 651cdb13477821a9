"""Objects that a job needs all of at once: what is here is kept from leaving, the rest gets slots."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import Protocol

from kvtier.errors import ObjectExists, SlotLeased
from kvtier.node.blocks import Stored
from kvtier.node.copies import Pair
from kvtier.node.room import Room
from kvtier.node.state import NodeState
from kvtier.objects import ObjectId, ObjectMeta
from kvtier.tier import Slot


class Needing(Protocol):
    """A job. todo: objects that are not known to be here, in order.  held: those that are."""

    id: str
    todo: deque[ObjectMeta]
    held: dict[ObjectId, Stored]


class Holding:
    """See the module's text. until_s: of leases on what host memory has of it; None: the disk suffices."""

    def __init__(self, state: NodeState, room: Room) -> None:
        self._state = state
        self._room = room

    def next_batch(self, job: Needing, holder: str, until_s: float | None) -> tuple[list[Pair], str]:
        """Slots for the next objects that are not here, and what stopped it from taking more.

        holder: of the slots, which have no lease yet.
        """
        batch: list[Pair] = []
        nbytes, most_bytes = 0, self._state.settings.batch_bytes
        while job.todo and (not batch or nbytes + job.todo[0].nbytes <= most_bytes):
            meta = job.todo[0]
            if not self.hold(job, meta, until_s):
                try:
                    slot = self._room.reserve(meta, holder)
                except ObjectExists:
                    return batch, "filling"
                if not isinstance(slot, Slot):
                    return batch, slot
                batch.append((meta, slot))
                nbytes += meta.nbytes
            job.todo.popleft()
        return batch, ""

    def hold(self, job: Needing, meta: ObjectMeta, until_s: float | None) -> bool:
        """Whether the object is here, with as many rows; if so it is held for the job."""
        state = self._state
        stored = state.tree.stored(meta.object_id)
        if stored is None:
            return False
        if stored.meta.first_valid > meta.first_valid:
            self._drop_incomplete(stored)
            return False
        if state.source_of(stored) is None:
            return False
        if stored.slot is not None and until_s is not None:
            state.host.lease(stored.slot, job.id, until_s)
        if job.held.get(meta.object_id) is not stored:
            self._let_go(job, meta.object_id)
            stored.pins += 1
            job.held[meta.object_id] = stored
        state.used((stored,))
        return True

    def let_go(self, job: Needing) -> None:
        """Of all that the job holds, but for its leases."""
        for object_id in list(job.held):
            self._let_go(job, object_id)

    @staticmethod
    def _let_go(job: Needing, object_id: ObjectId) -> None:
        stored = job.held.pop(object_id, None)
        if stored is not None:
            stored.pins -= 1

    def _drop_incomplete(self, stored: Stored) -> None:
        """A sliding layer's object that lacks rows which the job has: out of host memory, to store it whole.

        A copy on disk stays until the new one is written: should that never come, what was promised of the
        one that lacks rows holds.
        """
        block = self._state.tree.get(stored.meta.object_id.block_key)
        if block is None or stored.writing or stored.slot is None:
            return
        if self._room.is_written_first(block, stored):
            return
        # In use: the job waits until it is not.
        with suppress(SlotLeased):
            self._state.remove_from_host(block, stored)
