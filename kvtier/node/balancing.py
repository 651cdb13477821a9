"""What a node that is full gives to one with room, while both stay: idle conversations that would go next.

Looked for in the order in which the last tier, the disk where there is one, drops what it holds; no more
than what was dropped since the node is full, and what goes soon.  Each is kept by the other node like a
copy, within the bytes that may be given in a second; what is here goes when its room is needed, as it would
have anyhow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice
from math import inf
from typing import NamedTuple

from kvtier.node.blocks import Block, ConversationId
from kvtier.node.conversations import Head
from kvtier.node.replicas import Copied, Replicas, keep_of
from kvtier.node.state import NodeState
from kvtier.policy import balance
from kvtier.policy.interfaces import EvictionPolicy

_LOOK_EVERY_S = 1.0
# Where nobody takes anything, so long a pause; what is not worth its way is looked at again after as long.
_PAUSE_S, _LOOK_AGAIN_S = 10.0, 60.0
# Of the last tier, this share is what goes soon.
_SOON = 1 / 16
# In one look so many ends of chains are passed over that are known, and so many others reckoned.
_ENDS_MOST, _RECKONED_MOST = 512, 8
# Given at once.
_AT_ONCE = 2
# For one of them.
_GIVE_S = 60.0
_KNOWN_MOST = 4096


class LastTier(NamedTuple):
    """What drops a conversation for good. order: in which it does."""

    used_bytes: int
    capacity_bytes: int
    order: EvictionPolicy


def last_tier(state: NodeState) -> LastTier | None:
    """Of this node; None while it is away."""
    if not state.settings.disk_expected:
        return LastTier(state.host.usage().used_bytes, sum(state.arena_bytes), state.policies.host)
    disk = state.disk
    if not disk.ready or disk.said.state != "ready":
        return None
    return LastTier(state.disk_held_bytes, disk.capacity_bytes, state.policies.disk)


class _Idle(NamedTuple):
    name: ConversationId
    head: Head


class Balancing:
    """See the module's text."""

    def __init__(self, state: NodeState, replicas: Replicas) -> None:
        self._state = state
        self._replicas = replicas
        self._todo: deque[_Idle] = deque()
        self._look_s = 0.0
        # When what was given so far has used up its share of time.
        self._paid_s = 0.0
        self._running = 0
        # Since the node is full: what was given, and what had been dropped by then.
        self._given_bytes = 0
        self._dropped_bytes = 0
        # By the key of its end, when to look again at what was given, or is not worth its way.
        self._known: dict[bytes, float] = {}

    def tick(self) -> None:
        """Give the next ones away, as far as they may go by now."""
        state = self._state
        if not (state.settings.rebalance_bytes_per_s and state.settings.ask_elsewhere_s) or state.draining:
            return
        if not (self._todo or self._running) and self._look_s <= state.now_s:
            self._look_s = state.now_s + _LOOK_EVERY_S
            tier = last_tier(state)
            if tier is not None and balance.gives(tier.used_bytes, tier.capacity_bytes):
                self._todo.extend(self._worth_it(tier))
            else:
                self._given_bytes, self._dropped_bytes = 0, state.dropped_bytes
        while self._todo and self._running < _AT_ONCE and self._paid_s <= state.now_s:
            self._give(self._todo.popleft())

    def _worth_it(self, tier: LastTier) -> Iterator[_Idle]:
        state = self._state
        dropped_bytes = state.dropped_bytes - self._dropped_bytes
        may_bytes = tier.capacity_bytes * _SOON + dropped_bytes - self._given_bytes
        reckoned = 0
        for key in islice(tier.order.victims(state.now_s), _ENDS_MOST):
            if may_bytes <= 0 or reckoned >= _RECKONED_MOST:
                return
            block = state.tree.get(key)
            idle = self._end_at(block) if block is not None else None
            if idle is None or self._known.get(key, 0.0) > state.now_s:
                continue
            reckoned += 1
            nbytes, pays = self._reckoned(idle)
            self._know(key, inf if pays else state.now_s + _LOOK_AGAIN_S)
            if pays:
                may_bytes -= nbytes
                yield idle

    def _end_at(self, block: Block) -> _Idle | None:
        """A branch that ends here, and that nobody uses."""
        if any(stored.pins or stored.holds for stored in block.parts.values()):
            return None
        for name in sorted(block.names):
            known = self._state.conversations.get(name)
            for head in known.heads if known is not None else ():
                if head.key == block.key:
                    return _Idle(name, head)
        return None

    def _reckoned(self, idle: _Idle) -> tuple[int, bool]:
        """Its bytes, and whether it is worth its way; it is not where nobody reckons."""
        state = self._state
        worth = state.policies.usage.account(idle.head.key, 0, (0, idle.head.tokens), state.now_s)
        if worth is None or worth.serving or worth.retired:
            return 0, False
        chain = state.tree.chain(idle.head.key)
        if not chain or chain[0].start:
            return 0, False
        nbytes = sum(stored.meta.nbytes for block in chain for stored in block.parts.values())
        move_s = state.policies.restore.line("peer").seconds(nbytes)
        _, within_an_hour, _ = worth.returns
        return nbytes, balance.pays(within_an_hour, worth.recompute_s, move_s)

    def _know(self, key: bytes, again_s: float) -> None:
        self._known.pop(key, None)
        self._known[key] = again_s
        if len(self._known) > _KNOWN_MOST:
            del self._known[next(iter(self._known))]

    def _give(self, idle: _Idle) -> None:
        state = self._state
        known = state.conversations.get(idle.name)
        if known is None or idle.head not in known.heads:
            return
        chain = state.tree.chain(idle.head.key)
        objects = [stored for block in chain for _, stored in sorted(block.parts.items())]
        keep = keep_of(state, idle.name, idle.head, objects, ())
        if not keep.metas or keep.metas[-1].block_key != idle.head.key:
            return
        nbytes = sum(meta.nbytes for meta in keep.metas)
        rate = state.settings.rebalance_bytes_per_s

        def copied(result: Copied) -> None:
            self._running -= 1
            # Of its front, much may have been there already.
            self._paid_s -= (nbytes - result.bytes) / rate
            self._given_bytes += result.bytes - nbytes
            if not result.copies:
                self._know(idle.head.key, state.now_s + _LOOK_AGAIN_S)
                for other in self._todo:
                    self._know(other.head.key, state.now_s + _PAUSE_S)
                self._todo.clear()
                self._look_s = state.now_s + _PAUSE_S

        self._running += 1
        self._given_bytes += nbytes
        self._paid_s = max(self._paid_s, state.now_s) + nbytes / rate
        self._replicas.start(keep, 1, state.now_s + _GIVE_S, copied, apart=False, spare=True)
