"""Everything that the node knows, shared by the parts of the core."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from kvtier.errors import KvtierError, SlotLeased
from kvtier.geometry import Geometry
from kvtier.keys import make_root, tenant_secret
from kvtier.messages.calls import Failed, Message
from kvtier.messages.cluster import Stone
from kvtier.messages.tiers import DiskUsage, GpuUsage
from kvtier.node.blocks import Block, BlockTree, ConversationId, Stored
from kvtier.node.conversations import Conversation, Head
from kvtier.node.counters import Counters, count
from kvtier.node.coverage import Source
from kvtier.node.events import Send
from kvtier.node.host_memory import HostMemory
from kvtier.node.settings import NodeSettings
from kvtier.objects import ObjectId, ObjectMeta, Root
from kvtier.policy.interfaces import Policies, PrefillRate


@dataclass(slots=True)
class Worker:
    """An attached worker. connected: its control connection is open.  rate: how fast it computes.

    ranks: shards of all ranks that park and restore together with it; () where it does so alone.  engine,
    place: as it said when it attached; gpu_bytes: so too, or as the GPU service says that copies for it.
    restored: see messages.tiers.Copy.over.
    """

    name: str
    peer: str
    fingerprint: bytes
    model: str
    geometry: Geometry
    shard: str
    mode: Literal["worker", "shared"]
    layout: str = ""
    pool_pages: int = 0
    pool: dict[str, Any] = field(default_factory=dict)
    connected: bool = True
    pid: int = 0
    rate: PrefillRate | None = None
    jobs: set[str] = field(default_factory=set)
    restored: list[str] = field(default_factory=list)
    ranks: tuple[str, ...] = ()
    engine: str = ""
    place: str = ""
    gpu_bytes: int = 0


NOTHING_SAID = DiskUsage(capacity_bytes=0, used_bytes=0, objects=0, quarantined=0, written_bytes=0)


@dataclass(slots=True)
class DiskView:
    """What the node knows of its disk service. peer: '' when there is none; ready: it takes work.

    said: the service's own counts, its health, and what its drive may still be written.
    """

    peer: str = ""
    ready: bool = False
    capacity_bytes: int = 0
    said: DiskUsage = NOTHING_SAID


# Roots that are kept, so that they need not be derived again.
_ROOTS_MOST = 4096

# An object takes whole units of this, and on disk one more for its header.
_UNIT_BYTES = 4096


def room_bytes(meta: ObjectMeta) -> int:
    """Room that the object takes in host memory."""
    return -(-meta.nbytes // _UNIT_BYTES) * _UNIT_BYTES


def disk_bytes(meta: ObjectMeta) -> int:
    """Room that the object takes on disk."""
    return room_bytes(meta) + _UNIT_BYTES


def spare_bytes(state: NodeState) -> int:
    """Room of host memory without what only it holds."""
    return max(0, sum(state.arena_bytes) - state.dirty_bytes)


class NodeState:
    """Tree, conversations, workers and tiers of one node; knows how its parts stay consistent.

    host: the host tier, or its slots without memory in a simulation.  secret: from which each tenant's
    key secret is derived.  rng: for salts; seeded by the caller, so that a replay repeats them.
    """

    def __init__(
        self, settings: NodeSettings, host: HostMemory, policies: Policies, secret: bytes, rng: random.Random
    ) -> None:
        self.settings = settings
        self.host = host
        self.policies = policies
        self.rng = rng
        self.now_s = 0.0
        self.started_s: float | None = None
        self.epoch = 0
        self.pids: dict[str, int] = {}
        self.faulted_in_bytes = 0
        self.metrics_url = ""
        # Why the stimulus log goes no further, and how much it lacks by now.
        self.log_ended = ""
        self.log_lost = 0
        # What could not be taken over from before the start, in words.
        self.unlearned: list[str] = []
        self.out: list[Send] = []
        self.tree = BlockTree()
        self.conversations: dict[ConversationId, Conversation] = {}
        self.workers: dict[str, Worker] = {}
        self.models: dict[bytes, str] = {}
        # Models that somebody retired, and all whose KV is worth nothing by now.
        self.retired: dict[bytes, None] = {}
        self.worthless: dict[bytes, None] = {}
        # Of each model whose workers attached: how wide its numbers are.
        self.item_bytes: dict[bytes, int] = {}
        self.disk = DiskView()
        self.gpu_peer = ""
        self.gpu_address = ""
        self.gpu_said = GpuUsage()
        self.counters = Counters()
        # By other node: how it was reached last.
        self.ways: dict[str, str] = {}
        self.arena_bytes: list[int] = []
        # When plans stop to hold what they name in host memory, if nobody restores them.
        self.plan_ends_s: dict[str, float] = {}
        self.disk_held_bytes = 0
        # Room in host memory of objects that the disk does not have, or has less complete.
        self.dirty_bytes = 0
        # Of all objects that left their last tier.
        self.dropped_bytes = 0
        # Of each model, by fingerprint: bytes of its objects in each tier.
        self.host_bytes_of: dict[bytes, int] = {}
        self.disk_bytes_of: dict[bytes, int] = {}
        # Bytes of what was read ahead of a return and is in host memory, unused.
        self.prefetched: dict[ObjectId, int] = {}
        # Conversations that are over, by the version of the record that the disk may still have.
        self.ended: dict[ConversationId, int] = {}
        # Those of them of which the disk has not been told.
        self.ended_news: dict[ConversationId, None] = {}
        # Conversations whose record on disk names an end that the disk has lost. A dict keeps the order.
        self.records_changed: dict[ConversationId, None] = {}
        # What the directory has not been told yet; dicts keep the order.
        self.changed_blocks: dict[bytes, None] = {}
        self.changed_names: dict[ConversationId, None] = {}
        # Until then no plan is made: the directory is asked what was forgotten while the node was away.
        self.serves_from_s = 0.0
        # The node goes out of service: it takes no park, and writes what only memory holds.
        self.draining = False
        # Tombstones that this node has carried out, by conversation and id.
        self.stones: dict[ConversationId, dict[str, Stone]] = {}
        # Ids of tombstones that all nodes have carried out. A dict keeps the order.
        self.stones_past: dict[str, None] = {}
        self._tenant_codecs = dict(settings.tenant_codecs)
        self._secret = secret
        self._roots: dict[tuple[str, bytes, str, int], Root] = {}
        self._serial = 0

    # --- naming ---------------------------------------------------------------------------------------

    def next_id(self, prefix: str) -> str:
        """A name that is never used again in this epoch."""
        self._serial += 1
        return f"{prefix}{self.epoch}.{self._serial}"

    def root(self, tenant: str, fingerprint: bytes, fidelity: str, block_tokens: int) -> Root:
        """The start of all chains of this tenant, model, fidelity and block size."""
        name = (tenant, fingerprint, fidelity, block_tokens)
        root = self._roots.pop(name, None)
        if root is None:
            secret = tenant_secret(self._secret, tenant)
            root = make_root(secret, tenant, fingerprint, fidelity, block_tokens)
        self._roots[name] = root
        if len(self._roots) > _ROOTS_MOST:
            # The one asked for longest ago: a mere lookup is enough to be here.
            del self._roots[next(iter(self._roots))]
        return root

    def send(self, peer: str, message: Message, fds: Literal["", "arenas", "pool"] = "") -> None:
        """Add an instruction to the answer to the present stimulus."""
        self.out.append(Send(peer, message, fds))

    def refuse(self, peer: str, request: Message, error: KvtierError) -> None:
        """Answer a caller's mistake, which has changed nothing."""
        name = type(error).__name__
        count(self.counters.errors, name)
        self.send(peer, Failed(id=request.id, error=name, message=error.message, fix=error.fix))

    # --- where objects are ------------------------------------------------------------------------------

    def reached(self, node: str, way: str) -> None:
        """A node was reached like this; '' where it was not."""
        if node and way:
            self.ways[node] = way

    def path_to(self, node: str) -> str:
        """What the policy knows loads from there by: another way than TCP has speeds of its own."""
        way = self.ways.get(node, "tcp")
        return node if way == "tcp" else f"{node} by {way}"

    def source_of(self, stored: Stored) -> Source | None:
        """The best tier that has the object now."""
        if stored.slot is not None:
            return "host"
        return "disk" if stored.on_disk is not None and self.disk.ready else None

    def next_end_s(self) -> float | None:
        """When the next lease in host memory or plan ends, or None: before that its time frees nothing."""
        ends = [self.host.next_end_s(), *self.plan_ends_s.values()]
        return min((end_s for end_s in ends if end_s is not None), default=None)

    def in_host(self, object_id: ObjectId) -> bool:
        """Whether host memory has the object."""
        stored = self.tree.stored(object_id)
        return stored is not None and stored.slot is not None

    def is_stored(self, stored: Stored) -> bool:
        """Whether this entry, and not a later one of the same name, is in the tree."""
        return self.tree.stored(stored.meta.object_id) is stored

    def changed(self, key: bytes) -> None:
        """Note that a tier has more or less of a block, for the directory."""
        if self.settings.ask_elsewhere_s:
            self.changed_blocks[key] = None

    def name_changed(self, name: ConversationId) -> None:
        """Note that a conversation ends elsewhere now, or is over, for the directory."""
        if self.settings.ask_elsewhere_s:
            self.changed_names[name] = None

    def stones_of(self, name: ConversationId) -> tuple[str, ...]:
        """Ids of the tombstones of this conversation that this node has carried out."""
        return tuple(self.stones.get(name, ()))

    def unheard_stones_of(self, name: ConversationId) -> tuple[str, ...]:
        """Those of them that some node may not have heard of: it has what was forgotten."""
        return tuple(stone for stone in self.stones.get(name, ()) if stone not in self.stones_past)

    def stored_in_host(self, meta: ObjectMeta) -> Stored:
        """Note that an object has been committed to host memory."""
        self.changed(meta.object_id.block_key)
        # Of each object one description is kept, and not one here and one there.
        meta = self.host.meta(meta.object_id) or meta
        stored = self.tree.add(meta)
        assert stored.slot is None, "what host memory has it takes no second time"
        stored.meta, stored.slot = meta, self.host.find(meta.object_id)
        count(self.host_bytes_of, meta.root.fingerprint, meta.nbytes)
        self._count_dirty(stored)
        self.policies.host.added(meta.object_id.block_key, meta.parent_key, meta.nbytes, self.now_s)
        return stored

    def stored_on_disk(self, meta: ObjectMeta) -> Stored:
        """Note that an object is durable on disk."""
        self.changed(meta.object_id.block_key)
        stored = self.tree.add(meta)
        self._count_disk(stored, meta)
        if stored.slot is None:
            stored.meta = meta
        self._count_dirty(stored)
        self.policies.disk.added(meta.object_id.block_key, meta.parent_key, meta.nbytes, self.now_s)
        return stored

    def used(self, objects: Iterable[Stored]) -> None:
        """Note that objects were parked again, or are about to be restored."""
        host_used, disk_used, now_s = self.policies.host.used, self.policies.disk.used, self.now_s
        for stored in objects:
            key = stored.meta.object_id.block_key
            host_used(key, now_s)
            if stored.on_disk is not None:
                disk_used(key, now_s)

    def remove_from_host(self, block: Block, stored: Stored) -> int:
        """Drop the host copy; answers the bytes freed. Raises SlotLeased, also when a plan holds it."""
        if stored.holds:
            raise SlotLeased(f"{stored.meta.object_id} is held by a plan")
        freed = self.host.remove(stored.meta.object_id)
        self.left_host(block, stored)
        return freed

    def left_host(self, block: Block, stored: Stored) -> None:
        """Note that the host copy is gone."""
        self.changed(block.key)
        self.vacated(stored)
        if not block.hosted:
            self.policies.host.removed(block.key)
        if stored.on_disk is not None:
            stored.meta = stored.on_disk
            self._count_dirty(stored)
        else:
            self.forget_object(stored.meta.object_id)

    def vacated(self, stored: Stored) -> None:
        """Its slot is no longer its own; whoever calls sees to what follows from that."""
        stored.slot = None
        self.counters.prefetch_wasted_bytes += self.prefetched.pop(stored.meta.object_id, 0)
        count(self.host_bytes_of, stored.meta.root.fingerprint, -stored.meta.nbytes)

    def removed_from_disk(self, block: Block, stored: Stored) -> None:
        """Note that the disk copy is gone."""
        self.changed(block.key)
        self._count_disk(stored, None)
        self._count_dirty(stored)
        if not block.recorded:
            self.policies.disk.removed(block.key)
            self._left_disk(block)
        if stored.slot is None:
            self.forget_object(stored.meta.object_id)

    def forget_object(self, object_id: ObjectId) -> None:
        """No tier has it any more: out of the tree, and conversations end at what is left."""
        stored = self.tree.stored(object_id)
        if stored is None:
            return
        self.changed(object_id.block_key)
        self._count_disk(stored, None)
        self.dirty_bytes -= stored.dirty_bytes
        self.dropped_bytes += stored.meta.nbytes
        stored.dirty_bytes = 0
        gone = self.tree.drop(object_id)
        for block in gone:
            self.policies.host.removed(block.key)
            self.policies.disk.removed(block.key)
            self._shorten_conversations(block)
        left = self.tree.get(object_id.block_key)
        if left is not None:
            if not left.hosted:
                self.policies.host.removed(left.key)
            if not left.recorded:
                self.policies.disk.removed(left.key)

    def _count_disk(self, stored: Stored, meta: ObjectMeta | None) -> None:
        for copy, sign in ((stored.on_disk, -1), (meta, 1)):
            if copy is not None:
                self.disk_held_bytes += sign * disk_bytes(copy)
                count(self.disk_bytes_of, copy.root.fingerprint, sign * copy.nbytes)
        stored.on_disk = meta

    def _count_dirty(self, stored: Stored) -> None:
        dirty = stored.slot is not None and not stored.durable
        nbytes = room_bytes(stored.meta) if dirty else 0
        self.dirty_bytes += nbytes - stored.dirty_bytes
        stored.dirty_bytes = nbytes

    def codec_of(self, meta: ObjectMeta) -> str:
        """How a conversation of the object, or else its tenant, wants it encoded on disk; '' for no wish."""
        block = self.tree.get(meta.object_id.block_key)
        known = (self.conversations.get(name) for name in sorted(block.names if block is not None else ()))
        wishes = (conversation.codec for conversation in known if conversation is not None)
        return next(filter(None, wishes), "") or self.tenant_codec(meta.root.tenant)

    def tenant_codec(self, tenant: str) -> str:
        """How the tenant wants its blocks encoded on disk; '' for no wish."""
        return self._tenant_codecs.get(tenant, "")

    # --- conversations ----------------------------------------------------------------------------------

    def conversation(self, name: ConversationId) -> Conversation:
        """The conversation of this name; made where there was none."""
        known = self.conversations.get(name)
        if known is None:
            # Its record on disk, if one is left, must not be newer than what comes.
            known = Conversation(*name, version=self.ended.get(name, 0), after=self.stones_of(name))
            self.conversations[name] = known
        return known

    def end_conversation(self, name: ConversationId) -> None:
        """Nothing of it is left, or it is forgotten; its record on disk has to go."""
        known = self.conversations.pop(name, None)
        self.name_changed(name)
        if known is not None and known.recorded:
            self.note_end(name, known.version)

    def note_end(self, name: ConversationId, version: int) -> None:
        """Records of it up to this version have to go."""
        self.ended[name] = max(version, self.ended.get(name, 0))
        self.ended_news[name] = None

    def _shorten_conversations(self, block: Block) -> None:
        """Branches that ended in the block, which is nowhere any more, end in its parent."""
        parent = self.tree.get(block.parent)
        for name in sorted(block.names):
            conversation = self.conversations.get(name)
            for end in conversation.ends if conversation is not None else ():
                if conversation is not None and end.key == block.key:
                    conversation.lost(block.key, _before(end, parent))
                    self.name_changed(name)
                    if not conversation.ends:
                        self.end_conversation(name)

    def _left_disk(self, block: Block) -> None:
        """After power loss, conversations that run through the block end before it.

        Also those that were never asked to be on disk: with what is spilled of them their records are there.
        """
        parent = self.tree.get(block.parent)
        for name in sorted(block.names):
            conversation = self.conversations.get(name)
            for end in conversation.ends if conversation is not None and conversation.recorded else ():
                if conversation is None or end.tokens < block.end:
                    continue
                if end.key == block.key or (self._may_end_on_disk(end) and block in self.tree.chain(end.key)):
                    conversation.left_disk(end, _before(end, parent))
                    self.records_changed[name] = None

    def _may_end_on_disk(self, end: Head) -> bool:
        """Whether the disk has the end itself: if not, whoever reads the record passes over it."""
        last = self.tree.get(end.key)
        return last is not None and last.recorded


def _before(end: Head, parent: Block | None) -> Head | None:
    return None if parent is None else end._replace(key=parent.key, tokens=parent.end)
