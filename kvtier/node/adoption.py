"""What the disk holds becomes a part of what the node knows, once its service has announced all of it.

A store of a million blocks takes many seconds to adopt, and the node has one thread: so it is done in parts,
one with each tick, between which everything else goes on.  Until the last of them the disk counts as not
ready: nothing is read from it or written to it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import chain

from kvtier.errors import CorruptObject
from kvtier.messages.tiers import Announce, WireRecord
from kvtier.node import usage, wire
from kvtier.node.conversations import Conversation, from_bytes
from kvtier.node.disk_side import DiskSide
from kvtier.node.state import NodeState
from kvtier.objects import ObjectId, ObjectMeta

# Objects, or blocks of a conversation's chain, that one part looks at: about ten milliseconds.
UNITS_AT_ONCE = 500


class Adoption:
    """Collects the announcement of the present disk service, and takes it over."""

    def __init__(self, state: NodeState, disk: DiskSide) -> None:
        self._state = state
        self._disk = disk
        self.begin()

    def begin(self) -> None:
        """Another disk service is there: what an earlier one announced does not count."""
        self._peer = ""
        # By position of the first token: a chain is adopted from its front.
        self._metas: dict[int, list[ObjectMeta]] = {}
        self._present: set[ObjectId] = set()
        # A heap, with when each was parked last: the order by last use is that from before the restart.
        self._records: list[tuple[float, int, Conversation]] = []
        self._damaged: list[WireRecord] = []
        self._parts: Iterator[int] | None = None

    @property
    def under_way(self) -> bool:
        """Whether the next tick has something to do here."""
        return self._parts is not None

    def on_announce(self, peer: str, message: Announce) -> None:
        """A batch of what the disk holds; with the last one it begins to be adopted."""
        state = self._state
        if peer != state.disk.peer or self.under_way:
            return
        self._peer = peer
        for fingerprint, model in message.models:
            state.models.setdefault(fingerprint, model)
        for meta in wire.unpack_metas(message.roots, message.metas):
            self._metas.setdefault(meta.start, []).append(meta)
            self._present.add(meta.object_id)
        for record in message.records:
            self._collect(record)
        if message.last:
            self._parts = self._adopt()
            self.go_on()

    def go_on(self) -> None:
        """Do the next part, if there is one."""
        if self._parts is None:
            return
        if self._peer != self._state.disk.peer:
            self.begin()
            return
        left = UNITS_AT_ONCE
        for done in self._parts:
            left -= done
            if left <= 0:
                return
        self.begin()

    def _collect(self, record: WireRecord) -> None:
        try:
            known = from_bytes(record.tenant, record.conversation, record.version, record.data)
        except CorruptObject:
            self._damaged.append(record)
            return
        parked_at_s = max((head.parked_at_s for head in known.heads), default=0.0)
        # Of those parked at once, the one announced first.
        heapq.heappush(self._records, (parked_at_s, len(self._records), known))

    # --- the parts: each step answers how many units it was ------------------------------------------------

    def _adopt(self) -> Iterator[int]:
        state = self._state
        yield from self._drop_absent()
        for start in sorted(self._metas):
            for meta in self._metas[start]:
                state.stored_on_disk(meta)
                yield 1
        for damaged in self._damaged:
            self._drop_record(damaged)
            yield 1
        while self._records:
            _, _, record = heapq.heappop(self._records)
            if self._disk.dues.was_forgotten(record.id, record.after) or _is_killed(state, record):
                self._end_record(record)
            elif record.version > state.ended.get(record.id, -1):
                yield self._adopt_record(record)
        yield from self._remove_unnamed()
        self._disk.announced()
        self._disk.tidy_records()

    def _drop_absent(self) -> Iterator[int]:
        """What an earlier service held, and this one does not."""
        state = self._state
        for key in [block.key for block in state.tree]:
            block = state.tree.get(key)
            for stored in list(block.parts.values()) if block is not None else ():
                if block is not None and stored.on_disk and stored.meta.object_id not in self._present:
                    state.removed_from_disk(block, stored)
            yield 1

    def _drop_record(self, record: WireRecord) -> None:
        """A damaged record goes; where its conversation was parked again meanwhile, it is written anew."""
        state = self._state
        state.counters.damaged_records += 1
        name = (record.tenant, record.conversation)
        known = state.conversations.get(name)
        if known is None:
            state.note_end(name, record.version)
            return
        known.version = max(known.version, record.version) + 1
        known.recorded = True
        state.records_changed[name] = None

    def _end_record(self, record: Conversation) -> None:
        """It was forgotten before the disk could say that it has it; its name may be in use again."""
        state = self._state
        state.note_end(record.id, record.version)
        known = state.conversations.get(record.id)
        if known is not None:
            # Its own record must outlive the removal of the other.
            known.version = max(known.version, state.ended[record.id] + 1)

    def _adopt_record(self, record: Conversation) -> int:
        state = self._state
        known = state.conversations.get(record.id)
        if known is not None and known.recorded:
            return 1
        chains = {head.key: state.tree.chain(head.key) for head in record.heads}
        record.heads = [head for head in record.heads if chains[head.key]]
        record.durable = {head.key for head in record.heads}
        for head in record.heads:
            state.tree.name(chains[head.key], record.id, head.private)
        state.name_changed(record.id)
        if not record.heads:
            state.note_end(record.id, record.version)
        elif known is None:
            state.conversations[record.id] = record
        else:
            known.continues(record, state.settings.max_heads)
        usage.adopted(state, record, chains)
        return 1 + sum(map(len, chains.values()))

    def _remove_unnamed(self) -> Iterator[int]:
        """What no conversation names could never be forgotten; nor is what was dropped meanwhile wanted."""
        state = self._state
        unnamed: list[ObjectMeta] = []
        for meta in chain.from_iterable(self._metas.values()):
            block = state.tree.get(meta.object_id.block_key)
            if block is None or not block.names:
                unnamed.append(meta)
            elif (stored := state.tree.stored(meta.object_id)) is None or stored.on_disk is None:
                state.stored_on_disk(meta)
            if len(unnamed) == UNITS_AT_ONCE:
                self._disk.remove_unnamed(unnamed)
                unnamed = []
            yield 1
        self._disk.remove_unnamed(unnamed)


def _is_killed(state: NodeState, record: Conversation) -> bool:
    """Whether a tombstone that the record does not come after says that it is over."""
    return not set(state.stones_of(record.id)) <= set(record.after)
