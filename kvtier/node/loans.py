"""Objects of this node that another one asks for: what there is, and each held in place while it is sent."""

from __future__ import annotations

from kvtier.errors import ObjectExists
from kvtier.messages.cluster import MOST_METAS, GaveBack, Lend, Lent, TheseAre, WhatIs
from kvtier.node import wire
from kvtier.node.blocks import Stored
from kvtier.node.disk_side import DiskSide
from kvtier.node.room import Room
from kvtier.node.state import NodeState
from kvtier.objects import KEY_BYTES, ObjectId, ObjectMeta
from kvtier.tier import Slot

# A peer that takes nothing is cut off long before; only the service's own word ends a loan's use of a slot.
_LOAN_S = 60.0
# How long a loan waits for room to read into, while something is on its way out.
_ROOM_S = 2.0


class Loans:
    """See the module's text. What lies on disk alone is read into host memory first."""

    def __init__(self, state: NodeState, disk: DiskSide, room: Room) -> None:
        self._state = state
        self._disk = disk
        self._room = room
        self._waiting: list[tuple[str, Lend, float]] = []

    def what_is(self, peer: str, message: WhatIs) -> None:
        """Answer WhatIs."""
        metas: list[ObjectMeta] = []
        for at in range(0, len(message.keys), KEY_BYTES):
            block = self._state.tree.get(message.keys[at : at + KEY_BYTES])
            parts = block.parts.items() if block is not None else ()
            here = [s for (_, shard), s in parts if shard == message.shard]
            metas += [meta for meta in map(self._there, here) if meta is not None]
            if len(metas) > MOST_METAS:
                break
        roots, packed = wire.pack_metas(metas[:MOST_METAS])
        self._state.send(peer, TheseAre(roots=tuple(roots), metas=tuple(packed)))

    def lend(self, peer: str, message: Lend) -> None:
        """Answer Lend, at once or when the object was read from disk."""
        self._try(peer, message, self._state.now_s + _ROOM_S)

    def tick(self) -> None:
        """Those that wait for room try again; those that waited too long are refused."""
        waiting, self._waiting = self._waiting, []
        for peer, message, until_s in waiting:
            self._try(peer, message, until_s)

    def _try(self, peer: str, message: Lend, until_s: float) -> None:
        state = self._state
        object_id = ObjectId(message.block_key, message.group, message.shard)
        stored = state.tree.stored(object_id)
        slot = state.host.find(object_id)
        if slot is not None and stored is not None:
            self._lend(peer, stored.meta, slot)
        elif stored is None or stored.on_disk is None or not state.disk.ready:
            state.send(peer, Lent(reason="missing"))
        else:
            slot = self._reserve(stored.on_disk, read_id := state.next_id("r"))
            if slot is not None:
                self._read(peer, stored, stored.on_disk, read_id, slot)
            elif state.now_s < until_s:
                self._waiting.append((peer, message, until_s))
            else:
                state.send(peer, Lent(reason="busy"))

    def gave_back(self, peer: str, message: GaveBack) -> None:
        """Nothing of the loan is read any more."""
        self._state.host.holder_ended(message.loan)

    def _there(self, stored: Stored) -> ObjectMeta | None:
        source = self._state.source_of(stored)
        return stored.meta if source == "host" else stored.on_disk if source == "disk" else None

    def _lend(self, peer: str, meta: ObjectMeta, slot: Slot) -> None:
        state = self._state
        loan = state.next_id("l")
        state.host.lease(slot, loan, state.now_s + _LOAN_S)
        state.send(peer, Lent(loan=loan, item=wire.item(meta, slot)))

    def _reserve(self, meta: ObjectMeta, read_id: str) -> Slot | None:
        try:
            slot = self._room.reserve(meta, read_id)
        except ObjectExists:
            # Somebody reads it already.
            return None
        return slot if isinstance(slot, Slot) else None

    def _read(self, peer: str, stored: Stored, meta: ObjectMeta, read_id: str, slot: Slot) -> None:
        def ended(objects: list[tuple[Stored, str]], seconds: float) -> None:
            if objects[0][1]:
                self._state.send(peer, Lent(reason="missing"))
            else:
                self._lend(peer, meta, slot)

        self._disk.reads.start(read_id, [(stored, meta, slot)], ended)
