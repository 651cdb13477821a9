"""What the disk holds becomes a part of what the node knows, once its service has announced all of it."""

from __future__ import annotations

from kvtier.node import wire
from kvtier.node.conversations import Conversation, from_bytes
from kvtier.node.disk_side import DiskSide
from kvtier.node.state import NodeState
from kvtier.objects import ObjectMeta
from kvtier.tier_messages import Announce


class Adoption:
    """Collects the announcement of the present disk service."""

    def __init__(self, state: NodeState, disk: DiskSide) -> None:
        self._state = state
        self._disk = disk
        self.begin()

    def begin(self) -> None:
        """Another disk service is there: what an earlier one announced does not count."""
        self._metas: list[ObjectMeta] = []
        self._records: list[Conversation] = []

    def on_announce(self, peer: str, message: Announce) -> None:
        """A batch of what the disk holds; with the last one the disk is ready."""
        state = self._state
        if peer != state.disk.peer:
            return
        for fingerprint, model in message.models:
            state.models.setdefault(fingerprint, model)
        self._metas += wire.unpack_metas(message.roots, message.metas)
        self._records += [from_bytes(r.tenant, r.conversation, r.version, r.data) for r in message.records]
        if message.last:
            self._adopt()
            self.begin()

    def _adopt(self) -> None:
        state = self._state
        present = {meta.object_id for meta in self._metas}
        for block in state.tree:
            for stored in list(block.parts.values()):
                if stored.on_disk is not None and stored.meta.object_id not in present:
                    state.removed_from_disk(block, stored)
        for meta in sorted(self._metas, key=lambda m: m.start):
            state.stored_on_disk(meta)
        for record in self._records:
            if record.version > state.ended.get(record.id, -1):
                self._adopt_record(record)
        self._disk.announced()
        self._disk.remove_unnamed([meta for meta in self._metas if not self._is_named(meta)])
        self._disk.tidy_records()

    def _adopt_record(self, record: Conversation) -> None:
        state = self._state
        known = state.conversations.get(record.id)
        if known is not None and known.recorded:
            return
        chains = {head.key: state.tree.chain(head.key) for head in record.heads}
        record.heads = [head for head in record.heads if chains[head.key]]
        record.durable = {head.key for head in record.heads}
        for head in record.heads:
            for block in chains[head.key]:
                block.belongs_to(record.id, head.private)
        if not record.heads:
            state.ended[record.id] = record.version
        elif known is None:
            state.conversations[record.id] = record
        else:
            known.continues(record, state.settings.max_heads)

    def _is_named(self, meta: ObjectMeta) -> bool:
        """Whether a conversation can be forgotten with it: what nobody names could never be."""
        block = self._state.tree.get(meta.object_id.block_key)
        return block is not None and bool(block.names)
