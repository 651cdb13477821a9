"""What a node on its way out of service gives to others: what it has in memory, the most worth first.

One conversation after the other is kept by another node, which reads what it lacks of it; within the bytes
that may be given away in a second.  What stays is on this node's disk, or lost, as drains always were.
"""

from __future__ import annotations

from collections import deque

from kvtier.node.blocks import ConversationId
from kvtier.node.conversations import Head
from kvtier.node.replicas import Copied, Replicas, keep_of
from kvtier.node.state import NodeState

# Conversations under way at once.
_AT_ONCE = 4
# For one of them, unless the drain ends before.
_MOST_S = 60.0
# So many in a row that nobody took, and nobody else is asked.
_REFUSALS_MOST = 3


class Moving:
    """See the module's text. over: there is nothing more to give, or nobody who takes it."""

    def __init__(self, state: NodeState, replicas: Replicas) -> None:
        self._state = state
        self._replicas = replicas
        self._todo: deque[tuple[ConversationId, Head]] = deque()
        self._began_s = 0.0
        self._asked_bytes = 0
        self._running = 0
        self._refusals = 0
        self._moved: set[bytes] = set()
        self.moved_bytes = 0

    @property
    def over(self) -> bool:
        """Whether it will give nothing more."""
        return not (self._todo or self._running)

    def begin(self) -> None:
        """Look through what memory holds, and begin."""
        state = self._state
        self._began_s = state.now_s
        if not (state.settings.move_bytes_per_s and state.settings.ask_elsewhere_s):
            return
        ends: dict[bytes, list[tuple[ConversationId, Head]]] = {}
        for conversation in state.conversations.values():
            for head in conversation.heads:
                ends.setdefault(head.key, []).append((conversation.id, head))
        least_first = [one for key in state.policies.host.victims(state.now_s) for one in ends.get(key, ())]
        self._todo.extend(reversed(least_first))

    def tick(self, left_s: float) -> None:
        """Give the next ones away, as far as they may go by now. left_s: until the node ends, as is known."""
        state = self._state
        may_bytes = state.settings.move_bytes_per_s * (state.now_s - self._began_s)
        while self._todo and self._running < _AT_ONCE and self._asked_bytes <= may_bytes:
            self._give(*self._todo.popleft(), min(left_s, _MOST_S))

    def lost_bytes(self) -> int:
        """Of what only memory holds here, what no other node has taken."""
        state = self._state
        blocks = (state.tree.get(key) for key in self._moved)
        safe = sum(s.dirty_bytes for block in blocks if block is not None for s in block.parts.values())
        return state.dirty_bytes - safe

    def _give(self, name: ConversationId, head: Head, most_s: float) -> None:
        state = self._state
        known = state.conversations.get(name)
        chain = state.tree.chain(head.key)
        if known is None or not chain or head not in known.heads:
            return
        objects = [stored for block in chain for _, stored in sorted(block.parts.items())]
        keep = keep_of(state, name, head, objects, ())
        if not keep.metas or keep.metas[-1].block_key != head.key:
            return
        nbytes = sum(meta.nbytes for meta in keep.metas)

        def copied(result: Copied) -> None:
            self._running -= 1
            # Of its front, much may have been there already.
            self._asked_bytes += result.bytes - nbytes
            self.moved_bytes += result.bytes
            if result.copies:
                self._refusals = 0
                self._moved.update(block.key for block in chain)
                return
            self._refusals += 1
            if self._refusals >= _REFUSALS_MOST:
                self._todo.clear()

        self._running += 1
        self._asked_bytes += nbytes
        self._replicas.start(keep, 1, state.now_s + most_s, copied, apart=False)
