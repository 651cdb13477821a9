"""What is written to disk although nobody asked: victims of host memory, many of them with one flush.

Ahead of need, so that evicting them later costs no write; or when room is needed and nothing else can go.
They stay in host memory, as clean copies, until their room is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kvtier.node.blocks import Block, Stored
from kvtier.node.conversations import Conversation
from kvtier.node.disk_requests import Purpose, Written
from kvtier.node.disk_side import DiskSide
from kvtier.node.state import NodeState, disk_bytes, room_bytes
from kvtier.objects import ObjectId
from kvtier.states import State

# Writes under way at once: while one is flushed, the next one's data goes out.
_AT_ONCE = 2
# No write holds more of host memory than this share of it.
_SHARE = 8
# Blocks looked at for one write, before the chain that is at hand ends; clean ones among them are skipped.
_LOOK_AT = 4096
# When there was nothing to write although there should be, nobody looks again for this long.
_LOOK_AGAIN_S = 0.1
# After a refusal nothing is asked again for this long, and what would be written is dropped.
_PAUSE_S = 1.0


class Spills:
    """Decides what goes to disk, in the policy's order, and keeps the writes few and bounded."""

    def __init__(self, state: NodeState, disk: DiskSide) -> None:
        self._state = state
        self._disk = disk
        self._pause_until_s = 0.0
        self._look_again_s = 0.0
        # Of a node that drains: who is still to be looked at, the next one last.
        self._to_drain: list[bytes] = []

    def possible(self) -> bool:
        """Whether the disk takes what host memory wants to be rid of."""
        return self._disk.usable() and self._state.now_s >= self._pause_until_s

    def wanted(self, block: Block, stored: Stored) -> bool:
        """Whether the object is to be written before its host copy goes; if not, it may be dropped."""
        if stored.durable:
            return False
        if not self.possible():
            # Other nodes count on what is kept: it waits for a disk that may be back soon.
            return block.kept and self._disk.returns()
        if disk_bytes(stored.meta) > self._disk.wear_left_bytes():
            return False
        if self._state.draining or block.kept:
            # Memory is about to go as a whole, or other nodes count on it: it is not a question of worth.
            return True
        return self._state.policies.admission.demote(block.key, stored.meta.nbytes, self._state.now_s)

    def ahead(self) -> None:
        """Write the next victims while too much of host memory is in no other tier."""
        state = self._state
        limit = 0.0 if state.draining else state.settings.spill_above * sum(state.arena_bytes)
        if state.dirty_bytes <= limit or not self.possible():
            return
        spilling = self._disk.spilling()
        if state.dirty_bytes - sum(spilling) <= limit or len(spilling) >= _AT_ONCE:
            return
        if state.now_s >= self._look_again_s and not self._write(self._next_victims(), "ahead"):
            self._look_again_s = state.now_s + _LOOK_AGAIN_S

    def for_room(self, victims: Iterable[Block], nbytes: int) -> bool:
        """Write these, so that an object of nbytes finds room when that is done; False: nothing goes out."""
        if not self.possible():
            return False
        return sum(self._disk.spilling()) >= nbytes or self._write(victims, "spill")

    # --- what goes together -----------------------------------------------------------------------------

    def _next_victims(self) -> Iterator[Block]:
        keys = self._state.policies.host.victims(self._state.now_s)
        for key in self._most_worth_first() if self._state.draining else keys:
            block = self._state.tree.get(key)
            if block is not None:
                yield block

    def _most_worth_first(self) -> Iterator[bytes]:
        """For a node that drains: time may not suffice for all. One walk of the order does for all writes."""
        if not self._to_drain:
            self._to_drain = list(self._state.policies.host.victims(self._state.now_s))
        while self._to_drain:
            yield self._to_drain[-1]
            # Not before the next one is asked for: a write may be full in the middle of this one's chain.
            self._to_drain.pop()

    def _write(self, victims: Iterable[Block], purpose: Purpose) -> bool:
        """One write of what is dirty of these blocks, and of the chains that they end; was there any?"""
        state = self._state
        most = min(state.settings.spill_batch_bytes, sum(state.arena_bytes) // _SHARE)
        wear_left = self._disk.wear_left_bytes()
        taken: dict[ObjectId, Stored] = {}
        nbytes = on_disk = 0
        for block, stored in self._dirty(victims):
            if stored.meta.object_id in taken or not self.wanted(block, stored):
                continue
            nbytes += room_bytes(stored.meta)
            on_disk += disk_bytes(stored.meta)
            if taken and (nbytes > most or on_disk > wear_left):
                break
            taken[stored.meta.object_id] = stored
        if taken:
            self._disk.write(list(taken.values()), self._records(taken), purpose, self._written)
        return bool(taken)

    def _records(self, objects: Iterable[ObjectId]) -> list[Conversation]:
        """With them, what is spilled has its conversation's name after a restart too."""
        state = self._state
        blocks = {object_id.block_key: state.tree.get(object_id.block_key) for object_id in objects}
        names = sorted({name for block in blocks.values() if block is not None for name in block.names})
        return [state.conversations[name] for name in names if name in state.conversations]

    def _dirty(self, victims: Iterable[Block]) -> Iterator[tuple[Block, Stored]]:
        """Objects that no copy uses and no write has; a chain from its end, since so it will be evicted."""
        seen: set[bytes] = set()
        for victim in victims:
            block: Block | None = victim
            while block is not None and block.key not in seen:
                seen.add(block.key)
                for stored in block.parts.values():
                    if stored.dirty_bytes and self._is_free(stored):
                        yield block, stored
                block = self._state.tree.get(block.parent)
            if len(seen) >= _LOOK_AT:
                return

    def _is_free(self, stored: Stored) -> bool:
        """Whether nobody uses it. What a park still holds has no name yet that could go with it."""
        slot = stored.slot
        if slot is None or stored.writing or stored.pins or stored.holds:
            return False
        return self._state.host.state(slot) is State.PRESENT

    def _written(self, result: Written) -> None:
        # A disk that is not there is waited for anyhow, and takes what comes as soon as it is back.
        if not result.ok and result.reason != "no_disk":
            self._pause_until_s = self._state.now_s + _PAUSE_S
