"""Conversations that were forgotten, here or at another node: erased wherever they are, and never back.

Each forgetting has a tombstone with a name of its own.  A record that does not name it among those that it
came after is killed by it, whenever and wherever it turns up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvtier.cluster_messages import DIRECTORY, Buried, Bury, Erase, Erased, Graves, Heard, Over, Stone
from kvtier.node.blocks import ConversationId
from kvtier.node.disk_requests import RemoveDone
from kvtier.node.state import NodeState

# Erase everything of a conversation here; the callback is told when that is durable.
EraseHere = Callable[[ConversationId, RemoveDone], None]
# The service asks all nodes at once, and answers before a client has waited for too long.
_MOST_S = 20.0
# A tombstone that is over counts a while longer: reads that began before it may still be under way.
_OVER_S = 120.0


@dataclass(slots=True)
class _Burial:
    until_s: float
    answer: Buried | None = None
    waiting: Callable[[Buried | None], None] | None = None


class Burials:
    """Tombstones of this node, and the forgettings that other nodes have yet to confirm."""

    def __init__(self, state: NodeState) -> None:
        self._state = state
        self._burials: dict[str, _Burial] = {}
        # By id, with the time until which they count; in the order of that.
        self._over: dict[str, tuple[float, Stone]] = {}
        # Who waits for an erasure that runs, by tombstone.
        self._erasing: dict[str, list[str]] = {}
        self.erase_here: EraseHere = lambda name, done: done(False, "nothing erases")

    def bury(self, name: ConversationId) -> str:
        """Begin to forget a conversation everywhere; answers a name for `when_buried`, '' on a node alone."""
        state = self._state
        if not state.settings.ask_elsewhere_s:
            return ""
        stone = Stone(state.next_id(f"{state.settings.node}."), *name, at_s=state.now_s)
        self._keep(stone)
        self._burials[stone.id] = _Burial(state.now_s + _MOST_S)
        state.send(DIRECTORY, Bury(job=stone.id, stone=stone))
        return stone.id

    def when_buried(self, job: str, tell: Callable[[Buried | None], None]) -> None:
        """Tell once the other nodes have been asked; None: that was not known in time."""
        burial = self._burials.get(job)
        if burial is None:
            tell(None)
        elif burial.answer is not None:
            del self._burials[job]
            tell(burial.answer)
        else:
            burial.waiting = tell

    def on_buried(self, peer: str, message: Buried) -> None:
        """All nodes were asked."""
        burial = self._burials.get(message.job)
        if burial is None:
            return
        burial.answer = message
        if burial.waiting is not None:
            del self._burials[message.job]
            burial.waiting(message)

    def tick(self) -> None:
        """Who waits for too long is told so."""
        now_s = self._state.now_s
        while self._over:
            until_s, stone = next(iter(self._over.values()))
            if until_s > now_s:
                break
            del self._over[stone.id]
            self._drop(stone)
        for job, burial in [(j, b) for j, b in self._burials.items() if b.until_s <= now_s]:
            if burial.waiting is not None:
                del self._burials[job]
                burial.waiting(None)

    # --- what others forgot -----------------------------------------------------------------------------

    def on_erase(self, peer: str, message: Erase) -> None:
        """Another node forgot a conversation; answered when it is durable here."""
        state, stone = self._state, message.stone
        name = (stone.tenant, stone.conversation)
        if stone.id in self._erasing:
            self._erasing[stone.id].append(peer)
            return
        if stone.id in state.stones.get(name, ()):
            state.send(peer, Erased(stone=stone))
            return
        self._keep(stone)
        self._erasing[stone.id] = [peer]

        def done(ok: bool, detail: str) -> None:
            if not ok:
                # It is told once more, and then tried once more.
                self._drop(stone)
            for asking in self._erasing.pop(stone.id):
                state.send(asking, Erased(stone=stone, ok=ok))

        self.erase_here(name, done)

    def on_graves(self, peer: str, message: Graves) -> None:
        """What this node had carried out before its start; more may come before it serves."""
        self._state.serves_from_s = self._state.now_s + message.wait_s
        for stone in message.stones:
            self._keep(stone)

    def on_heard(self, peer: str, message: Heard) -> None:
        """Whatever was forgotten while this node was away, it has been told."""
        self._state.serves_from_s = 0.0

    def on_over(self, peer: str, message: Over) -> None:
        """These need not be kept: every node that could bring the conversation back has carried them out."""
        ids = set(message.ids)
        until_s = self._state.now_s + _OVER_S
        for stones in self._state.stones.values():
            for stone in stones.values():
                if stone.id in ids:
                    self._over.setdefault(stone.id, (until_s, stone))

    def _keep(self, stone: Stone) -> None:
        self._state.stones.setdefault((stone.tenant, stone.conversation), {})[stone.id] = stone

    def _drop(self, stone: Stone) -> None:
        name = (stone.tenant, stone.conversation)
        known = self._state.stones.get(name, {})
        known.pop(stone.id, None)
        if not known:
            self._state.stones.pop(name, None)
